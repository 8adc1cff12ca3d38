"""The advice as a page: one file that holds its scripts, styles and data, in the report's style."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tadistill.advise import figures
from tadistill.advise.probes import TOP_K
from tadistill.advise.record import TAGS, Report, plus_minus
from tadistill.advise.terminal import basis_line, interval, signed, verdict_line
from tadistill.advise.words import measure_name
from tadistill.results import units

_COLUMNS = (
    ("KL(q ‖ p)", "nats/token", "reverse_kl"),
    ("overlap", f"of {TOP_K} likeliest", "overlap"),
    ("mass", f"on p's {TOP_K} likeliest", "mass"),
    ("entropy gap", "H(p) − H(q), nats", "entropy_gap"),
    ("bias", "E[log p − log T], nats", "bias"),
    ("KL(p ‖ q)", "references, nats/token", "forward_kl"),
    ("loss ratio", "p / q, references", "loss_ratio"),
    ("advantage", "references, nats/token", "advantage"),
)
_HEATMAPS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("reverse_kl", "Initial KL(q ‖ p), nats/token", "0: both are the same", {}),
    ("overlap", f"Overlap of the {TOP_K} likeliest tokens", "1: both have the same", {"most": 1.0, "decimals": 2}),
    ("entropy_gap", "Entropy gap H(p) − H(q), nats", "red: the teacher is the sharper one", {"two_sided": True}),
)


@dataclass(frozen=True)
class Panel:
    """A picture with its caption."""

    title: str
    hint: str
    figure: Markup


def render_page(report: Report) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("tadistill.advise"), PackageLoader("tadistill.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(signed=signed, estimate=plus_minus, names=_names, few=_few)
    return environment.get_template("advice.html.j2").render(
        report=report,
        advice=report.advice,
        looks={" > ".join(path): look for path, look in figures.path_looks(report).items()},
        verdict=verdict_line(report.advice),
        basis=basis_line(report),
        interval=interval,
        units=units,
        columns=_COLUMNS,
        tags=TAGS,
        heatmaps=[Panel(title, hint, Markup(figures.heatmap(report.measures, field, **look))) for field, title, hint, look in _HEATMAPS],
        cost=_markup(figures.cost_figure(report)),
        cost_legend=figures.cost_legend(report),
        sweep=_markup(figures.lambda_figure(report)),
        bias=Markup(figures.bias_figure(report)),
        plotly_js=Markup(get_plotlyjs()),
    )


def _names(measures: Iterable[str]) -> str:
    return ", ".join(map(measure_name, measures))


def _few(measures: Sequence[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(measures) - 3} more" if len(measures) > 3 else ""
    return _names(measures[:3]) + more


def _markup(figure: str | None) -> Markup | None:
    return Markup(figure) if figure else None
