"""Objectives as config variants, told apart by `type`: one class per function of `tadistill.objectives`.

The fields of a divergence are exactly the keyword arguments of its function, so a variant says which function and with what. Defaults
are the source paper's; formulas, limits and ranges are in the functions' docstrings and in docs/objectives.md.
"""

from typing import Annotated, Literal

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

    Needs rollouts of the student itself, so sampler teacher_mixed with alpha 0; the teacher only scores them. Exact in the first update
    of a round only: set `rollouts` to the batch and `inner_epochs` to 1, or accept older samples. k1 is no objective,
    because its own gradient has mean zero.
    """

    type: Literal["sampled_kl"] = "sampled_kl"
    estimator: Literal["k2", "k3"] = "k2"


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
