"""Rules of thumb that choose a path from sizes and scores alone, without training any: what a search has to beat.

`assistants` are candidates from big to small; `sizes` (parameters, or any measure of capacity) and `scores` (higher is better) are by name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tadistill.search.lattice import Path


def direct(teacher: str, student: str) -> Path:
    """No assistant."""
    return (teacher, student)


def capacity_gap_law(parameters: float) -> float:
    """The best teacher's parameters for a student's, 2.498 S - 11.5 million (Zhang et al. 2025, arXiv 2311.07052).

    Fitted to students of 70 million to 2.8 billion parameters that were pruned from the teacher under test, so it may be a law about
    pruning. It says nothing about much smaller models (it turns negative below 4.6 million).
    """
    return 2.498 * parameters - 11.498e6


def size_law(
    teacher: str,
    assistants: Sequence[str],
    student: str,
    sizes: Mapping[str, float],
    *,
    ratio: float = 2.5,
    max_assistants: int | None = None,
) -> Path:
    """Upward from the student, each next model the one whose size is nearest to `ratio` times the last, until that is the teacher.

    The round form of `capacity_gap_law`, which works at any size. With `max_assistants` the ones nearest to the student stay.
    """
    path, above = [student], [teacher, *assistants]
    while path[0] != teacher:
        bigger = [name for name in above if sizes[name] > sizes[path[0]]] or [teacher]
        path.insert(0, min(bigger, key=lambda name: abs(sizes[name] - ratio * sizes[path[0]])))
    middle = path[1:-1]
    kept = middle if max_assistants is None else middle[len(middle) - min(max_assistants, len(middle)) :]
    return (teacher, *kept, student)


def performance_mean(teacher: str, assistants: Sequence[str], student: str, scores: Mapping[str, float]) -> Path:
    """One assistant, whose score without distillation is nearest to the mean of teacher's and student's (TAKD, Mirzadeh et al. 2020)."""
    wanted = (scores[teacher] + scores[student]) / 2
    return (teacher, min(assistants, key=lambda name: abs(scores[name] - wanted)), student)


def geometric_mean(teacher: str, assistants: Sequence[str], student: str, sizes: Mapping[str, float]) -> Path:
    """One assistant, whose size is nearest, as a ratio, to sqrt(N_T N_S): both hops shrink alike."""
    wanted = (math.log(sizes[teacher]) + math.log(sizes[student])) / 2
    return (teacher, min(assistants, key=lambda name: abs(math.log(sizes[name]) - wanted)), student)


@dataclass(frozen=True)
class Chosen:
    """The assistant that a trade-off chooses for every lambda from `low` to `high`."""

    assistant: str
    low: float
    high: float


def lambda_tradeoff(teacher: str, assistants: Sequence[str], scores: Mapping[str, float], sizes: Mapping[str, float]) -> tuple[Chosen, ...]:
    """MiniDisc's trade-off m(A) + lambda (1 - N_A / N_T), maximised for every lambda >= 0 (Zhang et al. 2022, arXiv 2205.14570).

    The choice turns on lambda and on the scale of the scores (0 to 1 is meant), so there is no default: the answer is the whole sweep,
    by rising lambda, with the points where it switches. At a switching point both are equally good.
    """
    left = {name: (scores[name], 1 - sizes[name] / sizes[teacher]) for name in assistants}
    at, found = 0.0, []
    now = max(left, key=lambda name: left[name])  # at lambda 0 the best score; of equal ones the smallest model
    while True:
        score, slope = left[now]
        crossings = {name: (score - s) / (k - slope) for name, (s, k) in left.items() if k > slope}
        if not crossings:
            return (*found, Chosen(now, at, math.inf))
        after = min(crossings, key=lambda name: (crossings[name], -left[name][1]))
        found.append(Chosen(now, at, crossings[after]))
        now, at = after, crossings[after]


def random_path(paths: Sequence[Path], rng: np.random.Generator) -> Path:
    """Any of the paths, all equally likely."""
    return paths[int(rng.integers(len(paths)))]
