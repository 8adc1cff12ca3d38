"""The parts of a stage's cost, for prediction (`plan.costs`) and measurement (`train.meter`) alike.

A part is called PHASE/MODEL, where MODEL is student or teacher. Phases: training (forward and backward on training text), rollout
(sampling), scoring (passes over rollouts before training on them), corpus (MiniLLM's plain text), recording (a teacher's signal), selection
(dev evaluations), watching (metrics of rollouts).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

NOT_LEARNING = ("selection", "watching")
"""Phases that measure the student without training it; an equal-compute baseline does not count them."""


@dataclass(frozen=True)
class Part:
    """FLOPs and token positions. A forward pass counts its positions once, a backward pass counts none."""

    flops: float = 0.0
    positions: float = 0.0
    """Token positions that went through the layers, padding included."""
    heads: float = 0.0
    """Positions whose logits were computed."""

    def __add__(self, other: "Part") -> "Part":
        return Part(self.flops + other.flops, self.positions + other.positions, self.heads + other.heads)


@dataclass(frozen=True)
class Cost:
    """The cost of a stage: its parts by name, and estimates of the whole stage."""

    parts: Mapping[str, Part] = field(default_factory=dict)
    padding: float = 0.0
    """Padding among the positions of the student's training and corpus parts."""
    published: float | None = None
    """FLOPs of MiniLLM's released code on as many rollouts; None for other methods."""
    memory: float | None = None
    """Estimated bytes at the peak."""
    kind: str = ""
    """Equal for stages that differ in their number of updates only, and therefore run at the same speed."""

    @property
    def learning(self) -> float:
        """FLOPs without selection and watching, which `compute: as ARM` matches."""
        return self.of(*(name for name in self.parts if phase(name) not in NOT_LEARNING))

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.of(*self.parts)

    def of(self, *names: str) -> float:
        """Return the FLOPs of some parts."""
        return float(sum(self.parts[name].flops for name in names))

    def phases(self) -> dict[str, float]:
        """Return the FLOPs by phase."""
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            found[phase(name)] = found.get(phase(name), 0.0) + part.flops
        return found


def spans(flops: Mapping[str, float]) -> dict[str, float]:
    """Add up the FLOPs of phases that the training loop times together: rollout and scoring as sampling, corpus as training."""
    found: dict[str, float] = {}
    for name, value in flops.items():
        span = {"rollout": "sampling", "scoring": "sampling", "corpus": "training"}.get(name, name)
        found[span] = found.get(span, 0.0) + value
    return found


def phase(name: str) -> str:
    """Return the phase in a part's name."""
    return name.split("/", 1)[0]
