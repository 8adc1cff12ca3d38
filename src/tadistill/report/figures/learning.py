"""Learning curves: one panel a metric."""

import plotly.graph_objects as go

from tadistill.report.figures.style import DASHES, GREY, GRID, LegendEntry, Look, arm_group, div, escaped, looks
from tadistill.results.collect import Results
from tadistill.results.curves import METRICS, Curve


def curve_figures(curves: list[Curve], results: Results) -> dict[str, str]:
    """One panel a metric: mean over seeds, faint lines for the seeds. The legend is the page's (`curve_legend`)."""
    entries = {entry.group: entry for entry in curve_legend(curves, results)}
    panels: dict[str, str] = {}
    for metric in METRICS:
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
    """The legend of the learning curves: arms, then the stages before them, which start hidden."""
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
