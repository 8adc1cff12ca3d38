"""The path lattice: what was distilled from what, over columns of model size."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import plotly.graph_objects as go

from tadistill.plan.specs import TRAINING
from tadistill.report.figures.style import DASHES, GREY, PALETTE, LegendEntry, Look, div, escaped, line, looks, row_text, separate_rows
from tadistill.results.collect import MEAN, Results, primary_metric
from tadistill.results.curves import last_dev_value
from tadistill.results.files import Arm, Stage
from tadistill.results.units import flops_text, metric_title, number, parameters_text

_ROW = 58  # pixels
_THIN, _WIDER = 1.5, 6.0  # pixels of an edge that costs nothing, and what the dearest one has more

NodeId = tuple[str, str]


@dataclass
class Node:
    """A model of the lattice: the original teacher, an assistant (shared by all arms that train it alike), or an arm's student."""

    model: str
    row: int
    arms: list[Arm] = field(default_factory=list)
    parent: NodeId | None = None
    kind: str = ""
    flops: float | None = None


def lattice(results: Results) -> Mapping[NodeId, Node]:
    """The nodes, each in the row of its first arm; arms that share models are neighbours."""
    nodes: dict[NodeId, Node] = {}
    for row, (arm, ids) in enumerate(_ordered(results)):
        for index, (at, model) in enumerate(zip(ids, arm.path, strict=True)):
            node = nodes.setdefault(at, Node(model, row))
            node.arms.append(arm)
            if index > 0:
                steps = _steps(results, arm, model)
                node.parent = ids[index - 1]
                node.kind = next((_kind(stage) for stage in steps[::-1] if stage.kind == "distill"), arm.method)
                known = [stage.flops for stage in steps if stage.flops is not None]
                node.flops = sum(known) if len(known) == len(steps) and steps else None
    return nodes


def _ordered(results: Results) -> list[tuple[Arm, tuple[NodeId, ...]]]:
    """Arms with their nodes; arms behind the same first nodes stand together, where the first of them stands in the plan."""
    arms = [(arm, _ids(results, arm)) for arm in results.plan.arms]
    first: dict[tuple[NodeId, ...], int] = {}
    for position, (_, ids) in enumerate(arms):
        for end in range(1, len(ids) + 1):
            first.setdefault(ids[:end], position)
    places = [[first[ids[:end]] for end in range(1, len(ids) + 1)] for _, ids in arms]
    order = sorted(range(len(arms)), key=lambda i: (len(arms[i][1]) == 1, places[i]))
    return [arms[i] for i in order]


def _ids(results: Results, arm: Arm) -> tuple[NodeId, ...]:
    if len(arm.path) == 1:
        return (("arm", arm.name),)
    assistants: list[NodeId] = []
    for model in arm.path[1:-1]:
        made = [stage.key for stage in _steps(results, arm, model)]
        assistants.append(("stage", made[-1]) if made else ("model", model))
    return (("model", arm.path[0]), *assistants, ("arm", arm.name))


def _steps(results: Results, arm: Arm, model: str) -> list[Stage]:
    """The stages of the arm's first training seed that train the model, in the plan's order."""
    seed = min(arm.evaluate)
    return [s for s in results.plan.stages if s.seed == seed and s.model == model and arm.name in s.arms and s.kind in TRAINING]


def _kind(stage: Stage) -> str:
    """The method out of a label such as ``distill xl -> l, minillm on student (rounds of 256, 4 updates each), 800 updates, seed 1``."""
    found = re.match(r"distill [^,]+, (.+?)(?: \(rounds[^)]*\))?(?:, |$)", stage.label)
    return found[1] if found else stage.kind


def lattice_figure(results: Results) -> str | None:
    """The figure; None when no arm distils anything."""
    nodes = lattice(results)
    if all(node.parent is None for node in nodes.values()):
        return None
    rows = len(results.plan.arms)
    models = sorted(dict.fromkeys(node.model for node in nodes.values()), key=lambda model: -results.plan.parameters[model])
    place = {at: (models.index(node.model), rows - 1 - node.row) for at, node in nodes.items()}
    styles, dearest = _kinds(results), max((node.flops or 0.0 for node in nodes.values()), default=0.0) or 1.0
    figure = go.Figure()
    for x in range(len(models)):
        line(figure, x0=x, x1=x, y0=-0.5, y1=rows - 0.5)
    for at, node in nodes.items():
        if node.parent is None:
            continue
        (x0, y0), (x1, y1), look = place[node.parent], place[at], styles[node.kind]
        if y0 != y1:
            line(figure, colour=GREY, width=1.4, x0=x0, x1=x0, y0=y0, y1=y1)
        width = 2.0 if node.flops is None else _THIN + _WIDER * (node.flops / dearest) ** 0.5
        middle = (
            f"{escaped(node.kind)}: {flops_text(node.flops)} FLOPs of one seed, for {', '.join(escaped(arm.name) for arm in node.arms)}"
        )
        figure.add_scatter(
            x=[x0, (x0 + x1) / 2, x1],
            y=[y1, y1, y1],
            mode="lines",
            legendgroup=f"kind:{node.kind}",
            line={"color": look.colour, "width": width, "dash": look.dash},
            hovertemplate=f"{middle}<extra></extra>",
            meta=[node.arms[0].name, "edge"],
        )
    for at, node in nodes.items():
        _add_node(figure, results, node, place[at], is_student=at[0] == "arm", is_last=place[at][0] == len(models) - 1)
    separate_rows(figure, rows)
    titles = [f"<b>{escaped(model)}</b><br>{parameters_text(results.plan.parameters[model])}" for model in models]
    figure.update_xaxes(range=[-0.18, len(models) - 0.82], side="top", showgrid=False, zeroline=False)
    figure.update_xaxes(tickvals=list(range(len(models))), ticktext=titles)
    figure.update_yaxes(range=[-0.52, rows - 0.48], visible=False)
    return div(figure, "figure-paths", height=_ROW * rows + 62, top=50, bottom=12)


def _add_node(figure: go.Figure, results: Results, node: Node, at: tuple[int, int], *, is_student: bool, is_last: bool) -> None:
    (x, y), arm, metric = at, node.arms[0], primary_metric(results)
    look = looks(results)[arm.name]
    if is_student:
        summary = results.summaries.get((arm.name, MEAN, metric))
        half = None if summary is None else (summary.high - summary.low) / 2
        value = "not finished" if summary is None or half is None else f"<b>{number(summary.mean, metric)}</b> ± {number(half, metric)}"
        edge = {} if is_last else {"xref": "x", "x": x, "xanchor": "left", "xshift": -6}
        figure.add_annotation(row_text(y + 0.3, f"<b>{escaped(arm.name)}</b>", right=True) | edge)
        figure.add_annotation(row_text(y - 0.3, value, right=True, size=11) | edge)
        marker = {"color": look.colour, "symbol": look.marker, "size": 13, "line": {"width": 2 if "open" in look.marker else 0}}
        hover = f"{escaped(arm.name)}: {metric_title(metric)} {value}"
    else:
        dev = last_dev_value(results, arm, node.model, metric)
        text = f"dev {number(dev, metric)}" if dev is not None else "teacher" if node.model == results.plan.teacher else ""
        side = {"xanchor": "right", "xshift": -4} if node.parent else {"xanchor": "left", "xshift": 4}
        figure.add_annotation(x=x, y=y - 0.3, text=text, showarrow=False, font={"size": 11}, visible=bool(text), **side)
        marker = {"color": GREY, "symbol": "circle", "size": 12}
        hover = f"{escaped(node.model)}, {text}: in the path of {', '.join(escaped(a.name) for a in node.arms)}"
    figure.add_scatter(
        x=[x], y=[y], mode="markers", marker=marker, hovertemplate=f"{hover}<extra></extra>", cliponaxis=False, meta=[arm.name, "node"]
    )


def _kinds(results: Results) -> Mapping[str, Look]:
    kinds = dict.fromkeys(node.kind for node in lattice(results).values() if node.parent is not None)
    return {kind: Look(PALETTE[i % len(PALETTE)], "line-ew", "━", DASHES[i % len(DASHES)]) for i, kind in enumerate(kinds)}


def lattice_legend(results: Results) -> list[LegendEntry]:
    """One entry for each kind of distillation."""
    return [LegendEntry(f"kind:{kind}", kind, look) for kind, look in _kinds(results).items()]
