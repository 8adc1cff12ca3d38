"""The settings of a training method: objective (the loss), sampler (the training text), optimizer, and choice of a checkpoint.

A method can have phases, which a student passes one after the other. Objectives are in `tadistill.config.objective`, samplers are in
`tadistill.config.sampling`, and settings of the optimizer in `tadistill.config.optim`. `tadistill.config.combinations` refuses
settings that do not fit together.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from tadistill.config.combinations import check_pairing
from tadistill.config.common import MOST, Strict
from tadistill.config.context import TeacherContext
from tadistill.config.objective import ForwardKL, Objective
from tadistill.config.optim import Optim
from tadistill.config.sampling import DatasetSampler, OnPolicy, Rounds, Sampler, Signal, StudentSampler
from tadistill.config.shorthand import MethodName, written_out
from tadistill.errors import ConfigError, about
from tadistill.metrics import SELECTABLE

PARTS = ("objective", "sampler", "optim", "select", "dense", "context", "ema")
"""The keys of a method that a model, an arm or a phase can change."""
_ROUNDING = 1e-6  # shares such as 0.333333 add up to 1

if TYPE_CHECKING:
    SelectMetric = str
else:
    SelectMetric = Literal[SELECTABLE]  # type checkers want the names written out


class Select(Strict):
    """The choice of the checkpoint that a training keeps."""

    metric: SelectMetric = "loss"
    """The metric on the dev set that chooses the checkpoint. With `last`, the final weights are kept."""
    every: int = Field(default=100, ge=1, le=MOST)
    """Number of updates between two evaluations on the dev set. The last evaluation is always at the end of training."""
    patience: int | None = Field(default=None, ge=1, le=MOST)
    """Stop the training if this many evaluations on the dev set, one after the other, give no better value. By default, training never
    stops early."""

    def check(self) -> None:
        """Raise a ConfigError if `patience` is set but no metric is measured on the dev set."""
        if self.patience is not None and self.metric == "last":
            raise ConfigError(
                f"select.patience is {self.patience}, but with select.metric `last` nothing is measured on the dev set; set "
                "`select.metric` to `loss` or `rouge_l`, or remove `select.patience`"
            )


Ema = Annotated[float, Field(ge=0, lt=1)]
"""Decay of an exponential moving average of weights: the factor of the teacher's old weights in each update of the teacher."""


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


class Dense(Strict):
    """Dense guidance (Son et al. 2021, DGKD): all models before a student in its path teach the student together. The target is the mean of
    their distributions."""

    kind: Literal["geometric", "arithmetic"] = "geometric"
    """The kind of mean. `geometric` fits the objective `reverse_kl`, and `arithmetic` fits `forward_kl`. For both pairs, the gradient
    equals the gradient of the mean of the KLs between the student and each teacher."""
    weights: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = ()
    """One weight per teacher, in the order of the path. By default, all weights are equal."""
    drop: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a teacher is left out of an update. At least one teacher always stays."""

    @model_validator(mode="after")
    def _check(self):
        if self.weights and not sum(self.weights) > 0:
            raise ValueError(f"dense.weights are {list(self.weights)}; set at least one weight above 0")
        return self


class Phase(Strict):
    """A part of a distillation with its own method and its own share of the updates. `NAME` is short for `{method: NAME}`.

    A student passes the phases one after the other. Each phase starts from the final weights of the phase before, with a new optimizer and
    a new schedule of the learning rate. Settings that a phase does not change are those of the whole distillation.
    """

    text_sets: ClassVar[str] = "method"
    method: MethodName | None = Field(default=None, exclude=True)
    """Name of a published method, such as `seqkd`, or of an entry of `methods`."""  # None once it is applied
    share: float | None = Field(default=None, gt=0, le=1)
    """Share of the updates of the whole distillation. The shares of all phases add up to 1. By default, all phases have equal shares."""
    objective: Objective | None = None
    """Changes to `objective` in this phase. If the `type` differs, this objective replaces that of the whole distillation."""
    sampler: Sampler | None = None
    """Changes to `sampler` in this phase. If the `type` differs, this sampler replaces that of the whole distillation."""
    optim: Optim | None = None
    """Changes to `optim` in this phase, without `steps` and `epochs`."""
    select: Select | None = None
    """Changes to `select` in this phase."""
    dense: Dense | None = None
    """Changes to `dense` in this phase."""
    context: TeacherContext | None = None
    """Changes to `context` in this phase."""
    ema: Ema | None = None
    """Replaces `ema` in this phase. The average begins with the student's weights at the start of the phase."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return written_out(value, string=cls.text_sets, name="method", phased=False)

    @model_validator(mode="after")
    def _check(self):
        if self.optim and (given := [name for name in ("steps", "epochs") if getattr(self.optim, name) is not None]):
            raise ValueError(
                f"a phase sets `optim.{given[0]}`, but phases divide the updates of the whole distillation; remove `{given[0]}`, and write "
                "the `share` of the phase"
            )
        return self

    @property
    def patch(self) -> "MethodPatch":
        """This phase's changes to the settings of the whole distillation."""
        return MethodPatch(**{part: getattr(self, part) for part in PARTS})


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


class MethodPatch(Strict):
    """Settings of a method, all optional. They change the recipe's method for one model, or define a method with a name of your own
    (`methods`). `NAME` is short for `{name: NAME}`."""

    text_sets: ClassVar[str] = "name"
    name: MethodName | None = Field(default=None, exclude=True)
    """Name of a published method, such as `gkd`, or of an entry of `methods`. It sets the objective and the sampler. Other keys beside
    `name` change these settings."""  # None once it is applied
    objective: Objective | None = None
    """Changes to the recipe's `method.objective`. If the `type` differs, this objective replaces the recipe's objective."""
    sampler: Sampler | None = None
    """Changes to the recipe's `method.sampler`. If the `type` differs, this sampler replaces the recipe's sampler."""
    optim: Optim | None = None
    """Changes to the recipe's `method.optim`."""
    select: Select | None = None
    """Changes to the recipe's `method.select`."""
    dense: Dense | None = None
    """Changes to the recipe's `method.dense`."""
    context: TeacherContext | None = None
    """Changes to the recipe's `method.context`."""
    ema: Ema | None = None
    """Replaces the recipe's `method.ema`."""
    phases: Phases | None = None
    """Phases of the distillation, one after the other. They replace the phases of the recipe's `method`. `[]` means no phases."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return written_out(value, string=cls.text_sets, name="name")


class Method(Strict):
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

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return written_out(value, string=cls.text_sets, name="name")

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


def merge_methods(base: Any, patch: Strict | float | None, part: str) -> Any:
    """Return a part of a method, such as its objective, with the changes in `patch`.

    Args:
        base: the part without the changes.
        patch: the changes. None changes nothing. A number, or an object of another class (another `type`), replaces `base`.
        part: the key of the part, such as `objective`, for the error message.

    Raises:
        ConfigError: the changed settings do not fit together.
    """
    if patch is None:
        return base
    if type(patch) is not type(base) or not isinstance(patch, Strict):
        return patch
    changed = {name: getattr(patch, name) for name in patch.model_fields_set}
    if isinstance(base, Optim):  # the keys of a pair exclude each other, so setting one clears the other
        for one, other in (("steps", "epochs"), ("epochs", "steps"), ("micro_batch", "tokens"), ("tokens", "micro_batch")):
            if changed.get(one) is not None:
                changed.setdefault(other, None)
    try:
        return type(base).model_validate({**base.model_dump(), **changed})
    except ValidationError as error:
        what = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise ConfigError(f"a model, an arm or a phase changes `{part}`, but the changed settings do not fit together: {what}") from error


def apply(method: Method, *patches: MethodPatch) -> Method:
    """Return the method with the changes of all `patches`, applied in order. Raises a ConfigError if the resulting settings do not fit
    together."""
    for patch in patches:
        phases = method.phases if patch.phases is None else patch.phases
        parts = {part: merge_methods(getattr(method, part), getattr(patch, part), part) for part in PARTS}
        method = Method(**parts, phases=phases)
    if method.phases:
        phases_of(method)  # checks the settings of each phase; those of the whole method are not trained with
        return method
    asked = method.objective.needs_teacher
    for name, used in (("dense", asked), ("context", method.uses_teacher), ("ema", asked)):
        if not used and all(getattr(patch, name) is None for patch in patches):
            method = method.model_copy(update={name: None})  # the recipe's own setting applies only to arms that have teachers
    check_pairing(method)
    return method


def phases_of(method: Method) -> list[tuple[Method, float]]:
    """Return the method of each phase and its share of the updates. A method without phases is returned as one phase, with the share 1.

    Raises:
        ConfigError: the settings of a phase do not fit together.
    """
    if not method.phases:
        return [(method, 1.0)]
    plain, found = method.model_copy(update={"phases": None}), []
    for number, phase in enumerate(method.phases, 1):
        with about(f"phase {number}"):
            found.append((apply(plain, phase.patch), phase.share or 1 / len(method.phases)))
    return found
