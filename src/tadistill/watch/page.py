"""The web page as HTML, in several parts. Every few seconds, the browser requests the parts and replaces those that have changed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tadistill import charts
from tadistill.errors import StoreError
from tadistill.metrics import in_order, log_parts, metric_title, metric_unit
from tadistill.runner.local import spoken
from tadistill.safe_text import visible
from tadistill.watch.graph import GUTTER, HEIGHT, ROW, WIDTH, Node, draw, nodes_of, picked
from tadistill.watch.logs import Curve, Point
from tadistill.watch.machine import Use
from tadistill.watch.state import BAD, Moment, Rollouts, StageState

PARTS = ("head", "alerts", "now", "graph", "curves", "samples", "machine", "stages", "log")
"""The ids of the parts, in the order of the page."""
_CARDS, _SAMPLED = 12, 4
_SENTENCES = {
    "running": "The study is running.",
    "queued": "Jobs of the study wait in the queue.",
    "finished": "The study is finished.",
    "killed": "The run was killed, or its machine stopped.",
    "failed": "The run ended because a stage failed.",
    "interrupted": "The run was stopped. Its stages saved their state.",
    "not running": "Nothing is running.",
}


@dataclass(frozen=True)
class Panel:
    """The curves of one metric."""

    title: str
    chart: Markup


def shell(moment: Moment, parts: Mapping[str, str]) -> str:
    """Return the HTML of the whole page. `parts` maps the id of each part to its HTML (`render`)."""
    own = files("tadistill.watch").joinpath("templates")
    style = f"{charts.style()}\n{own.joinpath('watch.css').read_text(encoding='utf-8')}"
    script = f"{charts.script()}\n{own.joinpath('watch.js').read_text(encoding='utf-8')}"
    return (
        _templates()
        .get_template("page.html.j2")
        .render(
            moment=moment,
            parts={name: Markup(parts[name]) for name in PARTS},
            style=Markup(style),
            script=Markup(script),
            title=title(moment),
        )
    )


def title(moment: Moment) -> str:
    """Return the title that the browser shows for the page."""
    return f"{moment.counts['done']}/{len(moment.stages)} {moment.state} · {moment.name}"


def render(moment: Moment, use: Use, wanted: Iterable[str], reports: Sequence[str]) -> dict[str, str]:
    """Return the parts of the page by id.

    Args:
        wanted: ids of the graph's nodes whose curves and samples are shown. If it is empty, a default is shown (`graph.picked`).
        reports: names of files of the study. The page has a link to each of them.
    """
    nodes = nodes_of(moment.stages)
    wanted = set(wanted) & {node.id for node in nodes}
    shown, about = picked(nodes, moment.logs, wanted)
    running = [stage for stage in moment.stages if stage.state == "running"]
    values: dict[str, Any] = {
        "moment": moment,
        "sentence": _SENTENCES[moment.state],
        "counts": _in_order(moment),
        "reports": reports,
        "bad": [stage for stage in moment.stages if stage.state in BAD],
        "stopped": [stage for stage in moment.stages if stage.state == "stopped"],
        "running": [(stage, _spark(moment, stage)) for stage in running[:_CARDS]],
        "more": max(len(running) - _CARDS, 0),
        "about": about,
        "wanted": wanted,
        "legend": [(stage, look, charts.glyph(look)) for stage, look in _looks(shown)],
        "panels": _panels(moment, shown),
        "graph": draw(nodes),
        "size": {"width": WIDTH, "height": HEIGHT, "row": ROW, "gutter": GUTTER},
        "samples": _samples(moment, nodes, wanted),
        "use": use,
    }
    template = _templates().get_template("parts.html.j2").module
    return {name: str(getattr(template, f"part_{name}")(values)).strip() for name in PARTS}


@cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("tadistill.watch"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters.update(spoken=spoken, visible=visible, bytes=_bytes, code=_code)
    found.globals.update(bad=BAD)
    return found


def _in_order(moment: Moment) -> list[tuple[str, int]]:
    counts = moment.counts
    return [
        (state, counts[state])
        for state in dict.fromkeys(("done", "running", *sorted(BAD), "stopped", "queued", "waiting", *counts))
        if counts[state]
    ]


def _looks(stages: Sequence[StageState]) -> list[tuple[StageState, charts.Look]]:
    return [(stage, charts.look(index)) for index, stage in enumerate(stages)]


def _panels(moment: Moment, shown: Sequence[StageState]) -> list[Panel]:
    looks, found = _looks(shown), []
    kinds = dict.fromkeys(stage.kind for stage in shown)
    names = [name for stage in shown for name in moment.logs[stage.key].curves]
    order = [name for name in dict.fromkeys(("train/loss", *in_order(names), *names)) if name in names]
    for kind in kinds:
        for name in order:
            lines = [(s, look, moment.logs[s.key].curves.get(name)) for s, look in looks if s.kind == kind]
            drawn = [(s, look, points) for s, look, curve in lines if curve and (points := curve.points())]
            if drawn:
                text = f"{_title(name)} ({kind})" if len(kinds) > 1 else _title(name)
                found.append(Panel(text, _chart("-".join(f"{kind}/{name}".replace("/", " ").split()), text, _unit(name), drawn)))
    return found


def _chart(name: str, text: str, unit: str, lines: Sequence[tuple[StageState, charts.Look, list[Point]]]) -> Markup:
    ends = [min(max(stage.total, points[-1].step), 1.25 * points[-1].step) for stage, _, points in lines]
    low, high = charts.nice_span(value for _, _, points in lines for point in points for value in (point.low, point.high))
    # steps count from 0, so that all panels of a stage agree
    chart = charts.Chart(name, f"{text} by update", charts.Axis(0, max(*ends, 1), "update"), charts.Axis(low, high, unit), height=170)
    for stage, look, points in lines:
        steps = [point.step for point in points]
        if any(point.low < point.high for point in points):
            chart.band(stage.label, steps, [point.low for point in points], [point.high for point in points], look)
        chart.line(stage.label, steps, [point.mean for point in points], look)
    return chart.html()


def _title(name: str) -> str:
    if name == "train/loss":
        return "Training loss"
    log, metric, of_set = log_parts(name)
    try:
        text = metric_title(metric)
    except StoreError:  # a metric of the user's own code
        text = metric
    text = f"{text} {'on dev' if log == 'dev' else 'of sampled text'}{f': {of_set}' if of_set else ''}"
    return text[0].upper() + text[1:]


def _unit(name: str) -> str:
    try:
        return metric_unit(log_parts(name)[1])
    except StoreError:
        return ""


def _spark(moment: Moment, stage: StageState) -> Markup:
    log = moment.logs.get(stage.key)
    points = log.curves.get("train/loss", Curve()).points() if log else []
    if len(points) < 2:
        return Markup("")
    low, high = min(p.mean for p in points), max(p.mean for p in points)
    across, scale = max(stage.total, points[-1].step), (high - low) or 1.0
    path = "L".join(f"{100 * p.step / across:.1f} {2 + 26 * (high - p.mean) / scale:.1f}" for p in points)
    text = f"training loss, from {points[0].mean:.3g} to {points[-1].mean:.3g}"
    head = 'class="spark" viewBox="0 0 100 30" preserveAspectRatio="none" role="img"'
    return Markup(f'<svg {head} aria-label="{escape(text)}"><path d="M{path}"/></svg>')


def _samples(moment: Moment, nodes: Sequence[Node], wanted: set[str]) -> list[tuple[StageState, Rollouts]]:
    every = [(stage, moment.rollouts[stage.key]) for node in nodes for stage in node.stages if stage.key in moment.rollouts]
    chosen = {stage.key for node in nodes if node.id in wanted for stage in node.stages}
    some = [found for found in every if found[0].key in chosen] or every
    return sorted(some, key=lambda found: (found[0].state != "running", -found[1].changed))[:_SAMPLED]


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _code(text: str) -> Markup:
    pieces = [str(escape(visible(piece))) for piece in text.split("`")]
    return Markup("".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces)))
