"""Figures of paths: the lattice of models, and the error budget of each chain."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import plotly.graph_objects as go

from tadistill.metrics import metric_title
from tadistill.plan.specs import TRAINING
from tadistill.report.figures.style import (
    DASHES,
    GREY,
    GRID,
    PALETTE,
    LegendEntry,
    Look,
    div,
    escaped,
    line,
    looks,
    row_text,
    separate_rows,
)
from tadistill.results.collect import MEAN, Results, Summary, primary_metric
from tadistill.results.compare import budget_models, twin_of
from tadistill.results.curves import last_dev_value
from tadistill.results.study import ArmRecord, StageRecord
from tadistill.results.units import flops_text, interval, number, parameters_text, summary_text

_ROW = 58  # pixels
_THIN, _WIDER = 1.5, 6.0  # width of an edge without cost, and the additional width of the most expensive edge, in pixels

NodeId = tuple[str, str]


@dataclass
class Node:
    """A model in the figure of paths: the original teacher, an assistant or a student. Arms that train an assistant alike share it."""

    model: str
    row: int
    arms: list[ArmRecord] = field(default_factory=list)
    parent: NodeId | None = None
    kind: str = ""
    flops: float | None = None


def lattice(results: Results) -> Mapping[NodeId, Node]:
    """Return the nodes of the figure of paths. A node is in the row of its first arm. Arms that share trained models are neighbours."""
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


def _ordered(results: Results) -> list[tuple[ArmRecord, tuple[NodeId, ...]]]:
    arms = [(arm, _ids(results, arm)) for arm in results.plan.arms]
    first: dict[tuple[NodeId, ...], int] = {}
    for position, (_, ids) in enumerate(arms):
        for end in range(1, len(ids) + 1):
            first.setdefault(ids[:end], position)
    places = [[first[ids[:end]] for end in range(1, len(ids) + 1)] for _, ids in arms]
    order = sorted(range(len(arms)), key=lambda i: (len(arms[i][1]) == 1, places[i]))
    return [arms[i] for i in order]


def _ids(results: Results, arm: ArmRecord) -> tuple[NodeId, ...]:
    if len(arm.path) == 1:
        return (("arm", arm.name),)
    assistants: list[NodeId] = []
    for model in arm.path[1:-1]:
        made = [stage.key for stage in _steps(results, arm, model)]
        assistants.append(("stage", made[-1]) if made else ("model", model))
    return (("model", arm.path[0]), *assistants, ("arm", arm.name))


def _steps(results: Results, arm: ArmRecord, model: str) -> list[StageRecord]:
    seed = arm.first_seed(results.scores[arm.name])
    return [s for s in results.plan.stages if s.seed == seed and s.model == model and arm.name in s.arms and s.kind in TRAINING]


def _kind(stage: StageRecord) -> str:
    """Return the method in a label such as ``distill xl -> l, minillm on student (rounds of 256, 4 updates each), 800 updates, seed 1``."""
    found = re.match(r"distill [^,]+, (.+?)(?: \(rounds[^)]*\))?(?:, |$)", stage.label)
    return found[1] if found else stage.kind


def lattice_figure(results: Results) -> str | None:
    """Draw the models and the distillations between them. Return None if no arm distils a model."""
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
    return [LegendEntry(f"kind:{kind}", kind, look) for kind, look in _kinds(results).items()]


# --- error budget -----------------------------------------------------------------------------------------------------


_ADDS, _TAKES = "#E0475B", "#17A673"


@dataclass(frozen=True)
class Budget:
    """The error budget of a chain (nats/token): `terms` add up to KL(q ‖ p_T), `total` is measured separately (q student, p_T teacher)."""

    arm: ArmRecord
    terms: tuple[tuple[str, Summary], ...]
    total: tuple[str, Summary]
    twin: tuple[str, Summary] | None
    """KL(q ‖ p_T) of the chain's equal-compute baseline."""


def budgets(results: Results) -> list[Budget]:
    """Return the error budget of each chain for which all terms were measured."""
    found: list[Budget] = []
    for arm in (arm for arm in results.plan.arms if arm.is_chain):
        upwards = budget_models(results, arm)[::-1]  # student, last assistant, ..., teacher
        names = [f"KL({upwards[0]} ‖ {upwards[1]})", *(f"{upwards[j]} → {upwards[j + 1]}" for j in range(1, len(upwards) - 1))]
        terms = [results.summaries.get((arm.name, MEAN, f"budget/{j}")) for j in range(len(names))]
        total = results.summaries.get((arm.name, MEAN, "reverse_kl"))
        known = [(name, term) for name, term in zip(names, terms, strict=True) if term is not None]
        if total is None or len(known) < len(names):
            continue
        twin = twin_of(results, arm)
        of_twin = results.summaries.get((twin.name, MEAN, "reverse_kl")) if twin else None
        found.append(
            Budget(arm, tuple(known), (f"KL({upwards[0]} ‖ {upwards[-1]})", total), (twin.name, of_twin) if twin and of_twin else None)
        )
    return found


def budget_figures(results: Results) -> Mapping[str, str]:
    """Draw each chain's error budget as a waterfall chart. All charts have the same scale."""
    found = budgets(results)
    if not found:
        return {}
    tops = [sum(max(term.mean, 0) for _, term in b.terms) for b in found] + [b.total[1].high for b in found]
    bottoms = [min(0.0, *_ends(b)) for b in found]
    span = (min(bottoms), max(*tops, *(b.twin[1].mean for b in found if b.twin), 0.0))
    return {b.arm.name: _waterfall(results, b, index, span) for index, b in enumerate(found)}


def _ends(budget: Budget) -> list[float]:
    ends, at = [], 0.0
    for _, term in budget.terms:
        ends.append(min(at, at + term.mean, at + term.low))
        at += term.mean
    return ends


def _waterfall(results: Results, budget: Budget, index: int, span: tuple[float, float]) -> str:
    figure, at = go.Figure(), 0.0
    bars = [*budget.terms, budget.total]
    colours = [looks(results)[budget.arm.name].colour, *(_ADDS if term.mean > 0 else _TAKES for _, term in budget.terms[1:]), GREY]
    for x, ((name, term), colour) in enumerate(zip(bars, colours, strict=True)):
        last = x == len(bars) - 1
        base = 0.0 if last else at
        figure.add_bar(
            x=[x],
            y=[term.mean],
            base=[base],
            width=0.62,
            marker={"color": colour, "opacity": 0.85},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [term.high - term.mean],
                "arrayminus": [term.mean - term.low],
                "width": 5,
            },
            hovertemplate=f"{escaped(name)}: {summary_text(term, 'reverse_kl')} nats/token<extra></extra>",
            meta=[budget.arm.name, "total" if last else f"budget/{x}"],
        )
        sign = "+" if 0 < x < len(bars) - 1 and term.mean > 0 else ""
        text = f"<b>{sign}{number(term.mean, 'reverse_kl')}</b>"
        if len(bars) < 5:  # more would run into each other on a phone
            text += f"<br>{interval(term.low, term.high, 'reverse_kl')}"
        high = max(base, base + term.mean, base + term.high)
        figure.add_annotation(x=x, y=high, yanchor="bottom", yshift=2, text=text, showarrow=False, font_size=9 if len(bars) > 3 else 10)
        if not last:
            at += term.mean
            line(figure, colour=GREY, dash="dot", x0=x, x1=x + 1, y0=at, y1=at)
    if budget.twin:
        name, twin = budget.twin
        line(figure, colour=GREY, width=1.5, dash="dash", x0=len(bars) - 1.5, x1=len(bars) - 0.5, y0=twin.mean, y1=twin.mean)
    ticks = [_wrapped(name, first=x == 0, last=x == len(bars) - 1) for x, (name, _) in enumerate(bars)]
    figure.update_xaxes(tickvals=list(range(len(bars))), ticktext=ticks, range=[-0.55, len(bars) - 0.45], zeroline=False, showgrid=False)
    figure.update_xaxes(tickfont_size=11, tickangle=0)
    room = 0.2 * (span[1] - span[0])
    figure.update_yaxes(
        range=[span[0] - (0.02 if span[0] else 0) * room, span[1] + room], gridcolor=GRID, zeroline=True, zerolinecolor=GREY
    )
    figure.update_yaxes(title={"text": "nats/token", "standoff": 4}, automargin=True, title_font_size=12)
    return div(figure, f"figure-budget-{index}", height=330, bottom=52)


def _wrapped(name: str, *, first: bool, last: bool) -> str:
    return f"{escaped(name)}<br>{'trained on' if first else 'in all' if last else 'hop'}"
