"""pass@k: the estimate, its keys in a recipe, and where a report shows it."""

import json
from itertools import combinations

import numpy as np
import pytest

from tadistill.config import Evaluate, validate
from tadistill.metrics import MEAN
from tadistill.plan.arms import make_plan
from tadistill.report import write_report
from tadistill.report.model_card import model_card
from tadistill.results.collect import primary_metric
from tadistill.statistics import macro_interval, pass_at_k

from .builder import SMALL, StudySpec, build_study, key_of


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_the_estimate_is_the_share_of_groups_of_k_with_a_right_response(k):
    right_NK = np.random.default_rng(0).random((20, 6)) < 0.3
    groups = [list(group) for group in combinations(range(6), k)]
    expected = [np.mean([row[group].any() for group in groups]) for row in right_NK]
    found = pass_at_k(right_NK, k)
    assert found.shape == (20, 1)
    assert found[:, 0] == pytest.approx(expected, abs=1e-12)


def test_the_estimate_is_exact_for_many_samples():
    right = np.zeros((3, 1000), bool)
    right[1, :990], right[2] = True, True
    assert pass_at_k(right, 100)[:, 0].tolist() == [0, 1, 1]  # fewer than 100 are wrong


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_samples_is_an_error(k):
    with pytest.raises(ValueError, match=f"`k` is {k}, but there are 3 responses"):
        pass_at_k(np.zeros((2, 3)), k)


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ({"samples": 7}, (10, 20, 30, 40, 50, 51, 52)),
        ({"samples": 2}, (10, 20)),
        ({"seeds": [3], "samples": 3}, (3, 4, 5)),
    ],
)
def test_samples_are_seeds(given, seeds):
    read = Evaluate.model_validate(given)
    assert read.seeds == seeds
    assert Evaluate.model_validate(read.model_dump()) == read
    assert (read.one_response.seeds, Evaluate.model_validate(read.one_response.model_dump()).seeds) == (seeds[:1], seeds[:1])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"pass_at": [6]},
            "pass_at has 6, but the number of responses to a prompt is 5; set `evaluate.samples` to 6, or use smaller values",
        ),
        ({"pass_at": [2, 2]}, "pass_at has 2 twice"),
        ({"pass_at": [0]}, "greater than or equal to 1"),
        ({"samples": 0}, "greater than or equal to 1"),
    ],
)
def test_mistakes(given, words):
    with pytest.raises(ValueError, match=words):
        Evaluate.model_validate(given)


def recipe(columns, **evaluate):
    model = {"load": "scratch:gpt2", "tokenizer": "tinyworld", "config": {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 96}}
    test = [{"load": "tinyworld_choices", "columns": {"choices": "choices", **columns}}]
    data = {"train": "tinyworld", "dev": "tinyworld", "test": test, "template": "plain", "max_length": 64}
    return validate({"study": "t", "seeds": [1], "models": {"s": model}, "data": data, "evaluate": evaluate, "arms": {"s": "s"}})


def test_pass_at_changes_no_stage_and_samples_are_those_of_their_seeds():
    named = {"choice": "outputs"}
    plans = [make_plan(recipe(named, **more)) for more in ({}, {"pass_at": [1, 4]}, {"seeds": [1, 2, 3]}, {"seeds": [1], "samples": 3})]
    plain, passing, three, sampled = (set(plan.stages) for plan in plans)
    assert plain == passing
    assert three == sampled != plain


def test_pass_at_without_right_answers_is_refused():
    with pytest.raises(
        ValueError,
        match=r"evaluate\.pass_at` needs right answers, but no test set names a column that has them; add `columns` to a test set",
    ):
        recipe({}, pass_at=[2])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study whose set `facts` has right numbers: the chain is right more often."""
    made = build_study(tmp_path_factory.mktemp("passes"), StudySpec(SMALL, fact_sets=()))
    plan = made.study_dir / "plan.json"
    content = json.loads(plan.read_text())
    content["recipe"]["evaluate"]["pass_at"] = [1, 2, 3]
    plan.write_text(json.dumps(content))
    rng = np.random.default_rng(1)
    for arm in SMALL:
        for seed in (10, 20):
            path = made.store_dir / (key := key_of("evaluate", arm.name, seed))[:2] / key / "scores.json"
            scores = json.loads(path.read_text())
            scores["facts"]["numeric"] = np.where(rng.random((9, 3)) < 0.3 + 0.1 * arm.gain, 100.0, 0.0).tolist()
            path.write_text(json.dumps(scores))
    return made


def test_results_have_pass_at_k_with_intervals(study):
    results = study.results
    table = results.scores["chain"][10]["facts"]
    assert table["numeric/2"] == pytest.approx(100 * pass_at_k(table["numeric"] > 0, 2))
    assert "numeric/1" not in table  # it is the metric itself
    found = results.summaries["chain", MEAN, "numeric/3"]
    both = np.stack([results.scores["chain"][seed]["facts"]["numeric/3"] for seed in (10, 20)])
    assert (found.mean, found.low, found.high) == (pytest.approx(both.mean()), *macro_interval([both], bounds=(0, 100)))
    assert found.mean > results.summaries["chain", MEAN, "numeric"].mean
    assert primary_metric(results) == "numeric"


def test_pass_at_k_is_in_every_output(study):
    page = write_report(study.results)
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    titles = ["numeric accuracy", "numeric accuracy, pass@2", "numeric accuracy, pass@3", "ROUGE-L"]
    places = [text.index(f"### {title}\n") for title in titles]
    assert places == sorted(places)
    assert all(title in page.read_text(encoding="utf-8") for title in titles)
    content = json.loads(page.with_name("results.json").read_text())
    assert {"numeric", "numeric/2", "numeric/3"} <= {row["metric"] for row in content["differences"]}
    assert {"numeric/2", "numeric/3"} <= {row["metric"] for row in content["rows"]}
    card = model_card(study.results, "chain", 10, study.study_dir, "out")
    assert "| numeric accuracy (percentage points) | facts |" in card
    assert "| numeric accuracy, pass@3 (percentage points) | mean over sets |" in card
