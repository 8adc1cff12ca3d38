"""Where a difference comes from: the divergence from the teacher, greedy decoding, and the metric at matched entropy.

Reverse KL sharpens a student, and a sharper student scores higher when its answers are sampled at temperature 1, although
it knows no more. Such a gain moves along the curve of metric over entropy and does not lift it: it is gone when both
arms decode greedily, or when each is decoded at the temperature that gives both the same entropy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from tadistill.results.collect import Results, common_seeds, difference, sets_with, stack
from tadistill.statistics import Difference, macro_difference

Curves = Literal["matched", "apart", "not measured"]


@dataclass(frozen=True)
class Point:
    """One decoding of an arm: its mean entropy (nats a token), its mean of the metric, and the metric's name there."""

    entropy: float
    value: float
    metric: str


@dataclass(frozen=True)
class Mechanism:
    """Paired differences ``arm - other`` that tell knowledge from sharpening; None where nothing was measured."""

    forward_kl: Difference | None
    reverse_kl: Difference | None
    entropy: Difference | None
    greedy: Difference | None
    curves: Curves
    matched: Difference | None
    """The metric at ``at_entropy``, each arm interpolated between its decodings; the interpolation's weights count as known."""
    at_entropy: float | None


def mechanism(results: Results, arm: str, other: str, metric: str) -> Mechanism:
    """All of it for one pair of arms on the mean over sets."""
    greedy = greedy_decoding(results)
    curves, matched, at_entropy = _at_matched_entropy(results, arm, other, metric)
    return Mechanism(
        forward_kl=difference(results, arm, other, "forward_kl"),
        reverse_kl=difference(results, arm, other, "reverse_kl"),
        entropy=difference(results, arm, other, "entropy"),
        greedy=difference(results, arm, other, f"{metric}@{greedy}") if greedy else None,
        curves=curves,
        matched=matched,
        at_entropy=at_entropy,
    )


def greedy_decoding(results: Results) -> str | None:
    """The name of the study's first decoding at temperature 0 that changes nothing else."""
    return next((name for name in temperatures(results) if results.plan.decodings[name]["temperature"] == 0), None)


def temperatures(results: Results) -> list[str]:
    """The other decodings that change only the temperature (and perhaps their seeds): the points of one curve."""
    allowed = {"temperature", "seeds"}
    return [name for name, changes in results.plan.decodings.items() if "temperature" in changes and set(changes) <= allowed]


def entropy_curve(results: Results, arm: str, metric: str, seeds: Sequence[int]) -> list[Point]:
    """The arm's decodings by rising entropy, over the given seeds and the sets that have the metric."""
    sets = sets_with(results, metric)
    points: list[Point] = []
    for suffix in ("", *(f"@{name}" for name in temperatures(results))):
        names = [f"{which}{suffix}" for which in ("entropy", metric)]
        tables = [results.scores[arm][seed].get(member, {}) for seed in seeds for member in sets]
        if tables and all(name in table for name in names for table in tables):
            entropy, value = (float(np.mean([table[name].mean() for table in tables])) for name in names)
            points.append(Point(entropy, value, names[1]))
    return sorted(points, key=lambda point: point.entropy)


def _at_matched_entropy(results: Results, arm: str, other: str, metric: str) -> tuple[Curves, Difference | None, float | None]:
    """At the lower of the two entropies of the main decoding: the sharper arm as it is, the other one sharpened to it."""
    sets = sets_with(results, metric)
    seeds = common_seeds(results, arm, other, sets, metric)
    both = [entropy_curve(results, name, metric, seeds) for name in (arm, other)]
    mains = [point.entropy for points in both for point in points if point.metric == metric]
    if not seeds or len(mains) < 2 or min(map(len, both)) < 2:
        return "not measured", None, None
    target = min(mains)
    if not all(points[0].entropy <= target <= points[-1].entropy for points in both):
        return "apart", None, None
    mine, theirs = ([_blend(results, n, seeds, m, _weights(p, target)) for m in sets] for n, p in zip((arm, other), both, strict=True))
    return "matched", macro_difference(mine, theirs), target


def _weights(points: Sequence[Point], target: float) -> dict[str, float]:
    """Linear interpolation between the two decodings around the entropy."""
    left, right = next(pair for pair in pairwise(points) if pair[0].entropy <= target <= pair[1].entropy)
    width = right.entropy - left.entropy
    share = (target - left.entropy) / width if width else 0.0
    return {left.metric: 1 - share, right.metric: share}


def _blend(results: Results, arm: str, seeds: Sequence[int], set_name: str, weights: dict[str, float]) -> np.ndarray:
    return np.sum([weight * stack(results, arm, seeds, set_name, metric) for metric, weight in weights.items()], axis=0)
