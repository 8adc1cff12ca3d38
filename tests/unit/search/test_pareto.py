"""The front against brute force on random instances, and what its limits do."""

import itertools
import math

import numpy as np
import pytest

from tadistill.search import Label, pareto_paths, undominated

NODES = ("t", "a", "b", "c", "d", "e", "f", "s")
ROOT = Label(0.0, 1.0, 0.1, ("t",))


def instance(rng, n):
    """Nodes, costs (some edges missing, small whole numbers so that ties happen), and a monotone transfer that adds variance."""
    nodes = (*NODES[: n + 1], "s")
    edges = list(itertools.combinations(nodes, 2))
    cost = {e: float(rng.integers(0, 4)) for e in edges if rng.random() < 0.85}
    gain = {e: float(rng.integers(-3, 4)) for e in edges}
    slope = {e: float(rng.choice([0.0, 0.3, 1.0])) for e in edges}
    noise = {e: float(rng.choice([0.0, 0.5, 2.0])) for e in edges}

    def transfer(teacher, learner, mean, sd):
        e = (teacher, learner)
        return gain[e] + slope[e] * mean, math.hypot(slope[e] * sd, noise[e])

    return nodes, lambda u, v: cost.get((u, v)), transfer


def brute_force(nodes, cost, transfer, *, max_hops=None, budget=math.inf, z=0.0):
    """Every path by itself, and none that another beats or that repeats another's numbers."""
    found = []
    for k in range(len(nodes) - 1):
        for middle in itertools.combinations(nodes[1:-1], k):
            path, price, mean, sd = (nodes[0], *middle, nodes[-1]), 0.0, ROOT.mean, ROOT.sd
            for u, v in itertools.pairwise(path):
                edge = cost(u, v)
                price = math.inf if edge is None else price + edge
                mean, sd = transfer(u, v, mean, sd)
            if price <= budget and price < math.inf and (max_hops is None or k + 1 <= max_hops):
                found.append((price, -(mean - z * sd), k + 1))
    return {x for x in found if not any(y != x and all(a <= b for a, b in zip(y, x, strict=True)) for y in found)}


def numbers(labels, z):
    found = [(x.cost, -x.lower(z), x.hops) for x in labels]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("n", range(7))
def test_the_front_is_that_of_brute_force(n):
    rng = np.random.default_rng(n)
    for _ in range(25):
        nodes, cost, transfer = instance(rng, n)
        for limits in ({}, {"max_hops": 2}, {"budget": 3.0}, {"max_hops": 3, "budget": 4.0}):
            for z in (0.0, 1.64):
                assert numbers(pareto_paths(nodes, cost, transfer, ROOT, "s", z=z, **limits), z) == brute_force(
                    nodes, cost, transfer, z=z, **limits
                )


def test_limits_are_filters_of_the_whole_front():
    rng = np.random.default_rng(9)
    for _ in range(20):
        nodes, cost, transfer = instance(rng, 5)
        whole = pareto_paths(nodes, cost, transfer, ROOT, "s", z=1)
        some = pareto_paths(nodes, cost, transfer, ROOT, "s", z=1, max_hops=3, budget=5)
        assert numbers(some, 1) == numbers([x for x in whole if x.hops <= 3 and x.cost <= 5], 1)


def test_pruning_by_the_lower_bound_alone_would_lose_the_best_path():
    """A: 1.0 for sure. B: 2 ± 1, a lower bound of 1 - epsilon. An edge that adds variance turns them round."""
    mean = {("t", "a"): (1.0, 0.0), ("t", "b"): (1.99, 1.0)}

    def transfer(teacher, learner, m, sd):
        if teacher == "t":
            return mean[(teacher, learner if learner != "c" else "a")]
        return m, math.hypot(sd, 1.0)

    def cost(u, v):  # t -> a -> c, t -> b -> c, c -> s: both ways meet in c at the same cost and hops
        return 1.0 if (u, v) in {("t", "a"), ("t", "b"), ("a", "c"), ("b", "c"), ("c", "s")} else None

    def first(teacher, learner, m, sd):
        return (m, sd) if learner == "c" else transfer(teacher, learner, m, sd)

    (best,) = pareto_paths(("t", "a", "b", "c", "s"), cost, first, ROOT, "s", z=1)
    assert best.path == ("t", "b", "c", "s")
    assert best.lower(1) == pytest.approx(1.99 - math.sqrt(2))


def test_mistakes():
    with pytest.raises(ValueError, match="z >= 0"):
        pareto_paths(("t", "s"), lambda u, v: 1.0, lambda u, v, m, s: (m, s), ROOT, "s", z=-1)
    with pytest.raises(ValueError, match="cannot be negative"):
        pareto_paths(("t", "s"), lambda u, v: -1.0, lambda u, v, m, s: (m, s), ROOT, "s")
    with pytest.raises(ValueError, match="among the nodes"):
        pareto_paths(("t", "s"), lambda u, v: 1.0, lambda u, v, m, s: (m, s), ROOT, "x")


def test_undominated_keeps_the_first_of_equals():
    assert undominated([("a", 2, 1), ("b", 1, 2), ("c", 2, 1), ("d", 2, 2)], lambda x: x[1:]) == [("b", 1, 2), ("a", 2, 1)]
