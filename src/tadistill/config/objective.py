"""Objectives as config variants, told apart by `type`: one class per function of `tadistill.objectives`.

The fields of a divergence are exactly the keyword arguments of its function, so a variant says which function and with what. Defaults
are the source paper's; formulas, limits and ranges are in the functions' docstrings and in docs/objectives.md.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tadistill.config.strict import Strict

Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class CrossEntropy(Strict):
    """Maximum likelihood of the training text. On a teacher's text this is SeqKD (Kim & Rush 2016)."""

    type: Literal["cross_entropy"] = "cross_entropy"


class Divergence(Strict):
    """Base of all divergences between teacher and student at every token."""

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Both logits are divided by it; the loss is not rescaled."""
    kd_ratio: Share = 1.0
    """Share of the divergence; the rest is cross-entropy on the tokens (MiniLLM's KD baseline uses 0.5)."""


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
    """Weight of the teacher; 0 is the forward KL, 1 the reverse KL."""


class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q) (Ko et al. 2024, DistiLLM)."""

    type: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: Share = 0.1


class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q) (Ko et al. 2024, DistiLLM)."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: Share = 0.1
    detach_mixture: bool = False
    """No gradient through the mixture (DistiLLM-2)."""


class TotalVariation(Divergence):
    """Half the L1 distance (Wen et al. 2023, f-distill)."""

    type: Literal["total_variation"] = "total_variation"


class AdaptiveKL(Divergence):
    """Both KLs, weighed by where the models differ (Wu et al. 2025, AKL)."""

    type: Literal["adaptive_kl"] = "adaptive_kl"
    mu: Share = 0.5
    """Mass of the teacher's head."""


class AlphaBeta(Divergence):
    """The alpha-beta divergence (Wang et al. 2025, ABKD); defaults for GPT-2, 0.5 and 0.5 for OpenLLaMA2."""

    type: Literal["alpha_beta"] = "alpha_beta"
    alpha: float = Field(default=0.2, allow_inf_nan=False)
    beta: float = Field(default=0.7, allow_inf_nan=False)


class AlphaMixture(Divergence):
    """A divergence to the alpha-mixture of both models (Shin et al. 2025, AMiD); defaults as in WASD's runs of it."""

    type: Literal["alpha_mixture"] = "alpha_mixture"
    alpha: float = Field(default=-5.0, allow_inf_nan=False)
    lam: Share = 0.5
    pair: Literal["pr", "rp", "qr", "rq"] = "pr"
    ab_parameters: tuple[Finite, Finite] = (1.0, 0.0)


class _TopK(Divergence):
    k: int = Field(default=64, ge=1)
    tail: Literal["lump", "drop"] = "lump"


class TopKForwardKL(_TopK):
    """Forward KL on the teacher's k most probable tokens (Anshumann et al. 2025)."""

    type: Literal["top_k_forward_kl"] = "top_k_forward_kl"


class TopKReverseKL(_TopK):
    """Reverse KL on the teacher's k most probable tokens."""

    type: Literal["top_k_reverse_kl"] = "top_k_reverse_kl"


class Contrastive(Divergence):
    """DistiLLM-2's pair: skew forward KL on the teacher's text, skew reverse KL on the student's (Ko et al. 2025).

    Needs the pair sampler. The skew is fixed; the paper's, which adapts per response, is `objectives.contrastive_alpha`.
    """

    type: Literal["contrastive"] = "contrastive"
    alpha: Share = 0.1


class Taid(Divergence):
    """Cross-entropy to a target that moves from the student to the teacher (Shing et al. 2025, TAID)."""

    type: Literal["taid"] = "taid"
    start: Share = 0.4
    end: Share = 1.0
    rate: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    """How much faster than linearly t may rise."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the momentum of the loss's relative change."""

    @model_validator(mode="after")
    def _check(self):
        if self.end < self.start:
            raise ValueError(f"end {self.end} is below start {self.start}; t only rises, so raise end")
        return self


class SampledKL(Strict):
    """Reverse KL from the sampled tokens alone (Schulman 2020): `k2` has its gradient, `k3` that of the forward KL.

    Needs samples of the student itself, so sampler student. Exact in the first update of a round, so with its defaults of one batch and one
    epoch. k1 is no objective, because its own gradient has mean zero.
    """

    type: Literal["sampled_kl"] = "sampled_kl"
    estimator: Literal["k2", "k3"] = "k2"


class MiniLLM(Strict):
    """MiniLLM's policy gradient (Gu et al. 2024, arXiv 2306.08543v6), in the paper's form or the released code's, part by part.

    `preset` sets every field below it that is not given, but for `pt_weight`: `paper` is Algorithm 1, `official` the released code.
    Per token, with r = (log p - log q) / reward_scale, behaviour p~ and ratio = q / p~:

        -A min(ratio, clip(ratio))  +  ratio KL(q || p)  +  pt_weight L_PT,      A = length-normalised sum of r after the token
    """

    type: Literal["minillm"] = "minillm"
    preset: Literal["paper", "official"] = "paper"
    discount: float = Field(default=1.0, gt=0, le=1)
    """Of later rewards in the return. Paper: 1; official: 0.95."""
    include_current: bool = False
    """The return has the token's own reward in it, and so counts the single step twice. Paper: no, R_{t+1}; official: yes, R_t."""
    length_normalisation: Literal["after", "remaining", "discounts", "none"] = "after"
    """The return is divided by T - t - 1 (paper, Eq. 6), by the tokens from t to the end (official), or by the sum of the discounts,
    which alone makes the mean of equal rewards that reward. Without it answers collapse to short strings."""
    whitening: Literal["none", "tokens", "padded"] = "none"
    """Returns of an update get mean 0 and variance 1, over its tokens or over rows x max_new_tokens places of which the padding counts as
    0. Paper: none; official: padded."""
    reward_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Rewards are divided by it. Paper: 1; official: 0.5."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Largest absolute reward after scaling. Paper: none; official: 100."""
    clip: float = Field(default=0.2, gt=0)
    """Half width of the clip around 1."""
    clipping: Literal["ratio", "ppo"] = "ratio"
    """Paper: min(ratio, clip(ratio)); official: PPO's max(-A ratio, -A clip(ratio)), which depends on the sign of A."""
    clip_weight: bool = True
    """The importance weight q_old / p~ counts inside the clip, which then bites before the student has moved (both forms). Otherwise only
    the student's drift q / q_old is clipped."""
    single_step: bool = True
    """Add the exact one-step term, E_{y_t ~ q}[r_t] summed over the vocabulary (Eq. 3)."""
    single_step_weight: bool = True
    """Weight the one-step term by the (clipped) ratio as well. Paper: yes (Eq. 7); official: no."""
    pt_weight: float = Field(default=1.0, ge=0)
    """Weight of the term on `data.corpus` (L_PT); 0 leaves it out."""
    pt_kd_ratio: Share = 0.0
    """Share of the forward KL to the teacher in L_PT; the rest is language modelling. Paper: 0; official: 0.5."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """A preset that is named sets all its fields, so that it also replaces another one's when it comes as a patch."""
        named = values.get("preset") if isinstance(values, dict) else None
        return _PRESETS[named] | values if isinstance(named, str) and named in _PRESETS else values


_OFFICIAL: dict[str, Any] = {
    "discount": 0.95,
    "include_current": True,
    "length_normalisation": "remaining",
    "whitening": "padded",
    "reward_scale": 0.5,
    "reward_clip": 100.0,
    "clip": 0.2,
    "clipping": "ppo",
    "clip_weight": True,
    "single_step": True,
    "single_step_weight": False,
    "pt_kd_ratio": 0.5,
}
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
    | SampledKL
    | MiniLLM,
    Field(discriminator="type"),
]
