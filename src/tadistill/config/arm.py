"""The arms of a recipe, their training budgets, and the search for a path.

An arm is a named path of models, in which each model teaches the next one.
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

from pydantic import Field, field_validator, model_validator

from tadistill.config.common import MOST, Strict
from tadistill.config.method import Dense, MethodPatch, Optim, Select
from tadistill.config.objective import Objective
from tadistill.config.sampling import Sampler
from tadistill.config.shorthand import MethodName, written_out

ModelPath = Annotated[tuple[str, ...], Field(min_length=1)]
"""Names of models. Each model teaches the next one."""


def path_text(path: Iterable[str]) -> str:
    """Return a path as a recipe writes it, such as `xl > l > s`."""
    return " > ".join(path)


_COMPUTE = re.compile(r"(?:as|(?P<times>\d+(?:\.\d+)?)x) (?P<arm>.+)")


class ComparableArm(Protocol):
    """The properties of an arm that `direct_arm` reads. The last model of `path` is the one that the arm trains."""

    @property
    def path(self) -> tuple[str, ...]: ...
    @property
    def is_plain(self) -> bool: ...
    @property
    def compute(self) -> str | None: ...
    @property
    def method(self) -> object: ...


A = TypeVar("A", bound=ComparableArm)


def direct_arm(arms: Iterable[A], teacher: str | None, student: str, method: object = None, *, any_method: bool = False) -> A | None:
    """Return the first arm in which the teacher itself teaches the student. Return None if there is no such arm.

    Arms with `compute`, and arms that are not plain (`is_plain`), are skipped.

    Args:
        teacher: the original teacher. None accepts any teacher.
        method: the method that the arm must have. None accepts any method.
        any_method: if no arm has this method, return an arm with another method.
    """
    found = [a for a in arms if len(a.path) == 2 and a.is_plain and a.compute is None and a.path[1] == student]
    found = [a for a in found if teacher is None or a.path[0] == teacher]
    same = [a for a in found if method is None or a.method == method]
    return next(iter([*same, *(found if any_method else [])]), None)


class Published(Strict):
    """A published result for an arm, from a paper for example. The report shows it beside our result."""

    source: str
    """The publication."""
    rouge_l: dict[str, float]
    """Maps a test set to its Rouge-L."""


class Arm(Strict):
    """A named path of models and its method. A path of a single model evaluates that model or, with `objective`, continues its training.

    `xl > l > s` is two distillations: xl teaches l, and then l teaches s. `l > s then xl > s` continues the training of s with another
    teacher (a curriculum). `init: {s: l}` initialises s from this arm's model l, pruned to the size of s.
    With `dense`, all models before a learner in the path teach it together.
    """

    text_sets: ClassVar[str] = "path"
    path: tuple[ModelPath, ...] = Field(min_length=1)
    """One path or several, one after the other, as `A > B > C then D > C`. A name means the same model in all of them. If a model is taught
    more than once, its updates are divided equally among these distillations."""
    init: dict[str, str] = {}
    """Maps a learner to the model of this arm that initialises it. The learner's `sft` runs after that."""
    method: MethodName | None = Field(default=None, exclude=True)
    """A published method by name, which sets objective and sampler of this arm. None once it is applied."""
    objective: Objective | None = None
    """Changes to `method.objective`. An objective of another `type` replaces it."""
    sampler: Sampler | None = None
    """Changes to `method.sampler`. A sampler of another `type` replaces it."""
    optim: Optim | None = None
    """Changes to `method.optim`."""
    select: Select | None = None
    """Changes to `method.select`."""
    dense: Dense | None = None
    """Changes to `method.dense`."""
    compute: str | None = None
    """`as ARM` gives this arm the same total training FLOPs as ARM, by choosing its number of updates (an equal-compute baseline).
    `4x ARM` gives it 4 times the training FLOPs of ARM. The original teacher's own training is not counted."""
    published: Published | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return written_out(value, string=cls.text_sets, name="method")

    @field_validator("path", mode="before", json_schema_input_type=str | list[str] | list[list[str]])
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return (value,) if isinstance(value, list | tuple) and value and isinstance(value[0], str) else value
        return tuple(tuple(part.strip() for part in chain.split(">")) for chain in value.split(" then "))

    @model_validator(mode="after")
    def _check_path(self):
        for path in self.path:
            for name in path:
                if path.count(name) > 1:
                    raise ValueError(
                        f"path `{path_text(path)}` names model {name} twice, but a model cannot teach itself; remove one of them"
                    )
        if len(self.path) > 1 and any(len(path) < 2 for path in self.path):
            raise ValueError(f"path `{self.text}` has a part with only one model, which teaches nothing; write each part as A > B")
        for i, path in enumerate(self.path[:-1]):
            used = {m for later in self.path[i + 1 :] for m in later} | set(self.init.values())
            if path[-1] not in used:
                raise ValueError(f"path `{self.text}` teaches {path[-1]}, but no later part uses {path[-1]}; add a part that uses it")
        return self

    @model_validator(mode="after")
    def _check_init(self):
        for learner, source in self.init.items():
            first = next((i for i, path in enumerate(self.path) if learner in path[1:]), None)
            if first is None:
                raise ValueError(
                    f"init names {learner}, but path `{self.text}` does not teach {learner}; name a model that the path teaches"
                )
            before = [m for path in self.path[:first] for m in path] + [*self.path[first][: self.path[first].index(learner)]]
            if source not in before:
                raise ValueError(
                    f"init starts {learner} from {source}, but {source} is not before {learner} in `{self.text}`; name a model that is "
                    f"before {learner}"
                )
        return self

    @field_validator("compute")
    @classmethod
    def _as_arm(cls, value: str | None) -> str | None:
        if value is not None and _COMPUTE.fullmatch(value) is None:
            raise ValueError(f"compute is `{value}`; write `as ARM` or `4x ARM` with the name of an arm")
        return value

    @property
    def like(self) -> tuple[float | None, str] | None:
        """The arm that `compute` names, and the factor on its FLOPs. The factor is None for `as ARM`. Both are None without `compute`."""
        found = _COMPUTE.fullmatch(self.compute) if self.compute else None
        return (float(found["times"]) if found["times"] else None, found["arm"]) if found else None

    @property
    def last(self) -> ModelPath:
        """The last path. It ends with the model that the arm trains."""
        return self.path[-1]

    @property
    def models(self) -> tuple[str, ...]:
        """All models of the arm, each once."""
        return tuple(dict.fromkeys(m for path in self.path for m in path))

    @property
    def learners(self) -> tuple[str, ...]:
        """The models that the arm's distillations train, in order."""
        return tuple(m for path in self.path for m in path[1:])

    @property
    def text(self) -> str:
        return " then ".join(map(path_text, self.path))

    @property
    def patch(self) -> MethodPatch:
        """The changes that this arm makes to the recipe's method."""
        return MethodPatch(objective=self.objective, sampler=self.sampler, optim=self.optim, select=self.select, dense=self.dense)


class Budgets(Strict):
    """Training budgets at which arms are compared. Each arm is trained once for each budget, with its updates and its warmup scaled.

    Arm `chain` becomes the arms `chain-1x`, `chain-2x` … with `compute: 1x direct` …, where `direct` is the arm in `of`. The arm in `of`
    stays as it is, and has the budget 1x.
    """

    text_sets: ClassVar[str] = "times"
    times: tuple[Annotated[float, Field(ge=0.001, le=1e6)], ...] = Field(min_length=2)
    """The budgets, as multiples of the training FLOPs of the arm in `of`, without the original teacher's own training."""
    of: str | None = None
    """The arm that defines 1x; by default the first arm whose path is a teacher and a student."""
    arms: tuple[str, ...] | None = None
    """The arms that are trained at each budget; by default all arms that train a model and have no `compute`."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"times": value} if isinstance(value, list | tuple) else value

    @field_validator("times")
    @classmethod
    def _rising(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"budgets are {[f'{t:g}' for t in times]}; write rising numbers, such as [1, 2, 4, 8]")
        return times

    def expand(self, arms: dict[str, Arm]) -> dict[str, Arm]:
        """Return the arms with one arm for each budget. Arms that already have budgets are not changed.

        Raises:
            ValueError: an arm does not exist or cannot be trained at several budgets, or a new name is already used.
        """
        able = [name for name, arm in arms.items() if arm.compute is None and (arm.learners or arm.objective)]
        of = self.of or next((name for name in able if len(arms[name].learners) == 1 and len(arms[name].last) == 2), None)
        if of is None or of not in able:
            what = f"budgets.of is `{of}`" if of else "no arm has a path `teacher > student`"
            raise ValueError(
                f"{what}; set budgets.of to an arm that trains a model and has no `compute`: {', '.join(able) or 'there is none'}"
            )
        for name in self.arms or ():
            if name not in able and at_budget(name, self.times[0]) not in arms:
                raise ValueError(f"budgets.arms names `{name}`; name arms that train a model and have no `compute`: {', '.join(able)}")
        found: dict[str, Arm] = {}
        for name, arm in arms.items():
            if name not in (able if self.arms is None else self.arms):
                found[name] = arm
                continue
            if name == of:
                found[name] = arm
            for times in self.times:
                new, compute = at_budget(name, times), f"{times:g}x {of}"
                if name == of and times == 1:
                    continue
                if new in arms and arms[new].compute != compute:
                    raise ValueError(f"budgets need the name `{new}`, but an arm of the recipe has it; rename that arm")
                found[new] = arm.model_copy(update={"compute": compute, "published": None})
        return found


class BudgetOf(NamedTuple):
    """The budget of an arm that `Budgets.expand` made: the arm that it was made of, the factor, and the arm that defines 1x."""

    arm: str
    times: float
    reference: str


def budget_of(name: str, compute: str | None) -> BudgetOf | None:
    """Return the budget from which `Budgets.expand` made the arm `name`; None if it made no such arm."""
    found = _COMPUTE.fullmatch(compute) if compute else None
    if found is None or not found["times"]:
        return None
    times, suffix = float(found["times"]), at_budget("", float(found["times"]))
    return BudgetOf(name.removesuffix(suffix), times, found["arm"]) if name.endswith(suffix) else None


def at_budget(arm: str, times: float) -> str:
    """Return the name of an arm at a budget, such as `chain-4x`."""
    return f"{arm}-{times:g}x"


class Search(Strict):
    """The paths that `tadistill search` and `tadistill advise` compare, and how they search. They compare paths on the dev set only."""

    teacher: str
    """The model where all paths start."""
    assistants: tuple[str, ...] = Field(min_length=1)
    """Candidate assistants, from big to small."""
    student: str
    """The model where all paths end."""
    strategy: Literal["exhaustive", "single", "best_prefix", "beam", "halving"] = "best_prefix"
    """`exhaustive`: try every path. `single`: try the direct path, and paths with one assistant. `best_prefix`: keep and extend the
    best path to each model (a heuristic: it is right only where a better teacher makes a better student). `beam`: keep and extend
    the `width` best paths to each model. `halving`: train every path for a short run, and continue the better half of the paths."""
    max_assistants: int | None = Field(default=None, ge=1, le=MOST)
    """Largest number of assistants in a path; no limit by default."""
    budget: float | None = Field(default=None, gt=0)
    """Largest cost of a path, as a multiple of the direct path's training FLOPs; no limit by default."""
    width: int = Field(default=2, ge=1, le=MOST)
    """Number of paths to each model that `beam` keeps."""
    rungs: tuple[float, ...] = Field(default=(0.1, 0.3, 1.0), min_length=1)
    """Used by `halving`, with one number per round. A number is the fraction of all updates that is done after the round. The last one is
    1."""

    @model_validator(mode="after")
    def _check(self):
        models = (self.teacher, *self.assistants, self.student)
        for name in models:
            if models.count(name) > 1:
                raise ValueError(f"search names {name} twice; teacher, assistants and student must be different models")
        if self.rungs[-1] != 1 or any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)) or self.rungs[0] <= 0:
            raise ValueError(f"search.rungs are {list(self.rungs)}; write rising fractions that end with 1, such as [0.1, 0.3, 1]")
        if self.strategy == "halving" and len(self.rungs) < 2:
            raise ValueError(
                "search.strategy is `halving`, which needs at least two rungs; set `search.rungs`, for instance to [0.1, 0.3, 1]"
            )
        return self
