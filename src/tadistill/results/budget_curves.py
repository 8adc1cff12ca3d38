"""Curves of quality over training compute. The key `budgets` of a recipe trains an arm (a path of models) several times, with
different budgets. A budget is a multiple of a reference arm's FLOPs.

At every budget, an arm is compared with the reference arm, paired by training seed and prompt.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, ndtri, stdtrit

from tadistill.config.added_arms import budget_of
from tadistill.metrics import MEAN, metric_of
from tadistill.results.collect import Results, Summary, once, primary_metric
from tadistill.results.compare import difference, reference_at
from tadistill.results.study import ArmRecord
from tadistill.statistics import Difference

Array = NDArray[np.float64]

BUDGETS_FOR_A_FIT = 4
_DRAWS, _FIT_DRAWS, _GRID = 4000, 300, 2000
_SEED = 0
_RATES = (0.05, 3.0)  # exponents of the fitted power law
_FITTED = 3  # number of fitted parameters
_MISFIT = 0.01  # if the chi-squared test of the best fit has a smaller p-value, the curve is no power law and has no limit


@dataclass(frozen=True)
class BudgetPoint:
    """One point of a curve: the result of an arm at one budget."""

    times: float
    """The budget, as a multiple of the reference arm's FLOPs."""
    arm: str
    flops: float | None
    summary: Summary
    gap: Difference | None
    """The paired difference from the reference arm at the same budget. None for the reference arm itself."""


@dataclass(frozen=True)
class Limit:
    """The score to which a curve converges at large budgets, with its 95 % interval.

    `value` is the score. It is a parameter of the fitted curve score(t) = value - b * t ** -c, where t is the budget.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Crossing:
    """The budget at which a curve crosses the reference arm's curve, with its 95 % interval.

    An end of the interval is None if it is outside the budgets of the study, or not known.
    """

    times: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class BudgetCurve:
    """The results of one arm at all its budgets, in ascending order."""

    name: str
    points: tuple[BudgetPoint, ...]
    crossing: Crossing | None
    """The first crossing with the reference arm's curve. None if the curves do not cross within the budgets, and for the reference arm."""
    last_gain: Difference | None
    """Difference between the results at the largest and the second largest budget. None for a single budget."""
    limit: Limit | None
    """The score to which the curve converges. None if there are fewer than four budgets, if a power law does not fit the points, or if the
    score is outside the metric's bounds."""


@once
def budget_curves(results: Results, metric: str | None = None) -> tuple[BudgetCurve, ...]:
    """Return the curve of each arm with several budgets. The reference arm comes first.

    The result is empty if the study has no budgets or no results yet. By default, the metric is the primary one.
    """
    metric = metric or primary_metric(results)
    grouped: dict[str, list[tuple[float, ArmRecord]]] = {}
    references: dict[str, None] = {}
    for arm in results.plan.arms:
        if made := budget_of(arm.name, arm.compute):
            grouped.setdefault(made.arm, []).append((made.times, arm))
            references[made.reference] = None
    for name in references:
        grouped.setdefault(name, []).extend((1.0, arm) for arm in results.plan.arms if arm.name == name)
    order = [*references, *(name for name in grouped if name not in references)]
    curves = (_curve(results, name, sorted(grouped[name], key=lambda entry: entry[0]), metric) for name in order)
    return tuple(curve for curve in curves if curve)


def _curve(results: Results, name: str, arms: list[tuple[float, ArmRecord]], metric: str) -> BudgetCurve | None:
    points = []
    for times, arm in arms:
        if (summary := results.summaries.get((arm.name, MEAN, metric))) is None:
            continue
        other = reference_at(results, arm)
        gap = difference(results, arm.name, other.name, metric) if other else None
        points.append(BudgetPoint(times, arm.name, arm.flops, summary, gap))
    if not points:
        return None
    last_gain = difference(results, points[-1].arm, points[-2].arm, metric) if len(points) > 1 else None
    return BudgetCurve(name, tuple(points), _crossing(points), last_gain, _limit(points, metric_of(metric).bounds))


# --- where two curves cross ---------------------------------------------------------------------------------------------


def _crossing(points: list[BudgetPoint]) -> Crossing | None:
    known = [(point.times, point.gap) for point in points if point.gap]
    log_times = np.log([times for times, _ in known])
    means = np.array([gap.mean for _, gap in known])
    turns = np.flatnonzero(means[:-1] * means[1:] < 0)
    if not len(turns):
        return None
    rises = bool(means[turns[0]] < 0)
    drawn = np.stack([_draws(gap, stream) for stream, (_, gap) in enumerate(known)], axis=1)
    ends = np.quantile(first_crossing(log_times, drawn, rises=rises), [0.025, 0.975], method="nearest")
    unknown = any(gap.one_prompt for _, gap in known)
    low, high = (float(np.exp(end)) if np.isfinite(end) and not unknown else None for end in ends)
    return Crossing(float(np.exp(first_crossing(log_times, means[None], rises=rises)[0])), low, high)


def _draws(gap: Difference, stream: int) -> Array:
    # draws of the true difference, given its estimate: mean + t se
    shares = np.random.default_rng((_SEED, stream)).uniform(size=_DRAWS)
    return gap.mean + gap.se * (stdtrit(gap.df, shares) if np.isfinite(gap.df) else ndtri(shares))


def first_crossing(x_N: Array, y_RN: Array, *, rises: bool) -> Array:
    """Return the first x at which each of the R curves crosses 0, as an array (R,). The points of a curve are connected by straight lines.

    If a curve does not cross 0 between its first and its last point, `rises` decides. The result is -inf (a crossing before the first
    point) if the curve ends on the side of 0 where `rises` expects its end. Otherwise it is inf (a crossing after the last point).

    Args:
        x_N: the x of the points, in ascending order.
        y_RN: the values of each curve at these x.
        rises: True if a curve is expected to rise from below 0 to above 0, False for the other direction.
    """
    found_R = np.where((y_RN[:, -1] > 0) == rises, -np.inf, np.inf)
    for i in range(len(x_N) - 1, 0, -1):
        left_R, right_R = y_RN[:, i - 1], y_RN[:, i]
        turns_R = left_R * right_R < 0
        share_R = np.divide(left_R, left_R - right_R, out=np.zeros_like(left_R), where=turns_R)
        found_R = np.where(turns_R, x_N[i - 1] + share_R * (x_N[i] - x_N[i - 1]), found_R)
    return found_R


# --- where a curve converges --------------------------------------------------------------------------------------------


def _limit(points: list[BudgetPoint], bounds: tuple[float, float]) -> Limit | None:
    if len(points) < BUDGETS_FOR_A_FIT or any(point.summary.low == point.summary.high for point in points):
        return None
    times = np.array([point.times for point in points])
    scores = np.array([point.summary.mean for point in points])
    errors = np.array([(point.summary.high - point.summary.low) / 4 for point in points])
    errors = np.maximum(errors, 1e-6 * max(1.0, float(np.abs(scores).max())))
    drawn_RN = scores + errors * np.random.default_rng((_SEED, len(points))).normal(size=(_FIT_DRAWS, len(scores)))
    (value, *values), (misfit, *_) = fitted_limits(times, errors, np.vstack([scores, drawn_RN]))
    if misfit > chdtri(len(points) - _FITTED, _MISFIT) or not bounds[0] <= value <= bounds[1]:
        return None
    return Limit(float(value), *(float(end) for end in np.clip(np.quantile(values, [0.025, 0.975]), *bounds)))


def fitted_limits(times_N: Array, errors_N: Array, scores_RN: Array) -> tuple[Array, Array]:
    """Fit a power law to each curve. Return the scores to which the curves converge, and the chi-squared misfits, both of shape (R,).

    The fit is scores = a - b * times ** -c with weighted least squares. A curve converges to `a`. The exponent `c` is between 0.05 and 3.
    For a given `c` the fit is linear, so the best `c` is found on a fine grid.

    Args:
        times_N: the budgets.
        errors_N: the standard error of the score at each budget.
        scores_RN: the scores of each curve at these budgets.
    """
    x_CN = times_N ** -np.geomspace(*_RATES, _GRID)[:, None]
    weights_N = errors_N**-2 / (errors_N**-2).sum()
    x_C, y_R = x_CN @ weights_N, scores_RN @ weights_N
    weighted_CN = weights_N * (x_CN - x_C[:, None])
    shared_RC = (scores_RN - y_R[:, None]) @ weighted_CN.T
    slope_RC = shared_RC / ((x_CN - x_C[:, None]) * weighted_CN).sum(axis=1)
    explained_RC = slope_RC * shared_RC  # the part of the variance that a fit explains
    best_R = explained_RC.argmax(axis=1)
    variance_R = (scores_RN - y_R[:, None]) ** 2 @ weights_N
    misfit_R = (variance_R - explained_RC.max(axis=1)) * (errors_N**-2).sum()
    return y_R - slope_RC[np.arange(len(y_R)), best_R] * x_C[best_R], misfit_R
