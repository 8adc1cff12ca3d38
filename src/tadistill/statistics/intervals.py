"""Confidence intervals for scores of several training seeds on the same prompts.

Axes in names: S training seeds, N prompts, K decoding seeds. Every function first averages over the decoding seeds, because they only
repeat the measurement of one model on one prompt.

Every seed answers every prompt. The variance of the mean score is A + B - C, with three numbers:

    A = (variance between the seeds' mean scores) / S
    B = (variance between the prompts' mean scores) / N
    C = (variance of the seed x prompt interaction) / (S N)

C is subtracted because A and B both contain it. B - C is set to 0 if it is negative. With one seed, A and C are 0. With several test sets,
the result is a macro mean: the mean of the sets' mean scores. B and C are then added over the sets with squared weights. A is computed from
the macro means, because a seed affects all sets.

The interval is Student's: mean ± t se. The standard error se is the root of the variance. The degrees of freedom df follow from

    1 / df = w / (S - 1) + (1 - w) / (df of the prompts), where w = A / (A + B - C)

If a score has two bounds, such as 0 and 100, the interval is Wilson's. It contains every share s for which

    |p - s| <= t sqrt(s (1 - s) / n), where n = p (1 - p) / se^2

Here p is the mean as a share of the range, se is in the same unit, and n is the effective number of independent answers. Such an interval
never crosses a bound. Near a bound, it is longer on the other side. If there is only one bound, an interval that would cross it ends there.

If a set has only one prompt, B is not known. Then there is no interval (both ends are the mean), unless the mean is equal to a bound.

Sources: E. B. Wilson, JASA 22 (1927); E. L. Korn and B. I. Graubard, Survey Methodology 24 (1998), for the effective number.
"""

# Why seeds are not resampled: three resampled seeds give too narrow intervals. No replicate lies beyond the most extreme seed,
# and the variance is too small by the factor (S-1)/S. Satterthwaite's rule for df uses squared shares. Its interval is too
# narrow if seeds dominate, because a small A by chance gives a large df. Two independent t draws (Behrens and Fisher) give too wide
# tails. A bootstrap over prompts with the same variance covers no better than Student's interval, takes longer, and its smallest
# p-value is 2 / (replicates + 1), which Holm's method cannot use for 250 comparisons.
# Near a bound, Student's interval on the logit scale covers as well and is up to four times as long with two or three seeds.
# Coverage of all these rules, also near the bounds: docs/benchmarks/statistics-cpu.md.
# Three seeds that agree by chance can give an interval narrower than the variance of the prompts alone. No rule can detect this.

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit

Array = NDArray[np.float64]
Bounds = tuple[float, float]
"""The smallest and the largest possible score. A missing bound is infinite."""

UNBOUNDED: Bounds = (-inf, inf)
ROUNDING = 1e-6
"""Largest distance of a score outside its bounds that is treated as rounding."""


@dataclass(frozen=True)
class Difference:
    """The mean of a paired difference ``a - b`` and its uncertainty.

    ``low`` and ``high`` are the ends of the 95 % confidence interval. ``low90`` and ``high90`` are the ends of the 90 %
    interval, for equivalence tests. ``p`` is the two-sided p-value for a mean of zero. ``se`` is the standard error, and ``df`` is its
    number of degrees of freedom. If the values do not vary, ``se`` is 0 and ``df`` is infinite.
    """

    mean: float
    low: float
    high: float
    p: float
    se: float
    df: float
    low90: float
    high90: float
    all_zero: bool = False
    """True if the two models have exactly the same scores. The interval then has no width, and says nothing about new prompts."""
    one_prompt: bool = False
    """True if a test set has only one prompt. The variance between prompts is then unknown, so there is no interval, and nothing can be
    claimed: ``p`` is 1, ``se`` is 0, and ``df`` is infinite."""

    @property
    def covers_zero(self) -> bool:
        """True if the interval from ``low`` to ``high`` contains 0, or if there is no interval."""
        return not (self.above_zero or self.below_zero)

    @property
    def above_zero(self) -> bool:
        """True if there is an interval and it lies above 0."""
        return self.low > 0.0 and not self.one_prompt

    @property
    def below_zero(self) -> bool:
        """True if there is an interval and it lies below 0."""
        return self.high < 0.0 and not self.one_prompt


def pass_at_k(right_NK: ArrayLike, k: int) -> Array:
    """Return the chance that at least one of k responses to a prompt is right, from 0 to 1, as an array (prompts, 1).

    It is the unbiased estimate 1 - C(n - c, k) / C(n, k) from n >= k responses, of which c are right (Chen et al., arXiv:2107.03374).

    Args:
        right_NK: 1 or True for each right response, else 0, with the shape (prompts, responses).
    """
    right = np.asarray(right_NK, dtype=bool)
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"`k` is {k}, but there are {n} responses to a prompt; k must be from 1 to {n}")
    wrong_N = n - right.sum(axis=1)
    factors = (wrong_N[:, None] - np.arange(k)).clip(0) / (n - np.arange(k))  # C(n - c, k) / C(n, k), factor by factor
    return 1 - factors.prod(axis=1, keepdims=True)


def macro_interval(strata_SNK: Sequence[ArrayLike], *, bounds: Bounds = UNBOUNDED) -> tuple[float, float]:
    """Return the 95 % confidence interval (low, high) of a macro mean: the mean over test sets of their mean scores.

    ``strata_SNK`` has one array of scores per set, with the shape (training seeds, prompts, decoding seeds). The number of prompts may
    differ between sets. All sets have the same training seeds in the same order. With one training seed, the interval does not show how
    scores vary over trainings. A report must say so.

    If all scores are equal to one of two bounds, the interval goes from this bound to the exact (Clopper-Pearson) limit. Otherwise, if a
    set has only one prompt or no score varies, there is no interval: both ends are the mean.
    """
    return _Estimate(_prompt_means(strata_SNK), bounds).interval(0.95)


def macro_difference(a_SNK: Sequence[ArrayLike], b_SNK: Sequence[ArrayLike], *, bounds: Bounds = UNBOUNDED) -> Difference:
    """Return the mean of ``a - b`` over test sets, with its confidence intervals. Scores are paired by training seed and prompt.

    Each set has the same weight. ``bounds`` are the bounds (low, high) of a score. A difference is then between -(high - low) and high -
    low.
    """
    a_SN, b_SN = _prompt_means(a_SNK), _prompt_means(b_SNK)
    shapes_a, shapes_b = [x.shape for x in a_SN], [x.shape for x in b_SN]
    if shapes_a != shapes_b:
        raise ValueError(
            f"the scores of the two models have shapes {shapes_a} and {shapes_b} (seeds, prompts); give scores for the same seeds and "
            "prompts"
        )
    span = bounds[1] - bounds[0]
    gaps_SN = [a - b for a, b in zip(a_SN, b_SN, strict=True)]
    found, all_zero = _Estimate(gaps_SN, (-span, span)), not any(gaps.any() for gaps in gaps_SN)
    both = *found.interval(0.95), found.p, found.se, found.df, *found.interval(0.90)
    return Difference(found.mean, *both, all_zero, found.one_prompt)


class _Estimate:
    """The mean over test sets, with its standard error `se` and degrees of freedom `df`.

    `strata_SN` has, for each set, the values of S seeds and N prompts.
    """

    def __init__(self, strata_SN: list[Array], bounds: Bounds) -> None:
        self.prompts = [values.shape[1] for values in strata_SN]
        low, high = bounds
        mean = float(np.mean([values.mean() for values in strata_SN]))
        if np.isfinite(high - low):
            if not low - ROUNDING <= mean <= high + ROUNDING:
                raise ValueError(f"scores between {low} and {high} cannot have the mean {mean}; correct the scores or their bounds")
            mean = min(max(mean, low), high)  # rounding
        self.low, self.high, self.mean = low, high, mean
        self.one_prompt = min(self.prompts) == 1
        variance, self.df = (0.0, inf) if self.one_prompt else _variance(strata_SN)
        self.se = float(np.sqrt(variance))

    def interval(self, level: float) -> tuple[float, float]:
        if self.se == 0 or self.mean in (self.low, self.high):
            return self._without_variance(level)
        half = _quantile(self.df, (1 + level) / 2) * self.se
        span = self.high - self.low
        if np.isinf(span):
            return max(self.mean - half, self.low), min(self.mean + half, self.high)
        share = (self.mean - self.low) / span
        # the ends solve (p - s)^2 = t^2 s (1 - s) / n
        spread = (half / span) ** 2
        shift = spread / (share * (1 - share))  # t^2 / n
        centre = (share + shift / 2) / (1 + shift)
        half = float(np.sqrt(spread + shift**2 / 4)) / (1 + shift)
        return self.low + span * max(centre - half, 0.0), self.low + span * min(centre + half, 1.0)

    @property
    def p(self) -> float:
        """The two-sided p-value for a true mean of 0, by the same test as the interval.

        The lower bound of the values must be minus their upper bound.
        """
        if self.mean == 0 or self.one_prompt:
            return 1.0
        if self.se == 0:
            return min(1.0, 2.0 ** (1 - sum(self.prompts)))  # all differences are equal: a sign test over prompts
        scaled = self.mean / self.se
        if np.isfinite(self.high):
            scaled *= float(np.sqrt(1 - (self.mean / self.high) ** 2))  # the standard error at a mean of zero, with the same n
        return float(2 * (ndtr(-abs(scaled)) if np.isinf(self.df) else stdtr(self.df, -abs(scaled))))

    def _without_variance(self, level: float) -> tuple[float, float]:
        if self.mean not in (self.low, self.high) or np.isinf(self.high):
            return self.mean, self.mean
        # If all N scores of a set are at a bound, the mean lies within 1 - ((1 - level) / 2)^(1/N) of it, as a share of the range.
        room = (self.high - self.low) * float(np.mean([1 - ((1 - level) / 2) ** (1 / n) for n in self.prompts]))
        return (self.low, self.low + room) if self.mean == self.low else (self.high - room, self.high)


def _quantile(df: float, share: float) -> float:
    return float(ndtri(share) if np.isinf(df) else stdtrit(df, share))


def _prompt_means(strata_SNK: Sequence[ArrayLike]) -> list[Array]:
    if len(strata_SNK) == 0:
        raise ValueError("there are no scores; give the scores of at least one test set")
    strata = [np.asarray(values, dtype=np.float64) for values in strata_SNK]
    for values in strata:
        if values.ndim != 3 or 0 in values.shape:
            raise ValueError(
                f"scores have shape {values.shape}; they need three axes (training seeds, prompts, decoding seeds), and none may be empty"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} scores are NaN or infinite; all scores must be finite")
        if values.shape[0] != strata[0].shape[0]:
            raise ValueError(
                f"two test sets have {strata[0].shape[0]} and {values.shape[0]} training seeds; all sets must have the same seeds"
            )
    return [values.mean(axis=2) for values in strata]


def _variance(strata_SN: list[Array]) -> tuple[float, float]:
    n_seeds = strata_SN[0].shape[0]
    of_seeds = of_prompts = of_both = squares = 0.0
    if n_seeds > 1:
        of_seeds = float(np.var(np.mean([values.mean(axis=1) for values in strata_SN], axis=0), ddof=1)) / n_seeds
    for values_SN in strata_SN:
        n_prompts = values_SN.shape[1]
        share = len(strata_SN) ** 2 * n_prompts
        mean_N = values_SN.mean(axis=0)
        of_set = float(np.var(mean_N, ddof=1)) / share
        of_prompts += of_set
        squares += of_set**2 / (n_prompts - 1)
        if n_seeds > 1:
            rest_SN = values_SN - mean_N - values_SN.mean(axis=1, keepdims=True) + mean_N.mean()
            of_both += float((rest_SN**2).sum()) / ((n_seeds - 1) * (n_prompts - 1)) / (share * n_seeds)
    alone = max(of_prompts - of_both, 0.0)
    if of_seeds + alone == 0:
        return 0.0, inf
    share_of_seeds = of_seeds / (of_seeds + alone)
    inverse = share_of_seeds / max(1, n_seeds - 1)
    if alone > 0:
        inverse += (1 - share_of_seeds) * squares / of_prompts**2
    return of_seeds + alone, 1 / inverse
