"""Settings of the objectives. Each function of `tadistill.objectives` has one class here, which a recipe chooses by `type`.

The fields of a divergence are exactly the keyword arguments of its function. The defaults are those of the source paper. Formulas, limits
and ranges are in the functions' docstrings and in docs/reference/objectives.md.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tadistill.config.common import MOST, FunctionName, Modest, Share, Strict, Temperature


class ObjectiveBase(Strict):
    """Base class of all objectives. Plans, checks and samplers read its class attributes."""

    needs_teacher: ClassVar[bool] = True
    """The loss compares the student with a teacher."""
    needs_scores: ClassVar[bool] = False
    """The loss needs the teacher's log-probability of every sampled token before the update."""
    needs_rounds: ClassVar[bool] = False
    """The loss works only with a sampler that samples in rounds."""
    needs_pairs: ClassVar[bool] = False
    """The loss needs two responses to each prompt: one of the teacher and one of the student."""
    needs_own_samples: ClassVar[bool] = False
    """The loss is an estimate that is correct only if every token is sampled from the student's own distribution."""

    @property
    def label(self) -> str:
        """The objective's name in reports and in the labels of trainings."""
        return self.type  # type: ignore[attr-defined]

    @property
    def needs_distribution(self) -> bool:
        """True if the loss needs the teacher's distribution over the vocabulary at every token."""
        return self.needs_teacher and not self.needs_scores

    @property
    def needs_corpus(self) -> bool:
        """True if the loss has a term on the plain text of `data.corpus`."""
        return False

    @property
    def imitates_text(self) -> bool:
        """True if cross-entropy on the training text is a part of the loss."""
        return False


class CrossEntropy(ObjectiveBase):
    """Maximum likelihood of the training text. If a teacher generated the text, this is SeqKD (Kim & Rush 2016)."""

    needs_teacher: ClassVar[bool] = False
    type: Literal["cross_entropy"] = "cross_entropy"

    @property
    def imitates_text(self) -> bool:
        return True


class Divergence(ObjectiveBase):
    """Base class of all divergences between teacher and student at every token."""

    temperature: Temperature = 1.0
    """The logits of both models are divided by the temperature. The loss is not multiplied by the temperature squared."""
    kd_ratio: Share = 1.0
    """Weight of the divergence in the loss. The rest is cross-entropy on the tokens. (MiniLLM's KD baseline uses 0.5.)"""

    @property
    def imitates_text(self) -> bool:
        return self.kd_ratio < 1


class ForwardKL(Divergence):
    """KL(teacher || student) (Hinton et al. 2015; Sanh et al. 2019)."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Divergence):
    """KL(student || teacher), exact over the vocabulary (Gu et al. 2024, section 2.2)."""

    type: Literal["reverse_kl"] = "reverse_kl"


class Jeffreys(Divergence):
    """The sum of both KLs (Jeffreys 1946)."""

    type: Literal["jeffreys"] = "jeffreys"


class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD)."""

    type: Literal["jensen_shannon"] = "jensen_shannon"
    beta: Share = 0.5
    """Weight of the teacher. 0 gives the forward KL, and 1 gives the reverse KL."""


class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q), where p is the teacher and q is the student (Ko et al. 2024, DistiLLM)."""

    type: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: Share = 0.1
    """The teacher's share of the mixture."""


class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q), where p is the teacher and q is the student (Ko et al. 2024, DistiLLM)."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: Share = 0.1
    """The student's share of the mixture."""
    detach_mixture: bool = False
    """No gradient flows through the mixture (as in DistiLLM-2)."""


class TotalVariation(Divergence):
    """Half the L1 distance between the distributions (Wen et al. 2023, f-distill)."""

    type: Literal["total_variation"] = "total_variation"


class AdaptiveKL(Divergence):
    """A weighted sum of forward and reverse KL (Wu et al. 2025, AKL). At each position, the weights depend on where the models differ."""

    type: Literal["adaptive_kl"] = "adaptive_kl"
    mu: Share = 0.5
    """Total probability of the teacher's likely tokens. If the models differ mainly on these tokens, the forward KL has more weight."""


class AlphaBeta(Divergence):
    """The alpha-beta divergence (Wang et al. 2025, ABKD). The defaults are the paper's values for GPT-2."""

    type: Literal["alpha_beta"] = "alpha_beta"
    alpha: Modest = 0.2
    """A larger value gives more weight to tokens with a high teacher probability."""
    beta: Modest = 0.7
    """A larger value gives more weight to tokens with a high student probability."""


class AlphaMixture(Divergence):
    """A divergence that involves a mixture of teacher and student (Shin et al. 2025, AMiD). The defaults are those of the WASD paper."""

    type: Literal["alpha_mixture"] = "alpha_mixture"
    alpha: Modest = -5.0
    """Kind of mixture: -1 is the arithmetic mean, 1 is the geometric mean, and 3 is the harmonic mean."""
    lam: Share = 0.5
    """The teacher's share of the mixture."""
    pair: Literal["pr", "rp", "qr", "rq"] = "pr"
    """The two distributions that the divergence compares. p is the teacher, q is the student, and r is the mixture."""
    ab_parameters: tuple[Modest, Modest] = (1.0, 0.0)
    """Alpha and beta of the divergence (`alpha_beta`). (1, 0) is the KL."""


class _TopK(Divergence):
    k: int = Field(default=64, ge=1, le=MOST)
    """Number of the teacher's most probable tokens."""
    tail: Literal["lump", "drop"] = "lump"
    """Treatment of all other tokens: `lump` makes them one more outcome; `drop` removes them and renormalises."""


class TopKForwardKL(_TopK):
    """Forward KL on the teacher's k most probable tokens (Anshumann et al. 2025)."""

    type: Literal["top_k_forward_kl"] = "top_k_forward_kl"


class TopKReverseKL(_TopK):
    """Reverse KL on the teacher's k most probable tokens."""

    type: Literal["top_k_reverse_kl"] = "top_k_reverse_kl"


class Contrastive(Divergence):
    """Skew forward KL on the teacher's text, skew reverse KL on the student's (Ko et al. 2025, DistiLLM-2). It needs the sampler `pair`."""

    needs_pairs: ClassVar[bool] = True
    type: Literal["contrastive"] = "contrastive"
    alpha: Share = 0.1
    """The teacher's share of the mixture in the forward KL, and the student's in the reverse KL. The paper adapts it to each response."""


class Taid(Divergence):
    """Cross-entropy to a target that moves from the student (t = 0) to the teacher (t = 1) (Shing et al. 2025, TAID)."""

    type: Literal["taid"] = "taid"
    start: Share = 0.4
    """t at the first update."""
    end: Share = 1.0
    """t at the last update."""
    rate: float = Field(default=5e-4, ge=0)
    """Largest rise of t in one update, as a fraction of 1 - t. The linear schedule may raise t by more."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay rate of the moving average of the loss's relative change."""

    @model_validator(mode="after")
    def _check(self):
        if self.end < self.start:
            raise ValueError(f"end {self.end} is below start {self.start}, but the weight never falls during training; raise `end`")
        return self


class Custom(Divergence):
    """A function of the user's own code: `loss(student_logits, teacher_logits, **settings)` returns one value per token.

    The logits have shape (tokens, vocabulary) and are already divided by the temperature.
    """

    type: Literal["custom"] = "custom"
    function: FunctionName
    """MODULE:FUNCTION. MODULE is a file beside the recipe, or an installed module."""
    settings: dict[str, float | int | str] = {}
    """Additional keyword arguments of the function."""

    @property
    def label(self) -> str:
        return self.function


class SampledKL(ObjectiveBase):
    """Reverse KL, estimated from the sampled tokens (Schulman 2020).

    `k2` has the gradient of the reverse KL, and `k3` that of the forward KL. It needs the sampler `student`. The gradient is unbiased only
    in the first update of a round, so leave `rollouts` and `inner_epochs` at their defaults.
    """

    needs_scores: ClassVar[bool] = True
    needs_own_samples: ClassVar[bool] = True
    type: Literal["sampled_kl"] = "sampled_kl"
    estimator: Literal["k2", "k3"] = "k2"
    """The estimate of the KL divergence, which decides the gradient."""


class NoTeacher(ObjectiveBase):
    """A control without a teacher (arXiv 2608.31046): the student's own unlikely tokens get a constant advantage of -1.

    It needs the sampler `student`. If it is as good as distillation, the teacher was not the reason for the student's gain.
    """

    needs_teacher: ClassVar[bool] = False
    needs_own_samples: ClassVar[bool] = True
    type: Literal["no_teacher"] = "no_teacher"
    below: float = Field(default=0.1, gt=0, lt=1)
    """Tokens with a smaller probability are unlikely."""


class MiniLLM(ObjectiveBase):
    """MiniLLM's policy gradient (Gu et al. 2024, arXiv 2306.08543v6). Each part can follow the paper or the released code.

    `preset` sets the fields that the recipe leaves out, except `pt_weight`. `paper` is Algorithm 1, and `official` is the released code.
    The loss per token is:

        -A min(ratio, clip(ratio))  +  ratio KL(q || p)  +  pt_weight L_PT

    p is the teacher, q is the student, and p~ is the distribution that sampled the tokens. ratio is q / p~. L_PT is the loss on plain text.
    A is the return: the length-normalised sum of the later rewards (log p - log q) / reward_scale.
    """

    needs_scores: ClassVar[bool] = True
    needs_rounds: ClassVar[bool] = True
    type: Literal["minillm"] = "minillm"
    preset: Literal["paper", "official"] = "paper"
    """Values of the keys below that the recipe leaves out: those of the paper, or those of the released code."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Discount factor of later rewards in the return. Paper: 1; official: 0.95."""
    include_current: bool = False
    """Add a token's own reward to its return, although the single-step term contains it too. Paper: no; official: yes."""
    length_normalisation: Literal["after", "remaining", "discounts", "none"] = "after"
    """Divisor of the return of token t of T. `after`: T - t - 1 (paper, Eq. 6). `remaining`: number of tokens from t to the end (official).
    `discounts`: sum of the discounts. `none`: 1; answers then become very short."""
    whitening: Literal["none", "tokens", "padded"] = "none"
    """Scale the returns of an update to mean 0 and variance 1. `tokens`: computed over its tokens. `padded`: computed over all positions,
    with the value 0 at padding. Paper: none; official: padded."""
    reward_scale: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Rewards are divided by this number. Paper: 1; official: 0.5."""
    reward_clip: float | None = Field(default=None, gt=0, le=1e9)
    """Largest absolute reward after scaling. Paper: none; official: 100."""
    clip: float = Field(default=0.2, gt=0, le=1e9)
    """The ratio is clipped to the interval from 1 - clip to 1 + clip."""
    clipping: Literal["ratio", "ppo"] = "ratio"
    """Paper: min(ratio, clip(ratio)); official: PPO's max(-A ratio, -A clip(ratio)), which depends on the sign of A."""
    clip_weight: bool = True
    """True: clip the whole ratio q / p~ (paper and official). False: clip only q / q_old, where q_old is the student at sampling time."""
    single_step: bool = True
    """Add the single-step term: the expected reward of the next token, computed exactly over the vocabulary (Eq. 3)."""
    single_step_weight: bool = True
    """Multiply the single-step term by the (clipped) ratio. Paper: yes (Eq. 7); official: no."""
    pt_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the language-modelling loss L_PT on `data.corpus`. 0 leaves it out."""
    pt_kd_ratio: Share = 0.0
    """Weight of the forward KL to the teacher in L_PT. The rest is language modelling. Paper: 0; official: 0.5."""

    @property
    def needs_distribution(self) -> bool:
        return self.single_step

    @property
    def needs_corpus(self) -> bool:
        return self.pt_weight > 0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        # a named preset sets all its fields, so that a patch with this preset replaces the fields of another preset
        named = values.get("preset") if isinstance(values, dict) else None
        return _PRESETS[named] | values if isinstance(named, str) and named in _PRESETS else values


_OFFICIAL: dict[str, Any] = {
    "discount": 0.95, "include_current": True, "length_normalisation": "remaining", "whitening": "padded",
    "reward_scale": 0.5, "reward_clip": 100.0, "clip": 0.2, "clipping": "ppo", "clip_weight": True,
    "single_step": True, "single_step_weight": False, "pt_kd_ratio": 0.5,
}  # fmt: skip
_PRESETS = {"paper": {name: MiniLLM.model_fields[name].default for name in _OFFICIAL}, "official": _OFFICIAL}


Objective = Annotated[
    CrossEntropy
    | ForwardKL
    | ReverseKL
    | Jeffreys
    | JensenShannon
    | SkewForwardKL
    | SkewReverseKL
    | TotalVariation
    | AdaptiveKL
    | AlphaBeta
    | AlphaMixture
    | TopKForwardKL
    | TopKReverseKL
    | Contrastive
    | Taid
    | Custom
    | SampledKL
    | NoTeacher
    | MiniLLM,
    Field(discriminator="type"),
]
