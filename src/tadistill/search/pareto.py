"""Which paths are worth their cost: label-setting over cost, quality and hops, and the front of any set of options.

A label is dropped when another to the same model is at least as good in every respect. Dropping by the lower bound mean - z sd alone
would lose paths: a label with a higher mean and a wider sd can have the lower bound now and the higher one after an edge that adds
variance. So on the way mean and sd are compared each by itself, and the lower bound at the target only.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tadistill.search.lattice import Path

T = TypeVar("T")


@dataclass(frozen=True)
class Label:
    """A way from the root to a model: what it costs, and what quality it is predicted to reach (higher is better)."""

    cost: float
    mean: float
    sd: float
    path: Path

    @property
    def hops(self) -> int:
        """Trainings on the way."""
        return len(self.path) - 1

    def lower(self, z: float) -> float:
        """The quality that is reached with the confidence z stands for."""
        return self.mean - z * self.sd


def pareto_paths(
    nodes: Sequence[str],
    edge_cost: Callable[[str, str], float | None],
    edge_transfer: Callable[[str, str, float, float], tuple[float, float]],
    root: Label,
    target: str,
    *,
    max_hops: int | None = None,
    budget: float = math.inf,
    z: float = 0.0,
) -> list[Label]:
    """The whole front of paths to `target`, cheapest first: no other has cost <=, mean - z sd >= and hops <= (of equal ones the first).

    Exact where costs are not negative and add up along a path, and where `edge_transfer` is monotone: a higher mean, a smaller sd, or
    both never make the learner's mean lower or its sd larger. Limits of hops and budget are filters: they give the front's labels that
    keep to them.

    Args:
        nodes: from big to small; edges go from earlier to later ones.
        edge_cost: of (teacher, learner); None where there is no such edge.
        edge_transfer: (teacher, learner, mean, sd of the teacher) -> (mean, sd of the learner).
        root: the label of the teacher, with a path of one model.
        max_hops: most trainings in a path.
        z: how many sd below the mean a quality is counted; 0 compares means.

    Raises:
        ValueError: z or a cost is negative, or root or target is not among the nodes.
    """
    start = root.path[-1]
    if z < 0:
        raise ValueError(f"z is {z}; the lower bound of a quality needs z >= 0")
    if start not in nodes or target not in nodes:
        raise ValueError(f"{start} and {target} must both be among the nodes {', '.join(nodes)}")
    limit = math.inf if max_hops is None else max_hops
    labels: dict[str, list[Label]] = {start: [root]}
    for learner in nodes[nodes.index(start) + 1 :]:
        found: list[Label] = []
        for teacher, ways in labels.items():
            price = edge_cost(teacher, learner)
            if price is None:
                continue
            if price < 0:
                raise ValueError(f"training {learner} with {teacher} costs {price}; costs cannot be negative")
            for way in ways:
                if way.cost + price <= budget and way.hops < limit:
                    mean, sd = edge_transfer(teacher, learner, way.mean, way.sd)
                    found.append(Label(way.cost + price, mean, sd, (*way.path, learner)))
        labels[learner] = undominated(found, lambda x: (x.cost, -x.mean, x.sd, x.hops))
    return undominated(labels.get(target, []), lambda x: (x.cost, -x.lower(z), x.hops))


def undominated(options: Iterable[T], losses: Callable[[T], tuple[float, ...]]) -> list[T]:
    """Options than which no other is at least as good in every loss (lower is better), by rising losses; of equal ones the first."""
    kept: list[tuple[tuple[float, ...], T]] = []
    for vector, option in sorted(((losses(o), o) for o in options), key=lambda pair: pair[0]):
        # what dominates a vector sorts before it, so looking back is enough
        if not any(all(a <= b for a, b in zip(other, vector, strict=True)) for other, _ in kept):
            kept.append((vector, option))
    return [option for _, option in kept]
