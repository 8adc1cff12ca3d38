"""Rows of a data set: arms are paired by row and not by position, and rows that are left out are counted wherever prompts are."""

import csv
import json

import numpy as np
import pytest

from tadistill.errors import StoreError
from tadistill.report import summary_table, write_report
from tadistill.report.model_card import model_card
from tadistill.report.plain_text import side_by_side
from tadistill.results.collect import primary_metric
from tadistill.results.compare import compare
from tadistill.statistics import macro_difference

from .builder import SMALL, ArmSpec, Study, StudySpec, build_study, key_of
from .test_outputs import render

KINDS = ("evaluate", "analyse", "greedy", "t0.5")
COUNTS = {
    "role": "test",
    "set": "dolly",
    "rows": 14,
    "long": 2,
    "empty": 0,
    "cut": 0,
    "unopened": 0,
    "shortened": 0,
    "limit": 256,
    "max_length": 512,
}
COUNTS |= {
    "long_context": 0,
    "cut_context": 0,
    "context_limit": 0,
    "answers": 0,
    "more": 0,
    "turns": 0,
    "unlearnt": 0,
    "silent": 0,
    "marked": 0,
    "roles": 0,
}


def keep(study: Study, arm: str, seed: int, rows: list[int], numbers: list[int]) -> None:
    """Leave only some prompts of dolly in an arm's evaluations, in this order; `numbers` are their rows in the file."""
    for kind in KINDS:
        folder = study.store_dir / (key := key_of(kind, arm, seed))[:2] / key
        scores = json.loads((folder / "scores.json").read_text())
        scores["dolly"] = {metric: [values[i] for i in rows] for metric, values in scores["dolly"].items()}
        (folder / "scores.json").write_text(json.dumps(scores))
        if kind == "evaluate":
            corpus = json.loads((folder / "corpus.json").read_text())
            corpus["dolly"] |= {"reference_length": [corpus["dolly"]["reference_length"][i] for i in rows]}
            for name, found in corpus.items():
                found["rows"] = numbers if name == "dolly" else list(range(len(found["reference_length"])))
            (folder / "corpus.json").write_text(json.dumps(corpus))
            manifest = json.loads((folder / "manifest.json").read_text())
            rest = COUNTS | {"set": "facts", "rows": 9, "long": 0}
            manifest["rows"] = [COUNTS | {"rows": 12, "long": 12 - len(rows)}, rest]
            (folder / "manifest.json").write_text(json.dumps(manifest))


def test_arms_are_paired_by_row(tmp_path):
    """One arm lacks row 3, the other row 7 and is in another order: equal counts, but only ten common rows."""
    study = build_study(tmp_path, StudySpec(SMALL))
    mine, theirs = [i for i in range(12) if i != 3], [i for i in (*range(6, 12), *range(6)) if i != 7]
    for seed in (10, 20):
        keep(study, "chain", seed, mine, mine)
        keep(study, "direct-long", seed, theirs, theirs)
    results = study.read()
    common = [i for i in range(12) if i not in (3, 7)]
    stacks = [
        np.stack([study.scores[arm, seed]["dolly"]["rouge_l"][common].mean(axis=1, keepdims=True) for seed in (10, 20)])
        for arm in ("chain", "direct-long")
    ]
    found, _ = compare(results, "chain", "direct-long", "rouge_l", "dolly")
    assert found == macro_difference(*([stack] for stack in stacks), bounds=(0, 100))
    assert results.compared["dolly"].tolist() == common
    assert {len(results.scores[arm][10]["dolly"][m]) for arm in ("direct", "chain") for m in ("rouge_l", "loss", "rouge_l@greedy")} == {10}
    shown = render(summary_table(results), 400)
    assert "dolly (test, chain, direct-long): 11 of 12 rows; 1 longer than data.max_prompt (256); arms are compared on the 10 rows" in shown
    assert "Metrics with one value per set use all rows that a model answered." in shown
    assert "dolly, prompt 3\n" not in render(side_by_side(results, 50))


def test_evaluations_without_a_common_row_cannot_be_compared(study):
    keep(study, "chain", 20, [0, 1], [50, 51])
    with pytest.raises(StoreError, match=r"the evaluations of dolly have no row in common .*raise data\.max_prompt"):
        study.read()


@pytest.mark.parametrize("old", [False, True])
def test_left_out_rows_are_counted_everywhere(study, old):
    """By the stages of this version, and by those of earlier ones, which stored only how many rows were left out."""
    for arm in SMALL:
        for seed in (10, 20):
            folder = study.store_dir / (key := key_of("evaluate", arm.name, seed))[:2] / key
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest |= {"left_out": {"dolly": 2, "facts": 0}} if old else {"rows": [COUNTS]}
            (folder / "manifest.json").write_text(json.dumps(manifest))
    plan = json.loads((study.study_dir / "plan.json").read_text())
    plan["recipe"]["data"] |= {"max_prompt": 256, "max_length": 512}
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    results = study.read()
    write_report(results)
    said = "dolly (test): 12 of 14 rows; 2 longer than data.max_prompt (256)"
    assert said in render(summary_table(results), 400)
    for name in ("report.html", "report.md"):
        assert said in (study.study_dir / name).read_text(encoding="utf-8")
    card = model_card(results, "chain", 10, study.study_dir, "out")
    assert said in card
    (split,) = [s for s in json.loads((study.study_dir / "results.json").read_text())["data"] if s["set"] == "dolly"]
    assert split == COUNTS | {"unknown": 0, "tokens": 0, "used": 12, "compared": 12, "arms": []}


def test_training_rows_are_counted_too(study):
    key = json.loads((study.study_dir / "plan.json").read_text())["arms"][1]["final"]["10"]
    path = study.store_dir / key[:2] / key / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": [COUNTS | {"role": "train", "shortened": 3}]}))
    text = render(summary_table(study.read()), 400)
    assert "dolly (train): 12 of 14 rows; 2 longer than data.max_prompt (256); 3 with a reference cut at data.max_length (512)" in text


@pytest.mark.parametrize("measured", [True, False])
def test_references_that_rouge_cannot_see_are_a_caution(tmp_path, measured):
    """Where ROUGE-L for all scripts is measured, the verdict rests on it; an earlier version did not measure it."""
    study = build_study(tmp_path, StudySpec(SMALL, sets={"zh": 6}, fact_sets=()))
    for arm in SMALL:
        for seed in (10, 20):
            folder = study.store_dir / (key := key_of("evaluate", arm.name, seed))[:2] / key
            corpus, scores = (json.loads((folder / name).read_text()) for name in ("corpus.json", "scores.json"))
            corpus["zh"]["unseen"] = 0.98
            if measured:
                scores["zh"]["rouge_l_unicode"] = scores["zh"]["rouge_l"]
            (folder / "corpus.json").write_text(json.dumps(corpus))
            (folder / "scores.json").write_text(json.dumps(scores))
    results = study.read()
    text = render(summary_table(results), 400)
    assert "ignores the other letters of the references: 98 % in zh" in text
    assert primary_metric(results) == ("rouge_l_unicode" if measured else "rouge_l")
    assert ("ROUGE-L (all scripts) uses all letters, and arms are compared by this metric." in text) == measured


# --- bounds and ties ------------------------------------------------------------------------------------------------------


def test_no_interval_leaves_the_range_of_its_metric(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, sets={"dolly": 3, "facts": 3}))
    results = study.read()
    write_report(results)
    percent = ("fact_accuracy", "rouge_l", "exact_match", "repetition", "self_bleu")
    with (study.study_dir / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["low"]]
    assert {row["metric"] for row in rows} >= set(percent)
    for row in rows:
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
        if row["metric"].partition("@")[0] in percent:
            assert 0 <= float(row["low"]) <= float(row["high"]) <= 100
        if not row["metric"].startswith("budget"):
            assert float(row["low"]) >= 0
    for summary in (s for (_, _, metric), s in results.summaries.items() if metric in percent):
        assert 0 <= summary.low <= summary.high <= 100
    for c in json.loads((study.study_dir / "results.json").read_text())["comparisons"]:
        assert -100 <= c["low"] <= c["high"] <= 100


def test_equal_arms_are_a_tie_and_detect_nothing(tmp_path):
    study = build_study(tmp_path, StudySpec([ArmSpec("sft", ("s",)), ArmSpec("kd", ("xl", "s"))], seeds=(10, 20, 30)))
    for arm in ("sft", "kd"):
        for seed in (10, 20, 30):
            for kind in KINDS:
                path = study.store_dir / (key := key_of(kind, arm, seed))[:2] / key / "scores.json"
                content = json.loads(path.read_text())
                for table in content.values():
                    table |= {m: np.zeros_like(v).tolist() for m, v in table.items() if m in ("fact_accuracy", "rouge_l")}
                path.write_text(json.dumps(content))
    results = study.read()
    write_report(results)
    markdown = (study.study_dir / "report.md").read_text(encoding="utf-8")
    assert "Both arms have the same mean, 0.0 % fact accuracy" in markdown
    assert "Highest mean" not in markdown
    assert "**0.0" not in markdown
    (line,) = [line for line in markdown.split("### Comparisons")[1].splitlines() if "| undecided |" in line]
    assert "| – | undecided |" in line  # the detectable difference is not known
    assert json.loads((study.study_dir / "results.json").read_text())["comparisons"][0]["detectable"] is None
