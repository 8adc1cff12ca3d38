"""The web page as HTML, in several parts. Every few seconds, the browser requests the parts and replaces those that have changed.

The part `graph` shows the stages of the study as a small graph. One node holds all seeds of a training, and the stages that evaluate the
trained models. In a wide window, nodes are in columns, with parents left of children. In a narrow window, they are a list, and arcs beside
it are the edges.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tadistill import charts
from tadistill.cluster.status import BAD
from tadistill.errors import StoreError
from tadistill.metrics import in_order, log_parts, metric_title, metric_unit
from tadistill.plan.graph import without_seed
from tadistill.plan.throughput import spoken
from tadistill.text import visible
from tadistill.watch.logs import Point, TrainingLog, thinned
from tadistill.watch.machine import Use
from tadistill.watch.state import Moment, Rollouts, StageState

PARTS = ("head", "alerts", "now", "graph", "curves", "samples", "machine", "stages", "log")
"""The ids of the parts, in the order of the page."""
_CARDS, _SAMPLED, _SHOWN = 12, 4, 8  # most running stages with a card, stages with samples, and stages with curves
_SENTENCES = {
    "running": "The study is running.",
    "queued": "Jobs of the study wait in the queue.",
    "finished": "The study is finished.",
    "killed": "The run was killed, or its machine stopped.",
    "failed": "The run ended because a stage failed.",
    "interrupted": "The run was stopped. Its stages saved their state.",
    "not running": "Nothing is running.",
}
WIDTH, HEIGHT, ACROSS, DOWN = 292, 74, 342, 88
"""In columns: width and height of a node, and the horizontal and vertical distance from a node to the next one, in pixels."""
_GAP = DOWN - HEIGHT
"""Height of the free space below a node, through which edges pass columns."""
_LANES = (0, -4, 4)
"""Distances from the middle of this space at which edges of different nodes pass."""
ROW, GUTTER = 82, 42
"""In the list: height of a node's row, and width of the margin for the arcs, in pixels."""
_ROWS = 8
_At = tuple[int, int]  # x and y of a node's top left corner, in pixels
_COMMA = re.compile(r", (?![^(]*\))")  # not one between brackets


@dataclass(frozen=True)
class Node:
    """One node of the graph. Its `stages` differ only in their seed. Its `measures` are the stages that evaluate the trained models."""

    id: str
    title: str
    detail: str
    stages: tuple[StageState, ...]
    measures: tuple[StageState, ...]
    parents: tuple[str, ...]

    @property
    def state(self) -> str:
        """The state to show for the whole node. A failure comes first, then running stages, then other unfinished stages."""
        found = {stage.state for stage in (*self.stages, *self.measures)}
        order = (*sorted(BAD), "running", "stopped", "queued", "waiting", "done")
        return next((state for state in order if state in found), "waiting")

    @property
    def says(self) -> str:
        """The states of the node's stages in words, such as ``2 done, 1 running · 1/3 measured``."""
        every = self.stages or self.measures
        counts = Counter(stage.state for stage in every)
        text = every[0].state if len(every) == 1 else ", ".join(f"{n} {state}" for state, n in counts.items())
        done = sum(stage.state == "done" for stage in self.measures)
        return f"{text} · {done}/{len(self.measures)} measured" if self.stages and self.measures else text


@dataclass(frozen=True)
class Drawn:
    """The graph of a study, drawn in two ways: nodes in columns, or nodes in a list. `edges` and `arcs` are the SVG paths of its edges."""

    nodes: tuple[tuple[Node, int, int], ...]
    """Nodes in the order of the list. Each comes with x and y of its top left corner, in pixels, for the drawing in columns."""
    width: int
    height: int
    edges: tuple[str, ...]
    arcs: tuple[str, ...]
    """The edges in the list, where each node has a height of ROW pixels."""


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
        wanted: ids of the graph's nodes whose curves and samples are shown. If it is empty, a default is shown (`picked`).
        reports: names of files of the study. The page has a link to each of them.
    """
    nodes = nodes_of(moment.stages)
    wanted = set(wanted) & {node.id for node in nodes}
    shown, about = picked(nodes, moment.logs, wanted)
    looks = [(stage, charts.look(index)) for index, stage in enumerate(shown)]
    running = [stage for stage in moment.stages if stage.state == "running"]
    order = ("done", "running", *sorted(BAD), "stopped", "queued", "waiting", *moment.counts)
    values: dict[str, Any] = {
        "moment": moment,
        "sentence": _SENTENCES[moment.state],
        "counts": [(state, moment.counts[state]) for state in dict.fromkeys(order) if moment.counts[state]],
        "reports": reports,
        "bad": [stage for stage in moment.stages if stage.state in BAD],
        "stopped": [stage for stage in moment.stages if stage.state == "stopped"],
        "running": [(stage, _spark(moment, stage)) for stage in running[:_CARDS]],
        "more": max(len(running) - _CARDS, 0),
        "about": about,
        "wanted": wanted,
        "legend": [(stage, look, charts.glyph(look)) for stage, look in looks],
        "panels": _panels(moment, looks),
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


def _panels(moment: Moment, looks: Sequence[tuple[StageState, charts.Look]]) -> list[tuple[str, Markup]]:
    """Return the titles and the charts of the curves, one for each metric and kind of stage."""
    kinds = dict.fromkeys(stage.kind for stage, _ in looks)
    names = [name for stage, _ in looks for name in moment.logs[stage.key].curves]
    found = []
    for kind in kinds:
        for name in (name for name in dict.fromkeys(("train/loss", *in_order(names), *names)) if name in names):
            lines = [(s, look, moment.logs[s.key].curves.get(name)) for s, look in looks if s.kind == kind]
            drawn = [(s, look, points) for s, look, curve in lines if curve and (points := thinned(curve))]
            if drawn:
                title, unit = _title_and_unit(name)
                title += f" ({kind})" if len(kinds) > 1 else ""
                found.append((title, _chart("-".join(f"{kind}/{name}".replace("/", " ").split()), title, unit, drawn)))
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


def _title_and_unit(name: str) -> tuple[str, str]:
    log, metric, of_set = log_parts(name)
    try:
        text, unit = metric_title(metric), metric_unit(metric)
    except StoreError:  # a metric of the user's own code
        text, unit = metric, ""
    if name == "train/loss":
        return "Training loss", unit
    text = f"{text} {'on dev' if log == 'dev' else 'of sampled text'}{f': {of_set}' if of_set else ''}"
    return text[0].upper() + text[1:], unit


def _spark(moment: Moment, stage: StageState) -> Markup:
    log = moment.logs.get(stage.key)
    points = thinned(log.curves.get("train/loss", ())) if log else []
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


# --- the graph ------------------------------------------------------------------------------------------------------------


def nodes_of(stages: Iterable[StageState]) -> list[Node]:
    """Return the nodes of a study. Parents come before children."""
    home: dict[str, str] = {}  # key of a stage -> name of its node
    groups: dict[str, tuple[list[StageState], list[StageState]]] = {}
    for stage in stages:
        if stage.measures:
            name = home.get(stage.parents.get("model", ""), f"as it is: {stage.model}")
        else:
            name = f"{stage.kind} {without_seed(stage.label)}"
        groups.setdefault(name, ([], []))[stage.measures].append(stage)
        home[stage.key] = name
    ids = {name: (own or measures)[0].key for name, (own, measures) in groups.items()}
    nodes = []
    for name, (own, measures) in sorted(groups.items(), key=lambda group: not group[1][0]):  # models that are not trained come last
        title, *detail = _COMMA.split(without_seed(own[0].label), maxsplit=1) if own else (name.removeprefix("as it is: "), "as it is")
        above = dict.fromkeys(home[key] for stage in own for key in stage.parents.values() if key in home)
        parents = tuple(ids[other] for other in above if other != name)
        nodes.append(Node(ids[name], title, "".join(detail), tuple(own), tuple(measures), parents))
    return nodes


def draw(nodes: Sequence[Node]) -> Drawn:
    """Place the nodes in columns. A node is to the right of its parents. A column has at most `_ROWS` nodes."""
    depth: dict[str, int] = {}
    for node in nodes:  # parents come before children
        depth[node.id] = 1 + max((depth[parent] for parent in node.parents if parent in depth), default=-1)
    columns: dict[int, list[Node]] = {}
    for node in nodes:
        columns.setdefault(depth[node.id], []).append(node)
    at: dict[str, tuple[int, int]] = {}
    first = 0  # the first column of this depth
    for number in sorted(columns):
        ordered = sorted(columns[number], key=lambda node: fmean([at[p][1] for p in node.parents if p in at] or [0.0]))
        for place, node in enumerate(ordered):
            at[node.id] = (first + place // _ROWS) * ACROSS, place % _ROWS * DOWN
        first += -(-len(ordered) // _ROWS)
    pairs = [(parent, node.id) for node in nodes for parent in node.parents if parent in at]
    row = {node.id: number for number, node in enumerate(nodes)}
    low = max((y for _, y in at.values()), default=0) + HEIGHT
    return Drawn(
        nodes=tuple((node, *at[node.id]) for node in nodes),
        width=max((x for x, _ in at.values()), default=0) + WIDTH,
        height=low + _GAP * any(_columns(at[a], at[b]) > 1 for a, b in pairs),
        edges=_edges([(at[a], at[b]) for a, b in pairs]),
        arcs=tuple(_arc(row[a], row[b], len(nodes)) for a, b in pairs),
    )


def picked(nodes: Sequence[Node], logs: Mapping[str, TrainingLog], wanted: Container[str]) -> tuple[list[StageState], str]:
    """Return the trainings whose curves are shown, at most `_SHOWN`, and a sentence that says which they are.

    The trainings in the nodes with the ids `wanted` are shown. If these nodes have no training, the running trainings are shown, else the
    interrupted ones, else those with the newest logs.
    """
    some = [s for node in nodes if node.id in wanted for s in node.stages if s.key in logs]
    every = [s for node in nodes for s in node.stages if s.key in logs]
    if some:
        return some[:_SHOWN], _about("chosen", len(some))
    for what, states in (("running", {"running"}), ("interrupted", {"stopped"} | BAD)):
        if found := [s for s in every if s.state in states]:
            return found[:_SHOWN], _about(what, len(found))
    newest = sorted(every, key=lambda s: -logs[s.key].changed)
    return newest[:6], "The stages with the newest logs." if newest else ""


def _about(what: str, count: int) -> str:
    return f"The {what} stages." if count <= _SHOWN else f"{_SHOWN} of the {count} {what} stages; choose others in the graph."


def _columns(start: _At, end: _At) -> int:
    return (end[0] - start[0]) // ACROSS


def _edges(ends: Sequence[tuple[_At, _At]]) -> tuple[str, ...]:
    """Return the SVG paths of edges. An edge over several columns passes below the nodes between its ends, not behind them.

    Edges from different nodes do not share a lane, as long as there is a free one, because they would look like one edge.
    """
    taken: dict[int, set[_At]] = {}
    found = []
    for start, end in ends:
        x, y, down = start[0] + WIDTH, start[1] + HEIGHT // 2, end[1] + HEIGHT // 2
        if _columns(start, end) < 2:
            found.append(f"M{x} {y}{_bend(x, y, end[0], down)}")
            continue
        last = max(start[1], end[1]) // DOWN
        middles = sorted((row * DOWN + HEIGHT + _GAP // 2 for row in range(last + 1)), key=lambda at: abs(at - y) + abs(at - down))
        lanes = [middle + shift for middle in middles for shift in _LANES]
        lane = next((lane for lane in lanes if taken.get(lane, {start}) == {start}), lanes[0])
        taken.setdefault(lane, set()).add(start)
        near, far = start[0] + ACROSS, end[0] - ACROSS + WIDTH
        found.append(f"M{x} {y}{_bend(x, y, near, lane)}H{far}{_bend(far, lane, end[0], down)}")
    return tuple(found)


def _bend(x: int, y: int, to: int, down: int) -> str:
    by = (ACROSS - WIDTH) // 2 + 20
    return f"C{x + by} {y} {to - by} {down} {to} {down}"


def _arc(start: int, end: int, rows: int) -> str:
    y, to = start * ROW + ROW // 2, end * ROW + ROW // 2
    out = GUTTER - 8 - min(abs(end - start) / max(rows - 1, 1), 1.0) * (GUTTER - 14)
    return f"M{GUTTER} {y}C{out - 10:.0f} {y} {out - 10:.0f} {to} {GUTTER} {to}"
