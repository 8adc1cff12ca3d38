"""Compares rules for the interval of a mean over crossed seeds and prompts, on the mean squares of normal effects.

With d the paired difference of seed s and prompt n:

    A = var over seeds of the seeds' means / S,   B = var over prompts of the prompts' means / N,   C = residual mean square / (S N)

For normal effects they are independent chi-squares divided by their degrees of freedom. No scores need to be drawn, and the coverage of a
half width is a value of the normal distribution.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

Array = NDArray[np.float64]


class Scenario(NamedTuple):
    """Shares of the variance of a mean difference."""

    seed: float
    prompt: float
    both: float


class Squares(NamedTuple):
    """Studies' A, B and C, their numbers of seeds and prompts, and the true standard error."""

    a: Array
    b: Array
    c: Array
    seeds: int
    prompts: int
    se: float


def half_chosen(x: Squares) -> Array:
    """Return the half width of A + max(B - C, 0), with degrees of freedom weighted by share; `macro_interval` uses this rule."""
    prompts = np.maximum(x.b - x.c, 0)
    share = x.a / (x.a + prompts)
    return stdtrit(1 / (share / (x.seeds - 1) + (1 - share) / (x.prompts - 1)), 0.975) * np.sqrt(x.a + prompts)


def half_satterthwaite(x: Squares) -> Array:
    """Return the half width of A + B - C, at least B, with Satterthwaite's degrees of freedom."""
    variance = np.maximum(x.a + x.b - x.c, x.b)
    squares = x.a**2 / (x.seeds - 1) + x.b**2 / (x.prompts - 1) + x.c**2 / ((x.seeds - 1) * (x.prompts - 1))
    return stdtrit(np.maximum(variance**2 / squares, x.seeds - 1), 0.975) * np.sqrt(variance)


def half_student_draw(x: Squares) -> Array:
    """Return the half width of prompt resampling (B) plus Student's t with S - 1 degrees of freedom times sqrt(max(A - C, 0))."""
    rng = np.random.default_rng(3)
    return _quantile(x, x.b, np.maximum(x.a - x.c, 0), rng.normal(size=2000), rng.standard_t(x.seeds - 1, size=2000))


def half_fiducial(x: Squares) -> Array:
    """Return the half width of the Student draw with the noise left in the seeds: B - C plus t times sqrt(A) (Behrens and Fisher)."""
    rng = np.random.default_rng(3)
    return _quantile(x, np.maximum(x.b - x.c, 0), x.a, rng.normal(size=2000), rng.standard_t(x.seeds - 1, size=2000))


def half_seeds_resampled(x: Squares) -> Array:
    """Return the half width of the plain hierarchical percentile bootstrap, from its variance; real replicates are less smooth."""
    return ndtri(0.975) * np.sqrt((x.seeds - 1) / x.seeds * (x.a + x.c) + x.b)


def _quantile(x: Squares, normal: Array, student: Array, z_R: Array, t_R: Array) -> Array:
    blocks = zip(np.array_split(np.sqrt(normal), 20), np.array_split(np.sqrt(student), 20), strict=True)
    return np.concatenate([np.quantile(np.abs(n[:, None] * z_R + s[:, None] * t_R), 0.95, axis=1) for n, s in blocks])


RULES: dict[str, Callable[[Squares], Array]] = {
    "chosen": half_chosen,
    "Student draw": half_student_draw,
    "Satterthwaite": half_satterthwaite,
    "Behrens-Fisher": half_fiducial,
    "resampled seeds": half_seeds_resampled,
}


def rules_row(scenario: Scenario, seeds: int, studies: int, prompts: int = 500) -> dict[str, dict[str, float]]:
    """Return each rule's coverage in percent and mean width in true standard errors; the coverage of a half width is exact."""
    rng = np.random.default_rng((4, seeds, *(int(100 * share) for share in scenario)))
    df = (seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1))
    expected = (scenario.seed + scenario.both, scenario.prompt + scenario.both, scenario.both)
    a, b, c = (mean * rng.chisquare(f, size=studies) / f for mean, f in zip(expected, df, strict=True))
    squares = Squares(a, b, c, seeds, prompts, float(np.sqrt(sum(scenario))))
    halves = {name: rule(squares) / squares.se for name, rule in RULES.items()}
    return {name: {"coverage": 100 * float(np.mean(2 * ndtr(half) - 1)), "width": 2 * float(half.mean())} for name, half in halves.items()}
