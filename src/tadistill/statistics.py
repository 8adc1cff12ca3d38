"""Bootstrap intervals for scores that were measured on the same prompts with several training and decoding seeds.

Axes in names: S training seeds, N prompts, K decoding seeds, R bootstrap replicates. Every function averages the
decoding seeds first: they are repeated measurements of one model on one prompt, not a population to draw from.

A replicate draws training seeds, then prompts; the same prompts serve all seeds, because the prompts *are* the same.
Draws are kept as counts (a multinomial weight per unit), so that a replicate is a weighted mean and all replicates are
one matrix product. With few training seeds the percentile interval is too narrow (its seed variance is short by the
factor (S-1)/S): with fewer than three seeds a report must say so instead of claiming.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_SEED_DRAWS, _PROMPT_DRAWS = 0, 1  # one random stream each, so that more prompts never change which seeds are drawn
_CELLS_AT_ONCE = 2_000_000  # weights held as float64 at one time: 16 MB, whatever the number of prompts


@dataclass(frozen=True)
class Difference:
    """The mean of a paired difference ``a - b`` and its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        """True when the interval holds 0: the data are no evidence of a difference."""
        return self.low <= 0.0 <= self.high


def bootstrap_interval(values_NK: ArrayLike, *, replicates: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of one model's scores, prompts resampled, decoding seeds averaged."""
    values = np.asarray(values_NK, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"values must have the shape (prompts, decoding seeds), not {values.shape}")
    return macro_interval([values[None]], replicates=replicates, level=level, seed=seed)


def hierarchical_interval(values_SNK: ArrayLike, *, replicates: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over training seeds and prompts; a single seed leaves the prompts to resample."""
    return macro_interval([values_SNK], replicates=replicates, level=level, seed=seed)


def macro_interval(strata_SNK: Sequence[ArrayLike], *, replicates: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The same for the unweighted mean of several sets' means: prompts are resampled within each set, seeds jointly.

    Every set has its own number of prompts and the same training seeds in the same order.
    """
    return _percentiles(_replicate_means(_prompt_means(strata_SNK), replicates, seed), level)


def paired_difference(a_SNK: ArrayLike, b_SNK: ArrayLike, *, replicates: int = 2000, level: float = 0.95, seed: int = 0) -> Difference:
    """``a - b`` on shared training seeds and prompts, both drawn together, so that what they have in common cancels."""
    return macro_difference([a_SNK], [b_SNK], replicates=replicates, level=level, seed=seed)


def macro_difference(
    a_SNK: Sequence[ArrayLike],
    b_SNK: Sequence[ArrayLike],
    *,
    replicates: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The paired difference of the unweighted means over several sets, stratified by set."""
    a_SN, b_SN = _prompt_means(a_SNK), _prompt_means(b_SNK)
    shapes_a, shapes_b = [x.shape for x in a_SN], [x.shape for x in b_SN]
    if shapes_a != shapes_b:
        raise ValueError(f"a paired difference needs the same seeds and prompts on both sides, not {shapes_a} and {shapes_b}")
    apart = [a - b for a, b in zip(a_SN, b_SN, strict=True)]
    low, high = _percentiles(_replicate_means(apart, replicates, seed), level)
    return Difference(float(np.mean([x.mean() for x in apart])), low, high)


def _prompt_means(strata_SNK: Sequence[ArrayLike]) -> list[Array]:
    """Checks the arrays and averages over decoding seeds: a list of (S, N)."""
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


def _replicate_means(strata_SN: list[Array], replicates: int, seed: int) -> Array:
    """(R,): in each replicate, the mean over sets of the weighted mean over its seeds and prompts."""
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, not {replicates}")
    n_seeds = strata_SN[0].shape[0]
    seed_weights_RS = _counts(n_seeds, replicates, (seed, _SEED_DRAWS)) / n_seeds
    total_R = np.zeros(replicates)
    for index, values_SN in enumerate(strata_SN):
        n_prompts = values_SN.shape[1]
        counts_RN = _counts(n_prompts, replicates, (seed, _PROMPT_DRAWS, index))
        for rows in _blocks(replicates, n_prompts):
            weighted = (seed_weights_RS[rows] @ values_SN) * counts_RN[rows]
            total_R[rows] += weighted.sum(axis=1) / n_prompts
    return total_R / len(strata_SN)


@lru_cache(maxsize=8)
def _counts(units: int, replicates: int, address: tuple[int, ...]) -> NDArray[np.uint32]:
    """(R, units): how often each unit is drawn when ``units`` are drawn with replacement. Kept: a report asks often."""
    rng = np.random.default_rng(address)
    counts = np.empty((replicates, units), dtype=np.uint32)
    for rows in _blocks(replicates, units):
        n_rows = rows.stop - rows.start
        drawn = rng.integers(units, size=(n_rows, units)) + units * np.arange(n_rows)[:, None]
        counts[rows] = np.bincount(drawn.ravel(), minlength=n_rows * units).reshape(n_rows, units)
    counts.flags.writeable = False
    return counts


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CELLS_AT_ONCE // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _percentiles(means_R: Array, level: float) -> tuple[float, float]:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
