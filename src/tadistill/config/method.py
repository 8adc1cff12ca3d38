"""The settings of a training method: objective (the loss), sampler (the training text), optimizer, and choice of a checkpoint.

`check_pairing` refuses settings that do not fit together. Objectives are in `tadistill.config.objective`, samplers are in
`tadistill.config.sampling`, and settings of the optimizer in `tadistill.config.optim`.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from tadistill.config.common import MOST, Decoding, Strict
from tadistill.config.context import TeacherContext
from tadistill.config.objective import Divergence, ForwardKL, Objective, TopKForwardKL, TopKReverseKL
from tadistill.config.optim import Optim
from tadistill.config.sampling import (
    DatasetSampler,
    HiddenSignal,
    OnPolicy,
    ReplaySampler,
    Rounds,
    SampledSignal,
    Sampler,
    Signal,
    StudentSampler,
    TeacherMixedSampler,
    TopKSignal,
)
from tadistill.config.shorthand import MethodName, written_out
from tadistill.errors import ConfigError
from tadistill.metrics import SELECTABLE

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


class Sft(Strict):
    """Supervised fine-tuning of a model before it teaches or learns."""

    optim: Optim = Optim()
    select: Select = Select()
    keep: tuple[Annotated[int, Field(ge=1, le=MOST)], ...] = ()
    """Updates after which the weights are also stored, such as [100, 200]. Another model of the recipe can be such a stored state (key
    `checkpoint`)."""


class Dense(Strict):
    """Dense guidance (Son et al. 2021, DGKD): all models before a student in its path teach it together. Their distributions are
    averaged."""

    kind: Literal["geometric", "arithmetic"] = "geometric"
    """The mean of the teachers' distributions that is the target. `geometric` fits the objective `reverse_kl`, and `arithmetic` fits
    `forward_kl`. In both cases, the gradient equals that of the mean of the KLs to the single teachers."""
    weights: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = ()
    """One weight per teacher, in the order of the path. By default, all weights are equal."""
    drop: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a teacher is left out of an update. At least one teacher always stays."""

    @model_validator(mode="after")
    def _check(self):
        if self.weights and not sum(self.weights) > 0:
            raise ValueError(f"dense.weights are {list(self.weights)}; set at least one weight above 0")
        return self


class Method(Strict):
    """A distillation method: the loss, the training text, the optimizer, and the choice of a checkpoint. `method: NAME` is short for
    `method: {name: NAME}`."""

    text_sets: ClassVar[str] = "name"
    name: MethodName | None = Field(default=None, exclude=True)
    """Name of a published method. It sets the objective and the sampler. Other keys beside `name` change these settings."""
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
        """True if a teacher gives the loss or the text."""
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
    def round_rollouts(self) -> int:
        """Number of sequences that are sampled before each round of updates, on all devices together. The default is one batch."""
        return (self.sampler.rollouts if isinstance(self.sampler, Rounds) else None) or self.optim.batch

    @property
    def round_updates(self) -> int:
        """Number of updates in a round, after which new sequences are sampled. It is 1 if the sampler does not work in rounds."""
        epochs = self.sampler.inner_epochs if isinstance(self.sampler, Rounds) else 1
        return self.round_rollouts // self.optim.batch * epochs


class MethodPatch(Strict):
    """Changes to the recipe's method for one model or one arm."""

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


def merge_methods(base: Strict, patch: Strict | None) -> Any:
    """Return a copy of `base` with the fields that `patch` sets. Return `patch` itself if its class (its `type`) differs from that of
    `base`."""
    if patch is None:
        return base
    if type(patch) is not type(base):
        return patch
    changed = {name: getattr(patch, name) for name in patch.model_fields_set}
    if isinstance(base, Optim):  # two of these keys exclude each other, so giving one clears the other
        for one, other in (("steps", "epochs"), ("epochs", "steps"), ("micro_batch", "tokens"), ("tokens", "micro_batch")):
            if changed.get(one) is not None:
                changed.setdefault(other, None)
    try:
        return type(base).model_validate({**base.model_dump(), **changed})
    except ValidationError as error:
        what = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        part = type(base).__name__.lower()
        raise ConfigError(f"a model or an arm changes `{part}` of the method, but the result is not valid: {what}") from error


def apply(method: Method, *patches: MethodPatch) -> Method:
    """Return the method with the changes of all `patches`, applied in order. Raises a ConfigError if the resulting settings do not fit
    together."""
    for patch in patches:
        method = Method(**{f: merge_methods(getattr(method, f), getattr(patch, f)) for f in MethodPatch.model_fields})
    for name, used in (("dense", method.objective.needs_teacher), ("context", method.uses_teacher)):
        if not used and not any(getattr(patch, name) for patch in patches):
            method = method.model_copy(update={name: None})  # the recipe's own setting applies only to arms that have teachers
    check_pairing(method)
    return method


def check_pairing(method: Method) -> None:
    """Raise a ConfigError if the objective, the sampler, the recorded teacher outputs and the optimizer settings do not fit together."""
    method.sampler.check()
    _check_text(method)
    _check_signal(method)
    method.select.check()
    _check_engine(method)
    if method.context:
        _check_context(method)
    sampler, batch = method.sampler, method.optim.batch
    if method.round_rollouts % batch:
        raise ConfigError(
            f"sampler.rollouts {method.round_rollouts} is not a multiple of optim.batch {batch}; change one of them, so that a round is a "
            "whole number of updates"
        )
    if sampler.follows_dev and method.select.metric == "last":
        raise ConfigError(
            f"sampler `{sampler.type}` needs the loss on the dev set, but select.metric `last` does not measure it; set `select.metric` "
            "to `loss` or `rouge_l`"
        )
    if isinstance(sampler, ReplaySampler) and sampler.capacity < batch:
        raise ConfigError(
            f"sampler.capacity {sampler.capacity} is less than optim.batch {batch}; raise `sampler.capacity` to at least {batch}"
        )


def _check_text(method: Method) -> None:
    objective, sampler = method.objective, method.sampler
    if method.recorded_text and (objective.needs_rounds or objective.needs_own_samples):
        raise ConfigError(
            f"objective `{objective.type}` needs new samples of the current student, but sampler `student` has `recorded: true`, so "
            "its text is sampled once, before training; remove `recorded`, or use a divergence, such as `reverse_kl`"
        )
    if objective.needs_rounds and not sampler.in_rounds:
        raise ConfigError(
            f"objective `{objective.type}` needs a sampler that works in rounds, but sampler `{sampler.type}` does not; use "
            f"`sampler: {{type: teacher_mixed}}`"
        )
    if objective.needs_own_samples and not sampler.student_only:
        raise ConfigError(
            f"objective `{objective.type}` needs samples from the student's own distribution, but sampler `{sampler.type}` does not draw "
            f"them; use `sampler: {{type: student}}` with `temperature` 1, and without `top_k`, `top_p`, `min_p` and `no_repeat_ngram`"
        )
    if objective.needs_rounds and isinstance(sampler, Rounds) and sampler.temperature == 0:
        raise ConfigError(
            f"objective `{objective.type}` needs random samples, but sampler.temperature is 0 (greedy decoding); set "
            "`sampler.temperature` above 0"
        )
    if objective.needs_pairs != sampler.pairs:
        raise ConfigError(
            f"objective `contrastive` and sampler `pair` work only together, but the recipe has objective `{objective.type}` and sampler "
            f"`{sampler.type}`; change one of them"
        )
    if sampler.on_policy and objective.imitates_text:
        fix = (
            f"kd_ratio is {objective.kd_ratio}; set it to 1"
            if isinstance(objective, Divergence)
            else "use a divergence, such as `reverse_kl`"
        )
        raise ConfigError(f"sampler `{sampler.type}` trains on the student's own text, so the loss must not contain cross-entropy; {fix}")


def _check_signal(method: Method) -> None:
    objective, signal = method.objective, method.signal
    if method.dense and not isinstance(signal, HiddenSignal | None):
        raise ConfigError(
            f"`dense` averages the distributions of several teachers, which sampler.signal `{signal.type}` does not have; use "
            "`signal: {type: hidden}`"
        )
    if method.dense and not objective.needs_teacher:
        raise ConfigError(
            f"objective `{objective.type}` uses no teacher, so `dense` has no effect; use an objective with a teacher, such as `reverse_kl`"
        )
    if signal and not objective.needs_teacher:
        raise ConfigError(
            f"objective `{objective.type}` uses no teacher, so sampler.signal `{signal.type}` has no effect; set `signal: null` in this arm"
        )
    if isinstance(signal, TopKSignal) and isinstance(objective, TopKForwardKL | TopKReverseKL):
        raise ConfigError(
            f"objective `{objective.type}` selects the teacher's top tokens, but sampler.signal `top_k` already records only these; use "
            f"objective `{objective.type.removeprefix('top_k_')}`"
        )
    tempered = isinstance(objective, Divergence) and objective.temperature != 1
    if isinstance(signal, SampledSignal) and (not isinstance(objective, ForwardKL) or tempered):
        raise ConfigError(
            f"sampler.signal `sampled` gives an unbiased gradient only for objective `forward_kl` at temperature 1, but the recipe has "
            f"objective `{objective.type}`{' at another temperature' if tempered else ''}; change it, or use `signal: {{type: hidden}}`"
        )
    if isinstance(signal, TopKSignal) and signal.tail == "lump" and tempered:
        raise ConfigError("sampler.signal `top_k` with `tail: lump` needs objective.temperature 1; set `temperature: 1`, or `tail: drop`")


def _check_context(method: Method) -> None:
    objective, sampler = method.objective, method.sampler
    if not method.uses_teacher:
        raise ConfigError(
            f"objective `{objective.type}` uses no teacher, so `context` has no effect; use an objective with a teacher, such as "
            "`reverse_kl`, or remove `context`"
        )
    if sampler.guided:
        fix = "set `sampler.alpha: 0`" if isinstance(sampler, TeacherMixedSampler) else "use `sampler: {type: student}`"
        raise ConfigError(
            f"sampler `{sampler.type}` lets student and teacher sample one text together, but with `context` the teacher reads another "
            f"prompt; {fix}, or remove `context`"
        )
    if method.select.metric == "reverse_kl":
        raise ConfigError(
            "select.metric `reverse_kl` compares student and teacher on the student's prompts, but with `context` the teacher reads "
            "prompts of its own; set `select.metric` to `loss` or `rouge_l`"
        )


def _check_engine(method: Method) -> None:
    objective, sampler = method.objective, method.sampler
    if isinstance(sampler, Decoding):
        sampler.check_engine()
    if not (isinstance(sampler, OnPolicy) and sampler.vllm and method.samples):
        return
    if sampler.guided:
        raise ConfigError(
            f"sampler `{sampler.type}` needs the teacher's distribution at every token, but engine `vllm` cannot give it; use `engine: "
            "native`"
        )
    if objective.needs_rounds and not sampler.plain:
        raise ConfigError(
            f"objective `{objective.type}` with engine `vllm` needs temperature 1 and no `top_k`, `top_p` or `min_p`; "
            "change these settings, or use `engine: native`"
        )
