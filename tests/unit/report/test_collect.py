"""results.json against numbers computed from the synthetic scores, missing evaluations, and damaged files."""

import csv
import gc
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from rich.console import Console

from tadistill.config.arm import direct_arm
from tadistill.disk import digest
from tadistill.errors import StoreError
from tadistill.metrics import MEAN, metric_of
from tadistill.report import summary_table, write_report
from tadistill.report.explain import missing_text
from tadistill.report.results_json import write_results
from tadistill.results import collect
from tadistill.results.collect import primary_metric, read_results
from tadistill.results.compare import compare, direct_of, twin_of
from tadistill.results.measured import stream_predictions
from tadistill.results.number_text import number
from tadistill.results.sample_answers import references
from tadistill.results.verdict import comparisons
from tadistill.statistics import macro_difference, macro_interval
from tadistill.store import Store

from .builder import SMALL, ArmSpec, StudySpec, build_study, key_of

ROW_KEYS = ["arm", "model", "parameters", "seed", "set", "metric", "value", "low", "high", "stage"]


def test_rows_hold_the_scores(shared):
    write_results(shared.results)
    content = json.loads((shared.study_dir / "results.json").read_text())
    keys = "study created command data answer findings training_shares cautions models arms rows means references differences comparisons"
    figures = "verdicts explanations budgets paths lengths curves exposure calibration ledger stages versions"
    assert list(content) == [*keys.split(), *figures.split()]
    page = (Path(__file__).parents[3] / "docs" / "reference" / "results-json.md").read_text(encoding="utf-8")
    ours = {key: value[:1] for key, value in content.items() if isinstance(value, list)} | {"answer": [content["answer"]]}
    keys = [*content, *(key for rows in ours.values() for row in rows if isinstance(row, dict) for key in row)]
    assert [key for key in keys if f"`{key}`" not in page] == []  # the documentation names all keys
    for row in content["means"]:
        alone = [
            r["value"] for r in content["rows"] if (r["arm"], r["metric"]) == (row["arm"], row["metric"]) and r["set"] in (row["set"], "")
        ]
        assert row["set"] == "mean" or row["value"] == pytest.approx(np.mean(alone), abs=1e-5)
    assert content["command"] == "tadistill run recipes/demo.yaml"
    whole_set = ("perplexity", "distinct_1", "distinct_2", "distinct_4", "ece_tokens")
    assert {row["metric"] for row in content["rows"] if row["low"] is None} == set(whole_set)
    for row in (row for row in content["rows"] if row["metric"] not in whole_set):
        assert list(row) == ROW_KEYS
        values = shared.scores[row["arm"], row["seed"]][row["set"]][row["metric"]]
        assert row["value"] == pytest.approx(values.mean(), abs=1e-6)
        assert [row["low"], row["high"]] == pytest.approx(macro_interval([values[None]], bounds=metric_of(row["metric"]).bounds), abs=1e-6)
        assert (row["model"], row["parameters"]) == ("s", 124_439_808)
        analysed = row["metric"] in ("forward_kl", "reverse_kl") or row["metric"].startswith("budget/")
        what = row["metric"].partition("@")[2] or ("analyse" if analysed else "evaluate")
        assert row["stage"] == key_of(what, row["arm"], row["seed"])


def test_csv_holds_the_rows_of_results_json(shared):
    write_results(shared.results)
    rows = json.loads((shared.study_dir / "results.json").read_text())["rows"]
    with (shared.study_dir / "results.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]


def test_the_summary_holds_means_and_differences(shared):
    write_results(shared.results)
    content = json.loads((shared.study_dir / "results.json").read_text())
    with (shared.study_dir / "results-summary.csv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    means, differences = [row for row in rows if not row["other"]], [row for row in rows if row["other"]]
    ends = ("low", "high")
    wanted = [[row["arm"], row["set"], row["metric"], row["value"], *(row[end] for end in ends)] for row in content["means"]]
    assert [
        [row["arm"], row["set"], row["metric"], float(row["value"]), *(float(row[e]) if row[e] else None for e in ends)] for row in means
    ] == wanted
    assert {row["seeds"] for row in means} == {str(len(content["means"][0]["per_seed"]))}
    wanted = [[row["arm"], row["other"], row["where"], row["mean"]] for row in content["differences"]]
    assert [[row["arm"], row["other"], row["set"], float(row["value"])] for row in differences] == wanted


def test_a_measured_model_that_is_no_arm_is_a_reference(tmp_path):
    study = build_study(tmp_path, StudySpec(arms=[*SMALL, ArmSpec("teacher", ("xl",), gain=6.0)]))
    before = study.read()
    write_results(before)
    content = json.loads((study.study_dir / "results.json").read_text())
    assert content["references"] == []
    plan = json.loads((study.study_dir / "plan.json").read_text())
    plan["arms"] = [arm for arm in plan["arms"] if arm["name"] != "teacher"]
    plan["stages"] = [stage for stage in plan["stages"] if stage["arms"] != ["teacher"] or stage["label"].startswith("evaluate teacher, ")]
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    after = study.read()
    write_report(after)
    found = json.loads((study.study_dir / "results.json").read_text())
    measured = [
        {"model": "xl"} | row for row in content["means"] if row["arm"] == "teacher" and metric_of(row["metric"]).stage != "analyse"
    ]
    assert found["references"] == [{k: v for k, v in row.items() if k != "arm"} for row in measured if "@" not in row["metric"]]
    assert found["rows"] == [row for row in content["rows"] if row["arm"] != "teacher"]
    with (study.study_dir / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["arm"] for row in rows[: len(found["rows"])]] == [row["arm"] for row in found["rows"]]
    assert {(row["arm"], row["model"]) for row in rows[len(found["rows"]) :]} == {("", "xl")}
    mean = next(row["value"] for row in found["references"] if (row["set"], row["metric"]) == ("mean", "rouge_l"))
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table(after))
    (line,) = (line for line in console.file.getvalue().splitlines() if "xl (teacher, no arm)" in line)
    assert f" {number(mean, 'rouge_l')} [" in line
    assert all("xl (teacher, no arm)" in (study.study_dir / name).read_text() for name in ("report.md", "report.html"))
    key = next(stage["key"] for stage in plan["stages"] if stage["label"].startswith("evaluate teacher, "))
    (study.store_dir / key[:2] / key / "manifest.json").unlink()
    assert references(study.read()).plan.arms[0].evaluate.keys() == {20}


def test_the_same_files_give_the_same_bytes(study):
    write_results(study.read())
    first = (study.study_dir / "results.json").read_bytes()
    write_results(study.read())
    assert (study.study_dir / "results.json").read_bytes() == first
    assert sorted(path.name for path in study.study_dir.iterdir()) == ["plan.json", "results-summary.csv", "results.csv", "results.json"]


def test_summaries_average_seeds_and_the_mean_weighs_sets_equally(shared):
    results = shared.results
    for spec in SMALL:
        means = {seed: {name: table["rouge_l"].mean() for name, table in shared.scores[spec.name, seed].items()} for seed in (10, 20)}
        for name in ("dolly", "facts"):
            expected = np.mean([means[10][name], means[20][name]])
            assert results.summaries[spec.name, name, "rouge_l"].mean == pytest.approx(expected)
        summary = results.summaries[spec.name, MEAN, "rouge_l"]
        assert summary.mean == pytest.approx(np.mean([list(by_set.values()) for by_set in means.values()]))
        assert summary.low < summary.mean < summary.high
        assert summary.per_seed == pytest.approx({seed: np.mean(list(by_set.values())) for seed, by_set in means.items()})


def test_metrics_that_few_sets_have_are_averaged_over_those(shared):
    results = shared.results
    assert primary_metric(results) == "fact_accuracy"
    only, mean = (results.summaries["chain", name, "fact_accuracy"] for name in ("facts", MEAN))
    assert only == mean
    assert ("chain", "dolly", "fact_accuracy") not in results.summaries


def test_rouge_is_primary_without_facts(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, fact_sets=()))
    assert primary_metric(study.read()) == "rouge_l"


def test_comparison_is_paired(shared):
    results = shared.results
    difference, seeds = compare(results, "chain", "direct-long", "fact_accuracy")
    stacks = [
        np.stack([shared.scores[arm, seed]["facts"]["fact_accuracy"].mean(axis=1, keepdims=True) for seed in (10, 20)])
        for arm in ("chain", "direct-long")
    ]
    assert difference == macro_difference(*([stack] for stack in stacks), bounds=(0, 100))
    assert seeds == (10, 20)


def test_a_chain_knows_its_twin_and_its_direct_arm(shared):
    results = shared.results
    direct, chain, twin = results.plan.arms
    assert twin_of(results, chain) is twin
    assert twin_of(results, direct) is None
    assert direct_of(results, chain) is direct


def test_a_model_that_teaches_itself_is_measured_against_the_direct_arm(tmp_path):
    arms = [ArmSpec("direct", ("xl", "s")), ArmSpec("itself", ("s", "s"), text="s > s, context")]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1,), teacher=None)).read()  # `analyse: false`
    assert direct_of(results, results.plan.arms[1]) is results.plan.arms[0]


def test_unfinished_evaluations_are_listed_and_their_arms_kept(unfinished):
    results = unfinished.results
    assert [(entry.arm, entry.seed) for entry in results.missing] == [("direct", 20), ("chain", 10), ("chain", 20)]
    assert results.missing[0].stage == key_of("evaluate", "direct", 20)
    assert {row.arm for row in results.rows} == {"direct", "direct-long"}
    assert list(results.summaries["direct", MEAN, "rouge_l"].per_seed) == [10]
    assert compare(results, "direct", "direct-long", "rouge_l")[1] == (10,)
    assert compare(results, "chain", "direct-long", "rouge_l") is None


def test_two_arms_may_share_an_evaluation(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL))
    plan = json.loads((study.study_dir / "plan.json").read_text())
    plan["arms"].append({**plan["arms"][0], "name": "same"})
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    results = study.read()
    assert results.summaries["same", MEAN, "loss"] == results.summaries["direct", MEAN, "loss"]


def test_the_garbage_collector_rests_while_results_are_read(study, monkeypatch):
    found, load = list[bool](), collect.load_corpus

    def damaged(store, key):
        raise StoreError("damaged")

    monkeypatch.setattr(collect, "load_corpus", lambda store, key: found.append(gc.isenabled()) or load(store, key))
    study.read()
    assert set(found) == {False}
    assert gc.isenabled()
    monkeypatch.setattr(collect, "load_corpus", damaged)
    with pytest.raises(StoreError, match="damaged"):
        study.read()
    assert gc.isenabled()


def test_no_study_says_what_to_run(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere.plan\.json does not exist.*`tadistill run RECIPE`"):
        read_results(tmp_path / "nowhere", Store(tmp_path / "store"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"plan\.json cannot be read"),
        ("{}", r"plan\.json is damaged \(KeyError: 'study'\)"),
        ("[]", r"plan\.json is damaged"),
    ],
)
def test_a_damaged_plan_is_named(study, content, message):
    (study.study_dir / "plan.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        write_results(study.read())


def test_an_arm_over_an_undeclared_model_is_damage(study):
    plan = json.loads((study.study_dir / "plan.json").read_text())
    del plan["models"]["l"]
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(StoreError, match=r"plan\.json is damaged \(KeyError: 'l'\)"):
        write_results(study.read())


def test_a_published_result_without_scores_is_damage(study):
    plan = json.loads((study.study_dir / "plan.json").read_text())
    plan["arms"][0]["published"] = {"source": "a paper"}
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(StoreError, match=r"plan\.json is damaged \(KeyError: 'rouge_l'\); run `tadistill run RECIPE` to write it again$"):
        write_results(study.read())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"dolly": ', "Expecting value"),
        ('{"dolly": {"rouge_l": [[NaN], [2]]}}', "NaN or infinite"),
    ],
)
def test_damaged_scores_are_named(study, content, message):
    key = key_of("evaluate", "chain", 20)
    (study.store_dir / key[:2] / key / "scores.json").write_text(content)
    with pytest.raises(StoreError, match=rf"{key}.scores\.json cannot be read \(.*{message}") as caught:
        write_results(study.read())
    assert "\n" not in str(caught.value)
    assert not (study.study_dir / "results.json").exists()


def test_empty_predictions_are_named(study):
    """The first row of none was a bare StopIteration."""
    path = study.store_dir / (key := key_of("evaluate", "chain", 20))[:2] / key / "predictions.jsonl"
    path.write_text("")
    with pytest.raises(StoreError, match=r"predictions\.jsonl cannot be read \(it is empty\): delete .* and run .* again"):
        next(stream_predictions(study.results.store, key))


@pytest.mark.parametrize("name", ["scores.json", "corpus.json", "predictions.jsonl", "manifest.json"])
def test_a_stage_that_lost_a_file_is_missing(study, name):
    """The store's rule, so that the report names what `tadistill plan` would run."""
    key = key_of("evaluate", "chain", 20)
    (study.store_dir / key[:2] / key / name).unlink()
    results = study.read()
    assert not results.store.finished(key)
    assert [(entry.arm, entry.seed, entry.stage) for entry in results.missing] == [("chain", 20, key)]
    assert "1 of 6 evaluations are not finished: chain (seed 20)." in missing_text(results)
    alone = replace(results, plan=replace(results.plan, arms=(replace(results.plan.arms[0], evaluate={20: key}),)))
    assert missing_text(alone).startswith("The evaluation is not finished. `tadistill run ")


def test_an_unknown_metric_is_an_error(study):
    for name, change in (("scores", lambda t: t.update(novelty=[[1.0]])), ("corpus", lambda t: t["numbers"].update(novelty=1.0))):
        key = key_of("evaluate", "chain", 20)
        path = study.store_dir / key[:2] / key / f"{name}.json"
        before = path.read_text()
        content = json.loads(before)
        change(content["dolly"])
        path.write_text(json.dumps(content))
        with pytest.raises(StoreError, match=rf"{name}\.json: metric `novelty` is not known"):
            study.read()
        path.write_text(before)


def test_an_infinite_perplexity_is_reported(study):
    """exp(loss) of a model that diverged; JSON has no infinity."""
    path = study.store_dir / (key := key_of("evaluate", "chain", 20))[:2] / key / "corpus.json"
    corpus = json.loads(path.read_text())
    corpus["dolly"]["numbers"]["perplexity"] = float("inf")
    path.write_text(json.dumps(corpus))
    write_report(study.read())
    rows = json.loads((study.study_dir / "results.json").read_text())["rows"]
    at = ("chain", 20, "dolly", "perplexity")
    assert [r["value"] for r in rows if (r["arm"], r["seed"], r["set"], r["metric"]) == at] == [None]


def test_a_score_outside_its_bounds_is_an_error(study):
    path = study.store_dir / (key := key_of("evaluate", "chain", 20))[:2] / key / "scores.json"
    scores = json.loads(path.read_text())
    scores["dolly"]["rouge_l"][3][0] = 250.0
    path.write_text(json.dumps(scores))
    with pytest.raises(StoreError, match=r"1 score of `rouge_l` lies outside 0 to 100, .* instance 250; give the metric another `unit`"):
        write_results(study.read())


def test_a_set_with_the_name_of_the_mean_is_an_error(study):
    """A recipe cannot name a set so; earlier versions accepted it, and showed the mean over sets as the set's value."""
    path = study.store_dir / (key := key_of("evaluate", "chain", 20))[:2] / key / "scores.json"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps({"mean": scores.pop("dolly"), **scores}))
    with pytest.raises(StoreError, match=r"scores\.json has a test set called `mean`, .*; rename the set and run it again"):
        study.read()


def test_different_prompts_cannot_be_compared(study):
    key = key_of("evaluate", "chain", 20)
    path = study.store_dir / key[:2] / key / "scores.json"
    scores = json.loads(path.read_text())
    scores["dolly"]["rouge_l"].pop()
    path.write_text(json.dumps(scores))
    with pytest.raises(
        StoreError,
        match=r"dolly/rouge_l has 11 prompts, but the evaluation answered 12\): delete .*`tadistill run recipes/demo.yaml` again",
    ):
        write_results(study.read())


def test_a_teacher_may_be_an_arm(tmp_path):
    study = build_study(tmp_path, StudySpec([*SMALL, ArmSpec("teacher", ("xl",), gain=5, flops=None)]))
    results = study.read()
    assert direct_of(results, results.plan.arms[-1]) is None


def test_one_reading_computes_each_interval_once(study, monkeypatch):
    """The files, the page and the terminal's table share it."""
    calls = []
    monkeypatch.setattr(collect, "macro_interval", lambda strata, **given: calls.append(given) or macro_interval(strata, **given))
    results = study.read()
    assert calls == []  # nothing is computed before it is asked for
    write_report(results)
    once = len(calls)
    summary_table(results)
    assert once == len(calls) > 0
    assert comparisons(results) is comparisons(results)
    assert comparisons(results) is not comparisons(study.read())


class _Arm(NamedTuple):
    path: tuple[str, ...]
    is_plain: bool = True
    compute: str | None = None
    method: str = "kd"


def test_the_direct_arm():
    twin, started, kd = _Arm(("xl", "s"), compute="as chain"), _Arm(("xl", "s"), is_plain=False), _Arm(("xl", "s"))
    minillm, other = _Arm(("xl", "s"), method="minillm"), _Arm(("l", "s"))
    arms = [_Arm(("xl", "l", "s")), twin, started, other, kd, minillm]
    assert direct_arm(arms, "xl", "s") is kd
    assert direct_arm(arms, None, "s") is other
    assert direct_arm(arms, "xl", "s", "minillm") is minillm
    assert direct_arm(arms, "xl", "s", "gkd") is None
    assert direct_arm(arms, "xl", "s", "gkd", any_method=True) is kd
    assert direct_arm(arms, "xl", "l") is None


def test_one_teacher_is_never_dense(study):
    plan = json.loads((study.study_dir / "plan.json").read_text())
    for arm in plan["arms"]:
        arm["text"] = f"{' > '.join(arm['path'])}, dense"
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    assert [arm.is_plain for arm in study.read().plan.arms] == [True, False, True]


def test_changed_files_stop_the_report_before_anything_is_written(study):
    """The digests of all files that a report reads are checked first."""
    for kind, name in (("evaluate", "predictions.jsonl"), ("analyse", "exposure.json")):
        folder = study.store_dir / (key := key_of(kind, "chain", 20))[:2] / key
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = digest(folder / name)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    study.read()
    for kind, name in (("evaluate", "predictions.jsonl"), ("analyse", "exposure.json")):
        folder = study.store_dir / (key := key_of(kind, "chain", 20))[:2] / key
        (folder / name).write_text((folder / name).read_text() + "\n")
    with pytest.raises(
        StoreError, match=r"predictions\.jsonl has changed .*exposure\.json has changed .*`tadistill run recipes/demo.yaml`"
    ):
        study.read()
