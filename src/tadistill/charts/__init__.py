"""Charts as SVG, drawn in Python. The page needs no library for them. They work at every width, in hidden tabs and in print.

    chart = Chart("figure-loss", "Training loss by step", x=Axis(0, 800, "optimizer step"), y=Axis(1.2, 3.4, "nats/token"))
    chart.line("direct", steps, losses, look(0))
    page = f"<style>{style()}</style>{chart.html()}<script>{script()}</script>"

Positions along x are percentages of the width. Positions along y are pixels, so text keeps its size. Colours are variables of the style
sheet: each has one value for light, dark and printed pages. Every mark has the name of its arm in `data-arm`. The page uses it to hide
an arm in all figures.
"""

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from tadistill.charts.axis import Axis, nice_span
from tadistill.charts.chart import Chart, Point, Strip, embedded
from tadistill.charts.series import COLOURS, GREY, PLAIN, WIDTHS, Look, bar_texts, glyph, look
from tadistill.text import visible_parts

__all__ = [
    "COLOURS",
    "GREY",
    "PLAIN",
    "Axis",
    "Chart",
    "Look",
    "Point",
    "Strip",
    "bar_texts",
    "embedded",
    "glyph",
    "html_templates",
    "look",
    "nice_span",
    "script",
    "style",
]


@cache
def html_templates(*packages: str, **filters: Callable[..., Any]) -> Environment:
    """Return the templates of the packages, which are compiled once per process. They escape all values, and show hidden characters of
    values as escapes."""
    found = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in packages]),
        autoescape=True,
        finalize=visible_parts,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(filters)
    return found


def style() -> str:
    """Return the style sheet of charts. A page includes it once."""
    shown = "@container plot (min-width: {0}px) {{ .chart .placed {{ display: none; }} .chart .at{0} {{ display: inline; }} }}\n"
    fits = "".join(shown.format(width) for width in sorted(WIDTHS))
    smallest = f".chart .at{min(WIDTHS)} {{ display: inline; }}\n"
    return files(__name__).joinpath("charts.css").read_text(encoding="utf-8") + smallest + fits


def script() -> str:
    """Return the script of charts, for hover values and for saving. A page includes it once, at its end."""
    return files(__name__).joinpath("charts.js").read_text(encoding="utf-8")
