"""The graph of stages, and the base classes of their kinds (`plan.kinds`): a stage's key, its inputs and its predicted cost.

A plan adds each stage once, after the stages whose output it reads. A stage's key is a hash of everything that changes its results:
settings, fingerprints of data and weights, and its parents' keys.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from tadistill.config import Method
from tadistill.config.remote import LONGER
from tadistill.models.flops_and_memory import Cost
from tadistill.plan.inputs import Encoding, Handle, Input, Output, Part, Split, stage_of
from tadistill.store import key_of

if TYPE_CHECKING:
    from tadistill.plan.costs import Ledger


# --- base classes of the kinds of stages ----------------------------------------------------------------------------------


class Spec(Part):
    """Base class of all kinds of stages. A stage is one step of a study, such as one training."""

    kind: ClassVar[str]
    version: ClassVar[int]
    """A number in the stage's key. Increase it if a change of the code changes the results of this kind of stage."""
    work: ClassVar[str]
    """MODULE:FUNCTION in `tadistill.stages`. It is a string, because the module imports torch and a plan must work without torch."""
    trains: ClassVar[bool] = False
    """True if the stage updates weights."""
    shared: ClassVar[bool] = False  # True if several processes may share the work
    measures: ClassVar[bool] = False
    """True if the stage only measures models. The plan predicts no cost for such a stage."""
    in_recipes: ClassVar[bool] = True
    """False for stages that only `tadistill advise` runs. The recipe's `resources` cannot name them."""

    data: Encoding

    @property
    def key(self) -> str:
        """The stage's key in the store: a hash of its kind, version and content."""
        return key_of({"kind": self.kind, "version": self.version, **self.content()})

    @property
    def longest(self) -> int:
        """The largest number of tokens (prompt and answer) that a teacher may have to read at once. With a tokenizer of its own, a teacher
        may need `LONGER` times as many tokens for a text as the student."""
        method = getattr(self, "method", None) or Method(context=self.data.context)
        of_teacher = getattr(self, "teacher_data", None) or getattr(self, "of_teacher", None)
        return method.longest(self.data.max_prompt, self.data.max_length) * (LONGER if of_teacher else 1)

    @property
    def models(self) -> dict[str, Handle]:
        """The models that the stage reads, by role. A role is the name of a field of `spec`, such as `teacher`. The assistants are
        `assistant 1`, `assistant 2` and so on."""
        return {role: part for role, part in self._inputs() if not isinstance(part, Output)}

    @property
    def parents(self) -> dict[str, str]:
        """Keys of the stages that write this stage's inputs, by role, such as `teacher`. These stages must finish first."""
        keys = {role: stage_of(part) for role, part in self._inputs()}
        return {role: key for role, key in keys.items() if key is not None}

    def _inputs(self) -> Iterator[tuple[str, Input]]:
        for name, value in self:
            if isinstance(value, Input):
                yield name, value
            elif isinstance(value, tuple):
                yield from ((f"{name.removesuffix('s')} {i}", v) for i, v in enumerate(value, 1) if isinstance(v, Input))

    @property
    def steps(self) -> int | None:
        """Number of optimizer updates. None if the stage trains nothing."""
        return None

    @property
    def checkpoints(self) -> int:
        """Number of checkpoints that are evaluated on dev. The best one is selected."""
        return 0

    def saves_memory(self, processes: int) -> list[str]:
        """Return changes of the recipe that save memory in this stage with its number of processes, such as `optim.micro_batch: 4`. The
        most useful change comes first."""
        return []

    def cost(self, ledger: "Ledger", model: str, teachers: tuple[str, ...]) -> Cost | None:
        """Return the predicted cost. Return None if it cannot be predicted, or if the stage only measures.

        Args:
            ledger: predicts costs from model sizes and text lengths.
            model: name of the model that the stage trains, makes or runs.
            teachers: names of the stage's teachers, from big to small.
        """
        return None


class OnTrainingSets(Spec):
    """Base class of the stages that read the training sets."""

    train: Split
    more: tuple[Split, ...] = ()
    """The other training sets, if there are several."""

    @property
    def sets(self) -> tuple[Split, ...]:
        """All training sets."""
        return (self.train, *self.more)

    @property
    def limit(self) -> int | None:
        """Number of rows to use of the only training set. None means all rows, or that there are several sets with limits of their own."""
        return None if self.more else self.train.limit

    def texts(self, ledger: "Ledger", weights: tuple[float, ...] = (), route: tuple[int, ...] = ()) -> "Ledger":
        """Return a ledger that predicts costs for the texts of this stage. `weights` and `route` are attributes of `SizesAndLengths`."""
        return ledger.of_texts(tuple(split.ref.name for split in self.sets), self.data.context, weights, route)


def scores_of(*sets: Split) -> dict[str, Any]:
    """Return the versions of the scores of some sets, as a part of a stage's content. Empty if all scores have their first version."""
    found = {name: number for split in sets for name, number in split.scores.items()}
    return {"scores": dict(sorted(found.items()))} if found else {}


# --- the graph ------------------------------------------------------------------------------------------------------------


_BRACKETS = re.compile(r" \((?!turn |phase )[^()]*\)")
_UPDATES = re.compile(r", \d+ updates?")
_SEED = re.compile(r",?\s*seed \d+")
_MANY = 200  # stages; a table of more has one line for the seeds of a stage


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
    def steps(self) -> int | None:
        return self.spec.steps

    @cached_property
    def parents(self) -> dict[str, str]:
        """Keys of the stages that must finish before this one starts, by their role, such as `teacher`."""
        return self.spec.parents

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
        key = spec.key
        if key not in self.stages:
            self.stages[key] = Stage(spec, key, label, model, seed, cost, teachers)
        return key

    def mark(self, key: str, arm: str) -> None:
        """Record that an arm (a path of models) needs this stage and all stages before it."""
        for ancestor in with_ancestors(self.stages, [key]):
            self.stages[ancestor].arms.add(arm)

    def flops(self, key: str | None) -> float | None:
        """Return the training FLOPs of a stage and all stages behind it. Return None if the FLOPs of one of them are unknown."""
        return total_flops(behind(self.stages, key).values())

    def asked(self, key: str | None, teacher: str) -> float | None:
        """Return the number of answer tokens that a teacher writes or scores for a stage and all behind it. None if it is not known."""
        stages = behind(self.stages, key).values()
        costs = [stage.cost for stage in stages if teacher == (stage.teachers[0] if stage.teachers else stage.model)]
        return None if None in costs else math.fsum(cost.asked for cost in costs if cost is not None)


def total_flops(stages: Iterable[Stage]) -> float | None:
    """Return the training FLOPs of stages together. Return None if those of one of them are unknown."""
    flops = [stage.flops for stage in stages]
    return None if None in flops else math.fsum(each for each in flops if each is not None)  # fsum does not depend on the order


def with_ancestors(stages: Mapping[str, Stage], keys: Iterable[str], without: str | None = None) -> set[str]:
    """Return the keys of these stages and of all stages before them. Parents in one role, such as `like`, can be left out (`without`)."""
    found, todo = set(), list(keys)
    while todo:
        at = todo.pop()
        if at not in found:
            found.add(at)
            todo += [parent for role, parent in stages[at].parents.items() if role != without]
    return found


def behind(stages: Mapping[str, Stage], key: str | None) -> dict[str, Stage]:
    """Return a stage and all stages on whose models its own model depends, by key. Empty if `key` is None.

    A model in the role `like` only sets another model's temperature, so its training is left out.
    """
    found = with_ancestors(stages, [key] if key else [], without="like")
    return {each: stage for each, stage in stages.items() if each in found}


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


def labels_of(stages: Mapping[str, Stage], *, short: bool = True) -> dict[str, str]:
    """Return a label for each stage of a plan, as `distinct_labels` does."""
    return distinct_labels(((stage.key, stage.label, stage.arms) for stage in stages.values()), short=short)


def distinct_labels(stages: Iterable[tuple[str, str, Collection[str]]], *, short: bool = True) -> dict[str, str]:
    """Return a label for each stage, by the stage's key. No two stages have the same label.

    A full label is, for instance, `distill xl -> s, minillm on teacher_mixed (rounds of 256, 4 updates each), 160 updates, seed 10`. With
    `short`, the text in brackets and the number of updates are left out if the label is unique without them. If two full labels are equal,
    each label gets the names of the stage's arms, or else the start of the stage's key.

    Args:
        stages: the key, the full label and the names of the arms of each stage.
    """
    rows = {key: (label, arms) for key, label, arms in stages}
    full = {key: label for key, (label, _) in rows.items()}
    plain = {key: _BRACKETS.sub("", label) for key, label in full.items()}
    brief = {key: _UPDATES.sub("", label) for key, label in plain.items()}
    by_arm = {key: f"{brief[key]} ({', '.join(sorted(arms))})" if arms else full[key] for key, (_, arms) in rows.items()}
    by_key = {key: f"{brief[key]} ({key[:8]})" for key in full}
    forms = (brief, plain, full, by_arm, by_key) if short else (full, by_arm, by_key)
    found: dict[str, str] = {}
    for form in forms:
        left, used = {key: text for key, text in form.items() if key not in found}, set(found.values())
        counts = Counter(left.values())
        found |= {key: text for key, text in left.items() if counts[text] == 1 and text not in used}
    return {key: found[key] for key in full}


def without_seed(label: str) -> str:
    return _SEED.sub("", label)


def table_lines(states: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Return the lines of a table of stages: a text, and the labels of its stages. `states` maps the label of each stage to its state.

    If there are more than 200 stages, those that differ only in their seed share a line if all are done, or none has begun.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for label, state in states.items():
        together = len(states) > _MANY and state in ("done", "to run", "waiting")
        groups.setdefault((without_seed(label) if together else label, state), []).append(label)
    return [(labels[0] if len(labels) == 1 else f"{text}, {len(labels)} seeds", labels) for (text, _), labels in groups.items()]
