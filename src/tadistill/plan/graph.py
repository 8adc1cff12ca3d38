"""Stages and the stages that they need: a graph that grows while a plan asks for stages. Each stage is in it once.

A stage's key is a hash of everything that its numbers depend on: settings, fingerprints of data and weights, and the keys of its parents.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tadistill.plan.costs import Cost
from tadistill.plan.specs import KINDS, Spec


@dataclass
class Stage:
    """One unit of work with an artifact."""

    spec: Spec
    key: str
    label: str
    model: str
    seed: int
    cost: Cost | None
    """None where it is not known, and for stages that only measure."""
    arms: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        """The name of the stage's kind."""
        return self.spec.kind

    @property
    def trains(self) -> bool:
        """True if the stage updates weights."""
        return self.spec.trains

    @property
    def measures(self) -> bool:
        """True if the stage only looks at models."""
        return self.spec.measures

    @cached_property
    def parents(self) -> dict[str, str]:
        """Role -> key of a stage that must finish first."""
        return self.spec.parents

    @property
    def steps(self) -> int | None:
        """Updates of the optimizer; None where nothing is trained."""
        return self.spec.steps

    @property
    def checkpoints(self) -> int:
        """The number of dev evaluations that selection chooses among."""
        return self.spec.checkpoints

    @property
    def flops(self) -> float | None:
        """Training FLOPs, without dev evaluations; None where they are not known."""
        return self.cost.learning if self.cost else None


class Graph:
    """Stages by key, parents before children."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}

    def add(self, spec: Spec, label: str, model: str, seed: int, cost: Cost | None) -> str:
        """Add a stage, unless it is there already, and return its key."""
        assert KINDS[spec.kind] is type(spec), f"{type(spec).__name__} is not in KINDS of tadistill.plan.specs"
        key = spec.key
        if key not in self.stages:
            self.stages[key] = Stage(spec, key, label, model, seed, cost)
        return key

    def mark(self, key: str, arm: str) -> None:
        """Note that an arm needs this stage and all its ancestors."""
        for ancestor in with_ancestors(self.stages, [key]):
            self.stages[ancestor].arms.add(arm)

    def flops(self, key: str | None) -> float | None:
        """Return the training FLOPs of a stage and its ancestors, each counted once; None where some are not known.

        A model that is only used to choose another model's temperature (role `like`) is not counted.
        """
        if key is None:
            return 0.0
        parts = [self.stages[k].flops for k in with_ancestors(self.stages, [key], without="like")]
        return None if any(p is None for p in parts) else math.fsum(p for p in parts if p is not None)  # whatever the order of the set


def with_ancestors(stages: Mapping[str, Stage], keys: Iterable[str], without: str | None = None) -> set[str]:
    """Return these stages and all their ancestors, not following parents in the role `without`."""
    found, todo = set(), list(keys)
    while todo:
        at = todo.pop()
        if at not in found:
            found.add(at)
            todo += [parent for role, parent in stages[at].parents.items() if role != without]
    return found
