"""Prompts by the length of their first reference: short answers and long ones may differ in what a method does to them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tadistill.results.collect import Results, Summary, common_seeds, sets_with, stack, summarise
from tadistill.statistics import Difference, macro_difference

Bucket = tuple[int, int | None]

BUCKETS: tuple[Bucket, ...] = ((0, 5), (6, 10), (11, None))
"""First and last length in tokens; None has no last."""


def bucket_title(bucket: Bucket) -> str:
    """``[6, 10]``, ``[11, ∞)``."""
    first, last = bucket
    return f"[{first}, ∞)" if last is None else f"[{first}, {last}]"


def bucket_size(results: Results, metric: str, bucket: Bucket) -> int:
    """How many prompts of the sets that have the metric are in the bucket."""
    return sum(len(rows) for _, rows in _rows(results, metric, bucket))


def bucket_summary(results: Results, arm: str, metric: str, bucket: Bucket) -> Summary | None:
    """The arm's mean over the bucket's prompts, pooled from all sets; None without a finished seed or a prompt."""
    seeds = common_seeds(results, arm, arm, sets_with(results, metric), metric)
    values_SNK = _pooled(results, arm, seeds, metric, bucket)
    return None if values_SNK is None else summarise([values_SNK], seeds)


def bucket_difference(results: Results, arm: str, other: str, metric: str, bucket: Bucket) -> Difference | None:
    """``arm - other`` over the bucket's prompts, paired by training seed and prompt."""
    seeds = common_seeds(results, arm, other, sets_with(results, metric), metric)
    mine, theirs = (_pooled(results, name, seeds, metric, bucket) for name in (arm, other))
    return None if mine is None or theirs is None else macro_difference([mine], [theirs])


def _rows(results: Results, metric: str, bucket: Bucket) -> list[tuple[str, NDArray[np.intp]]]:
    first, last = bucket
    found: list[tuple[str, NDArray[np.intp]]] = []
    for name in sets_with(results, metric):
        length_N = results.reference_length.get(name, np.zeros(0, dtype=np.int64))
        rows = np.flatnonzero((length_N >= first) & (True if last is None else length_N <= last))
        if len(rows):
            found.append((name, rows))
    return found


def _pooled(results: Results, arm: str, seeds: Sequence[int], metric: str, bucket: Bucket) -> NDArray[np.float64] | None:
    """(S, N, 1)."""
    rows = _rows(results, metric, bucket)
    if not seeds or not rows:
        return None
    return np.concatenate([stack(results, arm, seeds, name, metric)[:, of_set] for name, of_set in rows], axis=1)
