"""Figures of training and behaviour: learning curves, exposure bias, calibration, and scores by reference length."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from tadistill.metrics import LOGS, metric_title
from tadistill.report.figures.style import DASHES, GREY, GRID, LegendEntry, Look, arm_group, arm_legend, axes, div, escaped, line, looks
from tadistill.results.collect import MEAN, Results
from tadistill.results.compare import BUCKETS, bucket_size, bucket_summary, bucket_title
from tadistill.results.curves import Array, Curve, exposures, reliabilities
from tadistill.results.units import number, summary_text


def exposure_figure(results: Results) -> str | None:
    """Draw each arm's exposure bias (ExAccErr) by position. The thick line is the mean, and the faint lines are the seeds.

    The mean is dotted at positions that fewer than 10 answers reach.
    """
    found, styles = exposures(results), looks(results)
    if not found:
        return None
    figure = go.Figure()
    for name, exposure in found.items():
        look, group = styles[name], arm_group(name)
        if len(exposure.seeds) > 1:
            for values in exposure.seeds.values():
                thin = {"color": look.colour, "width": 1}
                xs, ys = _points(values, 0, exposure.solid)
                figure.add_scatter(
                    x=xs, y=ys, mode="lines", opacity=0.25, hoverinfo="skip", line=thin, legendgroup=group, meta=[name, "seed"]
                )
        spans = [(0, exposure.solid, "exposure", look.dash, 1.0), (max(exposure.solid - 1, 0), len(exposure.mean), "few", "dot", 0.45)]
        for start, end, what, dash, opacity in spans:
            xs, ys = _points(exposure.mean, start, end)
            if len(xs) > (what == "few"):
                figure.add_scatter(
                    x=xs,
                    y=ys,
                    name=escaped(name),
                    mode="lines+markers" if what == "exposure" else "lines",
                    opacity=opacity,
                    line={"color": look.colour, "width": 2.2, "dash": dash},
                    marker={"symbol": look.marker, "size": 8, "maxdisplayed": 5},
                    hovertemplate=f"{escaped(name)}, position %{{x}}: %{{y:.1f}} %<extra></extra>",
                    legendgroup=group,
                    meta=[name, what],
                )
    line(figure, colour=GREY, xref="paper", x0=0, x1=1, y0=0, y1=0)
    axes(figure, "position in the response (tokens)", "ExAccErr (%)")
    return div(figure, "figure-exposure", height=360)


def _points(values: Array, start: int, end: int) -> tuple[list[int], list[float | None]]:
    shown = values[start:end]
    return list(range(start + 1, start + 1 + len(shown))), [round(float(v), 4) if np.isfinite(v) else None for v in shown]


def calibration_figures(results: Results) -> Mapping[str, str]:
    """Draw the reliability diagrams of next tokens (``tokens``) and chosen labels (``labels``), if they were measured."""
    panels: dict[str, str] = {}
    styles = looks(results)
    for what in ("tokens", "labels"):
        found = reliabilities(results, what)
        if not found:
            continue
        figure = go.Figure()
        line(figure, colour=GREY, width=1.5, dash="dash", x0=0, y0=0, x1=100, y1=100)
        for name, bins in found.items():
            look, ece = styles[name], results.averages.get((name, MEAN, f"ece_{what}"))
            error = f", ECE {number(ece.mean, f'ece_{what}')}" if ece else ""
            figure.add_scatter(
                x=bins.confidence.round(3).tolist(),
                y=bins.correct.round(3).tolist(),
                customdata=bins.count.tolist(),
                mode="lines+markers",
                legendgroup=arm_group(name),
                line={"color": look.colour, "width": 1.5, "dash": look.dash},
                marker={"symbol": look.marker, "size": 7},
                hovertemplate=f"{escaped(name)}{error}<br>sure %{{x:.0f}} %, right %{{y:.0f}} %, %{{customdata:.0f}} {what}<extra></extra>",
                meta=[name, what],
            )
        axes(figure, "confidence (%)", "correct (%)")
        figure.update_xaxes(range=[-2, 102])
        figure.update_yaxes(range=[-2, 102], gridcolor=GRID)
        panels[what] = div(figure, f"figure-calibration-{what}", height=400)
    return panels


def calibration_legend(results: Results) -> list[LegendEntry]:
    """Return the legend of the reliability diagrams. Each entry shows an arm and its expected calibration error."""
    names = {name for what in ("tokens", "labels") for name in reliabilities(results, what)}
    return [LegendEntry(e.group, e.name + _errors(results, e.name), e.look) for e in arm_legend(results, names)]


def _errors(results: Results, name: str) -> str:
    found = {what: results.averages.get((name, MEAN, f"ece_{what}")) for what in ("tokens", "labels")}
    known = [f"{number(ece.mean, f'ece_{what}')} ({what})" for what, ece in found.items() if ece is not None]
    return f" · ECE {', '.join(known)}" if known else ""


def length_figure(results: Results) -> str | None:
    """Draw ROUGE-L by the length of the reference. For each range of lengths, the arms are side by side with 95 % intervals."""
    metric, styles = "rouge_l", looks(results)
    buckets = [bucket for bucket in BUCKETS if bucket_size(results, metric, bucket)]
    names = [arm.name for arm in results.plan.arms if results.scores[arm.name]]
    if len(buckets) < 2 or not names:
        return None
    figure = go.Figure()
    for index, name in enumerate(names):
        summaries = [bucket_summary(results, name, metric, bucket) for bucket in buckets]
        aside = min(0.62 / max(1, len(names) - 1), 0.1) * (index - (len(names) - 1) / 2)
        known = [(x, s) for x, s in enumerate(summaries) if s is not None]
        look = styles[name]
        figure.add_scatter(
            x=[x + aside for x, _ in known],
            y=[s.mean for _, s in known],
            mode="markers",
            legendgroup=arm_group(name),
            marker={"color": look.colour, "symbol": look.marker, "size": 9, "line": {"width": 2 if "open" in look.marker else 0}},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [s.high - s.mean for _, s in known],
                "arrayminus": [s.mean - s.low for _, s in known],
                "thickness": 1.2,
                "width": 0,
            },
            customdata=[summary_text(s, metric) for _, s in known],
            hovertemplate=f"{escaped(name)}: %{{customdata}}<extra></extra>",
            meta=[name, "length"],
        )
    for x in range(len(buckets) - 1):
        line(figure, x0=x + 0.5, x1=x + 0.5, yref="paper", y0=0, y1=1)
    axes(figure, "length of the first reference (tokens)", metric_title(metric))
    ticks = [f"{bucket_title(b)}<br>{bucket_size(results, metric, b)} prompts" for b in buckets]
    figure.update_xaxes(tickvals=list(range(len(buckets))), ticktext=ticks, range=[-0.5, len(buckets) - 0.5], showgrid=False)
    return div(figure, "figure-lengths", height=360, bottom=64)


# --- learning curves --------------------------------------------------------------------------------------------------


def curve_figures(curves: list[Curve], results: Results) -> dict[str, str]:
    """Draw the learning curves, one panel per metric. The thick line is the mean over seeds, and the faint lines are the seeds."""
    entries = {entry.group: entry for entry in curve_legend(curves, results)}
    panels: dict[str, str] = {}
    for metric in LOGS:
        figure = go.Figure()
        for curve in (curve for curve in curves if curve.metric == metric):
            _add_curve(figure, curve, entries[_group(curve)])
        if figure.data:
            figure.update_xaxes(title="optimizer step", gridcolor=GRID, zeroline=False, nticks=7)
            figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)
            panels[metric] = div(figure, f"figure-{metric.replace('/', '-')}", height=290, dragmode="zoom")
    return panels


def _add_curve(figure: go.Figure, curve: Curve, entry: LegendEntry) -> None:
    look, common = entry.look, {"legendgroup": entry.group, "visible": entry.shown}
    if len(curve.seeds) > 1:
        for steps, values in curve.seeds.values():
            figure.add_scatter(
                x=steps, y=values, mode="lines", opacity=0.22, hoverinfo="skip", line={"color": look.colour, "width": 1}, **common
            )
    steps, values = curve.mean
    name = escaped(curve.name)
    figure.add_scatter(
        x=steps,
        y=values,
        name=name,
        mode="lines+markers",
        line={"color": look.colour, "width": 1.8, "dash": look.dash},
        marker={"symbol": look.marker, "size": 7, "maxdisplayed": 4},
        hovertemplate=f"{name}, step %{{x}}: %{{y:.4g}}<extra></extra>",
        **common,
    )


def curve_legend(curves: list[Curve], results: Results) -> list[LegendEntry]:
    """Return the legend of the learning curves: first the arms, then earlier training stages, which are hidden when the page opens."""
    styles = looks(results)
    groups = {_group(curve): curve for curve in curves}
    entries: list[LegendEntry] = []
    for group, curve in groups.items():
        if curve.arm is not None:
            entries.append(LegendEntry(group, curve.name, styles[curve.arm]))
        else:
            dash = DASHES[1 + sum(not entry.shown for entry in entries) % (len(DASHES) - 1)]
            entries.append(LegendEntry(group, curve.name, Look(GREY, "x-thin", "╌", dash), shown=False))
    return entries


def _group(curve: Curve) -> str:
    return arm_group(curve.arm) if curve.arm is not None else f"stage:{curve.name}"
