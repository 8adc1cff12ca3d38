"""`tadistill advise` through the command line: measures, the verdict without history, a second call that computes nothing, and history."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
from tests.e2e.inprocess import tadistill

RECIPE = Path(__file__).with_name("advice.yaml")
PAIR = {"reverse_kl", "forward_kl", "overlap", "mass", "entropy_gap", "loss_ratio", "advantage", "bias"}


def call(runs: Path, *arguments: str, verb: str = "advise", code: int = 0) -> str:
    with mock.patch.dict(os.environ, COLUMNS="100"):
        done = tadistill(verb, str(RECIPE), *arguments, "--runs", str(runs))
    assert done.code == code, done.out + done.err
    return done.out + done.err


def manifests(runs: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in runs.glob("store/*/*/manifest.json")}


def advice(runs: Path) -> dict:
    return json.loads((runs / "tiny-advice" / "advice.json").read_text())


@pytest.fixture(scope="module")
def advised(tmp_path_factory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("runs")
    return runs, call(runs)


def test_every_measure_is_there_with_its_error(advised):
    found = advice(advised[0])
    names = ["xl", "l", "m", "s"]
    assert [m["name"] for m in found["models"]] == names
    pairs = {(p["teacher"], p["learner"]): p for p in found["pairs"]}
    assert set(pairs) == {(a, b) for i, b in enumerate(names) for a in names[:i]}
    for pair in pairs.values():
        assert set(pair) == PAIR | {"teacher", "learner", "size_ratio"}
        for name in PAIR:
            assert pair[name]["n"] == 12
            assert pair[name]["se"] >= 0
        assert pair["reverse_kl"]["mean"] > 0
        assert pair["forward_kl"]["mean"] > 0
        assert 0 <= pair["overlap"]["mean"] <= 1
        assert 0 < pair["mass"]["mean"] <= 1
    for name in ("l", "m"):  # the hop of the error budget
        hop = pairs["xl", "s"]["reverse_kl"]["mean"] - pairs[name, "s"]["reverse_kl"]["mean"]
        assert pairs[name, "s"]["bias"]["mean"] == pytest.approx(hop)
    assert {name for edge in found["edges"] for name in edge["measures"]} == PAIR | {"size_ratio"}
    assert set(found["lambda_sweeps"]) == {"exp(−loss)", "ROUGE-L / 100"}


def test_without_history_the_advice_is_direct(advised):
    runs, text = advised
    found = advice(runs)
    assert found["advice"]["verdict"] == "direct"
    assert found["advice"]["path"] == ["xl", "s"]
    assert {o["basis"] for o in found["advice"]["options"][1:]} == {"prior"}
    assert [p["path"] for p in found["paths"]] == [["xl", "s"], ["xl", "l", "s"], ["xl", "m", "s"], ["xl", "l", "m", "s"]]
    assert "direct: xl > s" in text
    assert "No history: differences come from the prior" in text
    assert "tadistill run" in text
    assert not (runs / "tiny-advice" / "plan.json").exists()  # a study's own


def test_only_dev_is_read_and_nothing_is_distilled(advised):
    kinds = [json.loads(p.read_text())["kind"] for p in advised[0].glob("store/*/*/manifest.json")]
    assert {kind: kinds.count(kind) for kind in kinds} == {"sft": 4, "probe": 4, "pair": 6}


def test_the_second_call_computes_nothing(advised):
    runs, text = advised
    before, written = manifests(runs), (runs / "tiny-advice" / "advice.json").read_bytes()
    assert text.endswith(call(runs)[-2000:])
    assert manifests(runs) == before
    assert (runs / "tiny-advice" / "advice.json").read_bytes() == written


def test_a_finished_chain_beside_its_twin_is_history(advised, tmp_path):
    """The command at the end of the advice produces the history of the next advice."""
    runs = tmp_path / "copy"
    shutil.copytree(advised[0], runs)
    arms = ["arms.xl-m-s.path=xl > m > s", "arms.xl-m-s-twin.path=xl > s", "arms.xl-m-s-twin.compute=as xl-m-s"]
    call(runs, *arms, "seeds=[1,2]", verb="run")
    text = call(runs)
    found = advice(runs)
    assert found["advice"]["pairs"] == 1
    assert found["history"]["studies"] == ["tiny-advice"]
    assert {o["basis"] for o in found["advice"]["options"][1:]} == {"history"}
    assert "1 chain compared with direct at equal compute" in text
    assert found["advice"]["verdict"] in ("direct", "inconclusive")  # two seeds of one chain prove nothing


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["search={teacher: xl, assistants: [m, l], student: s}"], "from big to small"),
        (["search={teacher: xl, assistants: [l], student: s, budget: 0.1}"], "costs 1.00"),
        (["--prompts", "1"], "--prompts is 1"),
        (["data.dev=nowhere.jsonl"], "nowhere.jsonl"),
        (["arms.odd={path: xl > s, dense: {}}"], "arms.odd has `dense`"),
        (["models.n={load: ./nowhere}", "search={teacher: xl, assistants: [n], student: s}"], "does not exist"),
    ],
)
def test_mistakes_are_one_sentence_before_any_work(arguments, sentence, tmp_path):
    text = call(tmp_path / "runs", *arguments, code=2)
    assert sentence in text
    assert "Traceback" not in text
    assert not list((tmp_path / "runs").glob("store/*/*/manifest.json"))
