"""The arms of a recipe, and their budgets.

An arm is a named path of models, in which each model teaches the next one.
"""

import re
from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

from pydantic import Field, field_validator, model_validator

from tadistill.config.common import Strict
from tadistill.config.context import TeacherContext
from tadistill.config.controls import Control, read_control
from tadistill.config.method import PARTS, Dense, Ema, MethodPatch, Optim, Phases, Select
from tadistill.config.objective import Objective
from tadistill.config.route import flat, problems
from tadistill.config.sampling import Sampler
from tadistill.config.shorthand import MethodName, written_out

ModelPath = Annotated[tuple[str, ...], Field(min_length=1)]
"""Names of models. Each model teaches the next one."""


def path_text(path: Iterable[str]) -> str:
    """Return a path of models as text in the notation of recipes, such as `xl > l > s`."""
    return " > ".join(path)


def marked(text: str, across: Iterable[tuple[str, str]]) -> str:
    """Return `text`, which describes paths, with `~>` in place of `>` between models with different tokenizers, such as `xl ~> l > s`.
    `across` contains the pairs (teacher, student) that have different tokenizers."""
    parts, lossy = re.split(r"( > | then |, )", text), {*across}
    for i in range(1, len(parts) - 1, 2):
        if parts[i] == " > " and (parts[i - 1], parts[i + 1]) in lossy:
            parts[i] = " ~> "
    return "".join(parts)


_COMPUTE = re.compile(r"(?:as|(?P<times>\d+(?:\.\d+)?)x) (?P<arm>.+)")


class ComparableArm(Protocol):
    """The type of the arms that `direct_arm` accepts. An arm trains the last model of its `path`."""

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
    """Return the first arm that distils the teacher directly into the student. Return None if there is no such arm.

    Arms with several paths, several teachers at a time, `init` or `compute` are not considered.

    Args:
        teacher: the original teacher, the first model of the path. None accepts any teacher.
        method: the method that the arm must have. None accepts any method.
        any_method: if no arm has this method, return an arm with another method.
    """
    found = [a for a in arms if len(a.path) == 2 and a.is_plain and a.compute is None and a.path[1] == student]
    found = [a for a in found if teacher is None or a.path[0] == teacher]
    same = [a for a in found if method is None or a.method == method]
    return next(iter([*same, *(found if any_method else [])]), None)


class Published(Strict):
    """A published result of an arm, for example from a paper. The report shows it beside our own result."""

    source: str
    """Name of the publication, which the report shows."""
    rouge_l: dict[str, float]
    """Maps the name of a test set to the published Rouge-L."""


class Arm(Strict):
    """A path of models in which each model teaches the next one, with the training method.

    `xl > l > s` means two distillations: xl teaches l, and then l teaches s. `l > s then xl > s` means that s first learns from l, and then
    continues with the teacher xl. `m on maths + xl on chat > s` means that m teaches on the training set maths, and xl on chat.
    `init: {s: l}` initialises s with weights of this arm's model l, pruned to the size of s. With `dense`, a student learns from all models
    before it in the path at once. An arm whose path is a single model evaluates this model. If such an arm sets `objective`, the arm first
    continues the model's training.
    """

    text_sets: ClassVar[str] = "path"
    path: tuple[ModelPath, ...] = Field(min_length=1)
    """One path, or several paths that run one after the other, such as `A > B > C then D > C`. A name means the same model in all paths. If
    several distillations train the same model, its updates are divided equally among them."""
    init: dict[str, str] = {}
    """Maps a model that this arm trains to an earlier model of this arm. The trained model starts from the earlier model's weights. It then
    has its own fine-tuning (`sft`), and after that the distillation."""
    method: MethodName | None = Field(default=None, exclude=True)
    """Name of a published method, such as `gkd`, or of an entry of `methods`. It sets the objective and the sampler of this arm."""
    # None once it is applied
    objective: Objective | None = None
    """Changes to the recipe's `method.objective` for this arm. If the `type` differs, this objective replaces the recipe's objective."""
    sampler: Sampler | None = None
    """Changes to the recipe's `method.sampler` for this arm. If the `type` differs, this sampler replaces the recipe's sampler."""
    optim: Optim | None = None
    """Changes to the recipe's `method.optim` for this arm."""
    select: Select | None = None
    """Changes to the recipe's `method.select` for this arm."""
    dense: Dense | None = None
    """Changes to the recipe's `method.dense` for this arm."""
    context: TeacherContext | None = None
    """Changes to the recipe's `method.context` for this arm. A path such as `s > s`, in which a model teaches itself, needs a context."""
    ema: Ema | None = None
    """Replaces the recipe's `method.ema` for this arm."""
    phases: Phases | None = None
    """Phases of each distillation of this arm, one after the other. They replace the phases of the recipe's `method`. `[]` means no
    phases."""
    compute: str | None = None
    """Training budget of this arm, relative to another arm. `as ARM` gives the same training FLOPs as ARM (an equal-compute baseline).
    `4x ARM` gives 4 times the training FLOPs of ARM. The number of updates is chosen to match the budget. The original teacher's own
    training is not counted."""
    teacher_budget: str | None = None
    """Budget of the original teacher, relative to another arm. With `as ARM`, the teacher writes or scores as many answer tokens for this
    arm as for ARM. A teacher that only writes text (`seqkd`) answers the first prompts of the training set, as many as the budget allows.
    For a teacher that runs during training, the number of updates of the models that it teaches is chosen to match the budget. If such an
    arm also has `compute`, this key changes only the updates of the models that the original teacher does not teach."""
    control: str | None = None
    """`KIND of ARM`: this arm is a control of ARM. It has the same student, settings and training FLOPs as ARM, but another teacher or
    none. `no_teacher`: the student trains on its own text with the objective `no_teacher`. `tempered`: the first model of ARM's path
    teaches with its logits divided by a temperature. At this temperature, its mean entropy equals that of ARM's last assistant. Both
    means are over the reference responses of the dev set. `random_teacher`: the first model of ARM's path teaches with random weights."""
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
            for problem in problems(path):
                raise ValueError(problem)
            for name in path:
                if sum(other == name for other, _ in groupby(path)) > 1:
                    raise ValueError(
                        f"path `{path_text(path)}` names model {name} twice, with another model in between; name each model once, or write "
                        f"`{name} > {name}` for a model that teaches itself"
                    )
        if len(self.path) > 1 and any(len(path) < 2 for path in self.path):
            raise ValueError(
                f"path `{self.text}` has a part with only one model (`then` separates the parts), so nothing is trained there; write each "
                "part with two models or more, as A > B"
            )
        for i, path in enumerate(self.path[:-1]):
            used = {m for later in self.path[i + 1 :] for m in later} | set(self.init.values())
            if path[-1] not in used:
                raise ValueError(
                    f"path `{self.text}` trains {path[-1]}, but does not use it after the next `then`; use {path[-1]} in a later part"
                )
        return self

    @model_validator(mode="after")
    def _check_init(self):
        for learner, source in self.init.items():
            first = next((i for i, path in enumerate(self.path) if learner in path[1:]), None)
            if first is None:
                raise ValueError(
                    f"init names {learner}, but path `{self.text}` does not teach {learner}; name a model that the path teaches"
                )
            before = [*flat(m for path in self.path[:first] for m in path), *flat(self.path[first][: self.path[first].index(learner)])]
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
            raise ValueError(f"compute is `{value}`; write `as ARM` or `4x ARM`, where ARM is the name of an arm")
        return value

    @field_validator("teacher_budget")
    @classmethod
    def _of_teacher(cls, value: str | None) -> str | None:
        if value is not None and re.fullmatch(r"as \S.*", value) is None:
            raise ValueError(f"teacher_budget is `{value}`; write `as ARM`, where ARM is the name of an arm")
        return value

    @field_validator("control")
    @classmethod
    def _of_arm(cls, value: str | None) -> str | None:
        if value is not None and read_control(value) is None:
            raise ValueError(f"control is `{value}`; write `no_teacher of ARM`, `tempered of ARM` or `random_teacher of ARM`")
        return value

    @property
    def controls(self) -> Control | None:
        """The kind of this control, and the arm with which it is compared. None if this arm is not a control."""
        return read_control(self.control) if self.control else None

    @property
    def like(self) -> tuple[float | None, str] | None:
        """The factor and the arm in `compute`: (4.0, ARM) for `4x ARM`, and (None, ARM) for `as ARM`. None if `compute` is not set."""
        found = _COMPUTE.fullmatch(self.compute) if self.compute else None
        return (float(found["times"]) if found["times"] else None, found["arm"]) if found else None

    @property
    def asks_like(self) -> str | None:
        """The name ARM in `teacher_budget: as ARM`. None if `teacher_budget` is not set."""
        return self.teacher_budget.removeprefix("as ") if self.teacher_budget else None

    @property
    def budgets(self) -> dict[str, str]:
        """Maps each of the keys `compute` and `teacher_budget` that this arm sets to the arm that the key names."""
        found = {"compute": self.like[1] if self.like else None, "teacher_budget": self.asks_like}
        return {key: arm for key, arm in found.items() if arm is not None}

    @property
    def last(self) -> ModelPath:
        """The last path. The arm trains the last model of this path."""
        return self.path[-1]

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all models in the paths, each once."""
        return tuple(dict.fromkeys(m for path in self.path for m in flat(path)))

    @property
    def learners(self) -> tuple[str, ...]:
        """The models that the distillations of this arm train, in order."""
        return tuple(m for path in self.path for m in path[1:])

    @property
    def text(self) -> str:
        return " then ".join(map(path_text, self.path))

    @property
    def patch(self) -> MethodPatch:
        """This arm's changes to the recipe's method."""
        return MethodPatch(**{part: getattr(self, part) for part in PARTS}, phases=self.phases)


class Budgets(Strict):
    """Training budgets (FLOPs) at which arms are compared. Each arm is trained once for each budget, with scaled updates and warmup.

    For example, a recipe has the arms `direct` and `chain`. `times: [1, 2]` and `of: direct` turn these two into four arms: `direct`,
    `direct-2x`, `chain-1x` and `chain-2x`. The arm `direct` defines the budget 1x.
    """

    text_sets: ClassVar[str] = "times"
    times: tuple[Annotated[float, Field(ge=0.001, le=1e6)], ...] = Field(min_length=2)
    """The budgets, as multiples of the training FLOPs of the arm in `of`. The original teacher's own training is not counted."""
    of: str | None = None
    """Name of the arm whose training FLOPs are the budget 1x. The default is the first arm with a path of two models,
    `teacher > student`."""
    arms: tuple[str, ...] | None = None
    """Names of the arms that are trained at each budget. The default is all arms that train a model and have no `compute`."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"times": value} if isinstance(value, list | tuple) else value

    @field_validator("times")
    @classmethod
    def _rising(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"budgets are [{', '.join(f'{t:g}' for t in times)}]; write them in rising order, such as [1, 2, 4, 8]")
        return times

    def expand(self, arms: dict[str, Arm]) -> dict[str, Arm]:
        """Return the recipe's arms, with one arm per budget in place of each arm in `self.arms`. All other arms are not changed.

        Raises:
            ValueError: an arm in `of` or `arms` is missing, has `compute` or trains no model; or a new arm's name is already used.
        """
        able = [name for name, arm in arms.items() if arm.compute is None and (arm.learners or arm.objective)]
        of = self.of or next((name for name in able if len(arms[name].learners) == 1 and len(arms[name].last) == 2), None)
        if of is None or of not in able:
            what = f"budgets.of is `{of}`, which defines no budget" if of else "no arm `teacher > student` defines the budget 1x"
            raise ValueError(
                f"{what}; set budgets.of to an arm that trains a model and has no `compute` (such arms: {', '.join(able) or 'none'})"
            )
        for name in self.arms or ():
            if name not in able and at_budget(name, self.times[0]) not in arms:
                raise ValueError(
                    f"budgets.arms names `{name}`, whose budget cannot change; name only arms that train a model and have no "
                    f"`compute` (such arms: {', '.join(able)})"
                )
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
                    raise ValueError(f"budgets add an arm `{new}`, but the recipe already has an arm of this name; rename the recipe's arm")
                found[new] = arm.model_copy(update={"compute": compute, "published": None})
        return found


class BudgetOf(NamedTuple):
    """The training budget of an arm that `Budgets.expand` made from the recipe's arm `arm`. The budget is the training FLOPs of the arm
    `reference`, multiplied by the factor `times`."""

    arm: str
    times: float
    reference: str


def budget_of(name: str, compute: str | None) -> BudgetOf | None:
    """Return the training budget of an arm, given its name and its key `compute`. Return None if `Budgets.expand` did not make the arm."""
    found = _COMPUTE.fullmatch(compute) if compute else None
    if found is None or not found["times"]:
        return None
    times, suffix = float(found["times"]), at_budget("", float(found["times"]))
    return BudgetOf(name.removesuffix(suffix), times, found["arm"]) if name.endswith(suffix) else None


def at_budget(arm: str, times: float) -> str:
    """Return the name of an arm at a budget. For example, the arm `chain` at the budget 4x has the name `chain-4x`."""
    return f"{arm}-{times:g}x"
