"""The arms of a recipe. An arm is a named path of models, in which each model teaches the next one.

A path can begin with a route: several teachers, each of which teaches on its own training sets. `m on maths + xl on chat > s` means that m
teaches s on the rows of the set maths, and xl on those of the set chat. This is multi-teacher on-policy distillation (MOPD) if the student
writes the text. The sets are those of `data.train`.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, cast, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tadistill.config.common import Strict
from tadistill.config.method import Changes, MethodName, Phases

_AND, _ON = " + ", " on "


# --- routes ---------------------------------------------------------------------------------------------------------------


def is_route(name: str) -> bool:
    """Return True if the text between two `>` of a path is a route, such as `m on maths + xl on chat`."""
    return _ON in name


def members(name: str) -> tuple[str, ...]:
    """Return the models of one position of a path (the text between two `>`), without duplicates: one model, or the teachers of a route."""
    return tuple(dict.fromkeys(model for model, _ in _pairs(name))) if is_route(name) else (name,)


def teachers_of(name: str) -> dict[str, str]:
    """Map each training set of a route to its teacher. Return an empty dict for a single model."""
    return {set_: teacher for teacher, set_ in _pairs(name)} if is_route(name) else {}


def flat(path: Iterable[str]) -> tuple[str, ...]:
    """Return all models of a path, in order. A route is replaced by its teachers."""
    return tuple(model for name in path for model in members(name))


def routed(paths: Iterable[tuple[str, ...]]) -> bool:
    """Return True if one of the paths begins with a route."""
    return any(is_route(path[0]) for path in paths)


def route_problems(path: tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence for each mistake in the routes of a path."""
    for place, name in enumerate(path):
        if not is_route(name):
            continue
        if place > 0:
            yield f"path has several teachers (`{name}`) after another model; write several teachers only at the start of a path"
        elif len(path) < 2:
            yield f"path `{name}` has no student; write for instance `{name} > s`"
        pairs = _pairs(name)
        names = [set_ for _, set_ in pairs]
        if wrong := next((part for part in name.split(_AND) if part.count(_ON) != 1 or not all(map(str.strip, part.split(_ON)))), None):
            yield f"path has `{wrong.strip()}`, which is not of the form MODEL on SET; write for instance `m on maths + xl on chat > s`"
        elif twice := next((set_ for set_ in names if names.count(set_) > 1), None):
            yield f"path `{name}` names two teachers for the set {twice}; name one teacher for each set"
        elif own := next((model for model in path[1:] if model in members(name)), None):
            yield f"path `{name} > …` names {own} as a teacher and as a student; a model that teaches itself must be its only teacher"


def _pairs(name: str) -> list[tuple[str, str]]:
    return [(model.strip(), set_.strip()) for part in name.split(_AND) for model, _, set_ in [part.partition(_ON)]]


# --- paths ----------------------------------------------------------------------------------------------------------------


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


# --- keys that name another arm -------------------------------------------------------------------------------------------


_COMPUTE = re.compile(r"(?:as|(?P<times>(?![0.]+x)\d+(?:\.\d+)?)x) (?P<arm>.+)")


class Compute(NamedTuple):
    """The training budget of an arm, relative to the arm `arm`."""

    times: float | None
    """4.0 for `4x ARM`. None for `as ARM`, an equal-compute baseline."""
    arm: str


def read_compute(text: str) -> Compute | None:
    """Return the budget that the key `compute` sets, or None if the text has another form."""
    found = _COMPUTE.fullmatch(text)
    return Compute(float(found["times"]) if found["times"] else None, found["arm"]) if found else None


Kind = Literal["no_teacher", "tempered", "random_teacher"]
CONTROLS = "`no_teacher of ARM`, `tempered of ARM` or `random_teacher of ARM`"
"""The forms of `control`, for messages."""
_CONTROL = re.compile(rf"({'|'.join(get_args(Kind))}) of (.+)")


class Control(NamedTuple):
    """The kind of a control, and the name of the arm with which it is compared."""

    kind: Kind
    arm: str

    @property
    def words(self) -> str:
        """A phrase for reports: how the control trains its student, and the arm with which the control is compared."""
        teacher = {
            "no_teacher": "trained without a teacher",
            "tempered": "taught by the teacher, whose temperature is set so that its mean entropy equals the assistant's",
            "random_teacher": "taught by a teacher with random weights",
        }
        return f"{teacher[self.kind]} (control of {self.arm})"


def read_control(text: str) -> Control | None:
    """Return the control that `KIND of ARM` names, or None if the text has another form."""
    found = _CONTROL.fullmatch(text)
    return Control(cast(Kind, found[1]), found[2]) if found else None


_FORMS = {
    "compute": (_COMPUTE, "`as ARM` or `4x ARM`, where ARM is the name of an arm and the number is above 0"),
    "teacher_budget": (re.compile(r"as \S.*"), "`as ARM`, where ARM is the name of an arm"),
    "control": (_CONTROL, CONTROLS),
}
"""Maps each key that names another arm to the form of its value, and to an example for the error message."""


# --- arms -----------------------------------------------------------------------------------------------------------------


class Published(Strict):
    """A published result of an arm, for example from a paper. The report shows it beside our own result."""

    source: str
    """Name of the publication, which the report shows."""
    rouge_l: dict[str, float]
    """Maps the name of a test set to the published ROUGE-L."""


class Arm(Changes):
    """A path of models in which each model teaches the next one, with the training method.

    `xl > l > s` means two distillations: xl teaches l, and then l teaches s. `l > s then xl > s` means that s first learns from l, and then
    continues with the teacher xl. `m on maths + xl on chat > s` means that m teaches on the training set maths, and xl on chat.
    `init: {s: l}` initialises s with weights of this arm's model l, pruned to the size of s. With `dense`, a student learns from all models
    before it in the path at once. An arm whose path is a single model evaluates this model. If such an arm sets `objective`, the arm first
    continues the model's training.
    """

    text_sets: ClassVar[str] = "path"
    names_method: ClassVar[str] = "method"
    path: tuple[ModelPath, ...] = Field(min_length=1)
    """One path, or several paths that run one after the other, such as `A > B > C then D > C`. A name means the same model in all paths. If
    several distillations train the same model, its updates are divided equally among them."""
    init: dict[str, str] = {}
    """Maps a model that this arm trains to an earlier model of this arm. The trained model starts from the earlier model's weights. It then
    has its own fine-tuning (`sft`), and after that the distillation."""
    method: MethodName | None = Field(default=None, exclude=True)
    """Name of a published method, such as `gkd`, or of an entry of `methods`. It sets the objective and the sampler of this arm."""
    # None once it is applied
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

    @field_validator("path", mode="before", json_schema_input_type=str | list[str] | list[list[str]])
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError("a path is a text; write the models from the teacher to the student, such as xl > s")
        if not isinstance(value, str):
            return (value,) if isinstance(value, list | tuple) and value and isinstance(value[0], str) else value
        return tuple(tuple(part.strip() for part in chain.split(">")) for chain in value.split(" then "))

    @model_validator(mode="after")
    def _check_path(self):
        for path in self.path:
            for problem in route_problems(path):
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

    @field_validator(*_FORMS)
    @classmethod
    def _names_an_arm(cls, value: str | None, info: ValidationInfo) -> str | None:
        form, example = _FORMS[str(info.field_name)]
        if value is not None and form.fullmatch(value) is None:
            raise ValueError(f"{info.field_name} is `{value}`; write {example}")
        return value

    @property
    def controls(self) -> Control | None:
        """The kind of this control, and the arm with which it is compared. None if this arm is not a control."""
        return read_control(self.control) if self.control else None

    @property
    def like(self) -> Compute | None:
        """The budget that `compute` sets. None if `compute` is not set."""
        return read_compute(self.compute) if self.compute else None

    @property
    def asks_like(self) -> str | None:
        """The name ARM in `teacher_budget: as ARM`. None if `teacher_budget` is not set."""
        return self.teacher_budget.removeprefix("as ") if self.teacher_budget else None

    @property
    def budgets(self) -> dict[str, str]:
        """Maps each of the keys `compute` and `teacher_budget` that this arm sets to the arm that the key names."""
        found = {"compute": self.like.arm if self.like else None, "teacher_budget": self.asks_like}
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
