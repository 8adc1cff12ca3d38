"""Figures of training and behaviour: learning curves, exposure bias, calibration, and scores by the length of the reference."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tadistill.charts import GREY, Axis, Chart, Look, Point, nice_span
from tadistill.metrics import in_order, log_parts, metric_title, metric_unit
from tadistill.report.figures import MANY, looks, span_axis, titled
from tadistill.results.collect import Results, primary_metric
from tadistill.results.compare import BY_LENGTH, bucket_sizes, bucket_summary, bucket_title
from tadistill.results.curves import Array, Curve, exposures, reliabilities
from tadistill.results.number_text import summary_text
from tadistill.text import counted

_CALIBRATED = Look(GREY, "circle", "5 4")


def exposure_figure(results: Results) -> Chart | None:
    """Draw each arm's exposure bias (extra error after its own text) by position in the answer.

    The thick line is the mean, and each faint line is one seed. The mean is dotted where fewer than 10 answers are long enough.
    """
    found, styles = {name: e for name, e in exposures(results).items() if np.isfinite(e.mean).any()}, looks(results)
    if not found:
        return None
    longest = max(len(e.mean) for e in found.values())
    measured = any(np.isfinite(e.mean[: e.solid]).any() for e in found.values())  # else all lines are dotted
    heights = [float(v) for e in found.values() for v in (e.mean[: e.solid] if measured else e.mean) if np.isfinite(v)]
    x = Axis(1, max(longest, 2), "position in the response (tokens)")
    chart = Chart(
        "figure-exposure", "Exposure bias by position, one line per arm", x, span_axis([*heights, 0.0], "ExAccErr (%)"), height=260, head=24
    )
    chart.rule(y=0)
    for name, exposure in found.items():
        if len(exposure.seeds) > 1 and len(found) <= MANY:
            for seed, values in exposure.seeds.items():
                chart.line(name, *_points(values, 0, exposure.solid), styles[name], seed=seed)
        chart.line(name, *_points(exposure.mean, 0, exposure.solid), styles[name])
        if exposure.solid < len(exposure.mean):
            few = Look(styles[name].colour, styles[name].marker, "1 4")
            chart.line(name, *_points(exposure.mean, max(exposure.solid - 1, 0), len(exposure.mean)), few, seed=-1)
    return chart


def _points(values: Array, start: int, end: int) -> tuple[list[int], list[float | None]]:
    shown = values[start:end]
    return list(range(start + 1, start + 1 + len(shown))), [round(float(v), 4) if np.isfinite(v) else None for v in shown]


def calibration_figures(results: Results) -> Mapping[str, Chart]:
    """Draw reliability diagrams: ``tokens`` for the next token, ``labels`` for the chosen answer. A diagram without measurements is left
    out.
    """
    panels: dict[str, Chart] = {}
    for what in ("tokens", "labels"):
        found = reliabilities(results, what)
        if not found:
            continue
        x, y = Axis(0, 100, "confidence (%)"), Axis(0, 100, "correct (%)")
        chart = Chart(f"figure-calibration-{what}", f"Share of correct {what} over confidence, one line per arm", x, y, height=300, head=24)
        chart.segment((0, 0), (100, 100), _CALIBRATED)
        for name, bins in found.items():
            chart.line(name, bins.confidence.round(3).tolist(), bins.correct.round(3).tolist(), looks(results)[name])
        panels[what] = chart
    return panels


def length_figure(results: Results) -> Chart | None:
    """Draw ROUGE-L by the length of the reference, with 95 % intervals. For each range of lengths, the arms are side by side."""
    styles, buckets = looks(results), bucket_sizes(results)
    names = [arm.name for arm in results.plan.arms if results.scores[arm.name]]
    if len(buckets) < 2 or not names:
        return None
    found = {name: [(i, s) for i, b in enumerate(buckets) if (s := bucket_summary(results, name, b))] for name in names}
    marks = {float(i): f"{bucket_title(b)}\n{counted(size, 'prompt')}" for i, (b, size) in enumerate(buckets.items())}
    x = Axis(-0.5, len(buckets) - 0.5, "length of the first reference (tokens)", marks=marks, grid=False)
    y = span_axis([v for entries in found.values() for _, s in entries for v in (s.low, s.high)], titled(BY_LENGTH), zero=True)
    chart = Chart("figure-lengths", f"{metric_title(BY_LENGTH)} by length of the reference", x, y, height=260, head=24)
    for index, (name, entries) in enumerate(found.items()):
        aside = min(0.72 / max(1, len(names) - 1), 0.1) * (index - (len(names) - 1) / 2)
        points = [Point(i, s.mean, s.low, s.high, f"{name}: {summary_text(s, BY_LENGTH)}", i + aside) for i, s in entries]
        chart.points(name, points, styles[name], size=4.5)
    for edge in range(len(buckets) - 1):
        chart.rule(x=edge + 0.5, kind="grid")
    return chart


# --- learning curves --------------------------------------------------------------------------------------------------


def curve_figures(curves: list[Curve], results: Results) -> dict[str, Chart]:
    """Draw the learning curves, and return the figures by title. Methods with different training losses have separate figures.

    The thick line is the mean over seeds, and each faint line is one seed. The first figure shows the primary metric on dev.
    """
    first = f"dev/{primary_metric(results)}"
    panels: dict[str, Chart] = {}
    for metric in sorted(in_order(curve.metric for curve in curves), key=lambda log: not f"{log}/".startswith(f"{first}/")):
        of_metric = [curve for curve in curves if curve.metric == metric and curve.arm is not None]
        groups = {"": of_metric} if not metric.startswith("train/") else _by_method(of_metric, results)
        for method, found in groups.items():
            if found:
                title = f"{_log_title(metric)}{f': {method}' if method else ''}"
                log, of_log, of_set = log_parts(metric)
                name = f"figure-{log}-{of_log}" + (f"-{len(panels)}" if method or of_set else "")
                panels[title] = _curve_figure(name, title, found, results, large=metric == first)
    return panels


def _by_method(curves: list[Curve], results: Results) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(results.arm(curve.name).method, []).append(curve)
    taught_first = sorted(groups.items(), key=lambda group: not any(results.arm(curve.name).is_taught for curve in group[1]))
    return dict(taught_first) if len(groups) > 1 else {"": curves}


def _log_title(metric: str) -> str:
    if metric == "train/loss":
        return "training loss"
    log, name, of_set = log_parts(metric)
    where = {"dev": "on dev", "train": "in training", "rollout": "of rollouts"}[log]
    return f"{metric_title(name)} {where}{f': {of_set}' if of_set else ''}"


def _curve_figure(name: str, title: str, curves: list[Curve], results: Results, *, large: bool) -> Chart:
    plain = len(curves) <= MANY  # few lines differ enough in colour and marker; dashes of curves with noise are hard to read
    styles = {name: replace(found, dash="") if plain else found for name, found in looks(results).items()}
    unit = metric_unit(log_parts(curves[0].metric)[1])
    ends = {curve.name: max(curve.mean[0], default=1) for curve in curves}
    share = max(ends.values()) > 1.5 * min(ends.values())  # stages of different length are compared by their progress
    heights = [v for curve in curves for series in (curve.mean, *curve.seeds.values()) for v in series[1]]
    low, high = np.percentile(heights, [0.5, 99.5]) if len(heights) > 200 else (min(heights), max(heights))
    x = Axis(0, 100, "progress of the stage (%)") if share else Axis(0, max(*ends.values(), 1), "optimizer step")
    y = Axis(*nice_span([low, high]), "%" if unit == "percentage points" else unit)
    chart = Chart(name, f"{title}, one line per arm", x, y, height=300 if large else 210, head=24)

    def places(curve: Curve, steps: list[int]) -> list[float]:
        return [100 * step / ends[curve.name] for step in steps] if share else [float(step) for step in steps]

    for curve in curves:
        if len(curve.seeds) > 1 and len(curves) <= MANY:
            for seed, (steps, values) in curve.seeds.items():
                chart.line(curve.name, places(curve, steps), values, styles[curve.name], seed=seed)
    for curve in curves:
        steps, values = curve.mean
        chart.line(curve.name, places(curve, steps), values, styles[curve.name], label=len(curves) <= MANY)
    return chart
