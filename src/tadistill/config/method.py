"""What a learner minimises, on which sequences, with which optimizer: objectives, samplers, optimizer, selection.

Objectives are in `tadistill.config.objective`, samplers in `tadistill.config.sampling`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

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
from tadistill.config.sampling import (
    DatasetSampler,
    HiddenSignal,
    OnPolicy,
    PairSampler,
    ReplaySampler,
    Rounds,
    Sampler,
    SpeculativeSampler,
    StudentSampler,
    TeacherMixedSampler,
    TopKSignal,
)
from tadistill.config.strict import Strict
from tadistill.errors import ConfigError

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
    """Of each layer only the input is kept for the backward pass, which runs the layer again: less memory, a third more work."""

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


HIGHER_IS_BETTER = frozenset({"rouge_l", "fact_accuracy"})
"""Of the metrics of `Select`; of the others lower is."""
NOT_COMPARABLE = {
    "last": "measures nothing on dev",
    "reverse_kl": "is measured to the teacher of the last stage, which is another one in every path",
}
"""Metrics of `Select` that say nothing about two paths, and why."""


class Sft(Strict):
    """Supervised fine-tuning of a model before it teaches or learns."""

    optim: Optim = Optim()
    select: Select = Select()
    keep: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Updates whose weights are kept, for models that are a `checkpoint` of this one."""

    @model_serializer(mode="wrap")
    def _without_what_is_unset(self, handler: Any) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if v or k != "keep"}


class Dense(Strict):
    """Every model before a learner in its path teaches it, as one mixture (Son et al. 2021, DGKD; `objectives.TargetMixture`)."""

    kind: Literal["geometric", "arithmetic"] = "geometric"
    """Reverse KL to all teachers is reverse KL to their geometric mixture; forward KL from all is that from the arithmetic one."""
    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()
    """One per teacher, from the big end of the path; equal when absent."""
    drop: float = Field(default=0.0, ge=0, lt=1)
    """Probability of leaving a teacher out of an update; one always stays."""

    @model_validator(mode="after")
    def _check(self):
        if self.weights and not sum(self.weights) > 0:
            raise ValueError(f"dense.weights are {list(self.weights)}; at least one must be above 0")
        return self


class Method(Strict):
    """How a learner is distilled: what is minimised, on which sequences, with which optimizer."""

    objective: Objective = ForwardKL()
    sampler: Sampler = DatasetSampler()
    optim: Optim = Optim()
    select: Select = Select()
    dense: Dense | None = None

    @property
    def signal(self) -> HiddenSignal | TopKSignal | None:
        """The teacher's recorded signal, where the sampler reads one."""
        return self.sampler.signal if isinstance(self.sampler, DatasetSampler) else None

    @property
    def round_rollouts(self) -> int:
        """Global number of sequences in a round; a batch where the sampler has no rounds or leaves it open."""
        return (self.sampler.rollouts if isinstance(self.sampler, Rounds) else None) or self.optim.batch

    @property
    def round_updates(self) -> int:
        """Updates on one round of rollouts; 1 where the sampler has no rounds."""
        epochs = self.sampler.inner_epochs if isinstance(self.sampler, Rounds) else 1
        return self.round_rollouts // self.optim.batch * epochs


class MethodPatch(Strict):
    """The part of a method that one model or one arm changes."""

    objective: Objective | None = None
    sampler: Sampler | None = None
    optim: Optim | None = None
    select: Select | None = None
    dense: Dense | None = None


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
    if isinstance(method.objective, CrossEntropy) and not any(patch.dense for patch in patches):
        method = method.model_copy(update={"dense": None})  # of the recipe's method; an arm that has no teacher cannot follow it
    check_pairing(method)
    return method


def check_pairing(method: Method) -> None:
    """Raise where objective, sampler and optimizer cannot work together."""
    _check_text(method)
    _check_signal(method)
    sampler, optim = method.sampler, method.optim
    if isinstance(sampler, Rounds) and sampler.rollouts and sampler.rollouts % optim.batch:
        raise ConfigError(
            f"sampler.rollouts {sampler.rollouts} is not a multiple of optim.batch {optim.batch}, so a round has no whole "
            "number of updates; change one of them"
        )
    if isinstance(sampler, ReplaySampler) and method.select.metric == "last":
        raise ConfigError(
            "sampler replay follows the dev loss, but select.metric is `last`, which measures none; select by loss or rouge_l"
        )
    if isinstance(sampler, ReplaySampler) and sampler.capacity < optim.batch:
        raise ConfigError(f"sampler.capacity {sampler.capacity} holds less than one batch of {optim.batch}; raise it")
    if isinstance(sampler, TeacherMixedSampler | SpeculativeSampler) and sampler.engine == "vllm":
        raise ConfigError(f"sampler {sampler.type} needs the teacher's distribution at every token, which engine vllm has not; use native")
    if isinstance(sampler, OnPolicy) and sampler.engine == "vllm" and sampler.no_repeat_ngram:
        raise ConfigError("engine vllm knows no no_repeat_ngram; leave it out, or use engine: native")
    if isinstance(method.objective, MiniLLM) and sampler.engine == "vllm" and not sampler.plain:  # type: ignore[union-attr]
        raise ConfigError("objective minillm with engine vllm needs plain sampling (temperature 1, no top_k, top_p or min_p); use native")


def _check_text(method: Method) -> None:
    """Raise where an objective cannot learn from the sampler's text."""
    objective, sampler = method.objective, method.sampler
    if isinstance(objective, MiniLLM) and not isinstance(sampler, Rounds):
        raise ConfigError(
            f"objective minillm learns from rounds of rollouts, but the sampler is {sampler.type}; use sampler: {{type: teacher_mixed}}"
        )
    of_student = isinstance(sampler, StudentSampler) or (isinstance(sampler, TeacherMixedSampler) and sampler.alpha == 0)
    if isinstance(objective, SampledKL) and not (of_student and sampler.plain):  # type: ignore[union-attr]
        raise ConfigError(
            f"objective sampled_kl estimates from the student's own samples, which sampler {sampler.type} as set here does not draw; "
            "use sampler: {type: student} with temperature 1 and no top_k, top_p, min_p or no_repeat_ngram"
        )
    if isinstance(objective, MiniLLM) and isinstance(sampler, Rounds) and sampler.temperature == 0:
        raise ConfigError("objective minillm weighs samples by their probability, and sampler.temperature 0 draws none; set it above 0")
    if isinstance(objective, Contrastive) != isinstance(sampler, PairSampler):
        raise ConfigError(
            f"objective contrastive and sampler pair belong together, but here are {objective.type} and {sampler.type}; change one of them"
        )
    if not isinstance(sampler, OnPolicy):
        return
    if isinstance(objective, CrossEntropy) or (isinstance(objective, Divergence) and objective.kd_ratio < 1):
        fix = "use a divergence" if isinstance(objective, CrossEntropy) else f"kd_ratio is {objective.kd_ratio}; set it to 1"
        raise ConfigError(f"sampler {sampler.type} trains on the student's own text, which is no target for cross-entropy; {fix}")


def _check_signal(method: Method) -> None:
    """Raise where a recorded signal does not hold what the objective asks for."""
    objective, signal = method.objective, method.signal
    if signal and method.dense:
        raise ConfigError(f"sampler.signal {signal.type} records one teacher, but dense guidance has several; set signal: null here")
    if method.dense and isinstance(objective, CrossEntropy):
        raise ConfigError("objective cross_entropy has no teacher, so dense guidance would do nothing; use a divergence")
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
