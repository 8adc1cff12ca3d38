"""Figures of scores: forest plots, quality against entropy, and quality against cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from tadistill.metrics import metric_title, metric_unit
from tadistill.report.figures.style import (
    GREY,
    GRID,
    LegendEntry,
    Look,
    arm_group,
    arm_legend,
    axes,
    div,
    escaped,
    line,
    looks,
    row_text,
    separate_rows,
)
from tadistill.results.collect import MEAN, Results, Summary, complete_seeds, primary_metric, sets_with
from tadistill.results.compare import MAIN, Point, compare, differences_per_seed, direct_of, entropy_curve, twin_of
from tadistill.results.study import ArmRecord
from tadistill.results.units import MINUS, flops_text, interval, number, summary_text
from tadistill.results.verdict import comparisons
from tadistill.statistics import Difference, undominated

_PAIRS = 15  # with more pairs of models than this, all models are compared only with the first
_ROW, _TALL_ROW = 54, 70  # pixels of a row with one line of text and with two


@dataclass(frozen=True)
class ForestRow:
    """The paired difference of the primary metric between an arm and its reference arm. `word` is the verdict, if there is one."""

    arm: ArmRecord
    other: ArmRecord
    difference: Difference
    per_seed: dict[int, float]
    word: str | None


def reference_of(results: Results, arm: ArmRecord) -> ArmRecord | None:
    """Return the arm to compare an arm with: its equal-compute baseline, else the direct arm, else the first competitor."""
    teacher = results.plan.teacher
    if teacher is not None and arm.path == (teacher,):
        return None
    other = (twin_of(results, arm) if arm.has_assistant else None) or direct_of(results, arm)
    if other is None:
        other = next(a for a in results.plan.arms if teacher is None or a.model == arm.model)
    return None if other.name == arm.name else other


def differences(results: Results) -> list[ForestRow]:
    """Return the rows of the forest plot: chains first, then other arms, both in descending order of the difference.

    A study that distils nothing and has at most 15 pairs of models gets one row per pair.
    """
    metric, decided = primary_metric(results), comparisons(results)
    if decided and len(decided) <= _PAIRS and all(c.against == "pair" for c in decided):
        return [ForestRow(results.arm(c.arm), results.arm(c.other), c.difference, c.per_seed, c.word) for c in decided]
    words = {(c.arm, c.other): c.word for c in decided}
    found: list[ForestRow] = []
    for arm in results.plan.arms:
        other = reference_of(results, arm)
        compared = compare(results, arm.name, other.name, metric) if other else None
        if other and compared:
            per_seed = differences_per_seed(results, arm.name, other.name, metric)
            found.append(ForestRow(arm, other, compared[0], per_seed, words.get((arm.name, other.name))))
    return sorted(found, key=lambda entry: (not entry.arm.has_assistant, -entry.difference.mean))


def difference_figure(results: Results) -> str | None:
    """Draw the paired differences with 95 % intervals, a dot for each training seed, the zero line and the equivalence band."""
    rows = differences(results)[::-1]
    if not rows:
        return None
    metric, margin, styles = primary_metric(results), results.plan.margin, looks(results)
    figure = go.Figure()
    if margin > 0:
        figure.add_shape(
            type="rect", x0=-margin, x1=margin, yref="paper", y0=0, y1=1, fillcolor=GREY, opacity=0.16, line_width=0, layer="below"
        )
    line(figure, colour=GREY, width=1.5, x0=0, x1=0, yref="paper", y0=0, y1=1)
    for y, row in enumerate(rows):
        d, name, other = row.difference, escaped(row.arm.name), escaped(row.other.name)
        sign = "+" if d.mean > 0 else ""
        text = f"{sign}{number(d.mean, metric, more=1)} {interval(d.low, d.high, metric, more=1)}"
        equal = ", equal compute" if row.other.compute == f"as {row.arm.name}" else ""
        _row(figure, y - 0.14, styles[row.arm.name], (d.mean, d.low, d.high), row.per_seed, f"{name} {MINUS} {other}: {text}", row.arm.name)
        figure.add_annotation(**row_text(y + 0.35, f"<b>{name}</b>"))
        figure.add_annotation(**row_text(y + 0.35, text, right=True))
        figure.add_annotation(**row_text(y + 0.12, f"{MINUS} {other}{equal}", size=11))
        if row.word:
            figure.add_annotation(**row_text(y + 0.12, f"<b>{row.word}</b>", right=True, size=11))
    low = min(-margin, *(min(r.difference.low, *r.per_seed.values()) for r in rows))
    high = max(margin, *(max(r.difference.high, *r.per_seed.values()) for r in rows))
    unit = metric_unit(metric)
    _finish(figure, len(rows), (low, high), f"difference in {metric_title(metric)}{f' ({unit})' if unit else ''}")
    return div(figure, "figure-differences", height=_TALL_ROW * len(rows) + 70)


def means_figure(results: Results) -> str | None:
    """Draw each arm's mean of the primary metric over sets, best first, with its interval and a dot for each seed."""
    metric, styles = primary_metric(results), looks(results)
    scored = [(results.summaries.get((arm.name, MEAN, metric)), arm) for arm in results.plan.arms]
    ranked: list[tuple[Summary, ArmRecord]] = sorted(((s, arm) for s, arm in scored if s is not None), key=lambda pair: pair[0].mean)
    if len(ranked) < 2:
        return None
    figure = go.Figure()
    for y, (summary, arm) in enumerate(ranked):
        name, text = escaped(arm.name), summary_text(summary, metric)
        _row(figure, y, styles[arm.name], (summary.mean, summary.low, summary.high), dict(summary.per_seed), f"{name}: {text}", arm.name)
        figure.add_annotation(**row_text(y + 0.34, f"<b>{name}</b>"))
        figure.add_annotation(**row_text(y + 0.34, text, right=True))
    values = [value for s, _ in ranked for value in (s.low, s.high, *s.per_seed.values())]
    _finish(figure, len(ranked), (min(values), max(values)), f"{metric_title(metric)}, mean over sets")
    return div(figure, "figure-means", height=_ROW * len(ranked) + 70)


def _row(
    figure: go.Figure, y: float, look: Look, span: tuple[float, float, float], per_seed: dict[int, float], hover: str, name: str
) -> None:
    mean, low, high = span
    figure.add_scatter(
        x=[low, high], y=[y, y], mode="lines", line={"color": look.colour, "width": 3}, hoverinfo="skip", meta=[name, "interval"]
    )
    figure.add_scatter(
        x=[mean],
        y=[y],
        mode="markers",
        marker={"color": look.colour, "size": 11, "symbol": look.marker, "line": {"width": 2, "color": look.colour}},
        hovertemplate=f"{hover}<extra></extra>",
        meta=[name, "mean"],
    )
    figure.add_scatter(
        x=list(per_seed.values()),
        y=[y - 0.22] * len(per_seed),
        mode="markers",
        customdata=list(per_seed),
        marker={"color": look.colour, "size": 6, "opacity": 0.65},
        hovertemplate="seed %{customdata}: %{x:.2f}<extra></extra>",
        meta=[name, "seeds"],
    )


def _finish(figure: go.Figure, rows: int, span: tuple[float, float], title: str) -> None:
    separate_rows(figure, rows)
    pad = 0.04 * (span[1] - span[0]) or 1.0
    figure.update_xaxes(title=title, range=[span[0] - pad, span[1] + pad], gridcolor=GRID, zeroline=False)
    figure.update_yaxes(range=[-0.52, rows - 0.48], visible=False)


# --- quality against entropy and cost ---------------------------------------------------------------------------------


_PLAIN = Look(GREY, "line-ew", "┅", "dash")


def entropy_curves(results: Results) -> Mapping[str, list[Point]]:
    """Return the points (entropy, metric) of each arm, one per decoding. Arms without a measured point are omitted."""
    metric = primary_metric(results)
    sets, decodings = sets_with(results, metric), list(results.plan.decodings)
    names = [arm.name for arm in results.plan.arms]
    curves = {n: entropy_curve(results, n, metric, complete_seeds(results, n, sets, metric), decodings) for n in names}
    return {name: points for name, points in curves.items() if points}


def plane_figure(results: Results) -> str | None:
    """Draw the primary metric against entropy, with a curve through each arm's decodings. Return None if no arm has two decodings."""
    metric, styles, curves = primary_metric(results), looks(results), entropy_curves(results)
    if not any(len(points) > 1 for points in curves.values()):
        return None
    figure = go.Figure()
    for name, points in curves.items():
        look, main = styles[name], [point.decoding == MAIN for point in points]
        summary = results.summaries[name, MEAN, metric]
        figure.add_scatter(
            x=[point.entropy for point in points],
            y=[point.value for point in points],
            mode="lines+markers",
            legendgroup=arm_group(name),
            customdata=[point.decoding for point in points],
            line={"color": look.colour, "width": 1.6, "dash": look.dash},
            marker={"symbol": look.marker, "size": [12 if at else 8 for at in main], "line": {"width": 2 if "open" in look.marker else 0}},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [summary.high - summary.mean if at else 0 for at in main],
                "arrayminus": [summary.mean - summary.low if at else 0 for at in main],
                "thickness": 1,
                "width": 3,
            },
            hovertemplate=f"{escaped(name)}, %{{customdata}}: {metric_title(metric)} %{{y:.2f}}, %{{x:.2f}} nats/token<extra></extra>",
            meta=[name, "plane"],
        )
    axes(figure, "entropy of the decoding (nats/token)", metric_title(metric))
    _name_decodings(figure, list(curves.values()))
    return div(figure, "figure-plane", height=440, top=34)


def _name_decodings(figure: go.Figure, curves: Sequence[Sequence[Point]]) -> None:
    by_name: dict[str, list[float]] = {}
    for points in curves:
        for point in points:
            by_name.setdefault(point.decoding, []).append(point.entropy)
    places = sorted((float(np.mean(xs)), name) for name, xs in by_name.items())
    for index, (x, name) in enumerate(places):
        line(figure, dash="dot", x0=x, x1=x, yref="paper", y0=0, y1=1)
        figure.add_annotation(
            x=x, y=1, yref="paper", yanchor="bottom", yshift=13 * (index % 2), text=escaped(name), showarrow=False, font_size=11
        )


def plane_legend(results: Results) -> list[LegendEntry]:
    return arm_legend(results, entropy_curves(results))


def cost_points(results: Results) -> list[tuple[ArmRecord, float, float, float, float]]:
    """Return the arms with known training FLOPs: arm, FLOPs of one seed, and the primary metric's mean, low and high."""
    metric = primary_metric(results)
    found: list[tuple[ArmRecord, float, float, float, float]] = []
    for arm in results.plan.arms:
        summary = results.summaries.get((arm.name, MEAN, metric))
        if summary is not None and arm.flops is not None:
            found.append((arm, arm.flops, summary.mean, summary.low, summary.high))
    return found


def direct_longer(results: Results) -> list[tuple[float, float]]:
    """Return (FLOPs, mean) of the direct arm and of its equal-compute baselines, in ascending order of FLOPs.

    It takes the first direct arm that has such baselines. The list is empty if no direct arm has one.
    """
    arms = [(arm, flops, mean) for arm, flops, mean, *_ in cost_points(results) if flops > 0 and len(arm.path) == 2]
    for first in (arm for arm, *_ in arms if arm.compute is None):
        curve = [(f, m) for a, f, m in arms if a.name == first.name or (a.compute and (a.path, a.method) == (first.path, first.method))]
        if len(curve) > 1:
            return sorted(curve)
    return []


def pareto_figure(results: Results) -> str | None:
    """Draw the primary metric against training FLOPs, with the Pareto front. Return None if fewer than two arms are trained."""
    points = cost_points(results)
    trained = [point for point in points if point[1] > 0]
    if len(trained) < 2:
        return None
    metric, styles = primary_metric(results), looks(results)
    figure = go.Figure()
    front = undominated([(flops, mean) for _, flops, mean, *_ in trained], lambda point: (point[0], -point[1]))
    rightmost = max(flops for _, flops, *_ in trained)
    _guide(figure, [*front, (rightmost, front[-1][1])], "front", {"shape": "hv", "dash": "solid", "width": 1.5})
    longer = direct_longer(results)
    if longer:
        _guide(figure, longer, "direct longer", {"dash": "dash", "width": 2.5})
    for arm, flops, mean, low, high in trained:
        look = styles[arm.name]
        text = f"{escaped(arm.name)}: {summary_text(results.summaries[arm.name, MEAN, metric], metric)}, {flops_text(flops)} FLOPs"
        figure.add_scatter(
            x=[flops],
            y=[mean],
            mode="markers",
            legendgroup=arm_group(arm.name),
            marker={"color": look.colour, "symbol": look.marker, "size": 12, "line": {"width": 2 if "open" in look.marker else 0}},
            error_y={"type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low], "thickness": 1.3, "width": 4},
            hovertemplate=f"{text}<extra></extra>",
            meta=[arm.name, "cost"],
        )
    for arm, flops, mean, *_ in points:
        if flops == 0:
            line(figure, colour=GREY, dash="dot", xref="paper", x0=0, x1=1, y0=mean, y1=mean)
            label = f"{escaped(arm.name)} (not trained here) {number(mean, metric)}"
            figure.add_annotation(xref="paper", x=0.01, xanchor="left", y=mean, yanchor="bottom", text=label, showarrow=False, font_size=11)
    axes(figure, "training FLOPs of one seed", f"{metric_title(metric)}, mean over sets")
    spread = np.log10([flops for _, flops, *_ in trained])
    pad = max(0.06, 0.08 * float(np.ptp(spread)))
    ticks = [m * 10.0**e for e in range(int(spread.min()) - 1, int(spread.max()) + 2) for m in ((1, 2, 5) if np.ptp(spread) < 2 else (1,))]
    figure.update_xaxes(type="log", range=[float(spread.min()) - pad, float(spread.max()) + pad], tickangle=0)
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:.0e}".replace("e+", "e") for tick in ticks])
    return div(figure, "figure-cost", height=420)


def _guide(figure: go.Figure, points: Sequence[tuple[float, float]], name: str, style: Mapping[str, object]) -> None:
    xs, ys = zip(*points, strict=True)
    figure.add_scatter(
        x=list(xs), y=list(ys), mode="lines", line={"color": GREY, **style}, hoverinfo="skip", legendgroup=name, meta=["", name]
    )


def cost_legend(results: Results) -> list[LegendEntry]:
    entries = arm_legend(results, [arm.name for arm, flops, *_ in cost_points(results) if flops > 0])
    guides = [LegendEntry("front", "best for its cost", Look(GREY, "line-ew", "━", "solid"))]
    guides += [LegendEntry("direct longer", "direct, trained longer", _PLAIN)] if direct_longer(results) else []
    return [*entries, *guides]
