"""Figures of training compute: quality over the cost of each arm, and over the training budgets of a study with `budgets`.

A training budget is an amount of compute, as a multiple of that of the reference arm. Arms with the same budget are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tadistill.charts import Axis, Chart, Look, Point, nice_span
from tadistill.metrics import MEAN, metric_title
from tadistill.report.figures import MANY, looks, span_axis, titled
from tadistill.results.budget_curves import BudgetCurve, BudgetPoint, budget_curves
from tadistill.results.collect import Results, Summary, primary_metric
from tadistill.results.compare import direct_of
from tadistill.results.number_text import flops_text, number, ratio_text, span, summary_text
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import by_importance

_ROOM = 1.25  # factor on both ends of the axis of budgets
_NEAR = 0.018  # share of the width: points that are closer are moved apart
_MOST, _LAST = 0.08, 0.985  # shares of the width: the largest move of a point, and the largest position of the last point
_SHIFT = 1.02  # factor between the points of neighbouring curves, so that their intervals do not hide each other


@dataclass(frozen=True)
class CostPoint:
    """One arm in the figure of quality over compute."""

    arm: ArmRecord
    flops: float
    summary: Summary


def cost_points(results: Results, model: str) -> list[CostPoint]:
    """Return the arms that train `model` and have known FLOPs. Cheap arms come first."""
    metric = primary_metric(results)
    arms = [arm for arm in results.plan.arms if arm.model == model]
    found = [CostPoint(arm, arm.flops, s) for arm in arms if arm.flops and (s := results.summaries.get((arm.name, MEAN, metric)))]
    return sorted(found, key=lambda point: point.flops)


def cost_figure(results: Results, model: str) -> Chart | None:
    """Draw the primary metric over training compute, for the arms that train `model`. Return None if there are fewer than two."""
    points = cost_points(results, model)
    if len(points) < 2:
        return None
    metric, styles = primary_metric(results), looks(results)
    direct = direct_of(results, points[-1].arm)
    unit = direct.flops if direct and direct.flops else 1.0
    cheapest, dearest = points[0].flops / unit, points[-1].flops / unit
    log = dearest / cheapest > 40
    x = _compute_axis(cheapest, dearest, log=log, relative=direct.name if unit != 1.0 and direct else "")
    y = _quality_axis([p.summary for p in points], "")
    texts = [f"{p.arm.name} {summary_text(p.summary, metric)} at {flops_text(p.flops)} FLOPs" for p in points]
    chart = Chart("figure-cost", f"{metric_title(metric)} over training compute: {'; '.join(texts)}", x, y, height=250, head=10)
    named = len(points) <= MANY
    best = max(points, key=lambda p: p.summary.mean).arm.name
    compared = {best, *(name for c in by_importance(results)[:1] for name in (c.arm, c.other))}
    for p, place in zip(points, _apart([x.place(p.flops / unit) for p in points]), strict=True):
        at, s = x.low * (x.high / x.low) ** place if log else x.low + place * (x.high - x.low), p.summary
        tip = f"{p.arm.name}: {summary_text(s, metric)}\n{flops_text(p.flops)} training FLOPs" + (
            f", {ratio_text(p.flops / unit)}" if unit != 1.0 else ""
        )
        label = p.arm.name if named or p.arm.name in compared else ""
        chart.points(p.arm.name, [Point(p.flops / unit, s.mean, s.low, s.high, tip, at)], styles[p.arm.name], size=6, label=label)
    return chart


def _compute_axis(cheapest: float, dearest: float, *, log: bool, relative: str) -> Axis:
    title = f"training compute (1× = {relative})" if relative else "training FLOPs of one seed"
    text = (lambda value: f"{value:g}×") if relative else None
    if log:
        return Axis(cheapest / 1.6, dearest * 1.6, title, log=True, text=text)
    return Axis(0.0, dearest * 1.08, title, text=text)


def _apart(places: Sequence[float]) -> list[float]:
    """Return positions along the x axis (0-1), moved apart so that no point hides another. `places` are in ascending order.

    If a point would have to move far, all positions are returned unchanged.
    """
    moved = [*accumulate(places, lambda last, place: max(place, last + _NEAR))]
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], _LAST if index == len(moved) - 1 else moved[index + 1] - _NEAR)
    far = max(abs(new - old) for new, old in zip(moved, places, strict=True))
    return moved if far < _MOST else list(places)


def _quality_axis(summaries: Sequence[Summary], title: str) -> Axis:
    ends = [end for s in summaries for end in (s.low, s.high)]
    return Axis(*nice_span(ends, zero=min(ends) < 0.35 * max(ends), pad=0.08), title)


# --- training budgets ----------------------------------------------------------------------------------------------------


def curves_figure(results: Results) -> Chart | None:
    """Draw each arm's mean score over its budgets, with its 95 % interval as a band. Return None if no arm has two budgets."""
    curves = [curve for curve in budget_curves(results) if len(curve.points) > 1]
    if not curves:
        return None
    metric, styles = primary_metric(results), _looks(results, curves)
    y = _quality_axis([p.summary for curve in curves for p in curve.points], titled(metric))
    summary = "; ".join(f"{curve.name}: {', '.join(_said(p, metric) for p in curve.points)}" for curve in curves)
    chart = Chart("figure-budgets", f"{metric_title(metric)} over training budgets. {summary}", _axis(curves), y, height=300, head=22)
    for curve in curves:
        xs = [p.times for p in curve.points]
        chart.band(curve.name, xs, [p.summary.low for p in curve.points], [p.summary.high for p in curve.points], styles[curve.name])
        chart.line(curve.name, xs, [p.summary.mean for p in curve.points], styles[curve.name], label=True)
    return chart


def gaps_figure(results: Results) -> Chart | None:
    """Draw how much each arm differs from the reference arm at the same budget. Differences are paired, with 95 % intervals."""
    curves = [curve for curve in budget_curves(results) if any(p.gap for p in curve.points)]
    if not curves:
        return None
    metric, styles = primary_metric(results), _looks(results, budget_curves(results))
    reference = budget_curves(results)[0].name
    gaps = [(curve, p, p.gap) for curve in curves for p in curve.points if p.gap]
    y = span_axis([0.0, *(end for *_, gap in gaps for end in (gap.low, gap.high))], f"difference from {reference}")
    summary = "; ".join(f"{curve.name} at {ratio_text(p.times)}: {span(gap, metric)}" for curve, p, gap in gaps)
    chart = Chart("figure-budget-gaps", f"Differences from {reference}. {summary}", _axis(curves), y, height=240, head=22)
    chart.rule(y=0)
    for i, curve in enumerate(curves):
        shift = _SHIFT ** (i - (len(curves) - 1) / 2)
        points = [
            Point(p.times, p.gap.mean, p.gap.low, p.gap.high, f"{p.arm}: {span(p.gap, metric)}", p.times * shift)
            for p in curve.points
            if p.gap
        ]
        chart.points(curve.name, points, styles[curve.name], label=curve.name if len(curves) < 4 else "")
    return chart


def curve_sentences(results: Results) -> list[str]:
    """Return one sentence for each curve over budgets of training compute.

    It says where the curve crosses the reference arm's curve, what the last increase of the budget gained, and where the curve converges.
    """
    metric, curves = primary_metric(results), budget_curves(results)
    found: list[str] = []
    for curve in curves:
        said = [text for text in (_crossing_text(curve, curves[0].name), _gain_text(curve, metric), _limit_text(curve, metric)) if text]
        if said:
            found.append(f"{curve.name}: {'; '.join(said)}.")
    return found


def _crossing_text(curve: BudgetCurve, reference: str) -> str:
    gaps = [p.gap for p in curve.points if p.gap]
    if len(gaps) < 2:
        return ""
    if curve.crossing is None:
        sides = [name for name, hit in (("above", any(g.mean > 0 for g in gaps)), ("below", any(g.mean < 0 for g in gaps))) if hit]
        side = f"never {'below' if sides == ['above'] else 'above'}" if sides else "equal to"
        return f"its mean is {side} that of {reference} at these {len(gaps)} budgets, so the curves do not cross within them"
    at, low, high = curve.crossing.times, curve.crossing.low, curve.crossing.high
    ends = f"{f'{low:.2g}×' if low else 'below the smallest budget'} to {f'{high:.2g}×' if high else 'beyond the largest budget'}"
    return f"it crosses {reference} at {at:.2g}× (95 % interval {ends})"


def _gain_text(curve: BudgetCurve, metric: str) -> str:
    gain = curve.last_gain
    if gain is None:
        return ""
    before, last = curve.points[-2].times, curve.points[-1].times
    chance = ", which may be chance" if gain.covers_zero else ""
    return f"from {before:g}× to {last:g}× its mean changes by {span(gain, metric)}{chance}"


def _limit_text(curve: BudgetCurve, metric: str) -> str:
    if (limit := curve.limit) is None:
        return ""
    ends = f"{number(limit.low, metric)} to {number(limit.high, metric)}"
    return f"a power law fitted to its points converges to {number(limit.value, metric)} (95 % interval {ends})"


def _axis(curves: Sequence[BudgetCurve]) -> Axis:
    times = sorted({p.times for curve in curves for p in curve.points})
    title = "training compute as a multiple of the reference arm's, without the teacher's own training"
    return Axis(times[0] / _ROOM, times[-1] * _ROOM, title, log=True, marks={t: f"{t:g}×" for t in times})


def _looks(results: Results, curves: Sequence[BudgetCurve]) -> dict[str, Look]:
    # an arm that stays in the study keeps its look; the others get the look of their first budget
    of_arms = looks(results)
    return {curve.name: of_arms.get(curve.name) or of_arms[curve.points[0].arm] for curve in curves}


def _said(point: BudgetPoint, metric: str) -> str:
    return f"{summary_text(point.summary, metric)} at {ratio_text(point.times)}"
