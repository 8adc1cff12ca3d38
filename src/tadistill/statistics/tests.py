"""Tests in addition to the bootstrap: sign flips of the seeds, Holm's correction, equivalence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tadistill.statistics.bootstrap import Difference

MOST_SEEDS = 20  # 2^20 patterns are a second of work and 8 MB


@dataclass(frozen=True)
class SignFlip:
    """The two-sided p-value, and the smallest p-value that this number of seeds can give."""

    p: float
    smallest: float


def sign_flip(differences_S: ArrayLike) -> SignFlip:
    """Return the exact two-sided sign-flip test of paired differences, one per training seed, over all 2^S sign patterns.

    Assumes that under the null hypothesis each difference is symmetric about zero. Source: R. A. Fisher, The Design of
    Experiments (1935), section 21.
    """
    differences = np.asarray(differences_S, dtype=np.float64)
    if differences.ndim != 1 or not 1 <= len(differences) <= MOST_SEEDS:
        raise ValueError(f"sign_flip takes 1 to {MOST_SEEDS} differences, one per seed, not an array of shape {differences.shape}")
    if not np.isfinite(differences).all():
        raise ValueError("a difference of a seed is NaN or infinite")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    rounding = 1e-12 * np.abs(differences).sum()  # patterns that tie with the observed one must not be lost in the last digit
    p = float(np.mean(np.abs(sums) >= abs(differences.sum()) - rounding))
    return SignFlip(p, 2.0 / 2 ** len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given: below 0.05 rejects with a family-wise error of 5 %.

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
    """Return True when the difference is shown to be smaller than ``margin`` either way: two one-sided tests at 5 %.

    Both reject when the 90 % interval lies inside (-margin, margin). Source: D. J. Schuirmann, Journal of
    Pharmacokinetics and Biopharmaceutics 15 (1987).
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin must be greater than 0, not {margin}")
    return -margin < difference.low90 and difference.high90 < margin
