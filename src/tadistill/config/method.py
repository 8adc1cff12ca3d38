"""The settings of a training method: objective (the loss), sampler (the training text), optimizer, and choice of a checkpoint.

A method can have phases, which a student passes one after the other, and a published method can be given by its name. `methods.yaml` has
the settings of these methods. Objectives are in `tadistill.config.objective`, samplers in `tadistill.config.sampling`, and all other parts
in `tadistill.config.method_parts`. `tadistill.config.method_rules` refuses settings that do not fit together.
"""

from collections.abc import Iterable
from importlib import resources
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from tadistill.config.common import MOST, Strict
from tadistill.config.method_parts import Dense, Ema, Optim, Select, TeacherContext
from tadistill.config.objective import ForwardKL, Objective
from tadistill.config.sampling import DatasetSampler, OnPolicy, Rounds, Sampler, Signal, StudentSampler
from tadistill.errors import did_you_mean_then

PARTS = ("objective", "sampler", "optim", "select", "dense", "context", "ema")
"""The keys of a method that a model, an arm or a phase can change."""
METHODS: dict[str, dict[str, Any]] = yaml.safe_load(
    resources.files("tadistill.config").joinpath("methods.yaml").read_text(encoding="utf-8")
)
"""Maps the name of a published method to its settings of `objective` and `sampler`."""
MethodName = Annotated[str, Field(json_schema_extra={"anyOf": [{"enum": [*METHODS]}, {"type": "string"}]})]
"""The name of a published method, or of an entry of the recipe's `methods`."""
_NAMED = {"objective": TypeAdapter(Objective), "sampler": TypeAdapter(Sampler)}
_ROUNDING = 1e-6  # shares such as 0.333333 add up to 1


def no_method(name: Any) -> str:
    """Return the error sentence for an unknown method."""
    return f"`{name}` {not_a_method(name)}"


def not_a_method(name: Any, own: Iterable[str] = ()) -> str:
    """Return the error sentence for an unknown method, without the name at its beginning. `own` has the names of the recipe's methods."""
    names = [*own, *METHODS]
    hint = did_you_mean_then(str(name).lower(), names, f"the methods are {', '.join(names)}", cutoff=0.5)
    return f"is not a method; {hint}"


class WithMethod(Strict):
    """Base class of the parts of a recipe that can name a method. The objective and the sampler of this method replace its name.

    If the part also has an `objective` or a `sampler`, its keys override the keys of the named method's objective or sampler. If the `type`
    differs, it replaces that objective or sampler. A part that may have phases has none then, unless it sets them.
    """

    names_method: ClassVar[str] = "name"
    """The key that contains the method's name."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        given = {cls.text_sets: value} if isinstance(value, str) else value
        if not isinstance(given, dict) or (name := given.get(cls.names_method)) is None:
            return given
        if not isinstance(name, str) or name not in METHODS:
            # `_known` refuses the name, so that the mistakes in other keys are shown too; the rest of these two depends on the method
            return {key: part for key, part in given.items() if key not in _NAMED}
        rest = {key: part for key, part in given.items() if key != cls.names_method}
        settings = {"sampler": {"type": "dataset"}} | METHODS[name]
        phases: dict[str, Any] = {"phases": []} if "phases" in cls.model_fields else {}
        return phases | rest | {part: _merged(part, settings[part], rest.get(part)) for part in _NAMED}

    @field_validator("name", "method", mode="before", json_schema_input_type=MethodName | None, check_fields=False)
    @classmethod
    def _known(cls, name: Any) -> Any:
        if name is not None:
            raise ValueError(no_method(name))
        return name


def _merged(part: str, settings: dict[str, Any], given: Any) -> Any:
    if given is not None and not (isinstance(given, dict) and given.get("type", settings["type"]) == settings["type"]):
        return given
    merged = settings | (given or {})
    try:
        return _NAMED[part].validate_python(merged).model_dump()  # every field, so that an arm takes nothing from the recipe's own method
    except ValidationError:
        return merged  # the recipe's own validation shows the mistake


class Sft(Strict):
    """Supervised fine-tuning of a model before it teaches or learns."""

    optim: Optim = Optim()
    select: Select = Select()
    keep: tuple[Annotated[int, Field(ge=1, le=MOST)], ...] = ()
    """Numbers of updates after which the weights are also stored, such as [100, 200]. The key `checkpoint` of another model can name a
    stored state."""
    sets: tuple[str, ...] = ()
    """Names of the sets of `data.train` on which the model is fine-tuned, such as [maths]. Each set keeps its weight. By default, all sets
    are used."""


class Changes(WithMethod):
    """Base class of the parts of a recipe that change its method."""

    objective: Objective | None = None
    """Changes to `method.objective`. If the `type` differs, this objective replaces that of `method`."""
    sampler: Sampler | None = None
    """Changes to `method.sampler`. If the `type` differs, this sampler replaces that of `method`."""
    optim: Optim | None = None
    """Changes to `method.optim`. A phase cannot change `steps` and `epochs`."""
    select: Select | None = None
    """Changes to `method.select`."""
    dense: Dense | None = None
    """Changes to `method.dense`."""
    context: TeacherContext | None = None
    """Changes to `method.context`. A path such as `s > s`, in which a model teaches itself, needs a context."""
    ema: Ema | None = None
    """Replaces `method.ema`. In a phase, the average begins with the student's weights at the start of the phase."""

    @property
    def patch(self) -> "MethodPatch":
        """The changes alone, without other keys of an arm or a phase."""
        return MethodPatch(**{part: getattr(self, part) for part in (*PARTS, "phases") if part in type(self).model_fields})


class Phase(Changes):
    """A part of a distillation with its own method and its own share of the updates. `NAME` is short for `{method: NAME}`.

    A student passes the phases one after the other. Each phase starts from the final weights of the phase before, with a new optimizer and
    a new schedule of the learning rate. Settings that a phase does not change are those of the whole distillation.
    """

    text_sets: ClassVar[str] = "method"
    names_method: ClassVar[str] = "method"
    method: MethodName | None = Field(default=None, exclude=True)
    """Name of a published method, such as `seqkd`, or of an entry of `methods`."""  # None once it is applied
    share: float | None = Field(default=None, gt=0, le=1)
    """Share of the updates of the whole distillation. The shares of all phases add up to 1. By default, all phases have equal shares."""

    @model_validator(mode="after")
    def _check(self):
        if self.optim and (given := [name for name in ("steps", "epochs") if getattr(self.optim, name) is not None]):
            raise ValueError(
                f"a phase sets `optim.{given[0]}`, but phases divide the updates of the whole distillation; remove `{given[0]}`, and write "
                "the `share` of the phase"
            )
        return self


def _whole(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    shares = [phase.share for phase in phases if phase.share is not None]
    if shares and len(shares) < len(phases):
        raise ValueError(
            f"{len(shares)} of {len(phases)} phases have a `share`; give every phase a `share`, or remove every `share`, so that all "
            "phases are equally long"
        )
    if shares and abs(sum(shares) - 1) > _ROUNDING:
        raise ValueError(
            f"the shares of the phases are {', '.join(f'{share:g}' for share in shares)}, which add up to {sum(shares):g}; change them so "
            "that they add up to 1"
        )
    return phases


Phases = Annotated[tuple[Phase, ...], AfterValidator(_whole)]
"""Phases of a distillation, whose shares add up to 1."""


class MethodPatch(Changes):
    """Settings of a method, all optional. They change the recipe's method for one model, or define a method with a name of your own
    (`methods`). `NAME` is short for `{name: NAME}`."""

    text_sets: ClassVar[str] = "name"
    name: MethodName | None = Field(default=None, exclude=True)
    """Name of a published method, such as `gkd`, or of an entry of `methods`. It sets the objective and the sampler. Other keys beside
    `name` change these settings."""  # None once it is applied
    phases: Phases | None = None
    """Phases of the distillation, one after the other. They replace the phases of the recipe's `method`. `[]` means no phases."""


class Method(WithMethod):
    """A distillation method: the loss, the training text, the optimizer, and the choice of a checkpoint. `method: NAME` is short for
    `method: {name: NAME}`."""

    text_sets: ClassVar[str] = "name"
    name: MethodName | None = Field(default=None, exclude=True)
    """Name of a published method, such as `gkd`, or of an entry of `methods`. It sets the objective and the sampler. Other keys beside
    `name` change these settings."""
    # None once it is applied
    objective: Objective = ForwardKL()
    """The loss of each token. Its `type` chooses the loss."""
    sampler: Sampler = DatasetSampler()
    """The source of the text on which the student trains. Its `type` chooses the source."""
    optim: Optim = Optim()
    select: Select = Select()
    dense: Dense | None = None
    context: TeacherContext | None = None
    """The teacher's own prompt. By default, the teacher reads the student's prompt."""
    ema: Ema | None = None
    """Makes the teacher the exponential moving average of the student, in a path such as `s > s`, in which a model teaches itself. After
    each update, teacher = ema x teacher + (1 - ema) x student, in float32. With 0, the teacher is the student itself. By default, the
    teacher does not change."""
    phases: Phases | None = None
    """Phases of every distillation, one after the other. Each has its own `share` of the updates, and changes parts of this method. By
    default, a distillation has no phases."""

    @property
    def signal(self) -> Signal | None:
        """Settings of the teacher outputs that are recorded before training. None if no outputs are recorded."""
        return self.sampler.recording

    @property
    def recorded_text(self) -> bool:
        """True if the student's text is sampled once, before training, so that training samples nothing."""
        return isinstance(self.sampler, StudentSampler) and self.sampler.recorded

    @property
    def uses_teacher(self) -> bool:
        """True if the loss or the training text needs a teacher."""
        return self.objective.needs_teacher or self.sampler.teacher_text

    @property
    def samples(self) -> bool:
        """True if the current student samples text during training."""
        return isinstance(self.sampler, OnPolicy) and not self.recorded_text

    @property
    def keeps_behaviour(self) -> bool:
        """True if the loss needs probabilities under the decoding settings, which a pass like that of training in bf16 does not give."""
        decoded = isinstance(self.sampler, OnPolicy) and not self.sampler.plain
        return decoded and self.objective.needs_scores and self.optim.precision == "bf16"

    @property
    def trains_with_teacher(self) -> bool:
        """True if the teacher must run during training: the loss needs its outputs, and they are not recorded before training."""
        return self.objective.needs_teacher and self.signal is None

    @property
    def runs_teacher(self) -> bool:
        """True if the teacher runs during training, for the loss or for the choice of a checkpoint."""
        return self.trains_with_teacher or self.select.metric == "reverse_kl"

    @property
    def by_token(self) -> str | None:
        """The setting (objective, sampler or metric) that compares student and teacher token by token, such as ``objective `forward_kl` ``.
        None if the student gets only text from the teacher."""
        if self.objective.needs_teacher:
            return f"objective `{self.objective.label}`"
        if self.sampler.guided:
            return f"sampler `{self.sampler.label}`"
        return "select.metric `reverse_kl`" if self.select.metric == "reverse_kl" else None

    @property
    def round_rollouts(self) -> int:
        """Number of sequences that are sampled before each round of updates, on all devices together. The default is one batch."""
        return (self.sampler.rollouts if isinstance(self.sampler, Rounds) else None) or self.optim.batch

    @property
    def round_updates(self) -> int:
        """Number of updates in a round, after which new sequences are sampled. It is 1 if the sampler does not work in rounds."""
        epochs = self.sampler.inner_epochs if isinstance(self.sampler, Rounds) else 1
        return self.round_rollouts // self.optim.batch * epochs

    def longest(self, max_prompt: int, max_length: int) -> int:
        """Return the largest number of tokens (prompt and answer) that a teacher may have to read at once. The arguments are those of
        `data`."""
        answer = self.sampler.max_new_tokens if isinstance(self.sampler, OnPolicy) else 0
        if self.context is None:
            return max(max_length, max_prompt + answer)
        return self.context.max_prompt + max(answer, max_length)  # a response of the data set may be nearly as long as its row
