"""Verdicts: nothing without history, direct where nothing is, a chain where history shows one; experiments by what they are worth."""

import runpy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tadistill.advise.decide import CONSIDERED, SEEDS, Work, _knowledge_gradient, advise, separate_work
from tadistill.advise.history import Candidate, Edge, EdgeMeasures, Observation
from tadistill.advise.predict import Forecast
from tadistill.advise.words import reason

WORLDS = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "advise_worlds.py"))
SIZES = {"t": 8.0, "a": 2.6, "s": 1.0}


def candidate(path, cost):
    return Candidate(tuple(path), cost, tuple(Edge(a, b, EdgeMeasures(size_ratio=SIZES[a] / SIZES[b])) for a, b in pairwise(path)))


DIRECT, CHAIN = candidate("ts", 1.0), candidate("tas", 2.0)


def study(family, gain, rng, seeds=3, scale="rouge_l"):
    return [
        Observation(family, c.path, seed, c.edges, 2.0, 20 + gain * (len(c.path) > 2) + 0.1 * rng.normal(), scale)
        for c in (DIRECT, CHAIN)
        for seed in range(seeds)
    ]


def test_without_history_direct_with_the_size_law_as_a_hypothesis():
    advice = advise([DIRECT, CHAIN], [], margin=0.3)
    assert (advice.verdict, advice.path) == ("direct", ("t", "s"))
    assert "suggests t > a > s. This is only a hypothesis" in reason(advice)
    reference, chain = advice.options
    assert (reference.basis, chain.basis, chain.p_better) == ("reference", "prior", pytest.approx(0.5))
    assert chain.low < -0.9
    assert chain.high > 0.9
    (experiment,) = advice.next
    assert (experiment.path, experiment.cost) == (("t", "a", "s"), 2 * SEEDS * 2.0)


def test_experiments_are_ranked_by_the_cost_and_the_seeds_of_their_work():
    other = Candidate(("t", "b", "s"), 2.0, (Edge("t", "b", CHAIN.edges[0].measures), Edge("b", "s", CHAIN.edges[1].measures)))
    done = {"a": Work(6, 3, 9.0), "b": Work(3, 1, 0.0)}
    first, second = advise([DIRECT, CHAIN, other], [], margin=0.3, work=lambda chain: done[chain.path[1]]).next
    assert (first.path[1], first.seeds, first.new, first.cost) == ("b", 3, 1, 0.0)
    assert (second.path[1], second.seeds, second.new, second.cost) == ("a", 6, 3, 9.0)
    assert second.gain > first.gain > 0  # more seeds tell more


def test_what_cannot_be_proposed_is_left_out_and_few_experiments_are_planned():
    """All were planned, also if three of 256 are proposed: minutes, in a recipe with other arms and seeds."""
    chains = [replace(CHAIN, path=("t", f"a{i}", "s"), cost=2.0 + i) for i in range(40)]
    asked = []

    def work(chain):
        asked.append(chain.path[1])
        return None if chain.path[1] == "a0" else separate_work(chain)

    advice = advise([DIRECT, *chains], [], margin=0.3, work=work)
    assert [e.path[1] for e in advice.next] == ["a1", "a2", "a3"]
    assert asked == [f"a{i}" for i in range(CONSIDERED + 1)]
    assert advise([DIRECT, *chains], [], margin=0.3, work=lambda chain: None).next == ()


def test_history_without_a_twin_is_no_history():
    runs = [o for o in study("f", 3.0, np.random.default_rng(0)) if len(o.path) > 2]
    advice = advise([DIRECT, CHAIN], runs, margin=0.3)
    assert (advice.verdict, advice.pairs) == ("direct", 0)


def test_many_families_decide_and_one_does_not():
    rng = np.random.default_rng(0)
    many = [o for f in range(8) for o in study(f"f{f}", 2.0 + 0.2 * rng.normal(), rng)]
    advice = advise([DIRECT, CHAIN], many, margin=0.3)
    assert (advice.verdict, advice.path, advice.next) == ("chain", ("t", "a", "s"), ())
    assert advice.options[1].low > 0
    assert (advice.families, advice.pairs) == (8, 8)
    one = advise([DIRECT, CHAIN], many[:6], margin=0.3)
    assert (one.verdict, one.path) == ("inconclusive", ("t", "s"))
    assert "Until more is known, run direct" in reason(one)
    harmful = [o for f in range(8) for o in study(f"f{f}", -1.0 + 0.1 * rng.normal(), rng)]
    assert advise([DIRECT, CHAIN], harmful, margin=0.3).verdict == "direct"


def test_more_candidates_ask_for_more():
    """The same chain under other names: the best of k must be surer."""
    rng = np.random.default_rng(2)
    history = [o for f in range(4) for o in study(f"f{f}", 0.8 + 0.3 * rng.normal(), rng)]
    alone = advise([DIRECT, CHAIN], history, margin=0.3)
    level = alone.options[1].p_better - 1e-3  # just reached by a single candidate
    others = [Candidate(("t", n, "s"), 2.0, (Edge("t", n, CHAIN.edges[0].measures), Edge(n, "s", CHAIN.edges[1].measures))) for n in "bcd"]
    assert advise([DIRECT, CHAIN], history, margin=0.3, level=level).verdict == "chain"
    assert advise([DIRECT, CHAIN, *others], history, margin=0.3, level=level).verdict != "chain"


def test_only_direct_is_direct():
    advice = advise([DIRECT], [], margin=0.3)
    assert (advice.verdict, advice.next, len(advice.options)) == ("direct", (), 1)


def test_the_worth_of_an_experiment_is_the_regret_that_it_saves():
    """Against drawing truths, experiments and decisions."""
    mean, sd, seed_sd, others = -0.3, 0.8, 0.6, 0.1
    rng = np.random.default_rng(0)
    truth = mean + sd * rng.normal(size=400_000)
    seen = truth + seed_sd / np.sqrt(SEEDS) * rng.normal(size=truth.size)
    weight = sd**2 / (sd**2 + seed_sd**2 / SEEDS)
    chosen = np.where(mean + weight * (seen - mean) > others, truth, others)
    forecast = Forecast(np.array([1.0]), np.array([mean]), np.array([sd]), ())
    assert _knowledge_gradient(forecast, others, seed_sd) == pytest.approx(chosen.mean() - others, abs=4e-3)


@pytest.fixture(scope="module")
def verdicts():
    """Verdict and whether the path to run is direct, over 60 worlds with 6 families of history."""

    def run(world, key):
        rng, found = np.random.default_rng(key), []
        for _ in range(60):
            family, *others = (WORLDS["make_family"](rng, world, f"family {i}", 3) for i in range(7))
            advice = advise(family.candidates, [o for other in others for o in other.observations], margin=0.3)
            found.append((advice.verdict, len(advice.path) == 2, family, advice))
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("scatter", [0.0, 0.3])
def test_on_null_worlds_direct_is_what_to_run(verdicts, scatter):
    found = verdicts(WORLDS["World"]("none", family_sd=scatter, edge_sd=scatter), 11)
    assert np.mean([direct for _, direct, _, _ in found]) >= 0.9


@pytest.mark.slow
def test_a_large_effect_is_found_and_a_harmful_one_is_not(verdicts):
    """3 points for every chain, families and edges differing by 0.3, seeds by 0.4."""
    found = verdicts(WORLDS["World"]("constant", 3.0, family_sd=0.3, edge_sd=0.3), 12)
    assert np.mean([verdict == "chain" for verdict, *_ in found]) >= 0.8
    harmful = verdicts(WORLDS["World"]("constant", -1.0, family_sd=0.3, edge_sd=0.3), 13)
    assert all(direct for _, direct, _, _ in harmful)


def test_intervals_hold_the_truth(verdicts):
    found = verdicts(WORLDS["World"]("constant", 1.0, family_sd=0.3, edge_sd=0.3), 14)
    inside = [o.low <= family.truth[o.path] <= o.high for _, _, family, advice in found for o in advice.options[1:]]
    assert np.mean(inside) >= 0.9
