"""What a learner minimises, on which sequences, with which optimizer: objectives, samplers, optimizer, selection.

Each objective and sampler is a config variant told apart by `type`; its defaults are the source paper's. To add one, add
a class here and to its union, and the code that reads it in `tadistill.train.step` or `tadistill.rollout.samplers`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tadistill.errors import ConfigError


class Strict(BaseModel):
    """Base of all recipe parts: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# --- objectives ---------------------------------------------------------------------------------------------------------


class CrossEntropy(Strict):
    """Maximum likelihood of the training text. On a teacher's text this is SeqKD (Kim & Rush 2016)."""

    type: Literal["cross_entropy"] = "cross_entropy"


class _Divergence(Strict):
    temperature: float = Field(default=1.0, gt=0)
    """Both logits are divided by it; the loss is not rescaled."""
    kd_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the divergence; the rest is cross-entropy on the tokens (MiniLLM's KD baseline uses 0.5)."""


class ForwardKL(_Divergence):
    """KL(teacher || student) per token (Hinton et al. 2015; Sanh et al. 2019)."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(_Divergence):
    """KL(student || teacher) per token, exact over the vocabulary (Gu et al. 2024, section 2.2)."""

    type: Literal["reverse_kl"] = "reverse_kl"


class MiniLLM(Strict):
    """MiniLLM's policy gradient, as the paper has it (arXiv 2306.08543v6, Algorithm 1): each part is a switch.

    The `official` preset of the released code differs in ten points (discount, return, divisor, whitening, clip, …) and is not this class.
    """

    type: Literal["minillm"] = "minillm"
    clip: float = Field(default=0.2, gt=0)
    """The ratio q/p~ is replaced by min(ratio, clip(ratio, 1 - clip, 1 + clip))."""
    length_normalisation: bool = True
    """Divide the return R_{t+1} by T - t - 1 (Eq. 6); without it answers collapse to short strings."""
    single_step: bool = True
    """Add the exact one-step term, E_{y_t ~ q}[r_t] summed over the vocabulary (Eq. 3)."""
    single_step_weight: bool = True
    """Weight the one-step term by the (clipped) importance ratio as well (Eq. 7)."""
    pt_weight: float = Field(default=1.0, ge=0)
    """Weight of the language-modelling loss on `data.corpus` (L_PT); 0 leaves it out."""


Objective = Annotated[CrossEntropy | ForwardKL | ReverseKL | MiniLLM, Field(discriminator="type")]


# --- samplers: where training sequences come from -----------------------------------------------------------------------


class DatasetSampler(Strict):
    """The training set's own responses."""

    type: Literal["dataset"] = "dataset"


class TeacherSampler(Strict):
    """The teacher's own responses to the training prompts, generated once as a stage (SeqKD)."""

    type: Literal["teacher"] = "teacher"
    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy decoding."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)


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


Sampler = Annotated[DatasetSampler | TeacherSampler | TeacherMixedSampler, Field(discriminator="type")]


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
    if isinstance(method.objective, MiniLLM) and not isinstance(method.sampler, TeacherMixedSampler):
        raise ConfigError(
            f"objective minillm learns from rollouts, but the sampler is {method.sampler.type}; use sampler: {{type: teacher_mixed}}"
        )
    if isinstance(method.sampler, TeacherMixedSampler) and method.optim.gradient_checkpointing:
        raise ConfigError(
            "gradient_checkpointing works in training mode only, and rollouts train without dropout in evaluation mode; "
            "lower optim.micro_batch instead"
        )
    return method
