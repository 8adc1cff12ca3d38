"""Functions that all figures share: the look of an arm, the legends, and the conversion of a plotly figure to HTML.

Figures use the page's copy of plotly.js. Backgrounds are transparent, and the page's style sheet sets the colour of text, so that a figure
fits light pages, dark pages and print. An arm has the same colour and marker in every figure. Names are above their rows, because a phone
has no room for names beside them.
"""

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from tadistill.results.collect import Results

# Hues with enough contrast on white and on near-black
PALETTE = (
    *("#3B82F6", "#F0821E", "#17A673", "#E0475B", "#9B6BE3", "#B8921A"),
    *("#DB5FB4", "#1497B0", "#8A7560", "#6E9E2E", "#5B6BD6", "#C2603A"),
)
# 13 markers and 12 colours have no common factor, so the pairs repeat only after 156 arms
_MARKERS = (
    *(("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"), ("triangle-down", "▼"), ("star", "★"), ("cross", "✚")),
    *(("circle-open", "○"), ("square-open", "□"), ("diamond-open", "◇"), ("triangle-up-open", "△"), ("triangle-down-open", "▽")),
    ("star-open", "☆"),
)
GREY = "#8A93A3"
GRID = "rgba(128,136,150,0.22)"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
HOVER = {"bgcolor": "rgba(24,30,40,0.94)", "bordercolor": "rgba(0,0,0,0)", "font": {"size": 11, "color": "#F2F4F8"}}
_FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#6B7280"}


@dataclass(frozen=True)
class Look:
    """The look of an arm: colour, plotly's marker and the same marker as a character, and the dash of its lines."""

    colour: str
    marker: str
    glyph: str
    dash: str


@dataclass(frozen=True)
class LegendEntry:
    """A button in a legend, which shows or hides the traces of its group. `shown` is its state when the page opens."""

    group: str
    name: str
    look: Look
    shown: bool = True


def looks(results: Results) -> Mapping[str, Look]:
    """Return the look of each arm. It is the same in all figures and tables, and in the sample browser."""
    found: dict[str, Look] = {}
    for index, arm in enumerate(results.plan.arms):
        marker, glyph = _MARKERS[index % len(_MARKERS)]
        found[arm.name] = Look(PALETTE[index % len(PALETTE)], marker, glyph, DASHES[index // 3 % len(DASHES)])
    return found


def arm_group(name: str) -> str:
    return f"arm:{name}"


def arm_legend(results: Results, names: Iterable[str]) -> list[LegendEntry]:
    """Return a legend with one button for each of the arms, in the plan's order."""
    wanted, styles = set(names), looks(results)
    return [LegendEntry(arm_group(arm.name), arm.name, styles[arm.name]) for arm in results.plan.arms if arm.name in wanted]


def escaped(text: str) -> str:
    """Escape a name for a plotly text, which interprets a few tags."""
    return html.escape(text)


def row_text(y: float, text: str, *, right: bool = False, size: int = 12) -> dict[str, Any]:
    """Return a plotly annotation with a text at the left or right edge of the plot, at height `y`."""
    side = {"x": 1, "xanchor": "right"} if right else {"x": 0, "xanchor": "left"}
    return {"y": y, "xref": "paper", "yref": "y", "text": text, "showarrow": False, "font": {"size": size}, **side}


def separate_rows(figure: go.Figure, rows: int) -> None:
    for y in range(rows - 1):
        line(figure, xref="paper", x0=0, x1=1, y0=y + 0.5, y1=y + 0.5)


def line(figure: go.Figure, *, colour: str = GRID, width: float = 1, dash: str = "solid", **ends: Any) -> None:
    figure.add_shape(type="line", line={"color": colour, "width": width, "dash": dash}, layer="below", **ends)


def axes(figure: go.Figure, x: str, y: str) -> None:
    figure.update_xaxes(title={"text": x, "standoff": 6}, gridcolor=GRID, zeroline=False)
    figure.update_yaxes(title={"text": y, "standoff": 6}, gridcolor=GRID, zeroline=False, automargin=True, title_font_size=12)


def div(figure: go.Figure, name: str, *, height: int, dragmode: Any = False, top: int = 12, bottom: int = 48) -> str:
    """Return the figure as an HTML element with the id `name`."""
    figure.update_xaxes(title_font_size=12)
    figure.update_layout(
        template="none",
        height=height,
        dragmode=dragmode,
        showlegend=False,
        font=_FONT,
        hoverlabel=HOVER,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 12, "r": 12, "t": top, "b": bottom},
    )
    return pio.to_html(
        figure, full_html=False, include_plotlyjs=False, div_id=name, validate=False, config={"displayModeBar": False, "responsive": True}
    )
