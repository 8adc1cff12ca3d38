"""Stages and what they stand on: a graph that grows as a plan asks for stages, each once. Imports no torch.

A stage's key is a hash of everything its numbers depend on: its settings, its data's fingerprint, and its parents' keys.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tadistill.plan.costs import Cost
from tadistill.store import key_of

STAGE_VERSION = {"sft": 3, "generate": 2, "signal": 1, "distill": 3, "temper": 1, "evaluate": 4, "analyse": 1, "probe": 1, "pair": 1}
"""Raised by hand when a stage of that kind gives other numbers for the same settings."""

_ROLES = ("student", "teacher", "like", "model", "responses", "signal", "answers", "teacher_answers")
"""The parts of a stage's settings that may stand on another stage."""
Handle = dict[str, Any]
"""Where weights come from: {"stage": key} or {"load": …} (with its fingerprint), {"prune": layers, "of": handle}."""


@dataclass
class Stage:
    """One unit of work with an artifact."""

    kind: str
    key: str
    spec: dict[str, Any]
    parents: dict[str, str]
    """Role -> key of a stage that must be finished first."""
    label: str
    model: str
    seed: int
    cost: Cost | None
    """None where it is not known, or not counted: evaluate and analyse."""
    steps: int | None = None
    checkpoints: int = 0
    """How many dev evaluations its selection chooses among."""
    arms: set[str] = field(default_factory=set)

    @property
    def flops(self) -> float | None:
        """Training FLOPs, without dev evaluations; None where they are not known."""
        return self.cost.learning if self.cost else None


class Graph:
    """Stages by key, parents before children."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}

    def add(self, kind: str, spec: dict, label: str, model: str, seed: int, cost: Cost | None, steps: int | None = None) -> str:
        """The key of the stage with these settings, which is new unless an arm before had it."""
        key = key_of({"kind": kind, "version": STAGE_VERSION[kind], **spec})
        if key not in self.stages:
            handles = {role: spec.get(role) for role in _ROLES} | {
                f"assistant {i + 1}": h for i, h in enumerate(spec.get("assistants", ()))
            }
            parents = {role: k for role, handle in handles.items() for k in _stage_keys(handle)}
            self.stages[key] = Stage(kind, key, spec, parents, label, model, seed, cost, steps, _checkpoints(spec, steps))
        return key

    def mark(self, key: str, arm: str) -> None:
        """Note that an arm needs this stage and all that it stands on."""
        for ancestor in with_ancestors(self.stages, [key]):
            self.stages[ancestor].arms.add(arm)

    def flops(self, key: str | None) -> float | None:
        """Training FLOPs of a stage and everything it builds on, each stage once.

        A model that another is only tempered like teaches nothing, and its training is not counted.
        """
        if key is None:
            return 0.0
        parts = [self.stages[k].flops for k in with_ancestors(self.stages, [key], without="like")]
        return None if any(p is None for p in parts) else math.fsum(p for p in parts if p is not None)  # whatever the order of the set


def with_ancestors(stages: Mapping[str, Stage], keys: Iterable[str], without: str | None = None) -> set[str]:
    """These stages and all that they stand on, but for what stands there in the role `without`."""
    found, todo = set(), list(keys)
    while todo:
        at = todo.pop()
        if at not in found:
            found.add(at)
            todo += [parent for role, parent in stages[at].parents.items() if role != without]
    return found


def _stage_keys(handle: Handle | None) -> list[str]:
    """The stages a handle stands on (at most one)."""
    if handle is None:
        return []
    return [handle["stage"]] if "stage" in handle else _stage_keys(handle.get("of"))


def _checkpoints(spec: dict[str, Any], steps: int | None) -> int:
    """Selection looks at the model every `every` updates and at the end."""
    if steps is None or spec["select"]["metric"] == "last":
        return 0
    return -(-steps // spec["select"]["every"])
