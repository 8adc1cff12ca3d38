"""Settings of the samplers, which provide the training text. A recipe chooses a class by `type`. The defaults are those of the papers.

Any objective works with any sampler, except for the pairs that `tadistill.config.method_rules.check_pairing` refuses. A new sampler
has three parts: a class in this module, which the union `Sampler` also lists; the code in `tadistill.rollout` that draws its batches; and
its cost in `tadistill.plan.costs.ledger`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tadistill.config.common import MOST, Decoding, Share, Strict
from tadistill.errors import ConfigError


class SamplerBase(Strict):
    """Base class of all samplers. Plans, checks and stages (single steps of work) read its class attributes."""

    on_policy: ClassVar[bool] = False
    """True if the current student samples some or all of the training text."""
    in_rounds: ClassVar[bool] = False
    """True if the sampler works in rounds. A round samples many sequences, which are then used for several updates."""
    teacher_text: ClassVar[bool] = False
    """True if the teacher's responses to the training prompts are generated once, before training."""
    pairs: ClassVar[bool] = False
    """True if each prompt has two responses: one from the teacher and one from the student."""
    follows_dev: ClassVar[bool] = False
    """True if the loss on the dev set decides what is sampled. This loss is therefore also measured before training."""

    @property
    def reads_responses(self) -> bool:
        """True if the training text contains responses of the training set."""
        return not (self.in_rounds or self.teacher_text)

    @property
    def guided(self) -> bool:
        """True if the teacher takes part in sampling every token."""
        return False

    @property
    def has_second_law(self) -> bool:
        """True if the first version of the sampler drew tokens from another distribution."""
        return False

    @property
    def label(self) -> str:
        """Name of the sampler in reports: its `type`, and whether its text was recorded."""
        return self.type  # type: ignore[attr-defined]

    @property
    def student_only(self) -> bool:
        """True if every token is sampled from the student's own, unchanged distribution."""
        return False

    def check(self) -> None:
        """Raise a ConfigError if a setting has no effect, or if two settings contradict each other."""

    @property
    def recording(self) -> "Signal | None":
        """Settings of the teacher outputs that are recorded before training. None if no outputs are recorded."""
        return None


# --- fixed text ---------------------------------------------------------------------------------------------------------


class HiddenSignal(Strict):
    """Record the teacher's last hidden states for the whole text. Training then loads only the teacher's output head. The result is exact
    if `dtype` is float32."""

    type: Literal["hidden"] = "hidden"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the recorded states on disk."""

    def inexact(self, given: str) -> str | None:
        """Return a phrase that says how a loss on the recorded outputs differs from the exact loss, or None if the loss is exact.

        `given` is the phrase's subject and verb, such as `the recording has`.
        """
        return None if self.dtype == "float32" else f"approximate: {given} hidden states in bfloat16"


class TopKSignal(Strict):
    """Record the teacher's k most probable tokens at every position of the text. Training then does not load the teacher."""

    type: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1, le=MOST)
    """Number of tokens that are recorded per position."""
    tail: Literal["lump", "drop"] = "lump"
    """Treatment of all tokens except the k most probable ones. `lump` treats them as one token. `drop` removes them and renormalises the
    probabilities."""
    dtype: Literal["packed", "float32"] = "packed"
    """Number format on disk. `packed`: rounded log-probabilities, with k = 64 from 138 (50,257 tokens) to 156 bytes (262,144 tokens) per
    position. `float32`: 8 k + 4 bytes per position."""

    def inexact(self, given: str) -> str | None:
        rest = "count as one" if self.tail == "lump" else "are left out"
        return f"approximate: {given} the {self.k} most probable tokens, and all other tokens {rest}"


class SampledSignal(Strict):
    """Record tokens that are drawn from the teacher's distribution at every position of the text (Anshumann et al. 2025, arXiv 2503.16870).

    Training then does not load the teacher. The gradient of `forward_kl`, the only objective for this recording, is unbiased.
    """

    type: Literal["sampled"] = "sampled"
    draws: int = Field(default=50, ge=1, le=4096)
    """Number of draws per position. A token that is drawn several times is stored once, with its number of draws."""
    seed: int = Field(default=0, ge=0, le=MOST)
    """Seed of the draws. It is independent of the seeds of training."""

    def inexact(self, given: str) -> str | None:
        return f"an unbiased estimate: {given} {self.draws} drawn tokens for each position"


Signal = Annotated[HiddenSignal | TopKSignal | SampledSignal, Field(discriminator="type")]
"""Settings of the teacher outputs that are recorded before training."""


class DatasetSampler(SamplerBase):
    """The sampler that uses the responses in the training set."""

    type: Literal["dataset"] = "dataset"
    signal: Signal | None = None
    """The teacher outputs that are recorded before training, once for all arms with this teacher. By default, nothing is recorded, and the
    teacher runs during training."""

    @property
    def recording(self) -> Signal | None:
        return self.signal


class TeacherSampler(SamplerBase, Decoding):
    """The sampler that uses the teacher's responses to the training prompts. They are generated once, before training.

    With the objective cross_entropy, this is SeqKD (Kim & Rush 2016). With a divergence and kd_ratio 0.5, it is the SeqKD of MiniLLM's
    scripts.
    """

    teacher_text: ClassVar[bool] = True
    type: Literal["teacher"] = "teacher"


# --- text that the student samples ----------------------------------------------------------------------------------------


class OnPolicy(SamplerBase, Decoding):
    """Base class of the samplers in which the current student generates text during training."""

    on_policy: ClassVar[bool] = True
    chunk: int = Field(default=64, ge=1, le=MOST)
    """Number of sequences that one device samples in parallel. If the recipe does not set it, a GPU samples as many as fit into its
    memory, up to 512."""


class Rounds(OnPolicy):
    """Base class of the samplers that work in rounds. A round first samples many sequences, and then trains on them for some epochs."""

    in_rounds: ClassVar[bool] = True
    rollouts: int | None = Field(default=None, ge=1, le=MOST)
    """Number of sequences in a round, on all devices together. It must be a multiple of the batch size. The default is one batch."""
    inner_epochs: int = Field(default=1, ge=1, le=MOST)
    """Number of passes over the sequences of a round before new sequences are sampled."""


class StudentSampler(Rounds):
    """The sampler that uses the student's own responses (on-policy distillation), as in GKD with lambda = 1 (Agarwal et al. 2024).

    With `recorded`, the responses are sampled once, before training, and the teacher's outputs on them are recorded (offline on-policy
    distillation, as in Lightning OPD, arXiv 2604.13010). All arms, seeds and assistants then train on these responses.
    """

    type: Literal["student"] = "student"
    recorded: bool = False
    """True: one response to every training prompt is sampled before training. The last model of the arm's path samples them, after its own
    `sft` with the study's first seed. The outputs of each teacher on these responses are recorded (`signal`). All models of the path train
    on them, in a new order every epoch."""
    signal: Signal | None = None
    """The teacher outputs that are recorded if `recorded` is true. The default is then `hidden`."""

    @property
    def label(self) -> str:
        return "student, recorded" if self.recorded else self.type

    @property
    def student_only(self) -> bool:
        return self.plain and not self.recorded

    @property
    def recording(self) -> Signal | None:
        return (self.signal or HiddenSignal()) if self.recorded else None

    def check(self) -> None:
        if self.signal and not self.recorded:
            raise ConfigError("sampler `student` has `signal`, which needs `recorded: true`; add `recorded: true`, or set `signal: null`")
        given = [name for name in _OF_ROUNDS if getattr(self, name) != StudentSampler.model_fields[name].default]
        if self.recorded and given:
            raise ConfigError(
                f"sampler `student` has `recorded: true`, so its text is sampled once, before training, and `{given[0]}` has no effect; "
                f"remove `{given[0]}`"
            )


_OF_ROUNDS = ("rollouts", "inner_epochs", "chunk")  # settings of sampling during training


class TeacherMixedSampler(Rounds):
    """The sampler of MiniLLM. It draws each token from the mixture (1 - alpha) student + alpha teacher (Gu et al. 2024, Eq. 4)."""

    type: Literal["teacher_mixed"] = "teacher_mixed"
    alpha: Share = 0.2
    """The teacher's weight in the mixture."""
    rollouts: int | None = Field(default=256, ge=1, le=MOST)
    """Number of sequences in a round, on all devices together. It must be a multiple of the batch size."""
    inner_epochs: int = Field(default=4, ge=1, le=MOST)

    @property
    def guided(self) -> bool:
        return self.alpha > 0

    @property
    def student_only(self) -> bool:
        return self.alpha == 0 and self.plain


class SpeculativeSampler(Rounds):
    """The sampler of SKD (Xu et al. 2024). The student proposes each token, and the teacher replaces a token that it finds improbable."""

    type: Literal["speculative"] = "speculative"
    k: int = Field(default=25, ge=1, le=MOST)
    """A token of the student is kept if it is among the teacher's k most probable tokens."""

    @property
    def has_second_law(self) -> bool:
        # the k tokens were those under the decoding settings, so tokens of probability 0 could be among them; of all temperatures, only
        # low ones make likely tokens so improbable that their probability is stored as 0
        return self.temperature < 0.5 or not self.model_copy(update={"temperature": 1.0}).plain

    @property
    def guided(self) -> bool:
        return True


class MixSampler(OnPolicy):
    """The sampler of GKD (Agarwal et al. 2024). An update uses the student's responses with probability `lam`, and otherwise the data set.

    One random draw decides this for the whole batch on all devices. With forward_kl and `lam` 0.5, this is ImitKD (Lin et al. 2020).
    """

    type: Literal["mix"] = "mix"
    lam: Share = 0.5
    """Probability that an update uses the student's responses."""


class ReplaySampler(OnPolicy):
    """The sampler of DistiLLM, with a buffer of older student text (Ko et al. 2024, section 3.2).

    An update uses student text with probability phi, and otherwise the data set. phi starts at 0. The dev loss is measured before training
    and every `select.every` updates. If this loss has grown by at least `tolerance` since the start, phi rises by `increment`. After that,
    the growth is measured from the last rise of phi. At first, each update with student text samples new text into the buffer. When the
    buffer is full, only some of these updates sample new text (`schedule`). The other updates draw text from the buffer.
    """

    follows_dev: ClassVar[bool] = True
    type: Literal["replay"] = "replay"
    capacity: int = Field(default=1000, ge=1, le=MOST)
    """Number of sequences in the buffer. If it is full, new sequences replace the oldest ones."""
    schedule: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """Probability that update t of T samples new student text. Let phi be the probability that an update uses student text, new or stored.
    `decreasing`: phi (1 - t/T). `constant`: phi / 2. `increasing`: phi t/T."""
    tolerance: float = Field(default=0.1, ge=0)
    """Increase of the dev loss (in nats) at which phi rises. phi is the probability that an update uses student text."""
    increment: float = Field(default=0.1, gt=0, le=1)
    """Amount by which phi rises. phi is the probability that an update uses student text."""


class PairSampler(OnPolicy):
    """The sampler of DistiLLM-2. It gives two responses to each prompt: one of the teacher (generated before training), and a new one of
    the student.

    A batch of n prompts has 2n sequences. The decoding settings apply to both models.
    """

    teacher_text: ClassVar[bool] = True
    pairs: ClassVar[bool] = True
    type: Literal["pair"] = "pair"


Sampler = Annotated[
    DatasetSampler | TeacherSampler | StudentSampler | TeacherMixedSampler | SpeculativeSampler | MixSampler | ReplaySampler | PairSampler,
    Field(discriminator="type"),
]
