"""Samplers: where training sequences come from. One variant each, told apart by `type`, with the source paper's defaults.

Any objective can be joined with any of them, but for the pairings that `tadistill.config.method` refuses. To add one, add a class here and
to the union, and the code that reads it in `tadistill.rollout`.
"""

from typing import Annotated, Literal

from pydantic import Field

from tadistill.config.common import Decoding
from tadistill.config.strict import Strict

Share = Annotated[float, Field(ge=0, le=1)]


# --- fixed text ---------------------------------------------------------------------------------------------------------


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


class TeacherSampler(Decoding):
    """The teacher's own responses to the training prompts, generated once as a stage.

    With objective cross_entropy this is SeqKD (Kim & Rush 2016); with a divergence and kd_ratio 0.5 it is what MiniLLM's scripts call so.
    """

    type: Literal["teacher"] = "teacher"


# --- text the student has a part in -------------------------------------------------------------------------------------


class OnPolicy(Decoding):
    """Base of samplers that draw text from the student as it is now."""

    engine: Literal["native", "vllm"] = "native"
    """What samples: the built-in loop, or vLLM (CUDA only; `pip install 'tadistill[vllm]'`; its draws are its own). vLLM knows no
    teacher while it samples."""
    chunk: int = Field(default=64, ge=1)
    """Sequences sampled at the same time on one device."""


class Rounds(OnPolicy):
    """Base of samplers that draw a round of rollouts at once and then train on it for some epochs."""

    rollouts: int | None = Field(default=None, ge=1)
    """Global number of sequences in a round, a multiple of the batch; one batch when absent."""
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over a round's rollouts before new ones are sampled."""


class StudentSampler(Rounds):
    """The student's own responses (on-policy distillation; Agarwal et al. 2024 with lambda = 1)."""

    type: Literal["student"] = "student"


class TeacherMixedSampler(Rounds):
    """Responses from (1 - alpha) student + alpha teacher, mixed per token as distributions (Gu et al. 2024, MiniLLM, Eq. 4)."""

    type: Literal["teacher_mixed"] = "teacher_mixed"
    alpha: Share = 0.2
    rollouts: int | None = Field(default=256, ge=1)
    inner_epochs: int = Field(default=4, ge=1)


class SpeculativeSampler(Rounds):
    """Responses of the student, in which the teacher replaces each token that is not among its k most probable (Xu et al. 2024, SKD)."""

    type: Literal["speculative"] = "speculative"
    k: int = Field(default=25, ge=1)


class MixSampler(OnPolicy):
    """For each update the student's own responses with probability `lam`, else the training set's (Agarwal et al. 2024, GKD's lambda).

    One draw for the whole batch, the same on every device. With forward_kl and `lam` 0.5 this is ImitKD (Lin et al. 2020).
    """

    type: Literal["mix"] = "mix"
    lam: Share = 0.5


class ReplaySampler(OnPolicy):
    """DistiLLM's adaptive off-policy buffer (Ko et al. 2024, section 3.2).

    Student text is used with probability phi, which starts at 0 and rises by `increment` whenever the dev loss is `tolerance` above its
    last mark. Of those updates a part (`schedule`), and all of them until the buffer is full, sample anew and put the
    text into the buffer; the others draw from it. The dev loss is looked at before training and every `select.every` updates.
    """

    type: Literal["replay"] = "replay"
    capacity: int = Field(default=1000, ge=1)
    """Sequences in the buffer; the oldest make room."""
    schedule: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """The share sampled anew: phi (1 - t/T), phi / 2, or phi t/T."""
    tolerance: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    increment: float = Field(default=0.1, gt=0, le=1)


class PairSampler(OnPolicy):
    """For every prompt of a batch the teacher's response, generated once as a stage, and a fresh one of the student (DistiLLM-2).

    A batch of n prompts makes 2n sequences; the settings of decoding hold for both models.
    """

    type: Literal["pair"] = "pair"


Sampler = Annotated[
    DatasetSampler | TeacherSampler | StudentSampler | TeacherMixedSampler | SpeculativeSampler | MixSampler | ReplaySampler | PairSampler,
    Field(discriminator="type"),
]
