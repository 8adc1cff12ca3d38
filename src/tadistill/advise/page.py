"""The advice as a page. It is one HTML file with its scripts, styles, data and figures, in the style of the report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tadistill.advise.measures import TOP_K, Mean, Measures
from tadistill.advise.words import (
    TAGS,
    Report,
    basis_line,
    measure_name,
    option_interval,
    plus_minus,
    reason,
    signed_number,
    sweep_text,
    verdict_line,
)
from tadistill.config.arm import path_text
from tadistill.metrics import metric_title
from tadistill.report.figures.style import GREY, GRID, PALETTE, LegendEntry, Look, axes, div, escaped, line
from tadistill.results import units
from tadistill.visible import visible_parts

_COLUMNS = (
    ("KL(q ‖ p)", "nats/token", "reverse_kl"),
    ("overlap", f"of the {TOP_K} most likely tokens", "overlap"),
    ("mass", f"on p's {TOP_K} most likely tokens", "mass"),
    ("entropy gap", "H(p) − H(q), nats", "entropy_gap"),
    ("bias", "E[log p − log T], nats", "bias"),
    ("KL(p ‖ q)", "references, nats/token", "forward_kl"),
    ("loss ratio", "p / q, references", "loss_ratio"),
    ("advantage", "references, nats/token", "advantage"),
)
_HEATMAPS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("reverse_kl", "Initial KL(q ‖ p), nats/token", "0: both models are the same", {}),
    ("overlap", f"Overlap of the {TOP_K} most likely tokens", "1: both models have the same top tokens", {"most": 1.0, "decimals": 2}),
    ("entropy_gap", "Entropy gap H(p) − H(q), nats", "red: the teacher has the lower entropy", {"two_sided": True}),
)
_BLUE, _RED = "59,130,246", "224,71,91"
_ADDS, _TAKES = "#E0475B", "#17A673"
_MARKERS = (("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"), ("triangle-down", "▼"), ("star", "★"), ("cross", "✚"))


@dataclass(frozen=True)
class Panel:
    """A figure with its caption."""

    title: str
    hint: str
    figure: Markup


def render_advice(report: Report) -> str:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("tadistill.advise"), PackageLoader("tadistill.report")]),
        autoescape=True,
        finalize=visible_parts,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(signed=signed_number, estimate=plus_minus, names=_names, few=_few)
    return environment.get_template("advice.html.j2").render(
        report=report,
        advice=report.advice,
        looks={path_text(path): look for path, look in path_looks(report).items()},
        verdict=verdict_line(report.advice),
        reason=reason(report.advice),
        basis=basis_line(report),
        interval=option_interval,
        units=units,
        metric_title=metric_title,
        columns=_COLUMNS,
        tags=TAGS,
        heatmaps=[Panel(title, hint, Markup(heatmap(report.measures, field, **look))) for field, title, hint, look in _HEATMAPS],
        cost=_markup(cost_figure(report)),
        cost_legend=path_cost_legend(report),
        sweep=_markup(lambda_figure(report)),
        bias=Markup(bias_figure(report)),
        plotly_js=Markup(get_plotlyjs()),
    )


def _names(measures: Iterable[str]) -> str:
    return ", ".join(map(measure_name, measures))


def _few(measures: Sequence[str]) -> str:
    more = f" and {len(measures) - 3} more" if len(measures) > 3 else ""
    return _names(measures[:3]) + more


def _markup(figure: str | None) -> Markup | None:
    return Markup(figure) if figure else None


# --- figures, as HTML divs ----------------------------------------------------------------------------------------------


def heatmap(measures: Measures, field: str, *, two_sided: bool = False, most: float | None = None, decimals: int = 3) -> str:
    """Draw one measure of all pairs. Teachers are in rows and learners in columns. The colour shows the mean, and the text adds its error.

    Args:
        two_sided: show values below 0 in red and values above 0 in blue.
        most: the value with the strongest colour. By default, it is the largest absolute mean.
        decimals: number of decimals in the text.
    """
    names = [m.name for m in measures.models]
    teachers, learners = names[:-1], names[1:]
    found = {pair: getattr(measures.pairs[pair], field) for pair in measures.pairs}
    values = [[found[t, s].mean if (t, s) in found else None for s in learners] for t in teachers]
    most = most or max(abs(e.mean) for e in found.values()) or 1.0
    blue, red = (f"rgba({c},0.55)" for c in (_BLUE, _RED))
    none = f"rgba({_BLUE},0.03)"
    scale = [[0, red], [0.5, none], [1, blue]] if two_sided else [[0, none], [1, blue]]
    figure = go.Figure(
        go.Heatmap(z=values, colorscale=scale, zmin=-most if two_sided else 0, zmax=most, showscale=False, xgap=3, ygap=3, hoverinfo="skip")
    )
    small = len(learners) > 3
    for (teacher, learner), e in found.items():
        text = plus_minus(e, decimals).replace(" ± ", "<br>± ")
        size = 10 if small else 12
        figure.add_annotation(x=learners.index(learner), y=teachers.index(teacher), text=text, showarrow=False, font_size=size)
    figure.update_xaxes(tickvals=list(range(len(learners))), ticktext=[escaped(n) for n in learners], showgrid=False, zeroline=False)
    figure.update_yaxes(
        tickvals=list(range(len(teachers))), ticktext=[escaped(n) for n in teachers], autorange="reversed", showgrid=False, automargin=True
    )
    axes(figure, "learner", "teacher")
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    return div(figure, f"figure-{field.replace('_', '-')}", height=90 + 62 * len(teachers))


def path_looks(report: Report) -> dict[tuple[str, ...], Look]:
    """Return the colour and the marker of each path in the figures. The direct path is grey."""
    chains = [option.path for option in report.advice.options[1:]]
    found = {report.advice.options[0].path: Look(GREY, "line-ew", "━", "solid")}
    for i, path in enumerate(chains):
        marker, glyph = _MARKERS[i % len(_MARKERS)]
        found[path] = Look(PALETTE[i % len(PALETTE)], marker, glyph, "solid")
    return found


def path_cost_legend(report: Report) -> list[LegendEntry]:
    """Return the legend of the cost figure, with one entry for each path."""
    looks = path_looks(report)
    names = {path: path_text(path) for path in looks}
    direct = report.advice.options[0].path
    names[direct] = "direct, trained longer"
    return [LegendEntry(f"path:{path_text(path)}", names[path], look) for path, look in looks.items()]


def cost_figure(report: Report) -> str | None:
    """Draw one point for each path with assistants. Return None if there is no such path.

    x is the path's compute. y is its predicted score minus that of direct distillation at the same compute, with an error bar.
    """
    advice = report.advice
    if len(advice.options) < 2:
        return None
    figure, looks = go.Figure(), path_looks(report)
    right = max(o.cost for o in advice.options)
    room = 0.08 * max(right - 1, 0.25)
    ends = [1 - room, right + room]
    figure.add_shape(
        type="rect", xref="paper", x0=0, x1=1, y0=-advice.margin, y1=advice.margin, fillcolor=GRID, line={"width": 0}, layer="below"
    )
    direct = advice.options[0]
    group = f"path:{path_text(direct.path)}"
    figure.add_scatter(x=ends, y=[0, 0], mode="lines", line={"color": GREY, "width": 2.5}, hoverinfo="skip", legendgroup=group)
    for option in advice.options[1:]:
        look, name = looks[option.path], path_text(option.path)
        above, below = option.high - option.expected, option.expected - option.low
        text = f"{escaped(name)}: %{{y:+.2f}} [{option.low:+.2f}, {option.high:+.2f}] at %{{x:.2f}} times direct compute, {option.basis}"
        figure.add_scatter(
            x=[option.cost],
            y=[option.expected],
            mode="markers",
            legendgroup=f"path:{name}",
            marker={"color": look.colour, "symbol": look.marker, "size": 12},
            error_y={"type": "data", "symmetric": False, "array": [above], "arrayminus": [below], "thickness": 1.5, "width": 5},
            hovertemplate=f"{text}<extra></extra>",
            meta=[name, "option"],
        )
    axes(figure, "training compute, in direct runs", f"difference in {metric_title(report.metric)}")
    figure.update_xaxes(range=ends)
    return div(figure, "figure-cost", height=400)


def lambda_figure(report: Report) -> str | None:
    """Draw which assistant MiniDisc's trade-off chooses for each lambda. Return None if there are fewer than two assistants."""
    assistants = report.ladder.assistants
    if len(assistants) < 2:
        return None
    switches = [c.high for chosen in report.sweeps.values() for c in chosen if c.high != float("inf")]
    right = max(1.0, 1.25 * max(switches, default=1.0))
    figure = go.Figure()
    for y, (name, chosen) in enumerate(reversed(list(report.sweeps.items()))):
        for c in chosen:
            high = min(c.high, right)
            colour = PALETTE[assistants.index(c.assistant) % len(PALETTE)]
            figure.add_bar(
                x=[high - c.low],
                base=[c.low],
                y=[y],
                orientation="h",
                width=0.5,
                marker={"color": colour, "opacity": 0.8},
                hovertemplate=f"{escaped(name)}: {escaped(c.assistant)} for lambda from {c.low:.3g} to {c.high:.3g}<extra></extra>",
                meta=[name, c.assistant],
            )
            if high - c.low > 0.06 * right:
                label = {"text": f"<b>{escaped(c.assistant)}</b>", "showarrow": False, "font_size": 12}
                figure.add_annotation(x=(c.low + high) / 2, y=y, **label)
        text = f"{escaped(name)}: {escaped(sweep_text(chosen))}"
        figure.add_annotation(x=0, xref="paper", xanchor="left", y=y + 0.27, yanchor="bottom", text=text, showarrow=False, font_size=11)
    axes(figure, "lambda: weight of a small size against the score", "")
    figure.update_xaxes(range=[0, right])
    figure.update_yaxes(showticklabels=False, showgrid=False, range=[-0.4, len(report.sweeps) - 0.35])
    figure.update_layout(barmode="overlay")
    return div(figure, "figure-lambda", height=90 + 74 * len(report.sweeps))


def bias_figure(report: Report) -> str:
    """Draw a bar for each model p above the student q.

    The bar is KL(q ‖ p) plus the bias of p, which is the KL from q to the original teacher.
    """
    ladder, pairs = report.ladder, report.measures.pairs
    total = pairs[ladder.teacher, ladder.student].reverse_kl
    figure = go.Figure()
    names = [ladder.teacher, *ladder.assistants]
    rows = [(name, pairs[name, ladder.student]) for name in reversed(names)]
    for y, (name, pair) in enumerate(rows):
        _bar(figure, y, 0.0, pair.reverse_kl, PALETTE[0], f"KL(q ‖ {name})")
        if name != ladder.teacher:
            colour = _ADDS if pair.bias.mean > 0 else _TAKES
            _bar(figure, y, pair.reverse_kl.mean, pair.bias, colour, f"bias of {name}", error=True)
        detail = f"KL {plus_minus(pair.reverse_kl)}" + ("" if name == ladder.teacher else f", bias {plus_minus(pair.bias)}")
        text = f"<b>{escaped(name)}</b>  {detail}"
        figure.add_annotation(x=0, xref="paper", xanchor="left", y=y + 0.25, yanchor="bottom", text=text, showarrow=False, font_size=11)
    line(figure, colour=GREY, dash="dash", width=1.5, x0=total.mean, x1=total.mean, yref="paper", y0=0, y1=1)
    axes(figure, f"nats/token on the answers of {escaped(ladder.student)}", "")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(showticklabels=False, showgrid=False, range=[-0.4, len(rows) - 0.3])
    figure.update_layout(barmode="overlay")
    return div(figure, "figure-bias", height=80 + 66 * len(rows))


def _bar(figure: go.Figure, y: float, base: float, value: Mean, colour: str, name: str, *, error: bool = False) -> None:
    spread = [1.96 * (value.se or 0.0)] if error else [0.0]
    figure.add_bar(
        x=[value.mean],
        base=[base],
        y=[y],
        orientation="h",
        width=0.46,
        marker={"color": colour, "opacity": 0.8},
        error_x={"type": "data", "array": spread, "width": 4, "thickness": 1.3, "visible": error},
        hovertemplate=f"{escaped(name)}: {plus_minus(value)} nats/token<extra></extra>",
        meta=[name],
    )
