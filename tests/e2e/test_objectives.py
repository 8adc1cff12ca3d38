"""Objectives and recorded signals in whole studies: one of each kind of step, and a signal that changes no number."""

import json
from collections import Counter

import pytest
from tests.e2e.test_study import manifests, rows, run_here

ARMS = """
  jsd: {path: xl > s, objective: {type: jensen_shannon, beta: 0.1, kd_ratio: 0.5}, sampler: {type: dataset}}
  recorded: {path: xl > s, objective: {type: jensen_shannon, beta: 0.1, kd_ratio: 0.5}, sampler: {type: dataset, signal: {type: hidden}}}
  top_k: {path: xl > s, objective: {type: reverse_kl}, sampler: {type: dataset, signal: {type: top_k, k: 8}}}
  offline: {path: xl > s, objective: {type: reverse_kl}, sampler: {type: student, recorded: true, max_new_tokens: 8}}
  taid: {path: xl > s, objective: {type: taid}, sampler: {type: dataset}}
  contrastive: {path: xl > s, objective: {type: contrastive}, sampler: {type: pair, max_new_tokens: 8}}
  control: {control: no_teacher of taid, sampler: {max_new_tokens: 8}}
  noise: {control: random_teacher of taid}
  sampled: {path: xl > s, objective: {type: sampled_kl}, sampler: {type: student, max_new_tokens: 8}}
"""
SETTINGS = [
    *("seeds=[1]", "data.test=[tinyworld]", "models.xl.sft.optim.steps=10", "method.optim.steps=4", "method.select.metric=loss"),
    *("evaluate.seeds=[1]", "evaluate.max_new_tokens=8"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("objectives")
    run_here(runs, *SETTINGS, arms=ARMS, greedy=False)
    return runs


def test_all_train_and_are_measured(finished):
    assert {r["arm"] for r in rows(finished)} == {
        "jsd",
        "recorded",
        "top_k",
        "offline",
        "taid",
        "contrastive",
        "control",
        "noise",
        "sampled",
    }


def test_a_random_teacher_has_the_same_size_and_other_weights(finished):
    losses = {r["arm"]: r["value"] for r in rows(finished) if r["metric"] == "loss"}
    flops = {a["name"]: a["flops"] for a in json.loads(next(finished.glob("*/plan.json")).read_text())["arms"]}
    assert losses["noise"] != losses["taid"]
    assert flops["noise"] == flops["taid"]


def test_recorded_hidden_states_give_the_live_teachers_numbers(finished):
    """The same batches, so only the order of floating-point sums differs (padding of the teacher's batches)."""
    found = {(r["arm"], r["set"], r["metric"]): r["value"] for r in rows(finished) if r["metric"] in ("loss", "forward_kl")}
    for (arm, *rest), value in found.items():
        if arm == "recorded":
            assert value == pytest.approx(found["jsd", *rest], abs=1e-4)


def test_the_signal_is_written_once_and_reused(finished):
    stages = [json.loads((path.parent / "stage.json").read_text()) for path in finished.glob("store/*/*/manifest.json")]
    assert sorted(s["spec"]["signal"]["type"] for s in stages if s["kind"] == "signal") == ["hidden", "hidden", "top_k"]
    before = manifests(finished)
    more = ARMS + "  again: {path: xl > s, objective: {type: forward_kl}, sampler: {type: dataset, signal: {type: hidden}}}\n"
    offline = "sampler: {type: student, recorded: true, max_new_tokens: 8}"
    more += f"  second offline: {{path: xl > s, objective: {{type: forward_kl}}, {offline}}}\n"
    more += f"  chain offline: {{path: xl > l > s, objective: {{type: reverse_kl}}, {offline}}}\n"
    run_here(finished, *SETTINGS, arms=more, greedy=False)
    after = manifests(finished)
    assert before.items() <= after.items()
    kinds = [
        json.loads((finished / "store" / p[-2][:2] / p[-2] / "stage.json").read_text())["kind"]
        for p in (k.split("/") for k in after.keys() - before.keys())
    ]
    # no text is written again, and only the assistant of the chain is recorded
    assert Counter(kinds) == {"distill": 4, "sft": 1, "signal": 1, "evaluate": 3, "analyse": 3}
