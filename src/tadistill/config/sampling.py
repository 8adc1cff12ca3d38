"""Settings of the samplers, which provide the training sequences. A recipe chooses a class by `type`. Defaults are those of the papers.

Any objective works with any sampler, except for the pairs that `tadistill.config.method.check_pairing` refuses. To add a sampler, add three
things: a class here and in the union; code in `tadistill.rollout` that draws its batches; and its cost in `tadistill.plan.costs.ledger`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tadistill.config.common import MOST, Decoding, Share, Strict


class SamplerBase(Strict):
    """Base class of all samplers. Plans, checks and stages read its class attributes."""

    on_policy: ClassVar[bool] = False
    """The current student samples some or all of the training text."""
    in_rounds: ClassVar[bool] = False
    """The student samples many sequences (a round), which are then used for several updates."""
    teacher_text: ClassVar[bool] = False
    """The teacher's responses to the training prompts are generated once, in a separate stage."""
    pairs: ClassVar[bool] = False
    """Each prompt has two responses: one of the teacher and one of the student."""
    follows_dev: ClassVar[bool] = False
    """The dev loss decides what is sampled. It is therefore also measured before training."""

    @property
    def guided(self) -> bool:
        """True if the teacher takes part in sampling, token by token."""
        return False

    @property
    def student_only(self) -> bool:
        """True if every token is sampled from the student's own distribution, without changes."""
        return False

    @property
    def vllm(self) -> bool:
        """True if vLLM does the sampling."""
        return False


# --- fixed text ---------------------------------------------------------------------------------------------------------


class HiddenSignal(Strict):
    """Record the teacher's last hidden states on the whole training set. Training then loads only the teacher's head. Exact in float32."""

    type: Literal["hidden"] = "hidden"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format on disk."""


class TopKSignal(Strict):
    """Record the teacher's k most probable tokens at every position of the training set. Training then does not load the teacher."""

    type: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1, le=MOST)
    """Number of recorded tokens per position."""
    tail: Literal["lump", "drop"] = "lump"
    """What happens to all other tokens. `lump` treats them as one token. `drop` removes them and renormalises."""


class DatasetSampler(SamplerBase):
    """The sampler that uses the training set's own responses."""

    type: Literal["dataset"] = "dataset"
    signal: Annotated[HiddenSignal | TopKSignal, Field(discriminator="type")] | None = None
    """Which outputs of the teacher are recorded once, for all arms with this teacher. Without it, the teacher runs during training."""


class TeacherSampler(SamplerBase, Decoding):
    """The sampler that uses the teacher's responses to the training prompts. They are generated once, in a separate stage.

    With the objective cross_entropy this is SeqKD (Kim & Rush 2016). With a divergence and kd_ratio 0.5 it is the SeqKD of MiniLLM's
    scripts.
    """

    teacher_text: ClassVar[bool] = True
    type: Literal["teacher"] = "teacher"


# --- text that the student samples ----------------------------------------------------------------------------------------


class OnPolicy(SamplerBase, Decoding):
    """Base class of samplers that sample text from the current student during training."""

    on_policy: ClassVar[bool] = True
    engine: Literal["native", "vllm"] = "native"
    """`native` is the built-in sampling loop. `vllm` needs CUDA and `pip install 'tadistill[vllm]'`, uses other random numbers, and cannot
    use a teacher while it samples."""
    chunk: int = Field(default=64, ge=1, le=MOST)
    """Number of sequences that one device samples at the same time."""

    @property
    def vllm(self) -> bool:
        return self.engine == "vllm"


class Rounds(OnPolicy):
    """Base class of samplers that work in rounds. A round samples many sequences, and then trains on them for some epochs."""

    in_rounds: ClassVar[bool] = True
    rollouts: int | None = Field(default=None, ge=1, le=MOST)
    """Number of sequences in a round on all devices together. It must be a multiple of the batch; by default it is one batch."""
    inner_epochs: int = Field(default=1, ge=1, le=MOST)
    """Number of passes over the sequences of a round before new ones are sampled."""


class StudentSampler(Rounds):
    """The sampler that uses the student's own responses (on-policy distillation; Agarwal et al. 2024 with lambda = 1)."""

    type: Literal["student"] = "student"

    @property
    def student_only(self) -> bool:
        return self.plain


class TeacherMixedSampler(Rounds):
    """The sampler that draws tokens from a mixture: (1 - alpha) student + alpha teacher (Gu et al. 2024, MiniLLM, Eq. 4)."""

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
    """The sampler of SKD: the teacher replaces each of the student's tokens that it finds improbable (Xu et al. 2024)."""

    type: Literal["speculative"] = "speculative"
    k: int = Field(default=25, ge=1, le=MOST)
    """A token of the student is kept if it is among the teacher's k most probable tokens."""

    @property
    def guided(self) -> bool:
        return True


class MixSampler(OnPolicy):
    """The sampler of GKD. With probability `lam`, an update uses the student's responses, and otherwise the data set (Agarwal et al. 2024).

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
    """Number of sequences in the buffer. New sequences replace the oldest."""
    schedule: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """Probability of sampling new text at update t of T: `decreasing` phi (1 - t/T), `constant` phi / 2, `increasing` phi t/T."""
    tolerance: float = Field(default=0.1, ge=0)
    """Increase of the dev loss, in nats, that raises phi."""
    increment: float = Field(default=0.1, gt=0, le=1)
    """Amount by which phi rises."""


class PairSampler(OnPolicy):
    """The sampler of DistiLLM-2. Each prompt has two responses: the teacher's, generated once in a separate stage; and a new one of the
    student.

    A batch of n prompts makes 2n sequences. The decoding settings apply to both models.
    """

    teacher_text: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    type: Literal["pair"] = "pair"


Sampler = Annotated[
    DatasetSampler | TeacherSampler | StudentSampler | TeacherMixedSampler | SpeculativeSampler | MixSampler | ReplaySampler | PairSampler,
    Field(discriminator="type"),
]
