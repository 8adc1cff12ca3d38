"""Bootstrap intervals for scores on the same prompts with several training and decoding seeds.

Axes in names: S training seeds, N prompts, K decoding seeds, R bootstrap replicates. Every function first averages the
decoding seeds, because they are repeated measurements of one model on one prompt.

Seeds and prompts are crossed. For scores (or paired differences) of seed s and prompt n, let

    A = variance over seeds of the seeds' means / S           seeds,   and the noise of seed x prompt
    B = variance over prompts of the prompts' means / N       prompts, and the same noise
    C = mean square of seed x prompt / (S N)                  the noise alone

each summed over sets with the weights of the macro mean (A is taken of the macro means, as a seed moves all sets).
A + B - C is an unbiased variance of the mean. Resampling three seeds gives intervals that are too narrow: no replicate is
beyond the most extreme of the three, and the variance is too small by (S-1)/S. So only prompts are resampled. A replicate is

    mean + (sqrt((B - C) / B) x the move of the prompts' mean + sqrt(A) x a normal draw) / (a chi draw / sqrt(df))

with B - C at least 0. The degrees of freedom are those of the two parts, weighted by their shares of the variance:
1/df = (A / V) / (S - 1) + (1 - A / V) / df of the prompts, V = A + max(B - C, 0). With one seed A = C = 0. Draws of
prompts are kept as counts and shared by all arms, so that pairing is exact.

Why this rule. Satterthwaite weighs by squared shares, which is too narrow where seeds dominate but not alone, because a
luckily small A then brings large df. Drawing Student's t times sqrt(max(A - C, 0)) beside B takes the noise from the
part that has few degrees of freedom, and is too narrow where seeds and noise are both large. Keeping A whole and taking
the noise from B repairs the second, but the tails of t alone (Behrens and Fisher) are then too wide. Coverage of the
95 % interval at S = 3, and mean width in true standard errors (normal effects, `benchmarks/interval_rules.py`):

    variance of the mean      this rule    Student draw   Satterthwaite   Behrens-Fisher   resampled seeds
    all seed                  95.0 (7.6)   95.9 (8.4)     95.0 (7.6)      95.9 (8.4)       74.8 (2.8)
    10 seed : 1 : 1           94.3 (7.0)   93.4 (7.6)     92.8 (6.6)      96.3 (8.2)       86.5 (3.4)
    seed = noise              94.7 (7.5)   92.2 (6.4)     96.0 (7.3)      95.9 (8.5)       97.1 (4.7)
    all equal                 95.4 (5.9)   94.6 (5.8)     95.6 (5.3)      97.2 (7.2)       96.8 (4.5)
    1 : 10 prompt : 1         96.2 (4.4)   96.1 (4.5)     95.3 (4.0)      97.4 (4.9)       95.7 (4.1)
    all prompt                95.0 (3.9)   94.5 (3.8)     95.0 (3.9)      94.5 (3.8)       94.9 (3.9)
    all prompt x seed noise   94.9 (7.5)   96.3 (5.7)     98.2 (7.2)      96.1 (8.4)       99.5 (5.9)

The rule costs width in the last row: where only noise varies, the Student draw is a quarter narrower. On whole simulated
studies with skewed, clipped, heavy-tailed scores, one set or five, S = 3, 5, 10, it covers 93.5 to 96.7 %
(`docs/benchmarks/statistics-cpu.md`). With two seeds expect 90 to 96 %. Three seeds that agree by luck can give an
interval narrower than prompts alone would, and no rule can detect that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri

Array = NDArray[np.float64]

_PROMPT_DRAWS, _NORMAL_DRAWS, _CHI_DRAWS = 0, 1, 2  # one random stream each, so that a change in one leaves the others
_PROBLEMS_AT_ONCE = 64  # 5 MB of replicates
_CELLS_AT_ONCE = 2_000_000  # weights held as float64 at one time: 16 MB, whatever the number of prompts


@dataclass(frozen=True)
class Difference:
    """The mean of a paired difference ``a - b`` and its uncertainty.

    ``low`` and ``high`` bound the interval that was asked for (95 %), ``low90`` and ``high90`` the 90 % one, which two
    one-sided tests at 5 % look at. ``p`` is two-sided, for a mean of zero, never 0. ``se`` is the standard error that
    the intervals use, ``df`` its degrees of freedom (infinite where nothing varies).
    """

    mean: float
    low: float
    high: float
    p: float
    se: float
    df: float
    low90: float
    high90: float

    @property
    def covers_zero(self) -> bool:
        """True when the interval contains 0: the data are no evidence of a difference."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class _Spread:
    """The variance of the mean, as a part of seeds and a part of prompts, and its degrees of freedom."""

    seeds: float
    prompts: float
    resampled: float  # the variance that resampling prompts has by itself: more than ``prompts``, which is without A's share
    df: float

    @property
    def variance(self) -> float:
        return self.seeds + self.prompts


def macro_interval(strata_SNK: Sequence[ArrayLike], *, replicates: int = 10_000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the interval of the unweighted mean of several sets' means, each over training seeds and prompts.

    Every set has its own number of prompts and the same training seeds in the same order. With a single
    training seed only prompts vary: the interval then does not include the spread between trainings, and a report must say so.
    """
    return macro_intervals([strata_SNK], replicates=replicates, level=level, seed=seed)[0]


def macro_intervals(
    problems: Sequence[Sequence[ArrayLike]], *, replicates: int = 10_000, level: float = 0.95, seed: int = 0
) -> list[tuple[float, float]]:
    """Return `macro_interval` of many problems. This is much faster than one by one where sets have the same numbers of prompts.

    One by one gives the same up to the rounding of sums.
    """
    strata = [_prompt_means(problem) for problem in problems]
    spreads = [_spread(of_problem) for of_problem in strata]
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, of_problem in enumerate(strata):
        alike.setdefault(tuple(values.shape[1] for values in of_problem), []).append(i)
    bounds: dict[int, tuple[float, float]] = {}
    for members in alike.values():
        for batch in (members[start : start + _PROBLEMS_AT_ONCE] for start in range(0, len(members), _PROBLEMS_AT_ONCE)):
            moved_RP = _resampled([strata[i] for i in batch], replicates, seed)
            for i, moved_R in zip(batch, moved_RP.T, strict=True):
                bounds[i] = _bounds(_scaled(moved_R, strata[i], spreads[i], replicates, seed), level)
    return [bounds[i] for i in range(len(strata))]


def macro_difference(
    a_SNK: Sequence[ArrayLike],
    b_SNK: Sequence[ArrayLike],
    *,
    replicates: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Return ``a - b`` of the means over sets, paired by training seed and prompt, so that common variation cancels."""
    a_SN, b_SN = _prompt_means(a_SNK), _prompt_means(b_SNK)
    shapes_a, shapes_b = [x.shape for x in a_SN], [x.shape for x in b_SN]
    if shapes_a != shapes_b:
        raise ValueError(f"a paired difference needs the same seeds and prompts on both sides, not {shapes_a} and {shapes_b}")
    apart_SN = [a - b for a, b in zip(a_SN, b_SN, strict=True)]
    spread = _spread(apart_SN)
    means_R = _replicate_means(apart_SN, spread, replicates, seed)
    low, high = _bounds(means_R, level)
    low90, high90 = _bounds(means_R, 0.90)
    beyond = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    p = min(1.0, 2 * (1 + beyond) / (replicates + 1))
    return Difference(_macro_mean(apart_SN), low, high, p, float(np.sqrt(spread.variance)), spread.df, low90, high90)


def _macro_mean(strata_SN: list[Array]) -> float:
    return float(np.mean([values.mean() for values in strata_SN]))


def _prompt_means(strata_SNK: Sequence[ArrayLike]) -> list[Array]:
    """Check the arrays and average over decoding seeds: a list of (S, N)."""
    if len(strata_SNK) == 0:
        raise ValueError("there are no values to resample")
    strata = [np.asarray(values, dtype=np.float64) for values in strata_SNK]
    for values in strata:
        if values.ndim != 3 or 0 in values.shape:
            raise ValueError(f"values must have the shape (training seeds, prompts, decoding seeds), none empty, not {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are NaN or infinite")
        if values.shape[0] != strata[0].shape[0]:
            raise ValueError(f"the sets have {strata[0].shape[0]} and {values.shape[0]} training seeds: they must agree")
    return [values.mean(axis=2) for values in strata]


def _spread(strata_SN: list[Array]) -> _Spread:
    """Return A, B - C and the degrees of freedom of their sum; the module's docstring defines them."""
    n_seeds = strata_SN[0].shape[0]
    of_seeds = of_prompts = of_both = squares = 0.0
    if n_seeds > 1:
        of_seeds = float(np.var(np.mean([values.mean(axis=1) for values in strata_SN], axis=0), ddof=1)) / n_seeds
    for values_SN in strata_SN:
        n_prompts = values_SN.shape[1]
        if n_prompts == 1:
            continue  # the spread over a single prompt cannot be known
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
        return _Spread(0.0, 0.0, of_prompts, np.inf)
    share_of_seeds = of_seeds / (of_seeds + alone)
    inverse = share_of_seeds / max(1, n_seeds - 1)
    if alone > 0:
        inverse += (1 - share_of_seeds) * squares / of_prompts**2
    return _Spread(of_seeds, alone, of_prompts, 1 / inverse)


def _replicate_means(strata_SN: list[Array], spread: _Spread, replicates: int, seed: int) -> Array:
    """Return replicates of the mean, (R,): moved by resampled prompts and a normal draw for seeds, both divided by one chi draw."""
    return _scaled(_resampled([strata_SN], replicates, seed)[:, 0], strata_SN, spread, replicates, seed)


def _resampled(problems: list[list[Array]], replicates: int, seed: int) -> Array:
    """Return how far resampling prompts moves each mean, (R, problems). All problems have the same numbers of prompts, set by set."""
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, not {replicates}")
    moved_RP = np.zeros((replicates, len(problems)))
    met: dict[int, int] = {}
    for alike in zip(*problems, strict=True):
        n_prompts = alike[0].shape[1]
        # sets of one size need draws of their own; a set alone and among others has the same, which the cache then holds once
        number = met[n_prompts] = met.get(n_prompts, -1) + 1
        if n_prompts == 1:
            continue
        mean_NP = np.stack([values_SN.mean(axis=0) for values_SN in alike], axis=1)
        # resampling has the variance of N prompts, not N - 1
        centred_NP = (mean_NP - mean_NP.mean(axis=0)) * np.sqrt(n_prompts / (n_prompts - 1)) / (n_prompts * len(problems[0]))
        counts_RN = _counts(n_prompts, replicates, (seed, _PROMPT_DRAWS, number))
        for rows in _blocks(replicates, n_prompts):
            moved_RP[rows] += counts_RN[rows].astype(np.float64) @ centred_NP
    return moved_RP


def _scaled(moved_R: Array, strata_SN: list[Array], spread: _Spread, replicates: int, seed: int) -> Array:
    """Return replicates of the mean, (R,), scaled to the prompts' and the seeds' parts of its variance."""
    if spread.resampled > 0:
        moved_R = moved_R * np.sqrt(spread.prompts / spread.resampled)
    if spread.seeds > 0:
        moved_R = moved_R + np.sqrt(spread.seeds) * _normals(replicates, seed)
    return _macro_mean(strata_SN) + moved_R / _chis(replicates, seed, spread.df)


@lru_cache(maxsize=8)
def _counts(units: int, replicates: int, address: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return how often each unit is drawn when ``units`` are drawn with replacement, (R, units). Cached: a report needs it often."""
    rng = np.random.default_rng(address)
    counts = np.empty((replicates, units), dtype=np.uint8)  # 256 draws of one unit do not happen
    for rows in _blocks(replicates, units):
        n_rows = rows.stop - rows.start
        drawn = rng.integers(units, size=(n_rows, units)) + units * np.arange(n_rows)[:, None]
        counts[rows] = np.bincount(drawn.ravel(), minlength=n_rows * units).reshape(n_rows, units)
    counts.flags.writeable = False
    return counts


@lru_cache(maxsize=8)
def _normals(replicates: int, seed: int) -> Array:
    return np.random.default_rng((seed, _NORMAL_DRAWS)).normal(size=replicates)


@lru_cache(maxsize=512)  # a small report has a hundred different degrees of freedom, and asks for each several times
def _chis(replicates: int, seed: int, df: float) -> Array | float:
    """Return the square roots of chi-square draws over their degrees of freedom, (R,), from the same uniform draws for any df."""
    if np.isinf(df):
        return 1.0
    return np.sqrt(chdtri(df, np.random.default_rng((seed, _CHI_DRAWS)).uniform(size=replicates)) / df)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CELLS_AT_ONCE // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _bounds(means_R: Array, level: float) -> tuple[float, float]:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
