"""What is known of a teacher and its learner before any distillation, and what a path of such pairs adds to direct distillation.

A measure is reported by itself. `contrasts` turns the measures of a path into the numbers that the predictor's regression sees: the gap
of every hop, discounted by how far it is from the student, less the gap of the direct hop.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import pairwise
from math import isfinite, log

from tadistill.errors import ConfigError

SIZE_LAW = 2.5
"""Teacher's over learner's parameters that the law of capacity gap (Zhang et al. 2025, 2311.07052) asks for."""


@dataclass(frozen=True)
class EdgeMeasures:
    """Measures of one (teacher, learner) pair, each by itself; None where it was not taken. KLs are nats per token."""

    size_ratio: float | None = None
    """Teacher's parameters over the learner's."""
    reverse_kl: float | None = None
    """KL(learner || teacher) on the learner's samples, before distillation."""
    forward_kl: float | None = None
    """KL(teacher || learner) on references."""
    overlap: float | None = None
    """Share of the k most likely tokens that both have, on the learner's prefixes."""
    mass: float | None = None
    """The learner's probability of the teacher's k most likely tokens."""
    entropy_gap: float | None = None
    """H(teacher) - H(learner), on the learner's prefixes."""
    loss_ratio: float | None = None
    """The teacher's loss on references over the learner's."""
    advantage: float | None = None
    """E[log p_teacher - log p_learner] on references, per token."""
    bias: float | None = None
    """E[log p_teacher - log p_original] on the student's samples: what this teacher would add to the chain's error budget."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not isfinite(value):
                raise ConfigError(f"measure {name} is {value}; give a finite number, or None where it was not taken")
        for name in ("size_ratio", "loss_ratio"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"measure {name} is {value}; a ratio is positive")


@dataclass(frozen=True)
class Edge:
    """A model that may teach another."""

    teacher: str
    learner: str
    measures: EdgeMeasures = field(default_factory=EdgeMeasures)


@dataclass(frozen=True)
class Candidate:
    """A path that may be run. `cost` is its training compute as a multiple of the direct path's."""

    path: tuple[str, ...]
    cost: float
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        check_path(self.path, self.edges)
        if not (isfinite(self.cost) and self.cost > 0):
            raise ConfigError(f"the cost of {' > '.join(self.path)} is {self.cost}; give a positive multiple of the direct path's")


@dataclass(frozen=True)
class Observation:
    """One finished arm of an earlier study, for one training seed; dev values only."""

    family: str
    """Teacher, data and method: what runs share that are no independent evidence (`history.family_of`)."""
    path: tuple[str, ...]
    seed: int
    edges: tuple[Edge, ...]
    cost: float
    """Training compute as a multiple of the family's direct path."""
    quality: float
    """The dev metric of the selected checkpoint, higher is better."""
    scale: str
    """Which metric, and so which unit, `quality` has."""
    study: str = ""

    def __post_init__(self) -> None:
        check_path(self.path, self.edges)
        if not (isfinite(self.cost) and self.cost > 0 and isfinite(self.quality)):
            raise ConfigError(
                f"an observation of {' > '.join(self.path)} has cost {self.cost} and quality {self.quality}; both must be finite"
            )


def check_path(path: tuple[str, ...], edges: tuple[Edge, ...]) -> None:
    """Raise where the edges are not the hops of the path."""
    if len(path) < 2 or [(e.teacher, e.learner) for e in edges] != list(pairwise(path)):
        raise ConfigError(f"path {' > '.join(path)} needs at least two models and one edge for each of its hops, in order")


@lru_cache(maxsize=4096)
def gaps(measures: EdgeMeasures) -> dict[str, float | None]:
    """The gap between teacher and learner, by the measure's name; larger is wider.

    One of each kind, since history is short: forward KL, mass and advantage say much the same as reverse KL, overlap and loss.
    """
    m = measures
    size = None if m.size_ratio is None else log(m.size_ratio)
    return {
        "size": size,
        "size_law": None if size is None else (size - log(SIZE_LAW)) ** 2,
        "reverse_kl": m.reverse_kl,
        "overlap": None if m.overlap is None else 1 - m.overlap,
        "entropy_gap": m.entropy_gap,
        "loss": None if m.loss_ratio is None else -log(m.loss_ratio),
    }


def hop_weights(hops: int, carry: float) -> list[float]:
    """How much of each hop reaches the student, first hop first: 1 for the last, `carry` times less for each before it."""
    return [carry ** (hops - 1 - i) for i in range(hops)]


def contrasts(edges: tuple[Edge, ...], direct: Edge, cost: float, carry: float) -> dict[str, float | None]:
    """Per measure the chain's discounted sum of gaps less the direct hop's gap; and the log of the cost. All 0 for direct at cost 1."""
    found: dict[str, float | None] = {"cost": log(cost)}
    of_chain, weights = [gaps(e.measures) for e in edges], hop_weights(len(edges), carry)
    for name, base in gaps(direct.measures).items():
        total = -base if base is not None else None
        for weight, gap in zip(weights, of_chain, strict=True):
            value = gap[name]
            total = total + weight * value if total is not None and value is not None else None
        found[name] = total
    return found


def measures_from(values: Mapping[str, float | None]) -> EdgeMeasures:
    """Measures from a stored mapping; names of a later version are ignored."""
    known = {f.name for f in fields(EdgeMeasures)}
    return EdgeMeasures(**{name: value for name, value in values.items() if name in known})
