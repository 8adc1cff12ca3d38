"""The parts of a compute cost. Both the prediction (`plan.costs`) and the measurement (`train.meter`) use them.

A part is named PHASE/MODEL, where MODEL is student or teacher. The phases are: training (forward and backward on training text), rollout
(sampling), scoring (forward passes over rollouts before the update), corpus (MiniLLM's loss on plain text), recording (storing the
teacher's outputs), selection (evaluations on dev) and watching (metrics of rollouts).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

NOT_LEARNING = ("selection", "watching")
"""Phases that only measure the student. The compute of an equal-compute baseline does not include them."""


@dataclass(frozen=True)
class CostPart:
    """The FLOPs and token positions of one part. Forward passes add both. Backward passes add only FLOPs."""

    flops: float = 0.0
    positions: float = 0.0
    """Token positions that pass through the layers, including padding."""
    heads: float = 0.0
    """Token positions at which logits are computed."""

    def __add__(self, other: "CostPart") -> "CostPart":
        return CostPart(self.flops + other.flops, self.positions + other.positions, self.heads + other.heads)


@dataclass(frozen=True)
class Cost:
    """The cost of a stage (one step of a study, such as a training): its parts by name, and estimates for the whole stage."""

    parts: Mapping[str, CostPart] = field(default_factory=dict)
    padding: float = 0.0
    """Number of padding positions in the student's training and corpus parts."""
    published: float | None = None
    """FLOPs that MiniLLM's released code needs for the same number of rollouts; None for other methods."""
    memory: float | None = None
    """Estimated peak memory, in bytes."""
    kind: str = ""
    """A string that is equal for stages that differ only in their number of updates. Such stages run at the same speed."""

    @property
    def learning(self) -> float:
        """FLOPs of all phases except selection and watching. An equal-compute baseline (`compute: as ARM`) matches this number."""
        return self.of(*(name for name in self.parts if phase(name) not in NOT_LEARNING))

    @property
    def total(self) -> float:
        return self.of(*self.parts)

    def of(self, *names: str) -> float:
        """Return the sum of the FLOPs of the parts `names`."""
        return float(sum(self.parts[name].flops for name in names))

    def phases(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            found[phase(name)] = found.get(phase(name), 0.0) + part.flops
        return found


def spans(flops: Mapping[str, float]) -> dict[str, float]:
    """Add up the FLOPs of phases that the training loop times together. `flops` has one value per phase.

    Rollout and scoring become `sampling`. Corpus and training become `training`.
    """
    found: dict[str, float] = {}
    for name, value in flops.items():
        span = {"rollout": "sampling", "scoring": "sampling", "corpus": "training"}.get(name, name)
        found[span] = found.get(span, 0.0) + value
    return found


def phase(name: str) -> str:
    return name.split("/", 1)[0]
