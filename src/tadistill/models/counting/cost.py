"""The compute cost of a stage, and its parts. Predicted costs (`plan.costs`) and measured costs (`train.meter`) have the same parts.

A part is named PHASE/MODEL, where MODEL is student or teacher. There are seven phases:
- training: forward and backward passes on training text
- rollout: sampling
- scoring: forward passes over sampled text before an update
- corpus: MiniLLM's loss on the pre-training corpus
- recording: forward passes that store the teacher's outputs
- selection: evaluations on the dev set
- watching: computing metrics of sampled text
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tadistill.models.counting.memory import Memory

NOT_LEARNING = ("selection", "watching")
"""Phases that only measure the student. The comparison of two arms at equal compute ignores these phases."""


@dataclass(frozen=True)
class CostPart:
    """The FLOPs and the token positions of one part of a cost. Forward passes add to all fields, backward passes only to the FLOPs."""

    flops: float = 0.0
    positions: float = 0.0
    """Token positions that pass through the layers, including padding."""
    heads: float = 0.0
    """Token positions at which logits are computed."""

    def __add__(self, other: "CostPart") -> "CostPart":
        return CostPart(self.flops + other.flops, self.positions + other.positions, self.heads + other.heads)


@dataclass(frozen=True)
class Disk:
    """The disk space that a teacher's recorded outputs need."""

    token: float
    """Bytes per token of the text."""
    total: float
    """Estimated bytes of the whole recording."""
    exact: bool
    """False if the number of bytes differs from token to token. `token` and `total` are then upper limits."""


@dataclass(frozen=True)
class Cost:
    """The cost of a stage (one step of a study, such as a training): its parts by name, and some numbers for the whole stage."""

    parts: Mapping[str, CostPart] = field(default_factory=dict)
    padding: float = 0.0
    """Number of padding positions in the parts training/student and corpus/student."""
    published: float | None = None
    """FLOPs that MiniLLM's released code needs for the same number of sampled sequences. None if the method is not MiniLLM."""
    memory: Memory | None = None
    """Estimated memory of one process."""
    kind: str = ""
    """A key of the settings that determine a stage's speed. The number of updates is not one of them. Stages with equal keys are equally
    fast (FLOP/s)."""
    disk: Disk | None = None
    """Disk space of the outputs that the stage records. None if it records none."""
    asked: float = 0.0
    """Number of tokens that the first teacher samples or scores: those of answers and, with MiniLLM, of the pre-training corpus. They are
    tokens of the teacher's tokenizer (for a teacher behind an API, of the students'). Evaluations on the dev set do not count."""
    elsewhere: bool = False
    """True if a model behind an API does the work. Its FLOPs are not known, and are not counted."""

    @property
    def learning(self) -> float:
        """The FLOPs of all phases except selection and watching. With `compute: as X`, an arm gets as many of these FLOPs as arm X."""
        return self.of(*(name for name in self.parts if phase(name) not in NOT_LEARNING))

    @property
    def total(self) -> float:
        return self.of(*self.parts)

    def of(self, *names: str) -> float:
        """Return the sum of the FLOPs of the named parts."""
        return float(sum(self.parts[name].flops for name in names))

    def phases(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            found[phase(name)] = found.get(phase(name), 0.0) + part.flops
        return found


def spans(flops: Mapping[str, float]) -> dict[str, float]:
    """Return the FLOPs of each span. A span is a part of the training loop whose time is measured. `flops` has the FLOPs of each phase.

    The span `sampling` consists of the phases rollout and scoring. The span `training` consists of corpus and training. Every other phase
    is a span of its own.
    """
    found: dict[str, float] = {}
    for name, value in flops.items():
        span = {"rollout": "sampling", "scoring": "sampling", "corpus": "training"}.get(name, name)
        found[span] = found.get(span, 0.0) + value
    return found


def phase(name: str) -> str:
    return name.split("/", 1)[0]
