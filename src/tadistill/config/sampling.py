"""Samplers, which provide the training sequences. Each sampler is one class, chosen by `type`, with the defaults of its source paper.

Any objective works with any sampler, except for the pairs that `tadistill.config.method.check_pairing` refuses. To add a sampler, add a
class here and to the union, the code that draws its batches in `tadistill.rollout`, and its cost in `tadistill.plan.costs.ledger`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tadistill.config.common import MOST, Decoding, Share, Strict


class SamplerBase(Strict):
    """Base of all samplers, with the facts that plans, checks and stages need."""

    on_policy: ClassVar[bool] = False
    """The current student samples some or all of the text during training."""
    in_rounds: ClassVar[bool] = False
    """Rollouts are drawn in rounds and then used for several updates."""
    teacher_text: ClassVar[bool] = False
    """The teacher's responses to the training prompts are generated once, in a separate stage."""
    pairs: ClassVar[bool] = False
    """Each prompt comes with one response of the teacher and one response of the student."""
    follows_dev: ClassVar[bool] = False
    """The dev loss decides what is sampled, so the dev loss is also measured before training."""

    @property
    def guided(self) -> bool:
        """True if the teacher takes part in sampling, token by token."""
        return False

    @property
    def student_only(self) -> bool:
        """True if every token is drawn from the student's own, undistorted distribution."""
        return False

    @property
    def vllm(self) -> bool:
        """True if vLLM does the sampling."""
        return False


# --- fixed text ---------------------------------------------------------------------------------------------------------


class HiddenSignal(Strict):
    """Record the teacher's last hidden states on the whole training set; training then loads only the teacher's head. Exact in float32."""

    type: Literal["hidden"] = "hidden"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format on disk."""


class TopKSignal(Strict):
    """Record the teacher's k most probable tokens at every position of the training set; training then does not load the teacher."""

    type: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1, le=MOST)
    """Number of recorded tokens per position."""
    tail: Literal["lump", "drop"] = "lump"
    """Treatment of all other tokens: `lump` keeps their mass as one more outcome; `drop` removes them and renormalises."""


class DatasetSampler(SamplerBase):
    """The training set's own responses."""

    type: Literal["dataset"] = "dataset"
    signal: Annotated[HiddenSignal | TopKSignal, Field(discriminator="type")] | None = None
    """The teacher's outputs, recorded once in a separate stage and shared by all arms with this teacher. Without a signal, the teacher
    runs beside the student."""


class TeacherSampler(SamplerBase, Decoding):
    """The teacher's own responses to the training prompts, generated once in a separate stage.

    With objective cross_entropy this is SeqKD (Kim & Rush 2016); with a divergence and kd_ratio 0.5 it is the SeqKD of MiniLLM's scripts.
    """

    teacher_text: ClassVar[bool] = True
    type: Literal["teacher"] = "teacher"


# --- text that the student samples ----------------------------------------------------------------------------------------


class OnPolicy(SamplerBase, Decoding):
    """Base of samplers that draw text from the current student during training."""

    on_policy: ClassVar[bool] = True
    engine: Literal["native", "vllm"] = "native"
    """`native` is the built-in sampling loop. `vllm` needs CUDA and `pip install 'tadistill[vllm]'`, has its own random draws, and cannot
    use a teacher while it samples."""
    chunk: int = Field(default=64, ge=1, le=MOST)
    """Number of sequences that one device samples at the same time."""

    @property
    def vllm(self) -> bool:
        return self.engine == "vllm"


class Rounds(OnPolicy):
    """Base of samplers that draw a round of rollouts and then train on this round for some epochs."""

    in_rounds: ClassVar[bool] = True
    rollouts: int | None = Field(default=None, ge=1, le=MOST)
    """Number of sequences in a round over all devices, a multiple of the batch; one batch by default."""
    inner_epochs: int = Field(default=1, ge=1, le=MOST)
    """Number of passes over a round's rollouts before new rollouts are sampled."""


class StudentSampler(Rounds):
    """The student's own responses (on-policy distillation; Agarwal et al. 2024 with lambda = 1)."""

    type: Literal["student"] = "student"

    @property
    def student_only(self) -> bool:
        return self.plain


class TeacherMixedSampler(Rounds):
    """Responses sampled from a mixture of two distributions: (1 - alpha) student + alpha teacher (Gu et al. 2024, MiniLLM, Eq. 4)."""

    type: Literal["teacher_mixed"] = "teacher_mixed"
    alpha: Share = 0.2
    """The teacher's share of the mixture."""
    rollouts: int | None = Field(default=256, ge=1, le=MOST)
    inner_epochs: int = Field(default=4, ge=1, le=MOST)

    @property
    def guided(self) -> bool:
        return self.alpha > 0

    @property
    def student_only(self) -> bool:
        return self.alpha == 0 and self.plain


class SpeculativeSampler(Rounds):
    """The student's responses; the teacher replaces each token that is not among the teacher's k most probable (Xu et al. 2024, SKD)."""

    type: Literal["speculative"] = "speculative"
    k: int = Field(default=25, ge=1, le=MOST)
    """A student's token is kept if it is among the teacher's k most probable tokens."""

    @property
    def guided(self) -> bool:
        return True


class MixSampler(OnPolicy):
    """Each update uses student responses with probability `lam`, and otherwise the data set (Agarwal et al. 2024, GKD's lambda).

    One random draw decides for the whole batch on all devices. With forward_kl and `lam` 0.5 this is ImitKD (Lin et al. 2020).
    """

    type: Literal["mix"] = "mix"
    lam: Share = 0.5
    """Probability of an update on the student's responses."""


class ReplaySampler(OnPolicy):
    """DistiLLM's adaptive off-policy buffer (Ko et al. 2024, section 3.2).

    An update uses text of the student with probability phi. phi starts at 0. It rises by `increment` whenever the dev loss is `tolerance`
    above the loss at the last rise. Until the buffer is full, each of these updates samples new text into the buffer. Later only some
    of them do (`schedule`), and the others read the buffer. The dev loss is measured before training and every `select.every` updates.
    """

    follows_dev: ClassVar[bool] = True
    type: Literal["replay"] = "replay"
    capacity: int = Field(default=1000, ge=1, le=MOST)
    """Number of sequences in the buffer; new sequences replace the oldest."""
    schedule: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """Probability of sampling new text at update t of T: `decreasing` phi (1 - t/T), `constant` phi / 2, `increasing` phi t/T."""
    tolerance: float = Field(default=0.1, ge=0)
    """Increase of the dev loss, in nats, that raises phi."""
    increment: float = Field(default=0.1, gt=0, le=1)
    """Amount by which phi rises."""


class PairSampler(OnPolicy):
    """Two responses to every prompt: the teacher's, generated once in a separate stage, and a new one from the student (DistiLLM-2).

    A batch of n prompts makes 2n sequences; the decoding settings apply to both models.
    """

    teacher_text: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    type: Literal["pair"] = "pair"


Sampler = Annotated[
    DatasetSampler | TeacherSampler | StudentSampler | TeacherMixedSampler | SpeculativeSampler | MixSampler | ReplaySampler | PairSampler,
    Field(discriminator="type"),
]
