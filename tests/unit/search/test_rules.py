"""Rules of thumb on published sizes and scores."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from tests.unit.search.tables import TAKD, TAKD_SCRATCH

from tadistill.search.choice import Choice, Tried, choice_notes, choice_table
from tadistill.search.strategies import Chosen, Round, geometric_mean, lambda_tradeoff, performance_mean, size_law

GPT2 = {"xl": 1557.6e6, "l": 774.0e6, "m": 354.8e6, "s": 124.4e6}
LAYERS = {name: float(name) for name in ("10", "8", "6", "4", "2")}


def test_the_size_law_on_the_gpt2_ladder():
    assert size_law("xl", ["l", "m"], "s", GPT2) == ("xl", "l", "m", "s")
    assert size_law("xl", ["l", "m"], "s", GPT2, max_assistants=1) == ("xl", "m", "s")
    assert size_law("xl", ["l", "m"], "s", GPT2, max_assistants=0) == ("xl", "s")
    assert size_law("l", ["m"], "s", GPT2) == ("l", "m", "s")


def test_the_size_law_skips_models_that_are_too_near():
    sizes = {"t": 100.0, "a": 90.0, "b": 30.0, "c": 12.0, "s": 10.0}
    assert size_law("t", ["a", "b", "c"], "s", sizes) == ("t", "a", "b", "s")
    assert size_law("t", ["a"], "s", {"t": 10.0, "a": 10.0, "s": 10.0}) == ("t", "s")


def test_performance_mean_picks_four_layers_in_takd():
    assert performance_mean("10", ["8", "6", "4"], "2", TAKD_SCRATCH) == ("10", "4", "2")


def test_geometric_mean():
    assert geometric_mean("xl", ["l", "m"], "s", GPT2) == ("xl", "m", "s")
    assert geometric_mean("10", ["8", "6", "4"], "2", LAYERS) == ("10", "4", "2")


def test_lambda_sweep_of_takd_switches_from_six_to_four():
    scores = {name: TAKD[("10", name)] / 100 for name in ("8", "6", "4")}
    first, second = lambda_tradeoff("10", ["8", "6", "4"], scores, LAYERS)
    assert (first.assistant, second.assistant) == ("6", "4")
    assert first == Chosen("6", 0.0, second.low)
    assert second.high == math.inf
    assert second.low == pytest.approx((0.5713 - 0.5094) / 0.2)  # 0.3095: MiniDisc's default 0.2 picks 6, 0.5 picks 4


def test_lambda_sweep_is_the_maximum_everywhere():
    rng = np.random.default_rng(0)
    for _ in range(50):
        names = [f"a{i}" for i in range(5)]
        sizes = {name: float(x) for name, x in zip(names, sorted(rng.integers(1, 9, 5), reverse=True), strict=True)} | {"t": 10.0}
        scores = {name: float(rng.integers(0, 6)) / 5 for name in names}
        sweep = lambda_tradeoff("t", names, scores, sizes)
        assert sweep[0].low == 0
        assert all(a.high == b.low for a, b in itertools.pairwise(sweep))
        for lam in rng.uniform(0, 20, 30):
            chosen = next(c for c in sweep if c.low <= lam <= c.high).assistant
            value = {name: scores[name] + lam * (1 - sizes[name] / sizes["t"]) for name in names}
            assert value[chosen] == pytest.approx(max(value.values()))


def test_a_tie_is_called_a_tie(tmp_path):
    tried = [Tried(path, 1.0, (20.0, 21.0)) for path in (("t", "s"), ("t", "a", "s"))] + [Tried(("t", "b", "s"), 1.0, (19.0, 19.0))]
    common = {
        "study": "s",
        "strategy": "exhaustive",
        "metric": "rouge_l",
        "sign": 1,
        "rounds": ((Round(tuple(t.path for t in tried)), {}),),
        "distillations": 3,
    }
    choice = Choice(tried=tuple(tried), direct=1.0, trained=3.0, discarded=1.0, **common)
    said = (
        "2 paths have the same dev value: t > s, t > a > s. The path with fewer models is chosen, or else the one with bigger assistants."
    )
    assert said in choice_notes(choice, None, tmp_path)
    alone = Choice(tried=tuple(tried[1:]), direct=1.0, trained=3.0, discarded=1.0, **common)
    assert not any("same dev value" in note for note in choice_notes(alone, None, tmp_path))
    assert [column.header for column in choice_table(choice).columns][4:6] == ["range over seeds", "front"]
    first = replace(choice, tried=tuple(replace(each, values=each.values[:1]) for each in tried))
    assert [column.header for column in choice_table(first).columns][3:] == ["dev rouge_l", "front", ""]  # one seed has no range
