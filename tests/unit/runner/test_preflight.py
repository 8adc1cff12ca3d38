"""What is found before a study: architectures, rows left out, other scripts, too little memory. What a sentence advises helps."""

import json
import re

import pytest

from tadistill.config import validate
from tadistill.data.encoding_rules import Counts
from tadistill.errors import DataError, ModelError
from tadistill.models.flops_and_memory import TOKENIZER_BYTES
from tadistill.plan.arms import make_plan
from tadistill.plan.costs import Ledger
from tadistill.plan.task import host_bytes, process_bytes
from tadistill.runner import data_checks, preflight
from tadistill.terminal import Terminal


def check_study(recipe, *given):
    return preflight.check_study(make_plan(recipe), *given)


def recipe(jobs: int = 1, precision: str = "fp32"):
    def model(width: int) -> dict:
        config = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
        return {"load": "scratch:llama", "tokenizer": "tinyworld", "config": config | {"num_key_value_heads": 2}}

    return validate({
        "study": "memory",
        "seeds": [1, 2],
        "models": {"l": model(256), "s": model(16)},
        "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "template": "plain", "world": {"people": 20}}
        | {"limit": {"train": 64, "dev": 4, "test": 4}},
        "method": {"optim": {"steps": 4, "batch": 8, "precision": precision}, "objective": {"type": "forward_kl"}},
        "evaluate": {"batch": 1, "max_new_tokens": 1},
        "arms": {"direct": "l > s"},
        "runtime": {"jobs": jobs},
    })  # fmt: skip


def test_an_architecture_that_cannot_be_distilled_is_refused_before_work(tmp_path):
    """Its config.json is enough; the file of weights is whole, but holds none."""
    with pytest.raises(ModelError, match=r"models\.s: model `.*` is of type bert, which reads text in both directions"):
        check_study(with_student(tmp_path, {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}))


def test_a_model_that_cannot_be_built_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "check_model", lambda *_: pytest.fail("this downloads the weights"))
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ModelError, match=r"models\.s: config.json of model `.*`: hidden_act is `silux`, .*did you mean `silu`"):
        check_study(with_student(tmp_path, config | {"num_key_value_heads": 2, "vocab_size": 64, "hidden_act": "silux"}))


def with_student(tmp_path, config: dict):
    """The recipe with a student in a folder."""
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    changed = recipe()
    student = changed.models["s"].model_copy(update={"load": str(tmp_path), "config": {}})
    return changed.model_copy(update={"models": changed.models | {"s": student}})


PRUNED = {"init": {"from": "l", "layers": [0, 2, 3]}}


@pytest.mark.parametrize("pruned", [{"s": PRUNED}, {"m": PRUNED, "s": {"init": {"from": "m", "layers": 2}}}])
def test_pruning_that_a_family_does_not_allow_is_refused_before_work(pruned):
    """Also that of a model from which another one is pruned."""
    of = recipe().model_dump(mode="json", by_alias=True, exclude_unset=True)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    of["models"] |= pruned | {"l": of["models"]["l"] | {"load": "scratch:diffllama", "config": small, "seed": 1}}
    with pytest.raises(ModelError, match=r"this diffllama model cannot be pruned to these layers.*self_attn\.lambda_init"):
        check_study(validate(of))


def short(**settings):
    """The recipe with short prompts, so that evaluations need less memory than trainings."""
    found = recipe(**settings)
    return found.model_copy(update={"data": found.data.model_copy(update={"max_prompt": 24})})


def need(of) -> float:
    """Bytes of the largest stage."""
    plan = make_plan(of)
    return max(host_bytes(plan, stage, cuda=False) for stage in plan.stages.values())


def test_bf16_halves_a_frozen_teacher(monkeypatch):
    full, half = need(short()), need(short(precision="bf16"))
    assert half < full
    monkeypatch.setattr(preflight, "available_memory", lambda: (full + half) / 2)
    with pytest.raises(ModelError, match=r"need .* GB of memory \(distill l -> s.*optim.precision to bf16"):
        check_study(short())
    assert check_study(short(precision="bf16")) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_each_model_of_a_process_has_a_tokenizer_in_host_memory(processes):
    """No plan counted it: the tokenizers of two models with 262,144 tokens need 0.7 GB."""
    of = recipe().model_dump(mode="json", by_alias=True, exclude_unset=True)
    plan = make_plan(validate(of | {"resources": {"default": {"processes": processes}}}))
    vocab = Ledger(plan.recipe).config("s")["vocab_size"]
    for stage in plan.stages.values():
        count = 2 if stage.kind in ("distill", "analyse") else 1
        alone = process_bytes(plan, stage, cuda=False)
        times = processes if stage.spec.trains else 1
        assert host_bytes(plan, stage, cuda=False) == times * (alone + count * TOKENIZER_BYTES * vocab)
        assert host_bytes(plan, stage, cuda=True) > times * count * TOKENIZER_BYTES * vocab


def test_stages_at_the_same_time_are_counted_together(monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda: 1.5 * need(short()))
    with pytest.raises(
        ModelError, match=r"\(distill l -> s, .*seed 1 .* \+ distill l -> s, .*seed 2 .*\), but .* set runtime.jobs=1 \(now 2\)"
    ):
        check_study(short(jobs=2))
    assert check_study(short(jobs=1)) == 1


def test_stages_that_wait_for_each_other_are_not():
    plan = make_plan(recipe())
    needs = dict.fromkeys(plan.stages, 1)
    group = preflight._largest_group(plan, needs, 99)
    for key in group:
        assert not set(plan.stages[key].parents.values()) & set(group)
    assert len(group) < len(plan.stages)


# --- rows ---------------------------------------------------------------------------------------------------------------


def said(of) -> str:
    console = Terminal(width=400)
    with console.capture() as capture:
        check_study(of, console)
    return capture.get()


def of_rows(tmp_path, *rows: dict, **changes):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    content = recipe().model_dump(mode="json", by_alias=True, exclude_unset=True)
    content["data"] |= {"train": str(path), "dev": str(path), "test": [str(path)]} | changes
    return validate(content)


def test_rows_left_out_are_counted_before_anything_runs(tmp_path):
    rows = [{"instruction": "name " * n, "output": "cat"} for n in (3, 30, 3, 40)]
    text = said(of_rows(tmp_path, *rows, max_prompt=16))
    for role in ("train", "dev", "test"):
        assert f"own ({role}): 2 of 4 rows; 2 longer than data.max_prompt (16)" in text
    text = said(of_rows(tmp_path, *rows, max_prompt=16, long_prompts="cut"))
    assert "own (test): 4 of 4 rows; 2 with a prompt cut at data.max_prompt (16)" in text
    assert said(of_rows(tmp_path, *rows)) == ""


def test_words_that_the_tokenizer_does_not_know_are_counted(tmp_path):
    text = said(of_rows(tmp_path, {"instruction": "name это слово", "output": "cat"}))
    for role in ("train", "test"):
        assert re.search(rf"own \({role}\): 2 of \d+ tokens of the prompts are unknown to the tokenizer", text)


def test_models_that_keep_different_rows_are_named():
    def read(*kept: int) -> data_checks.Read:
        counts = Counts(rows=4, long=4 - len(kept), limit=8, max_length=16)
        return data_checks.Read(5, {("test", "own"): counts}, {"own": frozenset(kept)})

    found = data_checks.rows_notes({"a": read(0, 1, 2), "b": read(1, 2, 3)})
    assert found[-1] == "own (test): the models are compared on the 2 rows that are short enough for all of them"
    assert data_checks.rows_notes({"a": read(0, 1, 2, 3), "b": read(0, 1, 2, 3)}) == []
    with pytest.raises(DataError, match=r"no row of data set `own` .test. is short enough for all of the models a, b"):
        data_checks.rows_notes({"a": read(0), "b": read(1)})


def test_references_that_rouge_cannot_read_are_named(tmp_path):
    of = of_rows(tmp_path, {"instruction": "say", "output": "красное"}, {"instruction": "say", "output": "cat"})
    assert "own (test): ROUGE-L ignores 50 % of the letters" in said(of)
    assert "(dev)" not in said(of)  # the loss selects
    content = of.model_dump(mode="json", by_alias=True, exclude_unset=True)
    content["method"]["select"] = {"metric": "rouge_l"}
    text = said(validate(content))
    assert "own (dev): ROUGE-L ignores 50 % of the letters and symbols of the references, because they are not ASCII; set" in text
