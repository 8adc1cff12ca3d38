"""The parts that a stage's cost is made of, the same in prediction (`plan.costs`) and in measurement (`train.meter`).

A part's name is PHASE/WHO, WHO being student or teacher. Phases: training (forward and backward on training text), rollout (sampling),
scoring (passes over rollouts before they are trained on), corpus (MiniLLM's plain text), recording (a teacher's signal), selection (dev
evaluations), watching (metrics of rollouts).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

NOT_LEARNING = ("selection", "watching")
"""Phases that look at the student and change nothing in it; they do not count where computes are matched."""


@dataclass(frozen=True)
class Part:
    """FLOPs, and the tokens behind them: each forward pass counts its tokens once, a backward pass none."""

    flops: float = 0.0
    positions: float = 0.0
    """Token positions that went through the layers, padding included."""
    heads: float = 0.0
    """Positions whose logits were made."""

    def __add__(self, other: "Part") -> "Part":
        return Part(self.flops + other.flops, self.positions + other.positions, self.heads + other.heads)


@dataclass(frozen=True)
class Cost:
    """A stage's parts by name."""

    parts: Mapping[str, Part] = field(default_factory=dict)
    padding: float = 0.0
    """Positions of training text that are padding, of those in training and corpus parts of the student."""
    published: float | None = None
    """For MiniLLM: FLOPs of the released code's calls on as many rollouts."""
    memory: float | None = None
    """Estimated bytes at the peak."""
    kind: str = ""
    """Equal for stages that do the same, however long: they have one speed."""

    @property
    def learning(self) -> float:
        """FLOPs of all but selection and watching: what `compute: as ARM` matches."""
        return self.of(*(name for name in self.parts if phase(name) not in NOT_LEARNING))

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.of(*self.parts)

    def of(self, *names: str) -> float:
        """FLOPs of some parts."""
        return float(sum(self.parts[name].flops for name in names))

    def phases(self) -> dict[str, float]:
        """FLOPs by phase."""
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            found[phase(name)] = found.get(phase(name), 0.0) + part.flops
        return found


def spans(flops: Mapping[str, float]) -> dict[str, float]:
    """FLOPs of phases joined as the loop's clock takes them: scoring is part of sampling, the corpus of training."""
    found: dict[str, float] = {}
    for name, value in flops.items():
        span = {"rollout": "sampling", "scoring": "sampling", "corpus": "training"}.get(name, name)
        found[span] = found.get(span, 0.0) + value
    return found


def phase(name: str) -> str:
    """The phase of a part's name."""
    return name.split("/", 1)[0]
