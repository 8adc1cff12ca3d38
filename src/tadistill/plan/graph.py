"""The graph of stages. A plan adds each stage once, after the stages whose output it reads.

A stage's key is a hash of everything that changes its results: settings, fingerprints of data and weights, and its parents' keys.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tadistill.plan.costs import Cost
from tadistill.plan.kinds import KINDS, Spec

_BRACKETS = re.compile(r" \((?!turn |phase )[^()]*\)")
_UPDATES = re.compile(r", \d+ updates")


@dataclass
class Stage:
    """One step of a study, such as a training. It writes its own folder in the store."""

    spec: Spec
    key: str
    label: str
    model: str
    seed: int
    cost: Cost | None
    """The predicted cost. None if it is not known, or if the stage only measures models."""
    teachers: tuple[str, ...] = ()
    """Names of the teachers of a distillation, from big to small. Empty for other stages."""
    arms: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def trains(self) -> bool:
        return self.spec.trains

    @property
    def measures(self) -> bool:
        return self.spec.measures

    @cached_property
    def parents(self) -> dict[str, str]:
        """Keys of the stages that must finish before this one starts, by their role, such as `teacher`."""
        return self.spec.parents

    @property
    def steps(self) -> int | None:
        """Number of optimizer updates. None if the stage trains nothing."""
        return self.spec.steps

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints that are evaluated on dev. The best one is selected."""
        return self.spec.checkpoints

    @property
    def flops(self) -> float | None:
        """Training FLOPs without dev evaluations. None if they are not known."""
        return self.cost.learning if self.cost else None


class Graph:
    """The stages of a study by key. Parents come before children."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}

    def add(self, spec: Spec, label: str, model: str, seed: int, cost: Cost | None, teachers: tuple[str, ...] = ()) -> str:
        """Add a stage unless the graph already has it. Return its key."""
        assert KINDS[spec.kind] is type(spec), f"{type(spec).__name__} is not in KINDS of tadistill.plan.kinds"
        key = spec.key
        if key not in self.stages:
            self.stages[key] = Stage(spec, key, label, model, seed, cost, teachers)
        return key

    def mark(self, key: str, arm: str) -> None:
        """Record that an arm (a path of models) needs this stage and all stages before it."""
        for ancestor in with_ancestors(self.stages, [key]):
            self.stages[ancestor].arms.add(arm)

    def flops(self, key: str | None) -> float | None:
        """Return the training FLOPs of a stage and all its ancestors. Return None if the FLOPs of one of them are unknown.

        Each stage is counted once. A model in the role `like` only sets another model's temperature, so its training is not counted.
        """
        if key is None:
            return 0.0
        parts = [self.stages[k].flops for k in with_ancestors(self.stages, [key], without="like")]
        return None if any(p is None for p in parts) else math.fsum(p for p in parts if p is not None)  # fsum does not depend on the order

    def asked(self, key: str | None, teacher: str) -> float | None:
        """Return the number of answer tokens that a teacher writes or scores for a stage and all its ancestors. None if it is unknown."""
        stages = [self.stages[k] for k in with_ancestors(self.stages, [key] if key else [], without="like")]
        costs = [stage.cost for stage in stages if teacher == (stage.teachers[0] if stage.teachers else stage.model)]
        return None if None in costs else math.fsum(cost.asked for cost in costs if cost is not None)


def with_ancestors(stages: Mapping[str, Stage], keys: Iterable[str], without: str | None = None) -> set[str]:
    """Return the keys of these stages and of all stages before them. Parents in one role, such as `like`, can be left out (`without`)."""
    found, todo = set(), list(keys)
    while todo:
        at = todo.pop()
        if at not in found:
            found.add(at)
            todo += [parent for role, parent in stages[at].parents.items() if role != without]
    return found


def longest_chains(stages: Mapping[str, Stage], takes: Mapping[str, float]) -> dict[str, float]:
    """Return the largest sum of `takes` along a chain of stages, by the first stage. In a chain, each stage is a parent of the next.

    A stage that is not in `takes` counts as 0.
    """
    longest = dict.fromkeys(stages, 0.0)
    for key in reversed(list(stages)):
        longest[key] += takes.get(key, 0.0)
        for parent in stages[key].parents.values():
            longest[parent] = max(longest[parent], longest[key])
    return longest


def distinct_labels(stages: Iterable[tuple[str, str, Collection[str]]], *, short: bool = True) -> dict[str, str]:
    """Return a label for each stage, by the stage's key. No two stages have the same label.

    A full label is, for instance, `distill xl -> s, minillm on teacher_mixed (rounds of 256, 4 updates each), 160 updates, seed 10`. With
    `short`, the text in brackets and the number of updates are left out if the label is unique without them. If two full labels are equal,
    each label gets the names of the stage's arms, or else the start of the stage's key.

    Args:
        stages: the key, the full label and the names of the arms of each stage.
    """
    rows = list({key: (key, label, arms) for key, label, arms in stages}.values())
    full = {key: label for key, label, _ in rows}
    plain = {key: _BRACKETS.sub("", label) for key, label in full.items()}
    brief = {key: _UPDATES.sub("", label) for key, label in plain.items()}
    by_arm = {key: f"{brief[key]} ({', '.join(sorted(arms))})" if arms else full[key] for key, _, arms in rows}
    by_key = {key: f"{brief[key]} ({key[:8]})" for key in full}
    forms = (brief, plain, full, by_arm, by_key) if short else (full, by_arm, by_key)
    found: dict[str, str] = {}
    for form in forms:
        found |= _alone(form, found)
    return {key: found[key] for key in full}


def _alone(form: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    left, used = {key: text for key, text in form.items() if key not in found}, set(found.values())
    counts = Counter(left.values())
    return {key: text for key, text in left.items() if counts[text] == 1 and text not in used}
