"""The graph of stages: sharing, keys, equal compute, and mistakes found before anything runs."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from tadistill.config import DataRef, validate
from tadistill.data import tinyworld
from tadistill.data.survey import seen_prompts
from tadistill.errors import ConfigError, DataError
from tadistill.glossary import GLOSSARY
from tadistill.models.flops_and_memory import weight_bytes
from tadistill.plan import preview
from tadistill.plan.arms import make_plan
from tadistill.plan.costs import Ledger, sizes_and_lengths
from tadistill.plan.inputs import HashedData
from tadistill.plan.notes import ASKED, plan_notes, row_notes, seen_notes
from tadistill.plan.task import layout, planned_memory, process_bytes
from tadistill.runner.run_study import describe
from tadistill.store import Store

LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}


def model(width: int, **more) -> dict:
    config = LLAMA | {"hidden_size": width, "intermediate_size": 2 * width}
    return {"load": "scratch:llama", "tokenizer": "tinyworld", "config": config, "sft": {"optim": {"steps": 10}}, **more}


def recipe(**changes) -> dict:
    base = {
        "study": "t",
        "seeds": [1, 2],
        "models": {"xl": model(64, seed=1), "l": model(32), "s": model(16)},
        "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "template": "plain"},
        "method": {
            "objective": {"type": "minillm", "pt_weight": 0},
            "sampler": {"type": "teacher_mixed", "rollouts": 64},
            "optim": {"steps": 16, "batch": 16},
        },
        "arms": {"direct": "xl > s", "takd": "xl > l > s"},
    }
    return base | changes


def plan(**changes):
    return make_plan(validate(recipe(**changes)))


def kinds(found) -> dict[str, int]:
    every = [s.kind for s in found.stages.values()]
    return {k: every.count(k) for k in every}


def test_shared_prefixes_are_one_stage():
    found = plan()
    # sft: xl once (fixed seed), l and s per seed; distill per seed: xl->s, xl->l, l->s
    # measured per arm and seed: the main decoding, greedy and t0.5, and beside the teacher; the teacher's own answers once
    assert kinds(found) == {"sft": 5, "distill": 6, "evaluate": 13, "analyse": 4}
    order = list(found.stages)
    for key, stage in found.stages.items():
        assert all(order.index(p) < order.index(key) for p in stage.parents.values())


def test_keys_are_stable_and_follow_the_content():
    before = plan()
    assert list(plan().stages) == list(before.stages)
    changed = plan(arms={"direct": "xl > s", "takd": {"path": "xl > l > s", "optim": {"lr": 0.1}}})
    kept = set(before.stages) & set(changed.stages)
    assert {before.stages[k].label for k in set(before.stages) - kept} == {
        s.label for s in before.stages.values() if "takd" in s.arms and "direct" not in s.arms and s.kind != "sft"
    }


def test_runtime_settings_do_not_change_keys():
    assert list(plan(runtime={"jobs": 1, "checkpoint_seconds": 5}).stages) == list(plan().stages)


def test_a_seed_adds_only_its_own_stages():
    assert set(plan().stages) < set(plan(seeds=[1, 2, 3]).stages)


def test_equal_compute_matches_and_looks_as_often():
    arms = {"direct": "xl > s", "takd": "xl > l > s", "twin": {"path": "xl > s", "compute": "as takd"}}
    method = recipe()["method"] | {"select": {"metric": "loss", "every": 4}, "optim": {"steps": 160, "batch": 16}}
    found = {a.name: a for a in plan(arms=arms, method=method).arms}
    assert found["twin"].flops == pytest.approx(found["takd"].flops, rel=0.05)
    twin, direct = found["twin"].method, found["direct"].method
    assert twin.optim.steps > direct.optim.steps
    assert twin.optim.steps % 16 == 0  # whole rounds: 64 / 16 updates x 4 epochs
    assert abs(twin.optim.steps // twin.select.every - direct.optim.steps // direct.select.every) <= 1


def test_patience_is_part_of_a_key_only_when_it_is_set():
    method = recipe()["method"]
    early = plan(method=method | {"select": {"every": 4, "patience": 2}})
    late = plan(method=method | {"select": {"every": 4}})
    assert {s.kind for key, s in early.stages.items() if key not in late.stages} == {"distill", "evaluate", "analyse"}
    for key, stage in late.stages.items():
        assert "patience" not in json.dumps(stage.spec.content()), key


def test_a_plan_says_how_often_arms_with_a_budget_are_measured(tmp_path):
    method = recipe()["method"] | {"select": {"every": 5}}
    found = plan(method=method, arms={"direct": "xl > s", "takd": "xl > l > s", "twin": {"path": "xl > s", "compute": "as takd"}})
    every = next(arm.method.select.every for arm in found.arms if arm.name == "twin")
    assert every > 5
    said = f"Dev is measured every {every} updates for twin, not every 5, so that all arms choose among as many checkpoints."
    assert any(sentence == said for sentence in plan_notes(found, Store(tmp_path), {}, 1))
    last = plan(method=method | {"select": {"metric": "last"}}, arms={"a": "xl > l > s", "b": {"path": "xl > s", "compute": "as a"}})
    assert not any("Dev is measured" in sentence for sentence in plan_notes(last, Store(tmp_path), {}, 1))


def test_equal_compute_needs_arms_that_do_not_stop_early():
    """What an arm spends is not known before it ran. Stages that both arms share may stop early."""
    arms = {"takd": "xl > l > s", "direct": {"path": "xl > s", "compute": "as takd"}}
    every = {"every": 4, "patience": 2}
    with pytest.raises(ConfigError, match=r"arms.direct has `compute: as takd`, but `distill .* may stop early .select.patience"):
        plan(method=recipe()["method"] | {"select": every}, arms=arms)
    shared = model(16) | {"sft": {"optim": {"steps": 10}, "select": every}}
    plan(models=recipe()["models"] | {"s": shared}, arms=arms)
    for name in arms:
        arms[name] = {"path": "xl > l > s"} if name == "takd" else arms[name]
        with pytest.raises(ConfigError, match=r"set select: \{patience: null\} for takd and direct"):
            plan(arms=arms | {name: arms[name] | {"select": every}})


def test_equal_compute_allows_and_names_fine_tuning_that_stops_early():
    """The fine-tuning of the original teacher is not counted. That of another model has its own key."""
    models, every = recipe()["models"], {"every": 4, "patience": 2}
    early = {"sft": {"optim": {"steps": 10}, "select": every}}
    arms = {"takd": "xl > l > s", "short": {"path": "l > s", "compute": "as takd"}}
    plan(models=models | {"xl": models["xl"] | early}, arms=arms, teacher="xl")
    direct = {"path": "xl > s", "compute": "as takd"}
    with pytest.raises(ConfigError, match=r"`sft l, seed 1` may stop early .*; set models.l.sft.select: \{patience: null\}$"):
        plan(models=models | {"l": models["l"] | early}, arms=arms | {"direct": direct})
    with pytest.raises(ConfigError, match=r"set select: \{patience: null\} for takd and direct and for each of their phases$"):
        plan(arms=arms | {"direct": direct | {"phases": [{"select": every}, {}]}})


@pytest.mark.parametrize(
    ("sft", "words"),
    [
        (
            {"select": {"metric": "last", "patience": 1}},
            "models.s.sft: select.patience is 1, but with select.metric `last` nothing is measured",
        ),
        ({"keep": [5], "select": {"patience": 1}}, "models.s.sft has both `keep` and `select.patience`"),
    ],
)
def test_patience_of_fine_tuning_needs_a_dev_metric_and_no_kept_updates(sft, words):
    with pytest.raises(ConfigError, match=words):
        plan(models=recipe()["models"] | {"s": model(16) | {"sft": {"optim": {"steps": 10}} | sft}})


def test_compute_may_be_declared_before_the_arm_it_matches():
    arms = {"twin": {"path": "xl > s", "compute": "as takd"}, "takd": "xl > l > s"}
    assert [a.name for a in plan(arms=arms).arms] == ["twin", "takd"]


def test_seqkd_has_a_generate_stage_and_sft_longer_continues():
    arms = {
        "seqkd": {"path": "xl > s", "objective": {"type": "cross_entropy"}, "sampler": {"type": "teacher"}},
        "longer": {"path": "s", "objective": {"type": "cross_entropy"}, "sampler": {"type": "dataset"}},
    }
    assert kinds(plan(arms=arms, seeds=[1])) == {"sft": 3, "generate": 1, "distill": 1, "evaluate": 7, "analyse": 2}


def test_a_chain_is_analysed_with_its_assistants():
    found = plan(seeds=[1])
    (direct, takd) = found.arms
    chain, plain = (found.stages[arm.analyse[1]] for arm in (takd, direct))
    assert [k for role, k in chain.parents.items() if role.startswith("assistant")] == [found.stages[takd.final[1]].parents["teacher"]]
    assert not [role for role in plain.parents if role.startswith("assistant")]
    assert plain.parents["teacher_answers"] == chain.parents["teacher_answers"]
    assert chain.parents["answers"] == takd.evaluate[1]


def test_without_a_path_nothing_is_measured_beside_a_teacher():
    found = plan(arms={"small": "s", "large": "l"})
    assert found.teacher is None
    assert kinds(found) == {"sft": 4, "evaluate": 12}
    assert all(arm.analyse == {} for arm in found.arms)
    assert plan(arms={"small": "s"}, teacher="l").arms[0].analyse.keys() == {1, 2}


def test_another_decoding_adds_its_stages_and_changes_no_other():
    decodings = {"ngram6": {"no_repeat_ngram": 6}, "cold": {"temperature": 0.2, "seeds": [5, 6]}}
    before, after = plan(evaluate={"also": {}}), plan(evaluate={"also": decodings})
    added = [s for key, s in after.stages.items() if key not in before.stages]
    assert set(before.stages) < set(after.stages)
    assert {s.kind for s in added} == {"evaluate"}
    assert {(s.spec.decoding.temperature, s.spec.decoding.seeds) for s in added} == {(1.0, (10,)), (0.2, (5, 6))}
    assert after.arms[0].also.keys() == decodings.keys()


def test_a_plan_counts_what_selection_looks_at():
    method = recipe()["method"] | {"select": {"metric": "loss", "every": 5}}
    found = plan(method=method)
    assert {s.spec.checkpoints for s in found.stages.values() if s.kind == "distill"} == {4}  # after 5, 10, 15 and 16 updates
    assert {s.spec.checkpoints for s in found.stages.values() if s.kind in ("evaluate", "analyse")} == {0}


RECORDED = {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "recorded": True, "max_new_tokens": 16}}


def recorded(arms: dict, **changes):
    return plan(method=RECORDED | {"optim": {"steps": 4}}, arms=arms, **changes)


def stages(found, kind: str) -> list:
    return [s for s in found.stages.values() if s.kind == kind]


def test_a_recording_of_the_students_text_serves_all_arms_seeds_and_assistants():
    """One text of s. One recording of xl, for both arms, both seeds and the assistant l. One recording of l for each of its seeds."""
    found = recorded({"direct": "xl > s", "other": {"path": "xl > s", "objective": {"type": "forward_kl"}}, "takd": "xl > l > s"})
    (text,) = stages(found, "generate")
    assert (text.model, text.label) == ("s", "generate with s, seed 1")
    assert found.stages[text.parents["teacher"]].label == "sft s, seed 1"
    signals = stages(found, "signal")
    assert sorted(s.model for s in signals) == ["l", "l", "xl"]
    assert all(s.parents["responses"] == text.key for s in signals)
    assert len({s.parents["teacher"] for s in signals}) == 3
    learners = stages(found, "distill")
    readers = {s.label: [d.label for d in learners if d.parents["signal"] == s.key] for s in signals}
    assert sorted(map(len, readers.values())) == [1, 1, 6]  # direct, other and takd's assistant, for two seeds
    assert {d.parents["responses"] for d in learners} == {text.key}
    assert {d.parents["student"] for d in learners if d.model == "s"} == {s.key for s in stages(found, "sft") if s.model == "s"}


def test_all_teachers_of_dense_guidance_are_recorded_on_one_text():
    found = recorded({"dense": {"path": "xl > l > s", "dense": {}}}, seeds=[1])
    (text,), signals = stages(found, "generate"), {s.model: s for s in stages(found, "signal")}
    assert all(s.parents["responses"] == text.key for s in signals.values())
    learner = next(s for s in stages(found, "distill") if s.model == "s")
    assert (learner.parents["signal"], learner.parents["assistant_signal 1"]) == (signals["xl"].key, signals["l"].key)
    assert signals["l"].parents["teacher"] == learner.parents["assistant 1"]


def test_a_recording_depends_on_student_decoding_and_rows_and_not_on_seeds_arms_or_the_objective():
    def key(**changes) -> str:
        return stages(recorded({"direct": "xl > s"}, **changes), "generate")[0].key

    first = key()
    assert key(seeds=[1]) == key(seeds=[1, 5]) == first
    assert key(seeds=[2, 1]) != first  # the first seed's student writes
    cold = {"xl": model(64, seed=1), "s": model(16) | {"sft": {"optim": {"steps": 11}}}}
    assert key(models=cold) != first
    assert key(data=recipe()["data"] | {"limit": {"train": 9}}) != first
    longer = {"direct": {"path": "xl > s", "sampler": {"type": "student", "max_new_tokens": 17}}}
    assert stages(recorded(longer), "generate")[0].key != first
    others = {"direct": {"path": "xl > s", "objective": {"type": "forward_kl"}}, "start": {"path": "xl > l > s", "init": {"s": "l"}}}
    same = recipe()["models"] | {"l": model(16)}  # of the student's shape
    assert [s.key for s in stages(recorded(others, models=same), "generate")] == [first]


def test_a_plan_says_the_bytes_of_a_recording_and_how_often_it_is_read():
    kinds_of = {"hidden": {"type": "hidden"}, "top": {"type": "top_k", "k": 16}, "drawn": {"type": "sampled", "draws": 4}}
    sampler = RECORDED["sampler"]
    arms = {
        name: {"path": "xl > s", "objective": {"type": "forward_kl"}, "sampler": sampler | {"signal": signal}}
        for name, signal in kinds_of.items()
    }
    found = recorded(arms)
    text = io.StringIO()
    preview.print_plan(found, Store("nowhere"), Console(file=text, width=250))
    assert "hidden signal of xl on the text of s, seed 1: losses from this recording are exact; 256 bytes a token and " in text.getvalue()
    sampled = "an unbiased estimate: the recording has 4 drawn tokens for each position; at most 14 bytes a token and "
    assert f"sampled signal of xl on the text of s, seed 1: losses from this recording are {sampled}" in text.getvalue()
    disks = [stage.cost.disk.total for stage in found.stages.values() if stage.kind == "signal"]
    assert disks == [9354240, 1132740, 511560]
    for written in ("9.4 MB", "1.1 MB", "511.6 kB"):
        assert f" bytes a token and {written} on disk; 2 distillations read it." in text.getvalue()


def test_a_signal_may_be_recorded_by_several_processes():
    resources = {"default": {"processes": 2, "parallel": "fsdp", "teacher": "sharded"}, "signal": {"processes": 4}}
    found = recorded({"direct": "xl > s"}, resources=resources)
    (signal,), (text,) = stages(found, "signal"), stages(found, "generate")
    assert (layout(found.recipe, signal).processes, layout(found.recipe, signal).teacher) == (4, "replicated")
    assert layout(found.recipe, text).processes == 1


def test_a_recorded_signal_is_one_stage_of_its_teacher():
    signal = {"sampler": {"type": "dataset", "signal": {"type": "top_k", "k": 8}}}
    arms = {name: {"path": "xl > s", "objective": {"type": name}, **signal} for name in ("forward_kl", "reverse_kl")}
    found = plan(arms=arms, method={"optim": {"steps": 4}})
    assert kinds(found)["signal"] == 1  # the teacher has its own seed, so both seeds share it as well
    (key,) = [s.key for s in found.stages.values() if s.kind == "signal"]
    learners = [s for s in found.stages.values() if s.kind == "distill"]
    assert len(learners) == 4
    assert all(s.parents["signal"] == key for s in learners)
    live = plan(
        arms={"forward_kl": {"path": "xl > s", "objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}}},
        method={"optim": {"steps": 4}},
    )
    (cheaper,), (dearer,) = ({s.flops for s in p.stages.values() if s.kind == "distill"} for p in (found, live))
    assert cheaper < dearer


def test_pairs_have_a_generate_stage_shared_with_seqkd():
    text = {"max_new_tokens": 8}
    arms = {
        "pair": {"path": "xl > s", "objective": {"type": "contrastive"}, "sampler": {"type": "pair", **text}},
        "seqkd": {"path": "xl > s", "objective": {"type": "cross_entropy"}, "sampler": {"type": "teacher", **text}},
    }
    assert kinds(plan(arms=arms, method={"optim": {"steps": 4}}, seeds=[1]))["generate"] == 1


def test_specs_are_plain_data():
    for stage in plan().stages.values():
        assert json.loads(json.dumps(stage.spec.content())) is not None


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"method": {"objective": {"type": "minillm"}}}, ConfigError, "needs a sampler that works in rounds"),
        ({"method": recipe()["method"] | {"objective": {"type": "minillm"}}}, ConfigError, "which needs `data.corpus`"),
        ({"method": recipe()["method"] | {"optim": {"steps": 8, "batch": 48}}}, ConfigError, "not a multiple of optim.batch 48"),
        ({"method": recipe()["method"] | {"optim": {"batch": 16}}}, ConfigError, "neither `steps` nor `epochs`"),
        (
            {"arms": {"a": {"path": "s", "objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}}}},
            ConfigError,
            "no teacher in its path",
        ),
        ({"arms": {"a": "xl > s", "b": {"path": "xl > l > s", "compute": "as a"}}}, ConfigError, "needs a path of two models"),
        ({"arms": {"a": "s", "b": {"path": "xl > s", "compute": "as a"}}}, ConfigError, "costs less"),
        ({"data": recipe()["data"] | {"train": "nowhere.jsonl"}}, DataError, "data set `nowhere.jsonl` does not exist"),
        ({"data": recipe()["data"] | {"train": "tinyworld_open"}}, DataError, "has no split `train`"),
    ],
)
def test_mistakes_are_found_in_the_plan(changes, error, words):
    with pytest.raises(error, match=words):
        plan(**changes)


def test_adapters_are_part_of_their_models_keys_alone():
    plain, tuned = plan(), plan(models={"xl": model(64, seed=1), "l": model(32, lora={"r": 8}), "s": model(16)})
    assert list(plan(models={"xl": model(64, seed=1, lora=None), "l": model(32), "s": model(16)}).stages) == list(plain.stages)
    assert {tuned.stages[key].label.split(",")[0] for key in set(tuned.stages) & set(plain.stages)} >= {
        "sft xl",
        "sft s",
        "distill xl -> s",
    }
    written = plan(models={"xl": model(64, seed=1), "l": model(32, lora={"r": 8, "alpha": 32, "targets": []}), "s": model(16)})
    assert list(written.stages) == list(tuned.stages)
    for stage in tuned.stages.values():
        if stage.kind in ("sft", "distill"):
            lora = stage.spec.content().get("lora")
            assert lora == ({"r": 8, "alpha": 32.0, "dropout": 0.0, "targets": ()} if stage.model == "l" else None)
            assert lora or stage.key in plain.stages or "l ->" in stage.label


def test_adapters_that_do_not_fit_are_found_before_anything_runs(monkeypatch):
    models = {"xl": model(64, seed=1), "l": model(32), "s": model(16, lora={"targets": ["q_proj", "gate"]})}
    with pytest.raises(
        ConfigError, match=r"models\.s\.lora\.targets: `gate` is not a linear layer of this model; choose from self_attn\.q_proj"
    ):
        plan(models=models)
    with pytest.raises(ConfigError, match="the head and the embeddings cannot have adapters"):
        plan(models=models | {"s": model(16, lora={"targets": ["lm_head"]})})


@pytest.mark.parametrize("where", ["method", "model", "arm"])
def test_the_memory_check_counts_every_teacher_of_dense_guidance(where):
    settings = recipe(arms={"takd": {"path": "xl > l > s"}})
    place = {"method": settings["method"], "model": settings["models"]["s"].setdefault("distill", {}), "arm": settings["arms"]["takd"]}
    place[where]["dense"] = {}
    found, plain = make_plan(validate(settings)), plan(arms={"takd": {"path": "xl > l > s"}})
    last, alone = (next(s for s in each.stages.values() if s.label.endswith("seed 1") and "-> s" in s.label) for each in (found, plain))
    assert "xl + l -> s" in last.label
    big = weight_bytes(Ledger(found.recipe).size("xl").total, "float32")
    assert process_bytes(found, last, cuda=True) >= process_bytes(plain, alone, cuda=True) + big


def test_the_first_seed_is_the_one_that_the_recipe_lists_first():
    assert validate(recipe(seeds=[30, 10])).first_seed == 30


def test_what_a_data_set_does_not_use_is_no_part_of_its_identity():
    """Stored stages are keyed by this."""
    found = HashedData(ref=DataRef(load="dolly"), fingerprint="f").content()
    assert found == {"ref": {"load": "dolly", "split": None, "revision": "main", "columns": {}}, "fingerprint": "f"}
    chosen = HashedData(ref=DataRef(load="x", choices=("no", "yes"), instruction="do"), fingerprint="f").content()["ref"]
    assert (chosen["choices"], chosen["instruction"]) == (("no", "yes"), "do")


@pytest.mark.parametrize(
    ("columns", "tokenizer", "metric", "scores", "of_training"),
    [
        ({"choice": "c"}, "tinyworld", "loss", {"choice": 2}, None),
        ({"choice": "c", "numeric": "n", "math": "n"}, "tinyworld", "choice", {"choice": 2, "numeric": 2}, {"choice": 2, "numeric": 2}),
        ({"math": "n"}, "tinyworld", "math", None, None),
        ({"facts": "f"}, "tinyworld", "fact_accuracy", None, None),  # its texts have spaces between words and punctuation
        ({"facts": "f"}, "own", "fact_accuracy", {"facts": 2}, {"facts": 2}),
    ],
)
def test_stages_with_scores_that_have_another_version_have_other_keys(tmp_path, columns, tokenizer, metric, scores, of_training):
    row = {"instruction": "where ?", "output": "here", "c": "A", "n": 1, "f": [["here", ["there"]]]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    ref = {"load": str(tmp_path / "x.jsonl"), "columns": columns}
    method = recipe()["method"] | {"select": {"metric": metric}}
    if tokenizer == "own":
        tokenizer = str(tmp_path / "own")
        tinyworld.tokenizer("tinyworld").save_pretrained(tokenizer)
    models = {"xl": model(64, tokenizer=tokenizer), "s": model(16, tokenizer=tokenizer)}
    found = plan(models=models, arms={"kd": "xl > s"}, method=method, data=recipe()["data"] | {"dev": ref, "test": [ref]})
    content = {stage.kind: stage.spec.content() for stage in found.stages.values()}
    assert content["evaluate"].get("scores") == scores
    assert content["distill"].get("scores") == of_training
    assert "scores" not in content["analyse"]


def test_facts_of_tinyworld_have_another_version_for_models_with_other_tokenizers(tmp_path):
    own = str(tmp_path / "own")
    tinyworld.tokenizer("tinyworld").save_pretrained(own)
    arms = {"kd": "xl > s", "other": "xl > o"}
    found = plan(models={"xl": model(64), "s": model(16), "o": model(16, tokenizer=own)}, arms=arms)
    scores = {s.model: s.spec.content().get("scores") for s in found.stages.values() if s.kind == "evaluate"}
    assert scores == {"xl": None, "s": None, "o": {"facts": 2}}


@pytest.mark.parametrize(("turns", "asked", "version"), [("answer", True, None), ("last", True, 2), ("last", False, None)])
def test_bits_per_byte_of_whole_messages_have_another_version(turns, asked, version):
    found = plan(data=recipe()["data"] | {"turns": turns}, evaluate={"bits_per_byte": asked, "also": {}})
    assert {s.spec.content().get("bits_per_byte") for s in found.stages.values() if s.kind == "evaluate"} == {version}


def test_entries_of_resources_that_do_not_fit_together():
    wanted = validate(recipe(resources={"default": {"processes": 4, "parallel": "fsdp"}, "sft": {"processes": 1}, "distill": {"hours": 1}}))
    stages = {stage.kind: stage for stage in make_plan(wanted).stages.values()}
    with pytest.raises(ConfigError, match=r"resources of `sft s` \(merged from the entries default, sft\): `parallel: fsdp` splits a"):
        layout(wanted, next(s for s in make_plan(wanted).stages.values() if s.kind == "sft" and s.model == "s"))
    assert (layout(wanted, stages["distill"]).processes, layout(wanted, stages["distill"]).hours) == (4, 1)
    assert layout(wanted, stages["evaluate"]).processes == 1  # a default for training is none for others


@pytest.mark.parametrize("size", [{}, {"micro_batch": 16}, {"tokens": 100}])
@pytest.mark.parametrize("sampler", [{"type": "dataset"}, {"type": "student", "chunk": 32, "max_new_tokens": 8}])
def test_a_process_needs_memory_for_its_rows_of_a_batch(sampler, size):
    """Four processes with a batch of 32 need what one process with a batch of 8 does; the FLOPs are those of the whole batch."""

    def found(batch: int, processes: int, size: dict):
        method = {"objective": {"type": "reverse_kl"}, "sampler": sampler, "optim": {"steps": 4, "batch": batch} | size}
        made = plan(method=method | {"select": {"metric": "last"}}, resources={"default": {"processes": processes}})
        stage = next(s for s in made.stages.values() if s.kind == "distill" and s.model == "s")
        return planned_memory(made, stage), stage.cost.parts

    (memory, flops), (whole, as_whole) = found(32, 4, size), found(32, 1, size)
    assert flops == as_whole
    assert memory.rollouts == whole.rollouts  # every process has the states of the whole round
    alone = found(8, 1, {} if "micro_batch" in size else size)[0]
    ddp = {"several": True, "sampling": alone.sampling + alone.gradients}  # its gradients stay in memory
    assert memory == replace(alone, rollouts=whole.rollouts, **ddp)


def test_the_memory_of_a_stage_is_that_of_one_process(tmp_path):
    """FSDP divides the student with its gradients and moments; a sharded teacher is divided, an offloaded one is not there."""

    def said(found) -> str:
        console = Console(file=io.StringIO(), width=200)
        preview.print_plan(found, Store(tmp_path), console)
        return console.file.getvalue()

    method = recipe()["method"] | {"objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}}
    alone, note = plan(method=method), "The memory is that of one process"
    split = plan(
        method=method,
        resources={"distill": {"processes": 4, "parallel": "fsdp", "teacher": "sharded"}, "distill l": {"teacher": "offloaded"}},
    )
    size = {name: Ledger(alone.recipe).size(name).total for name in ("xl", "l", "s")}
    for key, stage in split.stages.items():
        wanted, one, now = layout(split.recipe, stage), planned_memory(alone, alone.stages[key]), planned_memory(split, stage)
        if stage.kind == "distill":
            assert 4 * size[stage.model] >= now.gathered > 0
            assert 4 * now.weights == one.weights == 4 * size[stage.model]
            assert (4 * now.gradients, 4 * now.moments) == (one.gradients, one.moments)
            assert now.frozen == (0 if wanted.teacher == "offloaded" else one.frozen / 4)
            assert one.frozen == 4 * size["xl" if "xl" in stage.label else "l"]
        else:
            assert now == one
    text = said(split)
    assert note in text
    assert note not in said(alone)
    with pytest.raises(ConfigError, match=r"`optim\.batch` is 16, but it must be a multiple of the 3 processes"):
        said(plan(resources={"distill": {"processes": 3}}))


def test_the_plan_counts_the_first_rows(tmp_path, monkeypatch):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"instruction": "{"name " * n}", "output": "cat"}}\n' for n in (3, 300, 3)))
    data = recipe()["data"] | {"train": str(path), "dev": str(path), "test": [str(path)]}
    monkeypatch.setattr(sizes_and_lengths, "_COUNTED", 3)  # the test set may have more rows, the training set has not
    notes = list(row_notes(plan(data=data)))
    assert notes == [
        f"Rows of own {where}: 2 of 3 rows; 1 longer than data.max_prompt (256)."
        for where in ("(train)", "(dev), among the first 3", "(test), among the first 3")
    ]
    assert list(row_notes(plan())) == []
    path.write_text('{"instruction": "name это слово", "output": "cat"}\n')
    first = next(iter(row_notes(plan(data=data))))
    assert first == "Rows of own (train): 2 of 4 tokens of the prompts are unknown to the tokenizer."


def test_a_test_set_with_training_prompts_is_named(tmp_path, monkeypatch):
    rows = [f'{{"instruction": "name {n}", "output": "cat"}}\n' for n in range(6)]
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("own", "half", "new")}
    for path, lines in zip(paths.values(), (rows[:4], rows[2:], rows[4:]), strict=True):
        path.write_text("".join(lines))
    own, half, new = map(str, paths.values())
    data = recipe()["data"] | {"train": own, "dev": new, "test": [half, new, own]}
    end, some = "so its scores do not show how the models answer new prompts", "so its scores are not only about new prompts"
    notes = [
        f"half (test) shares 2 of 4 prompts with the training data, {some}",
        f"own (test) shares all prompts with the training data, {end}",
        f"half (test) shares 2 of 4 prompts with the dev data, which choose checkpoints, {some}",
        f"new (test) shares all prompts with the dev data, which choose checkpoints, {end}",
    ]
    found = plan(data=data)
    assert [*seen_notes(found)] == notes
    assert describe(found, created="", recipe_text="", command="")["seen"] == notes
    assert f"{notes[0]}." in next(plan_notes(found, Store(tmp_path), {}, 1))
    few = plan(data=data | {"limit": {"train": 2}, "test": [own]})
    assert [*seen_notes(few)] == [f"own (test) shares 2 of 4 prompts with the training data, {some}"]
    kept = {"select": {"metric": "last"}}
    models = {name: each | {"sft": each["sft"] | kept} for name, each in recipe()["models"].items()}
    assert [*seen_notes(plan(data=data | {"test": [new]}, models=models, method=recipe()["method"] | kept))] == []
    assert [*seen_notes(plan(data=data | {"test": [new]}))] == notes[3:]
    assert [*seen_notes(plan())] == []
    monkeypatch.setattr("tadistill.data.survey.SplitRows.content", lambda rows: None)  # as of a set on the Hub, which is not read
    monkeypatch.setattr("tadistill.data.survey.SplitRows.fingerprint", lambda rows: rows.ref.load)
    found = [*seen_notes(plan(data=data))]
    assert found == [f"own (test) is a training set, {end}", f"new (test) is a dev set, which chooses checkpoints, {end}"]


@pytest.mark.parametrize(
    ("row", "shared"),
    [
        ({"messages": [{"content": "Name a river.\n\nIn Asia.", "role": "user", "name": None}, {"role": "assistant", "content": "x"}]}, 1),
        ({"instruction": "Name a river.\n\nIn Asia.", "output": "x"}, 1),
        ({"prompt": "Name a river.\n\nIn Asia.", "completion": "x"}, 1),
        ({"instruction": "Name a river.", "output": "x"}, 0),
        ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river.\n\nIn Asia."},
                       {"role": "assistant", "content": "x"}]}, 0),
    ],
)  # fmt: skip
def test_equal_prompts_are_found_in_rows_of_other_forms(row, shared, tmp_path):
    own, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    own.write_text(json.dumps({"instruction": "Name a river.", "input": "In Asia.", "output": "y"}))
    other.write_text(json.dumps(row))
    data = validate(recipe(data=recipe()["data"] | {"train": str(own), "test": [str(other)]})).data
    found = seen_prompts(data, "train")
    assert [*found] == ["other"] * shared
    assert not found or found["other"].startswith("shares all prompts with the training data, ")


@pytest.mark.parametrize(
    ("arms", "seeds", "few"),
    [
        ({}, [1, 2], True),
        ({}, [1, 2, 3], False),
        ({"arms": {"direct": "xl > s"}}, [1], False),
        ({"arms": {"a": "xl", "b": "s"}}, [1], False),
    ],
)
def test_a_plan_says_if_the_seeds_are_too_few_for_a_verdict(arms, seeds, few, tmp_path):
    models = (
        {name: {k: v for k, v in of.items() if k != "sft"} for name, of in recipe()["models"].items()}
        if "a" in arms.get("arms", {})
        else {}
    )
    found = plan(seeds=seeds, **arms, **({"models": models} if models else {}))
    text = " ".join(plan_notes(found, Store(tmp_path), {}, 1))
    assert ("the report will give no verdict on these arms" in text) == few


def test_the_plan_shows_the_time_of_finished_stages(tmp_path):
    found, store, console = plan(seeds=[1]), Store(tmp_path), Console(file=io.StringIO(), width=200)
    key = next(key for key, stage in found.stages.items() if stage.kind == "evaluate")
    store.begin(key, {})
    store.finish(key, {"key": key, "seconds": 65.4})
    preview.print_plan(found, store, console)
    rows = {line.split()[0]: line for line in console.file.getvalue().splitlines() if " to run " in line or " done " in line}
    assert rows.keys() == found.stages.keys()
    assert [row for row in rows.values() if " done " in row and " 65 s " in row] == [rows[key]]
    assert "No time is known yet. `tadistill plan RECIPE --measure` measures the speed" in " ".join(console.file.getvalue().split())


def test_the_seeds_of_a_stage_share_a_line_in_a_large_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("tadistill.plan.graph._MANY", 2)
    found, store, console = plan(seeds=[1, 2, 3], arms={"direct": "xl > s"}), Store(tmp_path), Console(file=io.StringIO(), width=200)
    keys = [key for key, stage in found.stages.items() if stage.kind == "distill"]
    for key in keys[:2]:
        store.begin(key, {})
        store.finish(key, {"key": key, "seconds": 30.0})
    preview.print_plan(found, store, console)
    done = next(line for line in console.file.getvalue().splitlines() if "  distill xl -> s" in line)
    total = sum(found.stages[key].flops for key in keys[:2])
    assert done.split()[:4] == ["done", f"{total:.2e}", "60", "s"]
    assert ", 2 seeds " in done


def test_a_plan_counts_the_stages_without_a_known_time(tmp_path, monkeypatch):
    found = plan(seeds=[1])
    todo = [stage.cost for stage in found.stages.values() if stage.cost and stage.cost.parts]
    monkeypatch.setattr("tadistill.plan.notes.throughput.seconds", lambda cost, _: 60.0 if cost is todo[0] else None)
    notes = " ".join(plan_notes(found, Store(tmp_path), {}, 1))
    assert f"The time is not known for {len(todo) - 1} of {len(todo)} unfinished stages of training" in notes
    assert "Stages with a known time take" in notes


def test_long_prompts_change_keys_only_where_they_are_cut():
    assert "long_prompts" not in plan().stages.popitem()[1].spec.content()["data"]
    cut = plan(data=recipe()["data"] | {"long_prompts": "cut"})
    assert cut.stages.popitem()[1].spec.content()["data"]["long_prompts"] == "cut"
    assert not set(cut.stages) & set(plan().stages)


@pytest.mark.parametrize(
    ("arms", "columns", "said"),
    [
        ({"direct": "xl > s"}, ["arm", "path", "FLOPs"], []),
        ({"sft": "s", "direct": "xl > s"}, ["arm", "path", "FLOPs", "x", "direct"], ["x direct: FLOPs relative to arm direct."]),
        (
            {"direct": "xl > s", "takd": "xl > l > s", "twin": {"path": "xl > s", "compute": "as takd"}},
            ["arm", "path", "FLOPs", "x", "direct", "assistants", "compute"],
            ["x direct: FLOPs relative to arm direct."],
        ),
    ],
)
def test_a_plan_shows_only_columns_with_content(arms, columns, said, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    preview.print_plan(plan(seeds=[1], arms=arms), Store(tmp_path), console)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert next(line.split() for line in lines if line.startswith("arm ")) == columns
    assert [line for line in lines if line.startswith("x direct: ")] == said
    assert {"x direct", ASKED} <= GLOSSARY.keys()


def test_the_plan_of_a_search_names_the_commands_for_it(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    preview.print_plan(plan(arms={}, search={"teacher": "xl", "assistants": ["l"], "student": "s"}), Store(tmp_path), console)
    said = "t has no arms to plan. Its section `search` is for `tadistill search` and `tadistill advise`."
    assert console.file.getvalue().strip() == said


@pytest.mark.parametrize(("patience", "steps", "stops"), [(3, 20, False), (3, 200, False), (3, 201, True), (None, 20, True)])
def test_a_plan_says_if_patience_can_never_stop_a_training(patience, steps, stops, tmp_path):
    """The first measurement is the best one so far, and one at the end has nothing to save."""
    method = {"name": "kd", "optim": {"steps": steps, "batch": 16}, "select": {"every": 50, "patience": patience}}
    text = " ".join(plan_notes(plan(method=method, arms={"direct": "xl > s"}), Store(tmp_path), {}, 1))
    measured = {20: "1 time in 20 updates", 200: "4 times in 200 updates"}.get(steps)
    said = f"`select.patience: 3` cannot stop a training of s, because dev is measured only {measured} (`select.every: 50`)."
    assert ("cannot stop" not in text) if stops else text.count(said) == 1


def test_a_plan_names_the_models_with_adapters(tmp_path):
    """Also models that the study does not train were said to be trained."""
    models = recipe()["models"] | {"s": model(16, lora={"r": 4}), "unused": model(16, lora={"r": 8})}
    text = " ".join(plan_notes(plan(models=models), Store(tmp_path), {}, 1))
    assert text.count("is trained with LoRA") == text.count("Model s is trained with LoRA: adapters of rank 4") == 1
