"""The figures of a report: plotly figures as HTML divs that need nothing but the page's one copy of plotly.js.

Backgrounds are transparent and text takes its colour from the page's style sheet, so one figure fits light, dark and
print. An arm has one colour everywhere. Arm names stand above their row, not beside it: a phone has no room for a
margin of names.
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from tadistill.report.collect import MEAN, Results, primary_metric
from tadistill.report.curves import METRICS, Curve, last_dev_value
from tadistill.report.files import Arm
from tadistill.report.text import metric_title, number, parameters_text, summary_text

# Ten hues with enough contrast on white and on near-black
_PALETTE = (
    "#3B82F6",
    "#F0821E",
    "#17A673",
    "#E0475B",
    "#9B6BE3",
    "#B8921A",
    "#DB5FB4",
    "#1497B0",
    "#8A7560",
    "#6E9E2E",
)
_GREY = "#8A93A3"
_GRID = "rgba(128,136,150,0.22)"
_DASHES = ("dot", "dash", "dashdot", "longdash")
_ROW, _LANE = 56, 66  # pixels for one arm in the forest plot and in the path picture
_HOVER = {"bgcolor": "rgba(24,30,40,0.94)", "bordercolor": "rgba(0,0,0,0)", "font": {"size": 11, "color": "#F2F4F8"}}
_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#6B7280"}


@dataclass(frozen=True)
class LegendEntry:
    """One button beside the learning curves; `shown` is its state on opening."""

    group: str
    name: str
    colour: str
    dash: str
    shown: bool


def arm_colours(results: Results) -> Mapping[str, str]:
    """One colour for each arm, the same in every figure and in the sample browser."""
    return {arm.name: _PALETTE[index % len(_PALETTE)] for index, arm in enumerate(results.plan.arms)}


def forest_figure(results: Results) -> str | None:
    """The primary metric's mean over sets per arm, best first, with its interval and a dot for each seed."""
    metric = primary_metric(results)
    scored = [(results.summaries.get((arm.name, MEAN, metric)), arm) for arm in results.plan.arms]
    ranked = sorted(((s, arm) for s, arm in scored if s is not None), key=lambda pair: pair[0].mean)
    if not ranked:
        return None
    colours = arm_colours(results)
    figure = go.Figure()
    for y, (summary, arm) in enumerate(ranked):
        colour = colours[arm.name]
        text = summary_text(summary, metric)
        figure.add_scatter(x=[summary.low, summary.high], y=[y, y], mode="lines", line={"color": colour, "width": 3}, hoverinfo="skip")
        figure.add_scatter(
            x=[summary.mean],
            y=[y],
            mode="markers",
            marker={"color": colour, "size": 11, "symbol": "diamond"},
            hovertemplate=f"{html.escape(arm.name)}: {text}<extra></extra>",
        )
        seeds = list(summary.per_seed)
        figure.add_scatter(
            x=list(summary.per_seed.values()),
            y=[y - 0.24] * len(seeds),
            mode="markers",
            customdata=seeds,
            marker={"color": colour, "size": 6, "opacity": 0.6},
            hovertemplate="seed %{customdata}: %{x:.2f}<extra></extra>",
        )
        figure.add_annotation(**_row_text(y + 0.34, f"<b>{html.escape(arm.name)}</b>"))
        figure.add_annotation(**_row_text(y + 0.34, text, right=True))
    _separate_rows(figure, len(ranked))
    low, high = min(s.low for s, _ in ranked), max(s.high for s, _ in ranked)
    margin = 0.04 * (high - low) or 1.0
    figure.update_xaxes(title=f"{metric_title(metric)}, mean over sets", range=[low - margin, high + margin])
    figure.update_xaxes(gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(range=[-0.52, len(ranked) - 0.5], visible=False)
    return _div(figure, "figure-forest", height=_ROW * len(ranked) + 70, dragmode=False)


def curve_figures(curves: list[Curve], results: Results) -> dict[str, str]:
    """One panel a metric: mean over seeds, faint lines for the seeds. The legend is the page's (`legend_entries`)."""
    style = {entry.group: entry for entry in legend_entries(curves, results)}
    panels: dict[str, str] = {}
    for metric in METRICS:
        figure = go.Figure()
        for curve in (curve for curve in curves if curve.metric == metric):
            entry = style[_group(curve)]
            common = {"legendgroup": entry.group, "visible": entry.shown}
            if len(curve.seeds) > 1:
                for steps, values in curve.seeds.values():
                    figure.add_scatter(
                        x=steps,
                        y=values,
                        mode="lines",
                        opacity=0.28,
                        hoverinfo="skip",
                        line={"color": entry.colour, "width": 1, "dash": entry.dash},
                        **common,
                    )
            steps, values = curve.mean
            figure.add_scatter(
                x=steps,
                y=values,
                name=html.escape(curve.name),
                mode="lines+markers" if len(steps) < 3 else "lines",
                line={"color": entry.colour, "width": 2.4, "dash": entry.dash},
                **common,
            )
        if figure.data:
            figure.update_xaxes(title="optimizer step", gridcolor=_GRID, zeroline=False)
            figure.update_yaxes(gridcolor=_GRID, zeroline=False, automargin=True)
            figure.update_layout(hovermode="x unified", hoverlabel=_HOVER)
            panels[metric] = _div(figure, f"figure-{metric.replace('/', '-')}", height=290, dragmode="zoom")
    return panels


def legend_entries(curves: list[Curve], results: Results) -> list[LegendEntry]:
    """The legend of the learning curves: arms, then the stages before them, which start hidden."""
    colours = arm_colours(results)
    groups = {_group(curve): curve for curve in curves}
    entries: list[LegendEntry] = []
    for group, curve in groups.items():
        if curve.arm is not None:
            entries.append(LegendEntry(group, curve.name, colours[curve.arm], "solid", True))
        else:
            dash = _DASHES[sum(not entry.shown for entry in entries) % len(_DASHES)]
            entries.append(LegendEntry(group, curve.name, _GREY, dash, False))
    return entries


def path_figure(results: Results) -> str:
    """A lane for each arm over columns of model size: nodes are models, arrows are distillations."""
    arms = results.plan.arms
    models = _columns(results)
    figure = go.Figure()
    for x in range(len(models)):
        _line(figure, x0=x, x1=x, y0=-0.5, y1=len(arms) - 0.5)
    for row, arm in enumerate(arms):
        _add_lane(figure, results, arm, models, len(arms) - 1 - row)
    _separate_rows(figure, len(arms))
    figure.update_xaxes(range=[-0.45, len(models) - 0.55], side="top", showgrid=False, zeroline=False)
    titles = [f"<b>{html.escape(model)}</b><br>{parameters_text(results.plan.parameters[model])}" for model in models]
    figure.update_xaxes(tickvals=list(range(len(models))), ticktext=titles)
    figure.update_yaxes(range=[-0.52, len(arms) - 0.5], visible=False)
    return _div(figure, "figure-paths", height=_LANE * len(arms) + 62, dragmode=False, top=50, bottom=12)


def _add_lane(figure: go.Figure, results: Results, arm: Arm, models: list[str], y: int) -> None:
    colour = arm_colours(results)[arm.name]
    places = [models.index(model) for model in arm.path]
    arrow = {"xref": "x", "yref": "y", "axref": "x", "ayref": "y", "text": "", "showarrow": True, "arrowhead": 2}
    for start, end in pairwise(places):
        figure.add_annotation(
            x=end,
            y=y,
            ax=start,
            ay=y,
            arrowcolor=colour,
            arrowwidth=2.2,
            arrowsize=0.9,
            standoff=9,
            startstandoff=8,
            **arrow,
        )
    labels = [_node_label(results, arm, model) for model in arm.path]
    figure.add_scatter(
        x=places,
        y=[y] * len(places),
        mode="markers",
        marker={"size": 13, "color": [_GREY if model == results.plan.teacher else colour for model in arm.path]},
        customdata=[f"{html.escape(model)}: {label}" for model, label in zip(arm.path, labels, strict=True)],
        hovertemplate="%{customdata}<extra></extra>",
    )
    for x, label in zip(places, labels, strict=True):
        figure.add_annotation(x=x, y=y - 0.31, text=label, showarrow=False, font={"size": 11})
    note = f"  {html.escape(arm.compute)}" if arm.compute else ""
    figure.add_annotation(**_row_text(y + 0.33, f"<b>{html.escape(arm.name)}</b>{note}"))


def _columns(results: Results) -> list[str]:
    """The models of all paths, big to small; equals in the order in which a path meets them."""
    met = dict.fromkeys(model for arm in results.plan.arms for model in arm.path)
    return sorted(met, key=lambda model: -results.plan.parameters[model])


def _node_label(results: Results, arm: Arm, model: str) -> str:
    """The last node shows the test result, the nodes before it what they reached on dev."""
    metric = primary_metric(results)
    if model == arm.path[-1]:
        summary = results.summaries.get((arm.name, MEAN, metric))
        return "not finished" if summary is None else _plus_minus(summary.mean, summary.low, summary.high, metric)
    value = last_dev_value(results, arm, model, metric)
    if value is not None:
        return f"dev {number(value, metric)}"
    return "teacher" if model == results.plan.teacher else ""


def _plus_minus(mean: float, low: float, high: float, metric: str) -> str:
    return f"<b>{number(mean, metric)}</b> ± {number((high - low) / 2, metric)}"


def _group(curve: Curve) -> str:
    return f"arm:{curve.arm}" if curve.arm is not None else f"stage:{curve.name}"


def _row_text(y: float, text: str, *, right: bool = False) -> dict[str, Any]:
    side = {"x": 1, "xanchor": "right"} if right else {"x": 0, "xanchor": "left"}
    return {"y": y, "xref": "paper", "yref": "y", "text": text, "showarrow": False, "font": {"size": 12}, **side}


def _separate_rows(figure: go.Figure, rows: int) -> None:
    for y in range(rows - 1):
        _line(figure, xref="paper", x0=0, x1=1, y0=y + 0.5, y1=y + 0.5)


def _line(figure: go.Figure, **ends: Any) -> None:
    figure.add_shape(type="line", line={"color": _GRID, "width": 1}, layer="below", **ends)


def _div(figure: go.Figure, name: str, *, height: int, dragmode: Any, top: int = 12, bottom: int = 48) -> str:
    figure.update_xaxes(title_font_size=12)
    figure.update_layout(
        template="none",
        height=height,
        dragmode=dragmode,
        showlegend=False,
        font=_FONT,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 12, "r": 12, "t": top, "b": bottom},
    )
    return pio.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        validate=False,
        config={"displayModeBar": False, "responsive": True},
    )
