"""Paths, shared prefixes, and what the public tables say about the Bellman condition."""

import pytest
from tests.unit.search.tables import FORK_CNN, FORK_RESNET, TAKD

from tadistill.search.strategies import Concordance, concordance, count_paths, make_lattice, trainings


def test_all_paths_fewest_assistants_first():
    found = make_lattice("t", ["a", "b"], "s")
    assert found.paths == (("t", "s"), ("t", "a", "s"), ("t", "b", "s"), ("t", "a", "b", "s"))
    assert found.prefixes() == (("t", "s"), ("t", "a"), ("t", "b"), ("t", "a", "s"), ("t", "b", "s"), ("t", "a", "b"), ("t", "a", "b", "s"))


@pytest.mark.parametrize("n", range(6))
def test_counts(n):
    names = [f"a{i}" for i in range(n)]
    everything = make_lattice("t", names, "s")
    assert len(everything.paths) == 2**n == count_paths(n)
    assert len(everything.prefixes()) == 2 ** (n + 1) - 1
    one = make_lattice("t", names, "s", max_assistants=1)
    assert len(one.paths) == n + 1 == count_paths(n, 1)
    assert len(one.prefixes()) == 2 * n + 1


def test_a_prefix_stands_behind_what_it_continues():
    order = trainings([("t", "a", "b", "s"), ("t", "b", "s")])
    assert len(order) == 5
    assert all(path[:-1] in order[:i] for i, path in enumerate(order) if len(path) > 2)


def test_a_budget_is_a_filter_and_may_leave_nothing():
    cost = {("t", "s"): 1.0, ("t", "a", "s"): 1.7}
    assert make_lattice("t", ["a"], "s", cost=cost.__getitem__, budget=1.5).paths == (("t", "s"),)
    assert make_lattice("t", ["a"], "s", cost=cost.__getitem__, budget=0.5).paths == ()


def test_a_model_may_stand_in_the_lattice_once():
    with pytest.raises(ValueError, match="named twice"):
        make_lattice("t", ["a", "a"], "s")


def test_concordance_of_the_public_tables():
    assert concordance(TAKD) == Concordance(6, 2, 0)
    # 10-6 and 10-8-6 scored the same: one tie between teachers, and so two tied pairs of learners
    assert concordance(FORK_CNN) == Concordance(3, 3, 2)
    assert concordance(FORK_RESNET) == Concordance(4, 4, 0)
    assert concordance(TAKD).share == 0.75
    assert concordance({("t", "s"): 1.0}).share is None
