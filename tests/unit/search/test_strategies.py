"""Strategies on the public tables and on random ones."""

import itertools

import numpy as np
import pytest
from tests.unit.search.tables import FORK_CNN, FORK_RESNET, TAKD

from tadistill.config.arm import ModelPath
from tadistill.search.strategies import Round, beam, best_prefix, drive, exhaustive, halving, make_lattice, single

CNN = make_lattice("10", ["8", "6", "4"], "2")
RESNET = make_lattice("110", ["56", "32", "20"], "8")


def lookup(table):
    return lambda asked: {path: table[path] for path in asked.paths}


@pytest.mark.parametrize(("table", "lattice", "best"), [(TAKD, CNN, 45.14), (FORK_CNN, CNN, 42.00), (FORK_RESNET, RESNET, 32.17)])
def test_best_prefix_finds_the_best_path_of_every_public_table(table, lattice, best):
    assert max(value for path, value in table.items() if path in lattice.paths) == best
    everything, heuristic, two = (drive(s, lookup(table)) for s in (exhaustive(lattice), best_prefix(lattice), beam(lattice, width=2)))
    for found in (everything, heuristic, two):
        assert table[found.path] == best
    assert (everything.trainings, heuristic.trainings, two.trainings) == (15, 10, 13)


def test_a_tie_goes_to_the_shorter_path_and_that_matters():
    """10-6 and 10-8-6 are equal in the fork's table; keeping the longer one costs 0.16."""
    assert drive(best_prefix(CNN), lookup(FORK_CNN)).path == ("10", "6", "4", "2")
    other_way = FORK_CNN | {("10", "8", "6"): FORK_CNN[("10", "8", "6")] + 1e-9}
    found = drive(best_prefix(CNN), lookup(other_way)).path
    assert 42.00 - FORK_CNN[found] == pytest.approx(0.16)
    flat = dict.fromkeys(CNN.prefixes(), 1.0)
    for strategy in (exhaustive(CNN), single(CNN), best_prefix(CNN), beam(CNN, width=2), halving(CNN, rungs=[0.5, 1])):
        assert drive(strategy, lookup(flat)).path == ("10", "2")


def test_single_looks_at_one_assistant_only():
    found = drive(single(CNN), lookup(TAKD))
    assert found.path == ("10", "4", "2")
    assert found.trainings == 7


def test_a_round_asks_only_for_what_continues_what_was_measured():
    seen: set[ModelPath] = {("10",)}

    def measure(asked: Round):
        assert asked.paths
        assert all(path[:-1] in seen for path in asked.paths)
        assert not seen & set(asked.paths)
        seen.update(asked.paths)
        return {path: TAKD[path] for path in asked.paths}

    for width in (1, 2, 8):
        seen = {("10",)}
        found = drive(beam(CNN, width=width), measure)
        assert found.quality == {path: TAKD[path] for path in seen if len(path) > 1}
    assert len(seen) == 16  # a beam wide enough is the exhaustive search


def random_table(lattice, rng):
    return {path: float(rng.normal()) for path in lattice.prefixes()}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_counts_of_trainings(n):
    lattice, rng = make_lattice("t", [f"a{i}" for i in range(n)], "s"), np.random.default_rng(n)
    table = random_table(lattice, rng)
    assert drive(exhaustive(lattice), lookup(table)).trainings == 2 ** (n + 1) - 1
    assert drive(single(lattice), lookup(table)).trainings == 2 * n + 1
    assert drive(best_prefix(lattice), lookup(table)).trainings == (n + 1) * (n + 2) // 2
    for width in (2, 3):
        assert drive(beam(lattice, width=width), lookup(table)).trainings <= width * (n + 1) * (n + 2) // 2


def test_best_prefix_is_right_where_the_bellman_condition_holds_and_only_there():
    rng, wrong = np.random.default_rng(0), 0
    lattice = make_lattice("t", ["a", "b", "c"], "s")
    for _ in range(100):
        gap = {edge: rng.normal() for edge in itertools.combinations(lattice.nodes, 2)}
        monotone: dict[ModelPath, float] = {("t",): 0.0}
        for path in lattice.prefixes():
            monotone[path] = 0.5 * monotone[path[:-1]] + gap[path[-2:]]  # a better teacher makes a better learner
        best = max(lattice.paths, key=monotone.__getitem__)
        assert drive(best_prefix(lattice), lookup(monotone)).path == best
        anything = random_table(lattice, rng)
        chosen = drive(best_prefix(lattice), lookup(anything)).path
        assert drive(exhaustive(lattice), lookup(anything)).path == max(lattice.paths, key=anything.__getitem__)
        wrong += anything[chosen] < max(anything[p] for p in lattice.paths)
    assert wrong > 10


def test_halving_keeps_the_better_half_of_each_rung():
    asked: list[Round] = []

    def measure(round_: Round):
        asked.append(round_)
        return {path: TAKD[path] for path in round_.paths}

    found = drive(halving(CNN, rungs=[0.1, 0.3, 1.0]), measure)
    assert [(r.share, len(r.paths)) for r in asked] == [(0.1, 8), (0.3, 4), (1.0, 2)]
    assert found.path == ("10", "8", "6", "4", "2")
    assert set(found.quality) == {("10", "8", "6", "4", "2"), ("10", "6", "4", "2")}  # whole runs only
    # all 15 stages, then those of four paths, then 4 + 3 of two paths that share none
    assert found.trainings == 15 + 10 + 7


@pytest.mark.parametrize("rungs", [[1.0], [0.5, 0.5, 1], [0.1, 0.5], [0, 1]])
def test_halving_needs_two_rising_rungs_that_end_with_one(rungs):
    with pytest.raises(ValueError, match="at least two rising numbers"):
        drive(halving(CNN, rungs=rungs), lookup(TAKD))


def test_limits_keep_strategies_to_what_may_be_tried():
    limited = make_lattice("10", ["8", "6", "4"], "2", max_assistants=2, cost=lambda p: 1.0 + ("6" in p), budget=1.5)
    # without 6, TAKD's table breaks the Bellman condition: 10-8-4 is better than 10-4 and teaches worse
    assert drive(best_prefix(limited), lookup(TAKD)).path == ("10", "8", "4", "2")
    for strategy in (exhaustive(limited), single(limited), beam(limited, width=2), halving(limited, rungs=[0.5, 1])):
        found = drive(strategy, lookup(TAKD))
        assert found.path == ("10", "4", "2")
        assert not any("6" in path for round_ in found.rounds for path in round_.paths)
    with pytest.raises(ValueError, match="at most one assistant"):
        drive(single(make_lattice("10", ["8", "6"], "2", cost=lambda p: -len(p), budget=-4)), lookup(TAKD))
