"""Contexts in the plan: models that teach themselves, keys, costs that equal the metered ones, and mistakes found before anything runs."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from tests.e2e.inprocess import run_here
from tests.unit.plan.test_plan import model, plan
from tests.unit.plan.test_plan_edges import MODELS, stages

from tadistill.config import validate
from tadistill.errors import DataError
from tadistill.plan import preview
from tadistill.plan.arms import make_plan
from tadistill.plan.inputs import FromStage
from tadistill.plan.task import resources_of
from tadistill.store import Store

SELF = {
    "path": "s > s",
    "context": "{output} {prompt}",
    "sampler": {"type": "student", "max_new_tokens": 8},
    "objective": {"type": "reverse_kl"},
}


def test_a_model_teaches_itself_as_it_was_before():
    found = plan(seeds=[1], arms={"once": SELF, "twice": SELF | {"path": "s > s > s"}, "chain": SELF | {"path": "xl > s > s"}})
    (only,) = stages(found, "once")
    (sft,) = (s for s in stages(found, "once", "sft") if s.model == "s")
    assert only.spec.teacher == only.spec.student == FromStage(stage=sft.key)
    assert only.label.endswith("reverse_kl on student, with a context, 16 updates, seed 1")
    first, second = stages(found, "twice")
    assert second.spec.teacher == second.spec.student == FromStage(stage=first.key)
    assert first.steps == second.steps == only.steps / 2
    above, itself = stages(found, "chain")
    assert (above.spec.teacher == itself.spec.teacher, itself.spec.teacher) == (False, FromStage(stage=above.key))


def test_what_reads_a_context_has_it_in_its_key():
    def keys(**context):
        text = {"sampler": {"type": "student", "recorded": True, "max_new_tokens": 8}}
        found = plan(seeds=[1], arms={"a": {"path": "xl > s", "objective": {"type": "reverse_kl"}} | text | context})
        return {s.kind: s.key for s in found.stages.values() if s.kind in ("generate", "signal", "distill", "evaluate")}, found

    none, one, other, again = (keys(**({"context": c} if c else {})) for c in (None, "{prompt}", "{output}", "{prompt}"))
    assert one[0] == again[0]
    for kind in ("generate", "signal", "distill"):
        assert len({none[0][kind], one[0][kind], other[0][kind]}) == 3, kind
    (sft,) = {s.key for s in none[1].stages.values() if s.kind == "sft" and s.model == "s"}
    assert sft in one[1].stages  # the model itself is the same


def test_a_context_of_the_recipe_leaves_out_arms_without_a_teacher():
    method, own = {"objective": {"type": "reverse_kl"}, "optim": {"steps": 16, "batch": 16}}, {"context": "{output} {prompt}"}
    tuned = {"path": "s", "objective": {"type": "cross_entropy"}}
    found = plan(seeds=[1], method=method | own, arms={"a": "xl > s", "sft": tuned})
    (distilled,), tunings = stages(found, "a"), stages(found, "sft", "sft")
    assert distilled.spec.data.context
    assert tunings
    assert not any(s.spec.data.context for s in tunings)
    assert stages(plan(seeds=[1], method=method, arms={"a": {"path": "xl > s"} | own}), "a")[0].key == distilled.key


def test_the_plan_shows_the_rows_that_a_context_leaves_out(tmp_path):
    found = plan(arms={"a": SELF | {"context": {"template": "{output} {prompt}", "max_prompt": 15}}})
    console = Console(file=io.StringIO(), width=400)
    preview.print_plan(found, Store(tmp_path), console)
    text = console.file.getvalue()
    assert "s > s, context" in text
    assert "with the `context` of s" in text
    assert "left out, because the teacher's prompt is longer than context.max_prompt (15)" in text


@pytest.mark.slow
def test_a_long_context_needs_memory():
    def peak(**context):
        arm = {"path": "xl > s", "objective": {"type": "reverse_kl"}, "sampler": {"type": "dataset"}, "select": {"metric": "last"}}
        return stages(plan(seeds=[1], arms={"a": arm | context}), "a")[0].cost.memory.peak(cuda=True)

    short, long = (peak(context={"template": "{prompt}" * n, "max_prompt": 10**5}) for n in (1, 400))
    assert peak() == short < 0.5 * long


def shaped(width: int) -> dict:
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"load": "scratch:llama", "tokenizer": "tinyworld", "config": shape | {"num_key_value_heads": 2, "max_position_embeddings": 64}}


ARMS = {
    "fixed": {"sampler": {"type": "dataset"}},
    "packed": {"sampler": {"type": "dataset"}, "optim": {"tokens": 60, "packed": True}},
    "recorded": {"sampler": {"type": "dataset", "signal": {"type": "hidden"}}},
    "rounds": {"sampler": {"type": "student", "max_new_tokens": 4, "rollouts": 16, "inner_epochs": 2}},
    "average": {"path": "s > s", "ema": 0.9, "sampler": {"type": "dataset"}},
    "adapters": {"path": "a > a", "ema": 0.9, "sampler": {"type": "dataset"}},
}


@pytest.mark.slow
def test_predicted_flops_are_those_that_are_metered(tmp_path):
    """All rows have equal lengths, so no average is in the way: the teacher's longer sequences are counted, and only they."""
    row = {"instruction": "who sold the peas ?", "output": "renor sold it .", "hint": "in birchham renor sold the peas"}
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 16)
    data = {"train": {"load": str(file), "extra": ["hint"]}, "dev": "tinyworld", "test": ["tinyworld"], "limit": {"test": 2}}
    recipe = {
        "study": "t",
        "seeds": [1],
        "models": {"t": shaped(32), "s": shaped(16), "a": shaped(16) | {"lora": {"r": 4}}},
        "analyse": False,
        "data": data | {"template": "plain"},
        "method": {"objective": {"type": "reverse_kl"}, "optim": {"steps": 2, "batch": 8}, "select": {"metric": "last"}},
        "evaluate": {"also": {}, "max_new_tokens": 4},
    }
    recipe["method"]["context"] = "{hint} {output} {prompt}"
    recipe["arms"] = {name: {"path": "t > s"} | arm for name, arm in ARMS.items()}
    found, store = make_plan(validate(recipe)), Store(tmp_path / "store")
    trained = {s.key: s for s in found.stages.values() if not s.spec.measures}
    run_here(replace(found, stages=trained), store, jobs=1, console=Console(quiet=True))
    trained = [stage for stage in found.stages.values() if stage.kind == "distill"]
    assert len(trained) == len(ARMS)
    for stage in trained:
        metered = {name: part["flops"] for name, part in store.manifest(stage.key)["ledger"]["parts"].items()}
        predicted = {name: part.flops for name, part in stage.cost.parts.items()}
        assert predicted == pytest.approx(metered, rel=0.01), stage.label


def test_a_moving_average_begins_with_the_weights_of_its_student():
    """In the second phase too. It costs the FLOPs of a fixed teacher, and the memory of float32 weights or of adapters alone."""
    phases = [{"share": 0.5}, {"share": 0.5, "ema": 0.5}]
    arms = {"fixed": SELF, "ema": SELF | {"ema": 0.9}, "phased": SELF | {"phases": phases}}
    half, lora = {"optim": {"precision": "bf16"}}, model(16, lora={"r": 2})
    found = plan(seeds=[1], models={"xl": model(64), "s": model(16), "a": lora}, arms=arms | {
        "half": SELF | half, "half ema": SELF | half | {"ema": 0.9}, "adapters": SELF | {"path": "a > a", "ema": 0.9},
        "xl": "xl > s",
    })  # fmt: skip
    (fixed,), (ema,), (first, second) = (stages(found, name) for name in ("fixed", "ema", "phased"))
    assert ema.spec.teacher == ema.spec.student == fixed.spec.teacher
    assert second.spec.teacher == second.spec.student == FromStage(stage=first.key)
    assert ema.label.endswith("reverse_kl on student, with a context, EMA 0.9, 16 updates, seed 1")
    out = io.StringIO()
    whole = {"optim": {"steps": 16, "batch": 16}, "ema": 0.9} | {key: SELF[key] for key in ("context", "sampler", "objective")}
    preview.print_plan(plan(method=whole, arms={"ema": "s > s", "alone": "s"}), Store(io.__file__), Console(file=out, width=200))
    assert re.findall(r"^ (ema|alone) +(.*?)  ", out.getvalue(), re.MULTILINE) == [("ema", "s > s, context, EMA 0.9"), ("alone", "s")]
    assert (ema.flops, ema.key == fixed.key) == (fixed.flops, False)
    (half,), (other,), (adapters,) = (stages(found, name) for name in ("half", "half ema", "adapters"))
    assert ema.cost.memory.frozen == fixed.cost.memory.frozen == other.cost.memory.frozen == 2 * half.cost.memory.frozen
    assert adapters.cost.memory.frozen == adapters.cost.memory.gradients < 0.2 * ema.cost.memory.frozen


def test_an_average_lies_where_its_student_does():
    def where(**given):
        found = plan(seeds=[1], resources={"distill": {"processes": 2, **given}}, arms={"a": SELF | {"ema": 0.9}})
        return resources_of(found.recipe, stages(found, "a")[0]).teacher

    assert (where(), where(parallel="fsdp"), where(teacher="offloaded")) == ("replicated", "sharded", "replicated")


def test_an_older_checkpoint_may_teach_without_a_context():
    models = MODELS | {"s": model(16, sft={"optim": {"steps": 10}, "keep": [4]}), "early": {"checkpoint": {"of": "s", "step": 4}}}
    found = plan(
        seeds=[1], models=models, arms={"a": {"path": "early > s", "objective": {"type": "reverse_kl"}, "sampler": {"type": "student"}}}
    )
    (only,) = stages(found, "a")
    assert (only.spec.teacher, only.spec.student.checkpoint) == (only.spec.student.model_copy(update={"checkpoint": 4}), None)


def test_a_model_that_teaches_itself_has_a_control_without_a_teacher():
    found = plan(seeds=[1], arms={"a": SELF | {"ema": 0.9}, "b": {"control": "no_teacher of a"}})
    (control,) = stages(found, "b")
    assert (control.spec.objective.type, control.spec.data.context, control.spec.ema) == ("no_teacher", None, None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"arms": {"a": "s > s"}},
            "arms.a: in `s > s`, s teaches itself, so there is nothing to learn; give the teacher a prompt of its own",
        ),
        ({"arms": {"a": {"path": "xl > s > s"}}}, "in `xl > s > s`, s teaches itself"),
        (
            {"arms": {"a": SELF | {"path": "xl > s", "ema": 0.9}}},
            "arms.a: with `ema`, .* in `xl > s`, xl teaches s; write `s > s`, or remove `ema`",
        ),
        (
            {"arms": {"a": SELF | {"context": None, "ema": 0.9}}},
            "arms.a: with `ema`, student and teacher begin .* \\(`context`\\), such as",
        ),
        ({"arms": {"a": SELF | {"path": "xl > s", "context": None, "ema": 0.9}}}, "arms.a: with `ema`, .* in `xl > s`, xl teaches s"),
        (
            {"arms": {"a": SELF | {"context": "{prompt}"}}},
            "s teaches itself, and the teacher's `context` is exactly the student's prompt, so there is",
        ),
        (
            {"arms": {"a": SELF | {"ema": 0.9, "sampler": {"type": "dataset", "signal": {"type": "hidden"}}}}},
            "sampler.signal `hidden` records the teacher's outputs before training, but with `ema`",
        ),
        (
            {"arms": {"a": SELF | {"ema": 0.9, "sampler": {"type": "teacher"}}}},
            "sampler `teacher` uses text of the teacher, but with `ema`",
        ),
        (
            {"arms": {"a": SELF | {"ema": 0.9, "sampler": {"type": "student", "rollouts": 32, "inner_epochs": 2}}}},
            "its outputs are kept for a round of 4 updates; set `sampler.inner_epochs` to 1 and `sampler.rollouts` to `optim.batch`",
        ),
        (
            {"arms": {"a": SELF | {"ema": 0.9, "objective": {"type": "cross_entropy"}, "sampler": {"type": "dataset"}}}},
            "objective `cross_entropy` uses no teacher",
        ),
        ({"arms": {"a": SELF | {"ema": 1.0}}}, "`arms.a.ema` is 1.0: write a number less than 1"),
        (
            {"arms": {"a": SELF | {"path": "xl > l > s", "ema": 0.9, "dense": {}}}},
            "`dense` has several teachers, but `ema` makes the student its only teacher",
        ),
        (
            {"method": {"ema": 0.9, "optim": {"steps": 16, "batch": 16}}, "arms": {"a": SELF, "b": {"control": "random_teacher of a"}}},
            "arms.b is a control \\(`random_teacher of a`\\), whose teacher must not change, but with `ema`",
        ),
        (
            {"arms": {"a": SELF | {"sampler": {"type": "teacher_mixed", "rollouts": 32}}}},
            "sampler `teacher_mixed` lets student and teacher sample one text together, but .*; set `sampler.alpha: 0`",
        ),
        ({"arms": {"a": SELF | {"sampler": {"type": "speculative"}}}}, "sampler `speculative` lets .*; use `sampler: {type: student}`"),
        (
            {"arms": {"a": SELF | {"select": {"metric": "reverse_kl"}}}},
            "select.metric `reverse_kl` compares .* set `select.metric` to `loss`",
        ),
        (
            {
                "arms": {
                    "a": {"path": "xl > s", "objective": {"type": "cross_entropy"}, "sampler": {"type": "dataset"}, "context": "{output}"}
                }
            },
            "objective `cross_entropy` uses no teacher, so `context` has no effect",
        ),
        ({"arms": {"a": {"path": "s", "context": "{output}"}, "b": "xl > s"}}, "arms.a trains no model, so its settings have no effect"),
        ({"models": MODELS, "arms": {"a": SELF | {"context": {"chat": True}}}}, "a `context` has `chat` or `system`, but the tokenizer of"),
    ],
)
def test_mistakes(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(**changes)


def test_a_placeholder_that_no_row_has():
    with pytest.raises(DataError, match=r"row 1: context.template names `\{document\}`, but the row has only .*; correct the template"):
        plan(arms={"a": SELF | {"context": "{document}"}})
