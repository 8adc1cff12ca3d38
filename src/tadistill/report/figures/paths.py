"""The figure of paths: the models of a study, and the distillations between them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from tadistill.charts import PLAIN, Axis, Chart, Look
from tadistill.config.arm import flat, members
from tadistill.metrics import metric_title
from tadistill.plan.kinds import TRAINING
from tadistill.report.figures.style import kinds, looks, rows_axis
from tadistill.report.path_words import route
from tadistill.results.collect import MEAN, Results, primary_metric
from tadistill.results.curves import last_dev_value
from tadistill.results.number_text import flops_text, interval, number, parameters_text
from tadistill.results.study import ArmRecord, StageRecord

_ROW = 46  # height of a row in pixels
_ASIDE = 0.3  # share of a row: how far a model of an earlier path is above the row
PRUNED = Look("var(--ink)", "circle", "2 5")
"""The look of a line from a model to the model that is pruned from it."""
_STUB = 0.07  # length of the line of a model that teaches itself, as a share of the width
_THIN, _WIDER = 1.5, 6.0  # pixels: the width of a line (distillation) without cost, and the additional width of the most expensive one

NodeId = tuple[str, str]


@dataclass
class Node:
    """A model in the figure of paths: the original teacher, an assistant or a student. Arms that use the same trained teacher or assistant
    share its node."""

    model: str
    row: float
    arms: list[ArmRecord] = field(default_factory=list)
    parent: NodeId | None = None
    kind: str = ""
    flops: float | None = None
    start: NodeId | None = None
    """The model from which this model is pruned."""
    others: list[NodeId] = field(default_factory=list)
    """The teachers of the model, except `parent` and the model itself. They are its teachers in other paths of an arm, the second and later
    teachers if a path begins with several, and with `dense` all earlier models of its path."""
    itself: bool = False
    """True if the model teaches itself."""

    @property
    def is_taught(self) -> bool:
        return self.itself or self.parent is not None


def lattice(results: Results) -> Mapping[NodeId, Node]:
    """Return the models of the figure of paths. Each arm has a row with its last path, and arms with common models are neighbours.

    A model is in the row of the first arm that uses it. Three kinds of models are a little above the row: models that are only in an
    earlier path, the second and later teachers if the path begins with several, and models from which another model is pruned.
    """
    nodes: dict[NodeId, Node] = {}
    for row, (arm, ids) in enumerate(_ordered(results)):
        alone = _has_no_teacher(arm)
        for index, (at, model) in enumerate(zip(ids, _line(arm), strict=True)):
            node = nodes.setdefault(at, Node(model, row))
            node.arms += [arm] if arm not in node.arms else []  # a model that teaches itself is in the path twice
            if index > 0 and not alone:
                _teach(results, node, arm, ids[index - 1], at)
        _add_beside(results, nodes, arm, row)
    return nodes


def _add_beside(results: Results, nodes: dict[NodeId, Node], arm: ArmRecord, row: float) -> None:
    """Add the models that an arm uses beside its last path: models of earlier paths, the second and later teachers if the path begins with
    several, and models from which another model is pruned."""
    found = route(arm)
    beside = [*(model for part in found.parts[:-1] for model in flat(part)), *found.starts.values(), *members(arm.path[0])[1:]]
    for model in beside:
        node = nodes.setdefault(_id(results, arm, model), Node(model, row - _ASIDE))
        node.arms += [arm] if arm not in node.arms else []
    for above, model in (pair for part in found.parts[:-1] for pair in pairwise((members(part[0])[0], *part[1:]))):
        node = nodes[_id(results, arm, model)]
        if node.parent is None:
            _teach(results, node, arm, _id(results, arm, above), _id(results, arm, model))
    for model in () if _has_no_teacher(arm) else found.learners:
        node = nodes[_id(results, arm, model)]
        teachers = dict.fromkeys(_id(results, arm, name) for names in found.teachers(model) for name in names)
        node.others += [at for at in teachers if at not in (node.parent, _id(results, arm, model), *node.others)]
        if model in found.starts:
            node.start = _id(results, arm, found.starts[model])


def _teach(results: Results, node: Node, arm: ArmRecord, teacher: NodeId, own: NodeId) -> None:
    steps = _steps(results, arm, node.model)
    if teacher == own:
        node.itself = True
    else:
        node.parent = teacher
    node.kind = (_kinds([stage for stage in steps if stage.kind == "distill"]) or arm.method) + _how(arm)
    known = [stage.flops for stage in steps if stage.flops is not None]
    node.flops = sum(known) if len(known) == len(steps) and steps else None


def _has_no_teacher(arm: ArmRecord) -> bool:
    return arm.control is not None and arm.control.kind == "no_teacher"


def _how(arm: ArmRecord) -> str:
    found = route(arm)
    control = {"tempered": "tempered teacher", "random_teacher": "random teacher"}.get(found.control.kind) if found.control else None
    marks = ["with a context"] * found.context + ["moving-average teacher"] * found.ema + [control]
    return "".join(f", {mark}" for mark in marks if mark)


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
    return tuple(_id(results, arm, model) for model in _line(arm))


def _line(arm: ArmRecord) -> tuple[str, ...]:
    # if the path begins with several teachers, this line has the first one, and `Node.others` the others
    return (members(arm.path[0])[0], *arm.path[1:])


def _id(results: Results, arm: ArmRecord, model: str) -> NodeId:
    if model == arm.model:
        return "arm", arm.name
    made = [stage.key for stage in _steps(results, arm, model)] if model in route(arm).learners else []
    return ("stage", made[-1]) if made else ("model", model)


def _steps(results: Results, arm: ArmRecord, model: str) -> list[StageRecord]:
    seed = arm.first_seed(results.scores[arm.name])
    return [s for s in results.plan.stages if s.seed == seed and s.model == model and arm.name in s.arms and s.kind in TRAINING]


def line_looks(results: Results) -> Mapping[str, Look]:
    """Return the look of each kind of line in the figure of paths, for its legend."""
    pruned = any(node.start is not None for node in lattice(results).values())
    return {**method_looks(results), **({"pruned": PRUNED} if pruned else {})}


def _kinds(stages: list[StageRecord]) -> str:
    """Return the methods of a model's distillations as text. Several phases with one method become `METHOD in N phases`."""
    phases = [stage for stage in stages if re.search(r"\((?:turn \d+; )?phase \d+ of \d+\)", stage.label)]
    if not stages or not phases:
        return _kind(stages[-1]) if stages else ""
    kinds = dict.fromkeys(map(_kind, stages))
    return ", then ".join(kinds) if len(kinds) > 1 else f"{_kind(stages[-1])} in {len(phases) + 1} phases"


def _kind(stage: StageRecord) -> str:
    found = re.match(r"distill [^,]+, (.+?)(?: \(rounds[^)]*\))?(?:, |$)", stage.label)
    return found[1] if found else stage.kind


def lattice_figure(results: Results) -> Chart | None:
    """Draw the models and the distillations between them. Return None if no arm distils a model."""
    nodes = lattice(results)
    if not any(node.is_taught for node in nodes.values()):
        return None
    rows = len(results.plan.arms)
    models = results.plan.from_big(dict.fromkeys(node.model for node in nodes.values()))
    place = {at: (float(models.index(node.model)), float(rows - 1 - node.row)) for at, node in nodes.items()}
    styles, dearest = method_looks(results), max((node.flops or 0.0 for node in nodes.values()), default=0.0) or 1.0
    marks = {float(i): model for i, model in enumerate(models)}
    x = Axis(-0.03, len(models) - 0.96, marks=marks, grid=False)
    summary = "Paths: " + "; ".join(f"{arm.name}: {arm.shown_path}" for arm in results.plan.arms)
    chart = Chart("figure-paths", summary, x, rows_axis(rows), height=_ROW * rows, head=42, frame=False)
    for at, model in marks.items():
        chart.rule(x=at, kind="grid")
        side = "start" if at == 0 else "end" if at == len(models) - 1 else "middle"
        chart.text(at, chart.y.high, model, side=side, kind="name", shift=(0, -24))
        chart.text(at, chart.y.high, parameters_text(results.plan.parameters[model]), side=side, shift=(0, -8))
    for at, node in nodes.items():
        if node.parent is not None:
            _add_edge(chart, node, (place[node.parent], place[at]), styles[node.kind], dearest)
        if node.itself:
            x, y = place[at]
            _add_edge(chart, node, ((x - _STUB * (chart.x.high - chart.x.low), y), (x, y)), styles[node.kind], dearest)
        for other in node.others:
            tip = f"{nodes[other].model} teaches {node.model} too"
            _add_side(chart, node, (place[other], place[at]), styles[node.kind], tip)
        if node.start is not None:
            _add_side(chart, node, (place[node.start], place[at]), PRUNED, f"{node.model} is pruned from {nodes[node.start].model}")
    for at, node in nodes.items():
        _add_node(chart, results, node, place[at], is_student=at[0] == "arm")
    return chart


def _add_edge(chart: Chart, node: Node, ends: tuple[tuple[float, float], tuple[float, float]], look: Look, dearest: float) -> None:
    (x0, y0), (x1, y1) = ends
    if y0 != y1:
        chart.segment((x0, y0), (x0, y1), PLAIN, width=1.4)
    width = 2.0 if node.flops is None else _THIN + _WIDER * (node.flops / dearest) ** 0.5
    tip = f"{node.kind}: {flops_text(node.flops)} FLOPs of one seed, for {', '.join(arm.name for arm in node.arms)}"
    name = node.arms[0].name if len(node.arms) == 1 else ""
    chart.segment((x0, y1), (x1, y1), look, width=width, name=name, tip=tip, kind="edge")


def _add_side(chart: Chart, node: Node, ends: tuple[tuple[float, float], tuple[float, float]], look: Look, tip: str) -> None:
    (x0, y0), (x1, y1) = ends
    joint = y1 + _ASIDE
    if abs(y0 - joint) > 1e-6:
        chart.segment((x0, y0), (x0, joint), PLAIN, width=1.4)
    chart.segment((x0, joint), (x1, y1), look, width=2.0, name=node.arms[0].name if len(node.arms) == 1 else "", tip=tip, kind="edge")


def _add_node(chart: Chart, results: Results, node: Node, at: tuple[float, float], *, is_student: bool) -> None:
    (x, y), arm, metric = at, node.arms[0], primary_metric(results)
    if not is_student:
        dev = last_dev_value(results, arm.name, node.model, metric)
        text = f"dev {number(dev, metric)}" if dev is not None else "teacher" if node.model == results.plan.teacher else ""
        side, away = ("start", 8) if dev is None else ("end", -8)  # on a phone, the value of a student is near the right side
        chart.text(x, y, text, side=side, shift=(away, 14))
        chart.mark("", (x, y), PLAIN, size=5, tip=f"{node.model}, {text}: in the path of {', '.join(a.name for a in node.arms)}")
        return
    summary = results.summaries.get((arm.name, MEAN, metric))
    half = "" if summary is None else f" {interval(summary.low, summary.high, metric)}"
    value = "not finished" if summary is None else f"{number(summary.mean, metric)}{half}"
    chart.mark(arm.name, (x, y), looks(results)[arm.name], size=6, tip=f"{arm.name}: {metric_title(metric)} {value}")
    left = chart.x.place(x) > 0.5  # the texts of the last column stand at its left, where a phone has room
    side, away = ("end", -12) if left else ("start", 12)
    chart.text(x, y, arm.name, side=side, name=arm.name, kind="name", shift=(away, -7))
    chart.text(x, y, value, side=side, name=arm.name, shift=(away, 16))


def method_looks(results: Results) -> Mapping[str, Look]:
    """Return the look (colour and dash) of each method in the figure of paths."""
    return kinds(dict.fromkeys(node.kind for node in lattice(results).values() if node.is_taught))


def lattice_notes(results: Results) -> list[str]:
    """Return sentences that explain the kinds of lines and numbers in this study's figure of paths."""
    nodes, metric = lattice(results), primary_metric(results)
    assistants = [node for at, node in nodes.items() if at[0] != "arm" and node.parent is not None]
    dev = any(last_dev_value(results, node.arms[0].name, node.model, metric) is not None for node in assistants)
    pruned = any(node.start is not None for node in nodes.values())
    alone = any(map(_has_no_teacher, results.plan.arms))
    said = (
        ("A short line means that the model teaches itself.", any(node.itself for node in nodes.values())),
        ("No line leads to a student that is trained without a teacher.", alone),
        ("The number below an assistant is its last dev value.", dev),
        ("A dotted line shows pruning, not distillation: the smaller model is pruned from the bigger model.", pruned),
        (
            "A sloping line, unless it is dotted, comes from an additional teacher.",
            any(node.others for node in nodes.values()),
        ),
    )
    return [sentence for sentence, needed in said if needed]
