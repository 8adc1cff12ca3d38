"""Numbers that say how models of a lattice fit together, from what the probe stages wrote. Each stands by itself; none is blended.

Every number is a mean over dev prompts with its standard error over prompts. Axes: N prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
PAIR_MEASURES = ("reverse_kl", "forward_kl", "overlap", "mass", "entropy_gap", "loss_ratio", "advantage", "bias")


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts; `se` is None with a single prompt."""

    mean: float
    se: float | None
    n: int


@dataclass(frozen=True)
class Model:
    """A model by itself, on dev prompts."""

    name: str
    parameters: int
    loss: Estimate
    """-log q per token of the references, in nats."""
    rouge_l: Estimate
    """Of its own sampled answers, 0 to 100."""
    entropy: Estimate
    """Nats per token, on its own answers."""


@dataclass(frozen=True)
class Pair:
    """A bigger model p beside a smaller learner q, both as they are before any distillation."""

    teacher: str
    learner: str
    size_ratio: float
    """Parameters of p / parameters of q."""
    reverse_kl: Estimate
    """KL(q ‖ p) per token on q's own answers: what on-policy distillation would start from."""
    forward_kl: Estimate
    """KL(p ‖ q) per token on the references."""
    overlap: Estimate
    """Share of q's likeliest tokens that are among p's, on q's prefixes."""
    mass: Estimate
    """Probability that q gives to p's likeliest tokens, on q's prefixes."""
    entropy_gap: Estimate
    """H(p) - H(q) in nats, on q's prefixes."""
    loss_ratio: Estimate
    """Loss of p / loss of q on the references."""
    advantage: Estimate
    """E[log p - log q] per token of the references: what p knows and q does not."""
    bias: Estimate
    """E_q[log p - log p_T] on q's own answers, T the original teacher: how much better q looks to p than to T. Zero where p is T."""


@dataclass(frozen=True)
class Measures:
    """All models of a lattice, from big to small, and all pairs (bigger, smaller)."""

    models: tuple[Model, ...]
    pairs: Mapping[tuple[str, str], Pair]

    def model(self, name: str) -> Model:
        """One of the models."""
        return next(m for m in self.models if m.name == name)


def estimate(values: ArrayLike) -> Estimate:
    """Mean and standard error over prompts (N,)."""
    found = np.asarray(values, float)
    se = float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
    return Estimate(float(found.mean()), se, len(found))


def ratio(above: ArrayLike, below: ArrayLike) -> Estimate:
    """mean(above) / mean(below) of paired values (N,), its standard error by the delta method. Infinite where mean(below) is 0."""
    a, b = np.asarray(above, float), np.asarray(below, float)
    if b.mean() == 0:
        return Estimate(float("inf"), None, len(a))
    value = a.mean() / b.mean()
    return Estimate(float(value), estimate((a - value * b) / b.mean()).se, len(a))


def measure(
    sizes: Mapping[str, int],
    alone: Mapping[str, Mapping[str, Sequence[float]]],
    beside: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
) -> Measures:
    """Estimates from scores per prompt.

    Args:
        sizes: parameters of every model, from big to small; the first is the original teacher.
        alone: model -> {loss, rouge_l, entropy} per prompt.
        beside: (bigger, smaller) -> {reverse_kl, forward_kl, overlap, mass, entropy_gap} per prompt.
    """
    root = next(iter(sizes))
    models = tuple(
        Model(name, size, **{m: estimate(alone[name][m]) for m in ("loss", "rouge_l", "entropy")}) for name, size in sizes.items()
    )
    pairs: dict[tuple[str, str], Pair] = {}
    for (teacher, learner), scores in beside.items():
        losses = (np.asarray(alone[name]["loss"], float) for name in (teacher, learner))
        of_teacher, of_learner = losses
        # KL(q ‖ p_T) - KL(q ‖ p) before every token is E_q[log p - log p_T] there, exact over the vocabulary
        to_root = np.asarray(beside[root, learner]["reverse_kl"], float)
        pairs[teacher, learner] = Pair(
            teacher,
            learner,
            sizes[teacher] / sizes[learner],
            **{name: estimate(scores[name]) for name in ("reverse_kl", "forward_kl", "overlap", "mass", "entropy_gap")},
            loss_ratio=ratio(of_teacher, of_learner),
            advantage=estimate(of_learner - of_teacher),
            bias=estimate(to_root - np.asarray(scores["reverse_kl"], float)),
        )
    return Measures(models, pairs)
