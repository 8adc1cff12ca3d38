"""Settings of the objectives (losses). Each function of `tadistill.objectives` has one class here, which a recipe chooses by `type`.

The fields of a divergence are exactly the keyword arguments of its function. The defaults are those of the source paper. Formulas, limits
and ranges are in the functions' docstrings and in docs/reference/objectives.md.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tadistill.config.common import MOST, Divergence, FunctionName, Modest, ObjectiveBase, Share


class CrossEntropy(ObjectiveBase):
    """Cross-entropy on the training text. If a teacher generated this text, the method is SeqKD (Kim & Rush 2016)."""

    needs_teacher: ClassVar[bool] = False
    type: Literal["cross_entropy"] = "cross_entropy"

    @property
    def imitates_text(self) -> bool:
        return True


class ForwardKL(Divergence):
    """The forward KL, KL(teacher || student) (Hinton et al. 2015; Sanh et al. 2019)."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Divergence):
    """The reverse KL, KL(student || teacher), computed exactly over the vocabulary (Gu et al. 2024, section 2.2)."""

    type: Literal["reverse_kl"] = "reverse_kl"


class Jeffreys(Divergence):
    """The sum of the forward and the reverse KL (Jeffreys 1946)."""

    type: Literal["jeffreys"] = "jeffreys"


class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD)."""

    type: Literal["jensen_shannon"] = "jensen_shannon"
    beta: Share = 0.5
    """Weight of the teacher in the mixture of both models. 0 gives the forward KL, and 1 gives the reverse KL."""


class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q), where p is the teacher and q is the student (Ko et al. 2024, DistiLLM)."""

    type: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: Share = 0.1
    """The teacher's weight in the mixture."""


class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q), where p is the teacher and q is the student (Ko et al. 2024, DistiLLM)."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: Share = 0.1
    """The student's weight in the mixture."""
    detach_mixture: bool = False
    """If true, no gradient flows through the mixture (as in DistiLLM-2)."""


class TotalVariation(Divergence):
    """Half the L1 distance between the distributions of teacher and student (Wen et al. 2023, f-distill)."""

    type: Literal["total_variation"] = "total_variation"


class AdaptiveKL(Divergence):
    """A weighted sum of the forward and the reverse KL (Wu et al. 2025, AKL). At each position, the weights depend on where teacher and
    student differ more: on the teacher's most probable tokens, or on all other tokens."""

    type: Literal["adaptive_kl"] = "adaptive_kl"
    mu: Share = 0.5
    """Total probability of the group of the teacher's most probable tokens. If the two models differ mainly on this group, the forward KL
    gets more weight."""


class AlphaBeta(Divergence):
    """The alpha-beta divergence (Wang et al. 2025, ABKD). The defaults are the paper's values for GPT-2."""

    type: Literal["alpha_beta"] = "alpha_beta"
    alpha: Modest = 0.2
    """A larger value gives more weight to tokens that the teacher finds probable."""
    beta: Modest = 0.7
    """A larger value gives more weight to tokens that the student finds probable."""


class AlphaMixture(Divergence):
    """A divergence between two distributions: a mixture of teacher and student, and either the teacher or the student (Shin et al. 2025,
    AMiD). The defaults are not those of this paper, but those of the WASD paper."""

    type: Literal["alpha_mixture"] = "alpha_mixture"
    alpha: Modest = -5.0
    """Parameter of the mixture: -1 gives the arithmetic mean, 1 the geometric mean, and 3 the harmonic mean."""
    lam: Share = 0.5
    """The teacher's weight in the mixture."""
    pair: Literal["pr", "rp", "qr", "rq"] = "pr"
    """The two distributions that are compared: `p` is the teacher, `q` is the student, and `r` is their mixture. For example, `pr` is the
    divergence from p to r."""
    ab_parameters: tuple[Modest, Modest] = (1.0, 0.0)
    """The parameters alpha and beta of the divergence (see objective `alpha_beta`). With (1, 0), the divergence is the KL."""


class _TopK(Divergence):
    only_by_token: ClassVar[str] = "compares the teacher's k most probable tokens; use `forward_kl` or `reverse_kl`"
    k: int = Field(default=64, ge=1, le=MOST)
    """Number of tokens that are compared: the teacher's k most probable ones."""
    tail: Literal["lump", "drop"] = "lump"
    """Treatment of all tokens that are not among these k. `lump` treats them as one token. `drop` removes them and renormalises the
    probabilities."""


class TopKForwardKL(_TopK):
    """The forward KL on the teacher's k most probable tokens (Anshumann et al. 2025)."""

    type: Literal["top_k_forward_kl"] = "top_k_forward_kl"


class TopKReverseKL(_TopK):
    """The reverse KL on the teacher's k most probable tokens."""

    type: Literal["top_k_reverse_kl"] = "top_k_reverse_kl"


class Contrastive(Divergence):
    """DistiLLM-2's loss (Ko et al. 2025): skew forward KL on the teacher's text, and skew reverse KL on the student's text. It needs the
    sampler `pair`."""

    needs_pairs: ClassVar[bool] = True
    only_by_token: ClassVar[str] = "has one loss for each of two responses; use `skew_forward_kl` or `skew_reverse_kl` with another sampler"
    type: Literal["contrastive"] = "contrastive"
    alpha: Share = 0.1
    """Weight in the mixture: of the teacher in the forward KL, and of the student in the reverse KL. The weight is constant here, but the
    paper adapts it to each response."""


class Taid(Divergence):
    """Cross-entropy to a target that moves from the student to the teacher during training (Shing et al. 2025, TAID). The target is the
    student at t = 0, and the teacher at t = 1."""

    type: Literal["taid"] = "taid"
    start: Share = 0.4
    """Weight t of the teacher in the target at the first two updates. Then t rises after every update."""
    end: Share = 1.0
    """Weight t of the teacher in the target that is reached after the last update, or earlier by the adaptive rise (`rate`)."""
    rate: float = Field(default=5e-4, ge=0)
    """Upper bound of the adaptive rise of t in one update, as a fraction of 1 - t. The faster the loss falls, the larger is this rise. If t
    would be below the straight line from `start` to `end`, it takes the value on this line."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay rate of the moving average that measures how fast the loss falls."""

    @model_validator(mode="after")
    def _check(self):
        if self.end < self.start:
            raise ValueError(
                f"end {self.end} is below start {self.start}, but the teacher's weight cannot fall during training; raise `end`"
            )
        return self


class Uld(Divergence):
    """The ULD distance between the sorted probabilities of teacher and student (Boizard et al. 2024, arXiv 2402.12030). Because the
    probabilities are sorted, the models need no tokens in common. For the same reason, the distance does not depend on which tokens are
    likely. This objective is included for comparison.

    If student and teacher have different tokenizers, the distance is computed over spans of text, as in GOLD of TRL 1.16.
    """

    type: Literal["uld"] = "uld"
    kd_ratio: Share = 0.6
    """Weight of the distance in the loss. Cross-entropy on the tokens has the weight 1 - kd_ratio. (The paper adds 1.5 times the distance
    to the cross-entropy.)"""


class Gold(Divergence):
    """GOLD's hybrid loss (TRL 1.16), for a student and a teacher with different tokenizers. The loss is a weighted sum of two parts: a
    Jensen-Shannon divergence on the tokens that are in both vocabularies, and the ULD distance on all other tokens. The probabilities of
    the shared tokens are not renormalised.

    The two parts have the weights w and 1 - w, where w is the share of the teacher's tokens that the student's vocabulary contains. This
    objective is included for comparison.
    """

    type: Literal["gold"] = "gold"
    beta: Share = 0.5
    """Weight of the teacher in the mixture of both models. 0 gives the forward KL, and 1 gives the reverse KL."""


class Custom(Divergence):
    """A loss in the user's own code. Its function `loss(student_logits, teacher_logits, **settings)` returns one value per token.

    The logits have the shape (tokens, vocabulary). They are already divided by the temperature.
    """

    type: Literal["custom"] = "custom"
    function: FunctionName
    """The function, written as MODULE:FUNCTION. MODULE is a Python file beside the recipe, or an installed module."""
    settings: dict[str, float | int | str] = {}
    """Additional keyword arguments of the function."""

    @property
    def label(self) -> str:
        return self.function


class SampledKL(ObjectiveBase):
    """An estimate of the reverse KL from the sampled tokens (Schulman 2020). This objective needs the sampler `student`.

    The gradient is unbiased only in the first update after sampling. So keep the sampler's default values of `rollouts` and `inner_epochs`,
    with which new text is sampled for every update.
    """

    needs_scores: ClassVar[bool] = True
    needs_own_samples: ClassVar[bool] = True
    only_by_token: ClassVar[str] = "estimates the KL from single tokens; use `reverse_kl`, or `minillm` with `sampler.alpha: 0`"
    type: Literal["sampled_kl"] = "sampled_kl"
    estimator: Literal["k2", "k3"] = "k2"
    """Schulman's estimator of the KL. Its expected gradient is that of the reverse KL for `k2`, and that of the forward KL for `k3`."""


class NoTeacher(ObjectiveBase):
    """A control without a teacher (arXiv 2608.31046): a policy gradient in which sampled tokens that the student finds improbable have the
    advantage -1, and all others 0.

    This objective needs the sampler `student`. If it improves a student as much as distillation does, then the teacher does not cause the
    improvement.
    """

    needs_teacher: ClassVar[bool] = False
    needs_own_samples: ClassVar[bool] = True
    type: Literal["no_teacher"] = "no_teacher"
    below: float = Field(default=0.1, gt=0, lt=1)
    """A sampled token gets the advantage -1 if the student gives it a smaller probability than this."""


class MiniLLM(ObjectiveBase):
    """MiniLLM's policy gradient (Gu et al. 2024, arXiv 2306.08543v6). Each part can follow the paper or the released code.

    The loss of each token is this sum:

        -A min(ratio, clip(ratio))  +  min(ratio, clip(ratio)) KL(q || p)  +  pt_weight L_PT

    p is the teacher, q is the student, and p~ is the distribution from which the tokens were sampled. ratio is q / p~. A is the return: the
    normalised sum of the later rewards (log p - log q_old) / reward_scale, where q_old is the student at the time of sampling. L_PT is a
    loss on plain text.
    """

    needs_scores: ClassVar[bool] = True
    needs_rounds: ClassVar[bool] = True
    type: Literal["minillm"] = "minillm"
    preset: Literal["paper", "official"] = "paper"
    """Source of the values of keys that the recipe leaves out. `paper`: Algorithm 1 of the paper. `official`: the released code. The
    default of `pt_weight` does not depend on the preset."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Discount factor of later rewards in the return. Preset `paper`: 1. Preset `official`: 0.95."""
    include_current: bool = False
    """Add a token's own reward to its return, although the single-step term contains this reward too. Preset `paper`: no. Preset
    `official`: yes."""
    length_normalisation: Literal["after", "remaining", "discounts", "none"] = "after"
    """Divisor of the return of token t in a response of T tokens. `after`: T - t - 1 (Eq. 6; preset `paper`). `remaining`: number of tokens
    from t to the end (preset `official`). `discounts`: sum of the discounts. `none`: no division, which leads to very short answers."""
    whitening: Literal["none", "tokens", "padded"] = "none"
    """Scale the returns of an update to mean 0 and variance 1. `tokens`: mean and variance are computed over the tokens. `padded`: padding
    is included as zeros. Preset `paper`: none. Preset `official`: padded."""
    reward_scale: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Number by which rewards are divided. Preset `paper`: 1. Preset `official`: 0.5."""
    reward_clip: float | None = Field(default=None, gt=0, le=1e9)
    """Largest absolute value of a reward after scaling. Preset `paper`: no limit. Preset `official`: 100."""
    clip: float = Field(default=0.2, gt=0, le=1e9)
    """The importance ratio is clipped to the interval from 1 - clip to 1 + clip."""
    clipping: Literal["ratio", "ppo"] = "ratio"
    """How the importance ratio is clipped. `ratio` (preset `paper`): min(ratio, clip(ratio)) for every return A. `ppo` (preset `official`):
    PPO's loss max(-A ratio, -A clip(ratio)), which depends on the sign of A."""
    clip_weight: bool = True
    """True (both presets): clip the whole importance ratio q / p~. Here q is the student, and p~ is the distribution from which the tokens
    were sampled. False: clip only q / q_old, where q_old is the student at the time of sampling."""
    single_step: bool = True
    """Add the single-step term: the expected reward of the next token, computed exactly over the vocabulary (Eq. 3)."""
    single_step_weight: bool = True
    """Multiply the single-step term by the clipped importance ratio. Preset `paper`: yes (Eq. 7). Preset `official`: no."""
    pt_weight: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the loss on the plain text of `data.corpus`. 0 leaves this loss out."""
    pt_kd_ratio: Share = 0.0
    """Weight of the forward KL to the teacher in the loss on plain text. Cross-entropy has the weight 1 - pt_kd_ratio. Preset `paper`: 0.
    Preset `official`: 0.5."""

    @property
    def needs_distribution(self) -> bool:
        return self.single_step

    @property
    def needs_corpus(self) -> bool:
        return self.pt_weight > 0

    @property
    def compares_on_corpus(self) -> bool:
        return self.needs_corpus and self.pt_kd_ratio > 0

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        # a named preset sets all its fields, so that an arm's preset replaces every field of the recipe's preset
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
    | Uld
    | Gold
    | Custom
    | SampledKL
    | NoTeacher
    | MiniLLM,
    Field(discriminator="type"),
]
