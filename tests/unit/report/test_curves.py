"""Learning curves: what they average, how they are thinned, and which stages they show."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tadistill.results.curves import last_dev_value, learning_curves, load_metrics
from tadistill.results.verdict import comparisons

from .builder import SMALL, ArmSpec, StudySpec, build_study, key_of


def log_of(study, arm, seed):
    path = {spec.name: spec.path for spec in SMALL}[arm]
    key = key_of("distill", path, seed, arm)
    text = (study.store_dir / key[:2] / key / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_an_arm_shows_its_last_stage_and_the_mean_of_its_seeds(shared):
    curves = learning_curves(shared.results)
    (curve,) = (c for c in curves if c.arm == "chain" and c.metric == "dev/loss")
    logs = {seed: [line["dev/loss"] for line in log_of(shared, "chain", seed)] for seed in (10, 20)}
    assert curve.seeds[20] == (list(range(1, 11)), pytest.approx(logs[20], abs=1e-5))
    assert curve.mean[1] == pytest.approx(np.mean(list(logs.values()), axis=0), abs=1e-5)


def test_stages_before_the_last_are_curves_of_their_own(shared):
    curves = learning_curves(shared.results)
    names = {curve.name for curve in curves if curve.arm is None}
    assert names == {"sft s", "distill xl -> l, minillm"}
    assert all(set(curve.seeds) == {10, 20} for curve in curves)


def test_long_logs_are_averaged_into_bins(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, steps=1000))
    curves = learning_curves(study.read())
    (curve,) = (c for c in curves if c.arm == "direct" and c.metric == "train/loss")
    steps, values = curve.seeds[10]
    raw = [line["train/loss"] for line in log_of(study, "direct", 10)]
    assert len(steps) == 60
    assert steps == sorted(steps)
    assert values[0] == pytest.approx(np.mean(raw[:16]), abs=1e-5)
    assert np.mean(values) == pytest.approx(np.mean(raw), abs=0.01)


def test_after_a_resume_the_later_line_of_a_step_wins(study):
    key = key_of("distill", ("xl", "s"), 10, "direct")
    with (study.store_dir / key[:2] / key / "metrics.jsonl").open("a") as log:
        log.write('{"step": 10, "dev/loss": 9.0}\n')
    curves = learning_curves(study.read())
    (curve,) = (c for c in curves if c.arm == "direct" and c.metric == "dev/loss")
    assert curve.seeds[10][0] == list(range(1, 11))
    assert curve.seeds[10][1][-1] == 9.0


def test_an_arm_whose_model_was_only_loaded_has_no_curve(study):
    plan = json.loads((study.study_dir / "plan.json").read_text())
    plan["arms"][0]["final"] = {"10": None, "20": None}
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    curves = learning_curves(study.read())
    assert "direct" not in {curve.arm for curve in curves}


def test_last_dev_value_of_a_teacher_assistant(shared):
    results = shared.results
    last = []
    for seed in (10, 20):
        key = key_of("distill", ("xl", "l"), seed, "")
        text = (shared.store_dir / key[:2] / key / "metrics.jsonl").read_text()
        last.append(json.loads(text.splitlines()[-1])["dev/rouge_l"])
    assert last_dev_value(results, "chain", "l", "rouge_l") == pytest.approx(np.mean(last))
    assert last_dev_value(results, "chain", "xl", "rouge_l") is None


def test_each_log_is_read_once(shared, monkeypatch):
    results, read = replace(shared.results, kept={}), list[str]()
    monkeypatch.setattr("tadistill.results.curves.load_metrics", lambda store, key: read.append(key) or load_metrics(store, key))
    assert learning_curves(results)
    assert last_dev_value(results, "chain", "l", "rouge_l") == last_dev_value(shared.results, "chain", "l", "rouge_l")
    assert len(read) == len({*read})


def test_each_log_is_read_once_for_all_pairs_of_an_arm(tmp_path, monkeypatch):
    chains = [ArmSpec(name, ("xl", name, "s")) for name in ("l", "m")]
    results, read = build_study(tmp_path, StudySpec([ArmSpec("direct", ("xl", "s")), *chains])).read(), list[str]()
    monkeypatch.setattr("tadistill.results.curves.load_metrics", lambda store, key: read.append(key) or load_metrics(store, key))
    assert [(c.other, c.selection is not None) for c in comparisons(results)] == [("direct", True)] * 2
    assert len(read) == len({*read}) == 6


def test_of_a_log_only_curves_and_values_on_dev_are_kept(shared):
    key = key_of("distill", ("xl", "s"), 10, "direct")
    logged = {name for line in log_of(shared, "direct", 10) for name in line}
    kept = load_metrics(shared.results.store, key)
    assert {"step", "train/tokens_per_second"} <= logged - {*kept}
    assert {"train/loss", "dev/rouge_l"} <= {*kept}
    steps, values = kept["train/loss"]
    assert steps.nbytes + values.nbytes == 16 * len(steps)
