"""Tests in addition to the bootstrap (sign flips, Holm's correction, equivalence), statistical power, and the bias of selecting a best."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import nctdtrinc, ndtr, ndtri, stdtrit

from tadistill.statistics.bootstrap import Difference

MOST_SEEDS = 20  # 2^20 sign patterns take one second and 8 MB


@dataclass(frozen=True)
class SignFlip:
    """The result of a sign-flip test: the two-sided p-value, and the smallest p-value that is possible with this number of seeds."""

    p: float
    smallest: float


def sign_flip(differences_S: ArrayLike) -> SignFlip:
    """Run the exact two-sided sign-flip test over all 2^S sign patterns of S paired differences, one per training seed.

    The test assumes that under the null hypothesis each difference is symmetric about zero. Source: R. A. Fisher, The Design of
    Experiments (1935), section 21.
    """
    differences = np.asarray(differences_S, dtype=np.float64)
    if differences.ndim != 1 or not 1 <= len(differences) <= MOST_SEEDS:
        raise ValueError(f"the sign-flip test needs 1 to {MOST_SEEDS} differences, one per seed, not an array of shape {differences.shape}")
    if not np.isfinite(differences).all():
        raise ValueError("the sign-flip test needs finite differences, but the difference of a seed is NaN or infinite")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-12 * np.abs(differences).sum()  # rounding errors must not exclude patterns that are equal to the observed one
    p = float(np.mean(np.abs(sums) >= abs(differences.sum()) - rounding))
    return SignFlip(p, 2.0 / 2 ** len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the given order. Reject those below 0.05 for a family-wise error rate of 5 %.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be a list of numbers from 0 to 1, not {p_values}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def equivalent(difference: Difference, margin: float) -> bool:
    """Return True if the difference is significantly inside (-margin, margin), by two one-sided tests at 5 %.

    Both tests reject if the 90 % interval lies inside (-margin, margin). Source: D. J. Schuirmann, Journal of
    Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin must be greater than 0, not {margin}")
    return -margin < difference.low90 and difference.high90 < margin


T = TypeVar("T")


def minimum_detectable_effect(se: float, df: float, power: float = 0.8, level: float = 0.95) -> float:
    """Return the true difference that a two-sided t-test at ``level`` detects with probability ``power``, in the unit of ``se``.

    ``se`` and ``df`` are the fields of a `Difference`. The result is exact for a non-central t statistic with ``df`` degrees of
    freedom, except that it ignores the chance of a significant wrong sign (below 1 in 10,000 at a power of 0.8).
    """
    if not (se >= 0 and df > 0):
        raise ValueError(f"se cannot be negative and df must be positive, but they are {se} and {df}")
    _check_shares(power, level)
    if np.isinf(df):
        return float(se * (ndtri((1 + level) / 2) + ndtri(power)))
    return float(se * nctdtrinc(df, 1 - power, stdtrit(df, (1 + level) / 2)))


def detectable(
    *, s_prompt: float, s_seed: float, s_decode: float, prompts: int, seeds: int, decodes: int, power: float = 0.8, level: float = 0.95
) -> float:
    """Return the minimum detectable effect of a planned study. Its variance is s_prompt^2/n + 2 s_seed^2/S + 2 s_decode^2/(n K).

    ``s_prompt`` is the standard deviation of a paired difference over prompts. ``s_seed`` and ``s_decode`` are standard deviations
    of a single arm, hence the factor 2. Normal quantiles are used as if the variances were known, which is optimistic for 3 seeds.
    """
    if min(prompts, seeds, decodes) < 1:
        raise ValueError(f"prompts, seeds and decodes must each be at least 1, not {prompts}, {seeds} and {decodes}")
    if min(s_prompt, s_seed, s_decode) < 0:
        raise ValueError(f"s_prompt, s_seed and s_decode cannot be negative, but they are {s_prompt}, {s_seed} and {s_decode}")
    variance = s_prompt**2 / prompts + 2 * s_seed**2 / seeds + 2 * s_decode**2 / (prompts * decodes)
    return minimum_detectable_effect(float(np.sqrt(variance)), np.inf, power, level)


def expected_best_of(k: int) -> float:
    """Return the mean of the maximum of ``k`` independent standard normal draws: how far chance alone raises the best of k scores."""
    if k < 1:
        raise ValueError(f"the expected best of {k} draws is not defined; k must be at least 1")
    x = np.linspace(0.0, 12.0, 12_001)
    # E[max] is the integral of 1 - F over x > 0, minus the integral of F over x < 0
    return float(np.trapezoid(1 - ndtr(x) ** k - ndtr(-x) ** k, x))


def inflation(k_a: int, k_b: int, sigma: float) -> float:
    """Return the bias, in the unit of ``sigma``, when arm a selects its best of ``k_a`` checkpoints and arm b its best of ``k_b``.

    ``sigma`` is the standard deviation of a checkpoint's measured score around its true score. The result is an upper bound,
    because checkpoints of one run have correlated scores.
    """
    if not sigma >= 0:
        raise ValueError(f"sigma is a standard deviation and cannot be negative, not {sigma}")
    return sigma * (expected_best_of(k_a) - expected_best_of(k_b))


def undominated(options: Iterable[T], losses: Callable[[T], tuple[float, ...]]) -> list[T]:
    """Return the Pareto front, sorted by losses (lower is better): options that no other option equals or beats in every loss.

    If several options have equal losses, only the first is returned.
    """
    kept: list[tuple[tuple[float, ...], T]] = []
    for vector, option in sorted(((losses(o), o) for o in options), key=lambda pair: pair[0]):
        # an option that dominates another sorts before it, so comparing with the kept ones is enough
        if not any(all(a <= b for a, b in zip(other, vector, strict=True)) for other, _ in kept):
            kept.append((vector, option))
    return [option for _, option in kept]


def _check_shares(power: float, level: float) -> None:
    for name, value in (("power", power), ("level", level)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}")
