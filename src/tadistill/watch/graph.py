"""The stages of a study as a small graph. One node holds all seeds of a training, and the stages that evaluate the trained models.

In a wide window, nodes are in columns, with parents left of children. In a narrow window, they are a list, and arcs beside it are the
edges.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tadistill.watch.logs import TrainingLog
from tadistill.watch.state import BAD, StageState

WIDTH, HEIGHT, ACROSS, DOWN = 292, 74, 342, 88
"""In columns: width and height of a node, and the horizontal and vertical distance from a node to the next one, in pixels."""
ROW, GUTTER = 82, 42
"""In the list: height of a node's row, and width of the margin for the arcs, in pixels."""
_ROWS = 8
_SEED = re.compile(r",?\s*seed \d+")
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
    """Nodes in the order of the list. Each comes with the place of its left top corner in the drawing with columns, in pixels."""
    width: int
    height: int
    edges: tuple[str, ...]
    arcs: tuple[str, ...]
    """The edges in the list, where each node has a height of ROW pixels."""


def nodes_of(stages: Iterable[StageState]) -> list[Node]:
    """Return the nodes of a study. Parents come before children."""
    group: dict[str, str] = {}  # key of a stage -> its node
    members: dict[str, list[StageState]] = {}
    measures: dict[str, list[StageState]] = {}
    for stage in stages:
        if stage.measures:
            home = group.get(stage.parents.get("model", ""), f"as it is: {stage.model}")
            measures.setdefault(home, []).append(stage)
        else:
            home = f"{stage.kind} {_SEED.sub('', stage.label)}"
            members.setdefault(home, []).append(stage)
        group[stage.key] = home
    found = []
    for home in dict.fromkeys((*members, *measures)):
        own = members.get(home, [])
        above = dict.fromkeys(group[key] for stage in own for key in stage.parents.values() if key in group)
        title, *rest = _COMMA.split(_SEED.sub("", own[0].label), maxsplit=1) if own else (home.removeprefix("as it is: "), "as it is")
        detail = "".join(rest)
        first = (own or measures[home])[0].key
        found.append((home, first, title, detail, own, [name for name in above if name != home]))
    ids = {home: first for home, first, *_ in found}
    return [
        Node(first, title, detail, tuple(own), tuple(measures.get(home, ())), tuple(ids[name] for name in above))
        for home, first, title, detail, own, above in found
    ]


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
    return Drawn(
        nodes=tuple((node, *at[node.id]) for node in nodes),
        width=max((x for x, _ in at.values()), default=0) + WIDTH,
        height=max((y for _, y in at.values()), default=0) + HEIGHT,
        edges=tuple(_edge(at[a], at[b]) for a, b in pairs),
        arcs=tuple(_arc(row[a], row[b], len(nodes)) for a, b in pairs),
    )


def picked(nodes: Iterable[Node], logs: Mapping[str, TrainingLog], wanted: Iterable[str]) -> tuple[list[StageState], str]:
    """Return the trainings whose curves are shown, at most `_SHOWN`, and a sentence that says which they are.

    The trainings in the nodes with the ids `wanted` are shown. If these nodes have no training, the running trainings are shown, else the
    interrupted ones, else those with the newest logs.
    """
    chosen, nodes = set(wanted), list(nodes)
    some = [s for node in nodes if node.id in chosen for s in node.stages if s.key in logs]
    every = [s for node in nodes for s in node.stages if s.key in logs]
    if some:
        return some[:_SHOWN], _about("chosen", len(some))
    for what, states in (("running", {"running"}), ("interrupted", {"stopped"} | BAD)):
        if found := [s for s in every if s.state in states]:
            return found[:_SHOWN], _about(what, len(found))
    newest = sorted(every, key=lambda s: -logs[s.key].file.changed)
    return newest[: min(_SHOWN, 6)], "The stages with the newest logs." if newest else ""


_SHOWN = 8


def _about(what: str, count: int) -> str:
    return f"The {what} stages." if count <= _SHOWN else f"{_SHOWN} of the {count} {what} stages; choose others in the graph."


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    x, y = start[0] + WIDTH, start[1] + HEIGHT // 2
    to, down = end[0], end[1] + HEIGHT // 2
    bend = (ACROSS - WIDTH) // 2 + 20
    return f"M{x} {y}C{x + bend} {y} {to - bend} {down} {to} {down}"


def _arc(start: int, end: int, rows: int) -> str:
    y, to = start * ROW + ROW // 2, end * ROW + ROW // 2
    out = GUTTER - 8 - min(abs(end - start) / max(rows - 1, 1), 1.0) * (GUTTER - 14)
    return f"M{GUTTER} {y}C{out - 10:.0f} {y} {out - 10:.0f} {to} {GUTTER} {to}"
