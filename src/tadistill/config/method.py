"""What a learner minimises, on which sequences, with which optimizer: objectives, samplers, optimizer, selection.

Objectives are in `tadistill.config.objective`. Each sampler is a config variant told apart by `type`, with the source paper's defaults; to
add one, add a class here and to its union, and the code that reads it in `tadistill.rollout.samplers`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tadistill.config.objective import (
    Contrastive,
    CrossEntropy,
    Divergence,
    ForwardKL,
    MiniLLM,
    Objective,
    SampledKL,
    TopKForwardKL,
    TopKReverseKL,
)
from tadistill.config.strict import Strict
from tadistill.errors import ConfigError

# --- samplers: where training sequences come from -----------------------------------------------------------------------


class HiddenSignal(Strict):
    """Keep the teacher's last hidden states for the whole training set on disk; its head alone is loaded to train. Exact in float32."""

    type: Literal["hidden"] = "hidden"
    dtype: Literal["float32", "bfloat16"] = "float32"


class TopKSignal(Strict):
    """Keep the teacher's k most probable tokens at every position on disk; nothing of the teacher is loaded to train."""

    type: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1)
    tail: Literal["lump", "drop"] = "lump"
    """`lump` keeps the mass of all other tokens as one more outcome, `drop` renormalises over the k tokens."""


class DatasetSampler(Strict):
    """The training set's own responses."""

    type: Literal["dataset"] = "dataset"
    signal: Annotated[HiddenSignal | TopKSignal, Field(discriminator="type")] | None = None
    """The teacher's outputs, computed once as a stage and shared by its arms. Without it the teacher runs beside the student."""


class _TeacherText(Strict):
    """How a teacher answers the training prompts."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)


class TeacherSampler(_TeacherText):
    """The teacher's own responses to the training prompts, generated once as a stage (SeqKD)."""

    type: Literal["teacher"] = "teacher"


class TeacherMixedSampler(Strict):
    """Rollouts from (1 - alpha) student + alpha teacher, mixed per token as distributions (MiniLLM, Eq. 4).

    Sampling is at temperature 1 over the whole vocabulary, as in the paper.
    """

    type: Literal["teacher_mixed"] = "teacher_mixed"
    alpha: float = Field(default=0.2, ge=0, lt=1)
    rollouts: int = Field(default=256, ge=1)
    """Global number of sequences sampled in a round."""
    inner_epochs: int = Field(default=4, ge=1)
    """Passes over a round's rollouts before new ones are sampled."""
    max_new_tokens: int = Field(default=256, ge=1)


class PairSampler(_TeacherText):
    """For every prompt of a batch the teacher's response, generated once as a stage, and a fresh one of the student (DistiLLM-2).

    A batch of n prompts makes 2n sequences; `temperature` and `top_p` hold for both models.
    """

    type: Literal["pair"] = "pair"


Sampler = Annotated[DatasetSampler | TeacherSampler | TeacherMixedSampler | PairSampler, Field(discriminator="type")]


# --- training settings --------------------------------------------------------------------------------------------------


class Optim(Strict):
    """AdamW and its schedule. Counts are global: `batch` sequences make one update on any number of devices."""

    lr: float = Field(default=5e-4, gt=0)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer updates. Give `steps` or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows (counted before the length filter)."""
    batch: int = Field(default=32, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences in one forward pass; the whole batch when absent."""
    warmup: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_min: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _check(self):
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; choose a divisor")
        return self


class Select(Strict):
    """Which checkpoint a stage keeps."""

    metric: Literal["last", "loss", "rouge_l", "fact_accuracy", "reverse_kl"] = "loss"
    """A metric on the dev set, or `last` for the final weights. Lower is better for loss and reverse_kl."""
    every: int = Field(default=100, ge=1)
    """Dev evaluation every so many updates, and at the end."""


class Sft(Strict):
    """Supervised fine-tuning of a model before it teaches or learns."""

    optim: Optim = Optim()
    select: Select = Select()


class Method(Strict):
    """How a learner is distilled: what is minimised, on which sequences, with which optimizer."""

    objective: Objective = ForwardKL()
    sampler: Sampler = DatasetSampler()
    optim: Optim = Optim()
    select: Select = Select()

    @property
    def signal(self) -> HiddenSignal | TopKSignal | None:
        """The teacher's recorded signal, where the sampler reads one."""
        return self.sampler.signal if isinstance(self.sampler, DatasetSampler) else None


class MethodPatch(Strict):
    """The part of a method that one model or one arm changes."""

    objective: Objective | None = None
    sampler: Sampler | None = None
    optim: Optim | None = None
    select: Select | None = None


def merge(base: Strict, patch: Strict | None) -> Any:
    """`base` with the fields that `patch` sets. A patch of another class (another `type`) replaces the base."""
    if patch is None:
        return base
    if type(patch) is not type(base):
        return patch
    changed = {name: getattr(patch, name) for name in patch.model_fields_set}
    if isinstance(base, Optim):  # steps and epochs exclude each other, so giving one clears the other
        if "steps" in changed:
            changed.setdefault("epochs", None)
        elif "epochs" in changed:
            changed.setdefault("steps", None)
    return type(base).model_validate({**base.model_dump(), **changed})


def apply(method: Method, *patches: MethodPatch) -> Method:
    """A method with patches applied in order; checks what only the result can break."""
    for patch in patches:
        method = Method(**{f: merge(getattr(method, f), getattr(patch, f)) for f in Method.model_fields})
    _check_pairing(method)
    return method


def _check_pairing(method: Method) -> None:
    """Raise where an objective and a sampler cannot work together."""
    objective, sampler = method.objective, method.sampler
    mixed, paired = isinstance(sampler, TeacherMixedSampler), isinstance(sampler, PairSampler)
    on_policy = isinstance(sampler, TeacherMixedSampler) and sampler.alpha == 0
    if isinstance(objective, MiniLLM) and not mixed:
        raise ConfigError(
            f"objective minillm learns from rollouts, but the sampler is {sampler.type}; use sampler: {{type: teacher_mixed}}"
        )
    if isinstance(objective, SampledKL) and not on_policy:
        raise ConfigError(
            f"objective sampled_kl estimates from the student's own samples, which sampler {sampler.type} as set here does not draw; "
            "use sampler: {type: teacher_mixed, alpha: 0}"
        )
    if isinstance(objective, Contrastive) != paired:
        raise ConfigError(
            f"objective contrastive and sampler pair belong together, but here are {objective.type} and {sampler.type}; change one of them"
        )
    if (mixed or paired) and isinstance(objective, Divergence) and objective.kd_ratio < 1:
        raise ConfigError(
            f"kd_ratio is {objective.kd_ratio}, but sampler {sampler.type} trains on the student's own text, which is no target for "
            "cross-entropy; set kd_ratio: 1"
        )
    signal = method.signal
    if signal and isinstance(objective, CrossEntropy):
        raise ConfigError(
            f"sampler.signal {signal.type} is of no use to objective cross_entropy, which has no teacher; set signal: null here"
        )
    if isinstance(signal, TopKSignal) and isinstance(objective, TopKForwardKL | TopKReverseKL):
        raise ConfigError(
            f"objective {objective.type} chooses its own tokens, and so does the top_k signal; "
            f"use objective {objective.type.removeprefix('top_k_')}"
        )
    tempered = isinstance(objective, Divergence) and objective.temperature != 1
    if isinstance(signal, TopKSignal) and signal.tail == "lump" and tempered:
        raise ConfigError("a top_k signal with a lumped tail knows the tail's mass at temperature 1 only; set temperature: 1 or tail: drop")
    if (mixed or paired) and method.optim.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing works in training mode only, and rollouts train without dropout in evaluation mode; "
            "lower optim.micro_batch instead"
        )
