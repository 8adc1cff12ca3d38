"""Bootstrap confidence intervals for scores of several training seeds on the same prompts.

Axes in names: S training seeds, N prompts, K decoding seeds, R bootstrap replicates. Every function first averages over the
decoding seeds, because they only repeat the measurement of one model on one prompt.

Every seed answers every prompt. The variance of the mean score is computed from three numbers:

    A = (variance between the seeds' mean scores) / S
    B = (variance between the prompts' mean scores) / N
    C = (variance of the seed x prompt interaction) / (S N)

The interaction is called noise here. A and B both contain the noise, so the variance of the mean is A + B - C. (B - C is set
to 0 if it is negative. With one seed, A and C are 0.) With several test sets, B and C are added with the squared weights of
the sets in the macro mean. A is computed from the macro means, because a seed affects all sets.

A replicate of the mean is computed in four steps:

    1. Resample the prompts. Take the resampled mean minus the mean.
    2. Multiply it by sqrt((B - C) / B), so that its variance is B - C.
    3. Add sqrt(A) times a standard normal draw.
    4. Divide by sqrt(chi-square draw / df), and add the mean.

The degrees of freedom df follow from 1/df = w / (S - 1) + (1 - w) / (df of the prompts), where w = A / (A + B - C). All
models use the same resampled prompts, so that comparisons are paired.
"""

# Why seeds are not resampled: three resampled seeds give too narrow intervals. No replicate lies beyond the most extreme seed,
# and the variance is too small by the factor (S-1)/S. Satterthwaite's rule for df uses squared shares. Its interval is too
# narrow if seeds dominate, because a small A by chance gives a large df. The Student draw, t times sqrt(max(A - C, 0)), is too
# narrow if seeds and noise are both large. Two independent t draws (Behrens and Fisher) give too wide tails.
# The coverage of all these rules at S = 3 is in docs/benchmarks/statistics-cpu.md.
# If only noise varies, the Student draw's interval is a quarter narrower. The coverage is 93.5 to 96.7 % on simulated
# studies with skewed, clipped and heavy-tailed scores, one or five sets, and S = 3, 5 or 10 (docs/benchmarks/statistics-cpu.md).
# With two seeds, expect 90 to 96 %. Three seeds that agree by chance can give an interval narrower than the variance of the
# prompts alone. No rule can detect this.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri

Array = NDArray[np.float64]

_PROMPT_DRAWS, _NORMAL_DRAWS, _CHI_DRAWS = 0, 1, 2  # one random stream each, so that a change in one does not change the others
_PROBLEMS_AT_ONCE = 64  # the replicates take 5 MB
_CELLS_AT_ONCE = 2_000_000  # counts converted to float64 at one time: 16 MB for any number of prompts


@dataclass(frozen=True)
class Difference:
    """The mean of a paired difference ``a - b`` and its uncertainty.

    ``low`` and ``high`` are the ends of the confidence interval at the requested level (default 95 %). ``low90`` and ``high90`` are the
    ends of the 90 % interval, for equivalence tests. ``p`` is the two-sided p-value for a mean of zero; it is never 0. ``se`` is the
    standard error. ``df`` is its degrees of freedom (infinite if the values do not vary).
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
        """True if the interval from ``low`` to ``high`` contains 0."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class _Spread:
    seeds: float  # A of the module's docstring
    prompts: float  # B - C, at least 0
    resampled: float  # B
    df: float

    @property
    def variance(self) -> float:
        return self.seeds + self.prompts


def macro_interval(strata_SNK: Sequence[ArrayLike], *, replicates: int = 10_000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the confidence interval (low, high) of a macro mean: the average of the mean scores of several test sets.

    ``strata_SNK`` has one array of scores per set, with the shape (training seeds, prompts, decoding seeds). The number of prompts may
    differ between sets. All sets have the same training seeds in the same order. With one training seed, the interval shows only how
    scores vary over prompts, not over trainings. A report must say so.
    """
    return macro_intervals([strata_SNK], replicates=replicates, level=level, seed=seed)[0]


def macro_intervals(
    problems: Sequence[Sequence[ArrayLike]], *, replicates: int = 10_000, level: float = 0.95, seed: int = 0
) -> list[tuple[float, float]]:
    """Return the result of `macro_interval` for each problem. A problem is a list of score arrays, one per test set.

    One call is faster than many calls of `macro_interval` if the problems have the same numbers of prompts. The intervals differ only by
    rounding.
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
    a_SNK: Sequence[ArrayLike], b_SNK: Sequence[ArrayLike], *, replicates: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Return the macro mean of ``a - b`` with its confidence intervals. Scores are paired by training seed and prompt."""
    a_SN, b_SN = _prompt_means(a_SNK), _prompt_means(b_SNK)
    shapes_a, shapes_b = [x.shape for x in a_SN], [x.shape for x in b_SN]
    if shapes_a != shapes_b:
        raise ValueError(
            f"the two models must have scores for the same seeds and prompts; the shapes (seeds, prompts) are {shapes_a} and {shapes_b}"
        )
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
    """Check the score arrays, and average each of them over its decoding seeds: (S, N, K) -> (S, N)."""
    if len(strata_SNK) == 0:
        raise ValueError("there are no scores to resample; give the scores of at least one test set")
    strata = [np.asarray(values, dtype=np.float64) for values in strata_SNK]
    for values in strata:
        if values.ndim != 3 or 0 in values.shape:
            raise ValueError(
                f"scores must have three axes (training seeds, prompts, decoding seeds), none of them empty; the shape is {values.shape}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} scores are NaN or infinite; all scores must be finite")
        if values.shape[0] != strata[0].shape[0]:
            raise ValueError(
                f"two test sets have {strata[0].shape[0]} and {values.shape[0]} training seeds; all sets must have the same seeds"
            )
    return [values.mean(axis=2) for values in strata]


def _spread(strata_SN: list[Array]) -> _Spread:
    n_seeds = strata_SN[0].shape[0]
    of_seeds = of_prompts = of_both = squares = 0.0
    if n_seeds > 1:
        of_seeds = float(np.var(np.mean([values.mean(axis=1) for values in strata_SN], axis=0), ddof=1)) / n_seeds
    for values_SN in strata_SN:
        n_prompts = values_SN.shape[1]
        if n_prompts == 1:
            continue  # the variance over a single prompt is unknown
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
    return _scaled(_resampled([strata_SN], replicates, seed)[:, 0], strata_SN, spread, replicates, seed)


def _resampled(problems: list[list[Array]], replicates: int, seed: int) -> Array:
    """Return the resampled mean minus the mean, for each bootstrap replicate and problem: (R, problems)."""
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, not {replicates}")
    # set i has the same number of prompts in all problems
    moved_RP = np.zeros((replicates, len(problems)))
    met: dict[int, int] = {}
    for alike in zip(*problems, strict=True):
        n_prompts = alike[0].shape[1]
        # sets of equal size get different draws; the numbering gives a set the same draws in every call, so the cache stores them once
        number = met[n_prompts] = met.get(n_prompts, -1) + 1
        if n_prompts == 1:
            continue
        mean_NP = np.stack([values_SN.mean(axis=0) for values_SN in alike], axis=1)
        # a resampled mean's variance divides by N, an unbiased one by N - 1; this factor corrects it
        centred_NP = (mean_NP - mean_NP.mean(axis=0)) * np.sqrt(n_prompts / (n_prompts - 1)) / (n_prompts * len(problems[0]))
        counts_RN = _counts(n_prompts, replicates, (seed, _PROMPT_DRAWS, number))
        for rows in _blocks(replicates, n_prompts):
            moved_RP[rows] += counts_RN[rows].astype(np.float64) @ centred_NP
    return moved_RP


def _scaled(moved_R: Array, strata_SN: list[Array], spread: _Spread, replicates: int, seed: int) -> Array:
    # the resampled differences get the variance B - C, and the seeds add the variance A
    if spread.resampled > 0:
        moved_R = moved_R * np.sqrt(spread.prompts / spread.resampled)
    if spread.seeds > 0:
        moved_R = moved_R + np.sqrt(spread.seeds) * _normals(replicates, seed)
    return _macro_mean(strata_SN) + moved_R / _chis(replicates, seed, spread.df)


@lru_cache(maxsize=8)
def _counts(units: int, replicates: int, address: tuple[int, ...]) -> NDArray[np.uint8]:
    rng = np.random.default_rng(address)
    counts = np.empty((replicates, units), dtype=np.uint8)  # a unit is never drawn 256 times in practice
    for rows in _blocks(replicates, units):
        n_rows = rows.stop - rows.start
        drawn = rng.integers(units, size=(n_rows, units)) + units * np.arange(n_rows)[:, None]
        counts[rows] = np.bincount(drawn.ravel(), minlength=n_rows * units).reshape(n_rows, units)
    counts.flags.writeable = False
    return counts


@lru_cache(maxsize=8)
def _normals(replicates: int, seed: int) -> Array:
    return np.random.default_rng((seed, _NORMAL_DRAWS)).normal(size=replicates)


@lru_cache(maxsize=512)  # a small report has about a hundred different degrees of freedom, and uses each several times
def _chis(replicates: int, seed: int, df: float) -> Array | float:
    if np.isinf(df):
        return 1.0
    # all df use the same random numbers
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
