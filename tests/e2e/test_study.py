"""A whole study through the command line: results, caching, and kills that change no number."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.e2e import forked
from tests.e2e.inprocess import ended, tadistill
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = Path(__file__).with_name("recipe.yaml")
CHAIN = "{takd: xl > l > s, seqkd: {path: xl > s, objective: {type: cross_entropy}, sampler: {type: teacher, max_new_tokens: 16}}}"
ONE_SEED = ["seeds=[1]", "runtime.checkpoint_seconds=0.05"]


def command(runs: Path, *overrides: str, arms: str = "", greedy: bool = True) -> list[str]:
    """Return the arguments of the command line. `arms` replaces the recipe's arms. Without `greedy`, evaluations sample only."""
    path = RECIPE
    if arms:
        path = runs.with_suffix(".yaml")
        text = RECIPE.read_text().split("arms:")[0] + f"arms: {arms}\n"
        path.write_text(text if greedy else text.replace("{greedy: {temperature: 0}}", "{}"))
    return ["run", str(path), *overrides, "--runs", str(runs)]


def run(runs: Path, *overrides: str, code: int = 0, arms: str = "") -> str:
    found, text = forked.run(*command(runs, *overrides, arms=arms))
    assert found == code, text
    return text


def run_here(runs: Path, *overrides: str, arms: str = "", greedy: bool = True) -> None:
    """Run the same command in this process, its stages too."""
    done = tadistill(*command(runs, *overrides, arms=arms, greedy=greedy))
    assert done.code == 0, done.out + done.err


def rows(runs: Path) -> list[dict]:
    return json.loads((runs / "tiny" / "results.json").read_text())["rows"]


def manifests(runs: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime_ns for p in runs.glob("store/*/*/manifest.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    run_here(runs)
    return runs


SETS = ("tinyworld", "tinyworld_multi", "tinyworld_choices")


def test_every_arm_seed_set_and_metric_is_there(finished):
    found = {(r["arm"], r["seed"], r["set"], r["metric"]) for r in rows(finished)}
    arms = ("sft", "longer", "kd", "rkl", "seqkd", "direct", "takd", "twin")
    answers = {"rouge_l", "fact_accuracy", "exact_match", "length", "repetition", "entropy"}
    whole_set = {"perplexity", "ece_tokens", "distinct_1", "distinct_2", "distinct_4"}
    metrics = answers | {f"{m}@greedy" for m in answers} | whole_set | {"loss", "self_bleu", "forward_kl", "reverse_kl"}
    expected = {(a, s, d, m) for a in arms for s in (1, 2) for d in SETS for m in metrics}
    expected |= {(a, s, "tinyworld_choices", m) for a in arms for s in (1, 2) for m in ("label_accuracy", "ece_labels")}
    expected |= {("takd", s, d, f"budget/{j}") for s in (1, 2) for d in SETS for j in (0, 1)}
    assert found == expected
    for row in rows(finished):
        assert row["low"] is None or row["metric"] not in whole_set | {"ece_labels"}
        assert row["low"] is None or row["low"] < row["high"]  # no interval if all answers have the same score
        assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
    assert all(row["low"] is not None for row in rows(finished) if row["metric"] in ("loss", "entropy", "forward_kl"))
    for name in ("report.html", "report.md", "plan.json"):
        assert (finished / "tiny" / name).is_file()


def test_the_error_budget_telescopes(finished):
    """KL(q ‖ p_T) of a chain's student is its distance to the last assistant plus what each hop adds."""
    values = {(r["seed"], r["set"], r["metric"]): r["value"] for r in rows(finished) if r["arm"] == "takd"}
    for seed in (1, 2):
        for name in SETS:
            terms = [values[seed, name, f"budget/{j}"] for j in (0, 1)]
            assert sum(terms) == pytest.approx(values[seed, name, "reverse_kl"], abs=1e-4)
            assert terms[0] > 0


def test_students_are_ordinary_hugging_face_models(finished):
    plan = json.loads((finished / "tiny" / "plan.json").read_text())
    key = next(a for a in plan["arms"] if a["name"] == "takd")["final"]["1"]
    folder = finished / "store" / key[:2] / key / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    assert len(AutoTokenizer.from_pretrained(folder)) > 100


def test_a_users_program_runs_what_is_missing_in_processes_to_the_same_results(finished, tmp_path):
    runs = tmp_path / "copy"
    shutil.copytree(finished, runs)
    plan = json.loads((runs / "tiny" / "plan.json").read_text())
    lost = {next(a for a in plan["arms"] if a["name"] == "kd")["final"]["1"]}
    for _ in range(2):  # and what stands on it
        stages = [json.loads(path.read_text()) | {"key": path.parent.name} for path in runs.glob("store/*/*/stage.json")]
        lost |= {stage["key"] for stage in stages if lost & set(stage["parents"].values())}
    for key in lost:
        shutil.rmtree(runs / "store" / key[:2] / key)
    assert len(lost) == 4  # with two evaluations and an analysis
    program = tmp_path / "program.py"  # as a user does, and without `if __name__ == "__main__":`
    program.write_text("from tadistill.cli import main\nmain()\n")
    done = subprocess.run([sys.executable, str(program), *command(runs)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifests(runs).keys() == {path.replace(str(finished), str(runs)) for path in manifests(finished)}
    assert rows(runs) == rows(finished)


def test_second_run_is_all_hits_and_identical(finished):
    before, results = manifests(finished), (finished / "tiny" / "results.json").read_bytes()
    run_here(finished)
    assert manifests(finished) == before
    assert (finished / "tiny" / "results.json").read_bytes() == results


def test_one_changed_key_reruns_only_what_depends_on_it(finished, tmp_path):
    runs = tmp_path / "copy"
    shutil.copytree(finished, runs)
    before = manifests(runs)
    run_here(runs, "arms.kd.objective.kd_ratio=0.7")
    kinds = [json.loads(Path(p).read_text())["kind"] for p in set(manifests(runs)) - set(before)]
    assert sorted(kinds) == [kind for kind, count in (("analyse", 2), ("distill", 2), ("evaluate", 4)) for _ in range(count)]


def training(runs: Path, kind: str, after: dict[Path, int]) -> dict[Path, int]:
    """Return the saved states of stages of a kind that are newer than in `after`, with their times."""
    found = {}
    for state in runs.glob("store/*/*/state.pt"):
        with contextlib.suppress(FileNotFoundError):  # the stage has just ended
            if json.loads((state.parent / "stage.json").read_text())["kind"] == kind:
                found[state] = state.stat().st_mtime_ns
    return {state: when for state, when in found.items() if when > after.get(state, 0)}


def test_killed_runs_resume_to_the_same_results(finished, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (whole / "store").mkdir(parents=True)
    shutil.copytree(finished / "store", whole / "store", dirs_exist_ok=True)
    run_here(whole, *ONE_SEED, arms=CHAIN)
    assert manifests(whole).keys() == {p.replace(str(finished), str(whole)) for p in manifests(finished)}  # the same stages
    saved: dict[Path, int] = {}
    for how, code, kind in (
        (signal.SIGKILL, -signal.SIGKILL, "sft"),
        (signal.SIGINT, 130, "sft"),
        (signal.SIGKILL, -signal.SIGKILL, "distill"),
    ):
        process = forked.start(*command(killed, *ONE_SEED, arms=CHAIN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not training(killed, kind, saved):
            time.sleep(0.01)
        os.kill(process.pid, how)  # just after a checkpoint
        assert process.wait(timeout=60) == code
        assert ended(process.pid)  # its workers too
        saved |= training(killed, kind, saved)
    run(killed, *ONE_SEED, arms=CHAIN)
    assert rows(killed) == rows(whole)


def test_a_diverging_run_fails_with_the_reason_and_keeps_the_rest(tmp_path):
    arms = "{kd: {path: xl > s, objective: {type: forward_kl}, sampler: {type: dataset}, optim: {lr: 10, betas: [0.99, 0.0], eps: 1e-30}}}"
    text = run(tmp_path / "runs", "seeds=[1]", "data.test=[tinyworld]", code=1, arms=arms)
    assert "not finite" in text
    assert "Traceback" not in text
    kinds = [json.loads(Path(p).read_text())["kind"] for p in manifests(tmp_path / "runs")]
    assert sorted(kinds) == ["evaluate", "sft", "sft"]  # the teacher's own answers need no student
