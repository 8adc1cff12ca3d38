"""Chains of finished studies beside direct distillation at equal compute, seed by seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log, prod

import numpy as np

from tadistill.advise.edges import Edge, Observation

EQUAL = 0.05
"""Costs that differ by less than this share count as equal."""


@dataclass(frozen=True)
class Pair:
    """One chain of one family less its twin; one difference a seed."""

    family: str
    path: tuple[str, ...]
    edges: tuple[Edge, ...]
    direct: Edge
    cost: float
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    """Higher is better for the chain."""
    twin: tuple[float, ...]
    """The costs of the direct runs that stand for the twin: one, or the two that it was interpolated between."""

    @cached_property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.differences))


def pair_up(observations: Sequence[Observation]) -> list[Pair]:
    """Every chain that has a twin: direct, same family and seed, at the chain's cost within 5 %, else between a cheaper and a dearer one.

    Between two direct runs the twin is interpolated in the log of the cost. Chains without either are left out, never compared with a
    cheaper direct run.
    """
    directs: dict[tuple[str, str, str, str, int], dict[float, Observation]] = {}
    for o in observations:
        if len(o.path) == 2:
            directs.setdefault(_ends(o), {})[o.cost] = o
    found: dict[tuple[tuple[str, ...], tuple[str, ...], float, tuple[float, ...]], list[tuple[Observation, Edge, float]]] = {}
    for o in observations:
        beside = directs.get(_ends(o), {})
        twin = _twin(o.cost, {cost: d.quality for cost, d in beside.items()}) if len(o.path) > 2 else None
        if twin is not None:
            costs, quality = twin
            found.setdefault((_ends(o)[:-1], o.path, o.cost, costs), []).append((o, beside[costs[0]].edges[0], o.quality - quality))
    return [_pair(rows, costs) for (*_, costs), rows in found.items()]


def _pair(rows: Sequence[tuple[Observation, Edge, float]], twin: tuple[float, ...]) -> Pair:
    """One chain with all its seeds: (run, direct hop, difference)."""
    first, direct, _ = rows[0]
    seeds, differences = tuple(o.seed for o, *_ in rows), tuple(difference for *_, difference in rows)
    return Pair(first.family, first.path, first.edges, direct, first.cost, seeds, differences, twin)


def _ends(o: Observation) -> tuple[str, str, str, str, int]:
    """What a chain and its twin share. The size ratio tells apart students that two studies call by one name."""
    ratio = prod(e.measures.size_ratio or 1.0 for e in o.edges)
    return o.family, o.path[0], o.path[-1], f"{ratio:.6g}", o.seed


def _twin(cost: float, directs: dict[float, float]) -> tuple[tuple[float, ...], float] | None:
    """The costs that stand for the twin and its quality."""
    nearest = min(directs, key=lambda c: abs(log(c / cost)), default=None)
    if nearest is None:
        return None
    if abs(nearest / cost - 1) <= EQUAL:
        return (nearest,), directs[nearest]
    below, above = [c for c in directs if c < cost], [c for c in directs if c > cost]
    if not (below and above):
        return None
    low, high = max(below), min(above)
    share = log(cost / low) / log(high / low)
    return (low, high), (1 - share) * directs[low] + share * directs[high]
