"""Statistical tests and related functions: significance, equivalence, power, the bias of a best-of-k score, and Pareto fronts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import chdtri, nctdtrinc, ndtr, ndtri, stdtr, stdtrit

from tadistill.statistics.intervals import Difference
from tadistill.text import counted, form

MOST_SEEDS = 20  # 2^20 sign patterns take one second and 8 MB
_MANY_SEEDS = 1_000_000  # largest number of seeds that `seeds_to_detect` returns
_LARGE_T = 1000.0  # scipy's inverse of the non-central t distribution is inexact beyond such quantiles, and may never return


@dataclass(frozen=True)
class SignFlip:
    """The result of a sign-flip test. ``p`` is the two-sided p-value. ``smallest`` is the smallest p-value that is possible with these
    seeds.
    """

    p: float
    smallest: float


def sign_flip(differences_S: ArrayLike) -> SignFlip:
    """Return the result of the exact two-sided sign-flip test, for differences of two models.

    ``differences_S`` has one paired difference per training seed. The test flips the signs of these values in all 2^S ways, and adds them
    up each time. ``p`` is the share of sums that are at least as far from zero as the sum without flips. The test assumes that each value
    is symmetric about zero if there is no true difference. Source: R. A. Fisher, The Design of Experiments (1935), section 21.
    """
    differences = np.asarray(differences_S, dtype=np.float64)
    if differences.ndim != 1 or not 1 <= len(differences) <= MOST_SEEDS:
        raise ValueError(
            f"the sign-flip test got differences of shape {differences.shape}; give a list of 1 to {MOST_SEEDS} differences, one per seed"
        )
    if not np.isfinite(differences).all():
        raise ValueError("the difference of a training seed is NaN or infinite; the sign-flip test needs finite differences")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-12 * np.abs(differences).sum()  # rounding errors must not exclude patterns that are equal to the observed one
    p = float(np.mean(np.abs(sums) >= abs(differences.sum()) - rounding))
    return SignFlip(p, 2.0 / 2 ** len(differences))


def holm(p_values: Sequence[float], *, untested: int = 0) -> list[float]:
    """Return the p-values, corrected for multiple testing by Holm's method. Their order stays the same.

    The usual rule rejects each hypothesis whose corrected p-value is below 0.05. The chance of any false rejection is then at most 5 %.
    Source: S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).

    Args:
        untested: the number of further hypotheses, which have no p-value yet. They count too, so that no rejection is reversed when they
            are tested.
    """
    p = np.array([*p_values, *[1.0] * untested], dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be a list of numbers from 0 to 1, not {p_values}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted[: len(p) - untested].tolist()


def equivalent(difference: Difference, margin: float) -> bool:
    """Return True if a test at the 5 % level shows that the true difference is between -``margin`` and ``margin``.

    This is so if the 90 % confidence interval lies inside this range. The rule is the same as two one-sided tests at 5 %. Source: D. J.
    Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin must be greater than 0, not {margin}")
    return -margin < difference.low90 and difference.high90 < margin and not difference.one_prompt


T = TypeVar("T")


def minimum_detectable_effect(se: float, df: float, power: float = 0.8, level: float = 0.95) -> float:
    """Return the smallest true difference that a study detects with probability ``power``, in the unit of ``se``.

    A difference is detected if a two-sided t-test is significant at the confidence level ``level``. ``se`` and ``df`` are fields of a
    `Difference`. The power comes from the non-central t distribution. Significant results with the wrong sign are ignored, because they are
    very rare. ``se`` counts as the true standard error. If most of it is estimated from three seeds, the power is
    lower: a study finds the difference that it names in about two of three cases, not in four of five.
    """
    if not (se >= 0 and df > 0):
        raise ValueError(f"`se` is {se} and `df` is {df}; `se` cannot be negative, and `df` must be greater than 0")
    for name, value in (("power", power), ("level", level)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"`{name}` is {value}; it must lie between 0 and 1")
    if np.isinf(df):
        return float(se * (ndtri((1 + level) / 2) + ndtri(power)))
    quantile = float(stdtrit(df, (1 + level) / 2))
    if quantile > _LARGE_T:  # the normal part of t is then negligible: only the chi-squared part decides
        return float(se * quantile * np.sqrt(chdtri(df, 1 - power) / df))
    return float(se * nctdtrinc(df, 1 - power, quantile))


def seeds_to_detect(effect: float, *, se: float, df: float, differences_S: ArrayLike, level: float = 0.95) -> int | None:
    """Return the number of training seeds with which a comparison on the same prompts detects ``effect`` with a probability of 80 %.

    ``se`` and ``df`` are fields of the `Difference` of this study, and ``differences_S`` has the mean difference of each training seed.
    Both parts of the variance, between seeds and between prompts, are treated as exact. Only the part between seeds becomes smaller with
    more seeds. The result is None if the part between prompts alone hides the effect.
    """
    differences = np.asarray(differences_S, dtype=np.float64)
    n = len(differences)
    if n < 2 or not effect > 0:
        raise ValueError(
            f"there {form(n, 'is', 'are')} {counted(n, 'training seed')} and `effect` is {effect}; give at least 2 seeds and an effect "
            "greater than 0"
        )
    of_seeds = min(float(differences.var(ddof=1)) / n, se**2)  # se^2 = of_seeds + alone, as in `intervals`
    alone = se**2 - of_seeds if of_seeds < (1 - 1e-9) * se**2 else 0.0
    df_alone = alone / se**2 / inverse if alone and (inverse := 1 / df - of_seeds / se**2 / (n - 1)) > 0 else np.inf

    def smallest(seeds: float) -> float:
        variance = of_seeds * n / seeds + alone
        share = of_seeds * n / seeds / variance if variance else 0.0
        inverse = share / (seeds - 1) + (1 - share) / df_alone
        return minimum_detectable_effect(float(np.sqrt(variance)), 1 / inverse if inverse else np.inf, level=level)

    if smallest(_MANY_SEEDS) > effect:
        return None
    low, high = 1, _MANY_SEEDS  # `low` seeds are too few, `high` seeds are enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if smallest(middle) <= effect else (middle, high)
    return high


def spread_claimed(mean: float, half: float, p: float) -> float:
    """Return the standard error of a reported mean. The interval and the p-value give one standard error each; the larger one is returned.

    Args:
        half: half the width of the 95 % interval.
        p: two-sided p-value for a mean of zero.
    """
    z = -ndtri(p / 2) if 0 < p < 1 else 0.0
    return float(max(half / ndtri(0.975), abs(mean) / z if z > 0 else 0.0))


def seeds_spread(differences_S: ArrayLike) -> float:
    """Return the standard error of the mean difference, from the t-test over seeds (see `spread_claimed`). It is 0 for one seed.

    ``differences_S`` has one paired difference per training seed.
    """
    differences = np.asarray(differences_S, dtype=np.float64)
    df = len(differences) - 1
    if df < 1 or not (se := float(differences.std(ddof=1)) / np.sqrt(df + 1)) > 0:
        return 0.0
    mean = float(differences.mean())
    return spread_claimed(mean, float(stdtrit(df, 0.975)) * se, float(2 * stdtr(df, -abs(mean) / se)))


def expected_best_of(k: int) -> float:
    """Return the expected maximum of ``k`` standard normal draws.

    If k scores differ only by chance, the best of them lies above their mean by this number of standard deviations on average.
    """
    if k < 1:
        raise ValueError(f"`k`, the number of draws, is {k}; it must be at least 1")
    x = np.linspace(0.0, 12.0, 12_001)
    # E[max] is the integral of 1 - F over x > 0, minus the integral of F over x < 0
    return float(np.trapezoid(1 - ndtr(x) ** k - ndtr(-x) ** k, x))


def inflation(k_a: int, k_b: int, sigma: float) -> float:
    """Return the bias of a difference of two scores, if each score is the best of several checkpoints.

    The first score is the best of ``k_a`` checkpoints, and the second is the best of ``k_b``. ``sigma`` is the standard deviation of the
    measurement error of one checkpoint's score. The bias has the same unit. It is an upper bound, because checkpoints of one run have
    correlated scores.
    """
    if not sigma >= 0:
        raise ValueError(f"`sigma` is {sigma}; it is a standard deviation and cannot be negative")
    return sigma * (expected_best_of(k_a) - expected_best_of(k_b))


def undominated(options: Iterable[T], losses: Callable[[T], tuple[float, ...]]) -> list[T]:
    """Return the options on the Pareto front, sorted by their losses. Lower losses are better.

    An option is left out if another option is at least as good in every loss. If several options have equal losses, the first is kept.
    """
    kept: list[tuple[tuple[float, ...], T]] = []
    for vector, option in sorted(((losses(o), o) for o in options), key=lambda pair: pair[0]):
        # an option that dominates another sorts before it, so comparing with the kept ones is enough
        if not any(all(a <= b for a, b in zip(other, vector, strict=True)) for other, _ in kept):
            kept.append((vector, option))
    return [option for _, option in kept]
