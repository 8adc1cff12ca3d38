"""Samplers: where training sequences come from. One variant each, told apart by `type`, with the source paper's defaults.

Any objective works with any sampler, except for the pairs that `tadistill.config.method.check_pairing` refuses. To add a sampler, add a
class here and to the union, the code that draws its batches in `tadistill.rollout`, and its cost in `tadistill.plan.costs.ledger`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tadistill.config.common import Decoding, Share, Strict


class SamplerBase(Strict):
    """Base of all samplers, with the facts that plans, checks and stages need."""

    on_policy: ClassVar[bool] = False
    """The student, as it is during training, samples some or all of the text."""
    in_rounds: ClassVar[bool] = False
    """Rollouts are drawn in rounds and then used for several updates."""
    teacher_text: ClassVar[bool] = False
    """The teacher's responses to the training prompts are generated once, as a stage of their own."""
    pairs: ClassVar[bool] = False
    """Each prompt comes with a response of the teacher and one of the student."""
    follows_dev: ClassVar[bool] = False
    """The dev loss decides what is sampled, so it is also measured before training."""

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
        """True if vLLM samples."""
        return False


# --- fixed text ---------------------------------------------------------------------------------------------------------


class HiddenSignal(Strict):
    """Record the teacher's last hidden states on the whole training set; training then loads only its head. Exact in float32."""

    type: Literal["hidden"] = "hidden"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format on disk."""


class TopKSignal(Strict):
    """Record the teacher's k most probable tokens at every position of the training set; training then loads nothing of the teacher."""

    type: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1)
    """Number of tokens."""
    tail: Literal["lump", "drop"] = "lump"
    """All other tokens: `lump` keeps their mass as one more outcome, `drop` renormalises without them."""


class DatasetSampler(SamplerBase):
    """The training set's own responses."""

    type: Literal["dataset"] = "dataset"
    signal: Annotated[HiddenSignal | TopKSignal, Field(discriminator="type")] | None = None
    """The teacher's outputs, recorded once as a stage and shared by all arms with this teacher. Without it the teacher runs beside the
    student."""


class TeacherSampler(SamplerBase, Decoding):
    """The teacher's own responses to the training prompts, generated once as a stage.

    With objective cross_entropy this is SeqKD (Kim & Rush 2016); with a divergence and kd_ratio 0.5 it is the SeqKD of MiniLLM's scripts.
    """

    teacher_text: ClassVar[bool] = True
    type: Literal["teacher"] = "teacher"


# --- text that the student samples ----------------------------------------------------------------------------------------


class OnPolicy(SamplerBase, Decoding):
    """Base of samplers that draw text from the student as it is during training."""

    on_policy: ClassVar[bool] = True
    engine: Literal["native", "vllm"] = "native"
    """`native` is the built-in sampling loop. `vllm` needs CUDA and `pip install 'tadistill[vllm]'`, has its own random draws, and cannot
    use a teacher while it samples."""
    chunk: int = Field(default=64, ge=1)
    """Sequences that one device samples at the same time."""

    @property
    def vllm(self) -> bool:
        """True if vLLM samples."""
        return self.engine == "vllm"


class Rounds(OnPolicy):
    """Base of samplers that draw a round of rollouts and then train on it for some epochs."""

    in_rounds: ClassVar[bool] = True
    rollouts: int | None = Field(default=None, ge=1)
    """Sequences in a round over all devices, a multiple of the batch; one batch by default."""
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over a round's rollouts before new ones are sampled."""


class StudentSampler(Rounds):
    """The student's own responses (on-policy distillation; Agarwal et al. 2024 with lambda = 1)."""

    type: Literal["student"] = "student"

    @property
    def student_only(self) -> bool:
        """True if the decoding changes nothing."""
        return self.plain


class TeacherMixedSampler(Rounds):
    """Responses from (1 - alpha) student + alpha teacher, mixed at every token as distributions (Gu et al. 2024, MiniLLM, Eq. 4)."""

    type: Literal["teacher_mixed"] = "teacher_mixed"
    alpha: Share = 0.2
    """The teacher's share of the mixture."""
    rollouts: int | None = Field(default=256, ge=1)
    inner_epochs: int = Field(default=4, ge=1)

    @property
    def guided(self) -> bool:
        """True if the teacher has a share."""
        return self.alpha > 0

    @property
    def student_only(self) -> bool:
        """True if the teacher has no share and the decoding changes nothing."""
        return self.alpha == 0 and self.plain


class SpeculativeSampler(Rounds):
    """The student's responses, in which the teacher replaces each token that is not among its k most probable (Xu et al. 2024, SKD)."""

    type: Literal["speculative"] = "speculative"
    k: int = Field(default=25, ge=1)
    """Number of the teacher's most probable tokens that it accepts."""

    @property
    def guided(self) -> bool:
        """True."""
        return True


class MixSampler(OnPolicy):
    """For each update the student's own responses with probability `lam`, else the training set's (Agarwal et al. 2024, GKD's lambda).

    One draw decides for the whole batch on all devices. With forward_kl and `lam` 0.5 this is ImitKD (Lin et al. 2020).
    """

    type: Literal["mix"] = "mix"
    lam: Share = 0.5
    """Probability of an update on the student's responses."""


class ReplaySampler(OnPolicy):
    """DistiLLM's adaptive off-policy buffer (Ko et al. 2024, section 3.2).

    An update uses student text with probability phi, which starts at 0 and rises by `increment` whenever the dev loss is `tolerance` above
    the loss of the last rise. Of these updates a share (`schedule`), and all until the buffer is full, sample new text and put it into the
    buffer; the others draw from the buffer. The dev loss is measured before training and every `select.every` updates.
    """

    follows_dev: ClassVar[bool] = True
    type: Literal["replay"] = "replay"
    capacity: int = Field(default=1000, ge=1)
    """Sequences in the buffer; new ones replace the oldest."""
    schedule: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """The share of updates on new text: phi (1 - t/T), phi / 2, or phi t/T, at update t of T."""
    tolerance: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Rise of the dev loss, in nats, that raises phi."""
    increment: float = Field(default=0.1, gt=0, le=1)
    """Rise of phi."""


class PairSampler(OnPolicy):
    """For every prompt of a batch the teacher's response, generated once as a stage, and a new one of the student (DistiLLM-2).

    A batch of n prompts makes 2n sequences; the settings of decoding hold for both models.
    """

    teacher_text: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    type: Literal["pair"] = "pair"


Sampler = Annotated[
    DatasetSampler | TeacherSampler | StudentSampler | TeacherMixedSampler | SpeculativeSampler | MixSampler | ReplaySampler | PairSampler,
    Field(discriminator="type"),
]
