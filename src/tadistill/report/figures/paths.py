"""Figures of paths: the models of a study with the distillations between them, and the error budget of each path with assistants.

An error budget says how much each step of a path adds to the divergence from the teacher.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from tadistill.charts import COLOURS, GREY, PLAIN, Axis, Chart, Look, bar_texts
from tadistill.charts.series import DASHES
from tadistill.config.arm import flat, members
from tadistill.metrics import MEAN, metric_title
from tadistill.plan.kinds import TRAINING
from tadistill.report.figures import looks, rows_axis
from tadistill.report.path_words import route, some
from tadistill.results.collect import Results, Summary, primary_metric
from tadistill.results.compare import added_by_steps, at_equal_compute, budget_models, teacher_of, twin_of
from tadistill.results.curves import last_dev_value
from tadistill.results.number_text import flops_text, number, parameters_text, signed, summary_text
from tadistill.results.study import ArmRecord, StageRecord
from tadistill.results.verdict import by_importance

_ROW, _HIGHER = 46, 8  # pixels: height of a row, and what is added if sloping lines pass below the names of students
_ASIDE = 0.3  # share of a row: how far a model of an earlier path is above the row
PRUNED = Look("var(--ink)", "circle", "2 5")
"""The look of a line from a model to the model that is pruned from it."""
_STUB = 0.07  # length of the line of a model that teaches itself, as a share of the width
_THIN, _WIDER = 1.5, 6.0  # pixels: the width of a line (distillation) without cost, and the additional width of the most expensive one
_ADDS, _TAKES = Look("var(--worse)"), Look("var(--better)")  # parts of an error budget that add to the divergence, and others

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
    arms = [(arm, tuple(_id(results, arm, model) for model in _line(arm))) for arm in results.plan.arms]
    first: dict[tuple[NodeId, ...], int] = {}
    for position, (_, ids) in enumerate(arms):
        for end in range(1, len(ids) + 1):
            first.setdefault(ids[:end], position)
    return sorted(arms, key=lambda found: (len(found[1]) == 1, [first[found[1][:end]] for end in range(1, len(found[1]) + 1)]))


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


def _kinds(stages: list[StageRecord]) -> str:
    """Return the methods of a model's distillations as text. Several phases with one method become `METHOD in N phases`."""
    labels = [re.match(r"distill [^,]+, (.+?)(?: \(rounds[^)]*\))?(?:, |$)", stage.label) for stage in stages]
    kinds = [label[1] if label else stage.kind for label, stage in zip(labels, stages, strict=True)]
    phases = sum(bool(re.search(r"\((?:turn \d+; )?phase \d+ of \d+\)", stage.label)) for stage in stages)
    if not phases:
        return kinds[-1] if kinds else ""
    return ", then ".join(dict.fromkeys(kinds)) if len(set(kinds)) > 1 else f"{kinds[-1]} in {phases + 1} phases"


def lattice_figure(results: Results) -> Chart | None:
    """Draw the models and the distillations between them. Return None if no arm distils a model."""
    nodes = lattice(results)
    if not any(node.is_taught for node in nodes.values()):
        return None
    rows, models = len(results.plan.arms), results.plan.from_big(dict.fromkeys(node.model for node in nodes.values()))
    place = {at: (float(models.index(node.model)), float(rows - 1 - node.row)) for at, node in nodes.items()}
    styles, dearest = line_looks(results), max((node.flops or 0.0 for node in nodes.values()), default=0.0) or 1.0
    marks = {float(i): model for i, model in enumerate(models)}
    x = Axis(-0.03, len(models) - 0.96, marks=marks, grid=False)
    summary = "Paths: " + "; ".join(f"{arm.name}: {arm.shown_path}" for arm in results.plan.arms)
    row = _ROW + (_HIGHER if any(node.others or node.start for node in nodes.values()) else 0)
    chart = Chart("figure-paths", summary, x, rows_axis(rows), height=row * rows, head=42, frame=False)
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
        sides = [(other, styles[node.kind], f"{nodes[other].model} teaches {node.model} too") for other in node.others]
        sides += [(node.start, PRUNED, f"{node.model} is pruned from {nodes[node.start].model}")] if node.start else []
        for other, look, tip in sides:
            _connect(chart, node, (place[other], place[at]), look, joint=place[at][1] + _ASIDE, width=2.0, tip=tip)
    for at, node in nodes.items():
        _add_node(chart, results, node, place[at], is_student=at[0] == "arm")
    return chart


def _add_edge(chart: Chart, node: Node, ends: tuple[tuple[float, float], tuple[float, float]], look: Look, dearest: float) -> None:
    width = 2.0 if node.flops is None else _THIN + _WIDER * (node.flops / dearest) ** 0.5
    tip = f"{node.kind}: {flops_text(node.flops)} FLOPs of one seed, for {', '.join(arm.name for arm in node.arms)}"
    _connect(chart, node, ends, look, joint=ends[1][1], width=width, tip=tip)


def _connect(
    chart: Chart, node: Node, ends: tuple[tuple[float, float], tuple[float, float]], look: Look, *, joint: float, width: float, tip: str
) -> None:
    (x0, y0), end = ends
    if abs(y0 - joint) > 1e-6:
        chart.segment((x0, y0), (x0, joint), PLAIN, width=1.4)
    chart.segment((x0, joint), end, look, width=width, name=node.arms[0].name if len(node.arms) == 1 else "", tip=tip, kind="edge")


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
    value = summary_text(summary, metric) if summary else "not finished"
    chart.mark(arm.name, (x, y), looks(results)[arm.name], size=6, tip=f"{arm.name}: {metric_title(metric)} {value}")
    left = chart.x.place(x) > 0.5  # the texts of the last column stand at its left, where a phone has room
    side, away = ("end", -12) if left else ("start", 12)
    chart.text(x, y, arm.name, side=side, name=arm.name, kind="name", shift=(away, -18 if node.others or node.start else -7))
    chart.text(x, y, value, side=side, name=arm.name, shift=(away, 16))


def line_looks(results: Results) -> Mapping[str, Look]:
    """Return the look of each kind of line in the figure of paths: of each method, and of pruning if a model is pruned."""
    nodes = lattice(results).values()
    kinds = dict.fromkeys(node.kind for node in nodes if node.is_taught)
    found = {kind: Look(f"var(--c{i % COLOURS})", "circle", DASHES[i % len(DASHES)]) for i, kind in enumerate(kinds)}
    return found | ({"pruned": PRUNED} if any(node.start for node in nodes) else {})


def lattice_notes(results: Results) -> list[str]:
    """Return sentences that explain the kinds of lines and numbers in this study's figure of paths."""
    nodes, metric = lattice(results), primary_metric(results)
    assistants = [node for at, node in nodes.items() if at[0] != "arm" and node.parent is not None]
    dev = any(last_dev_value(results, node.arms[0].name, node.model, metric) is not None for node in assistants)
    said = (
        ("A short line means that the model teaches itself.", any(node.itself for node in nodes.values())),
        ("No line leads to a student that is trained without a teacher.", any(map(_has_no_teacher, results.plan.arms))),
        ("The number below an assistant is its last dev value.", dev),
        (
            "A dotted line shows pruning, not distillation: the smaller model is pruned from the bigger model.",
            any(node.start for node in nodes.values()),
        ),
        ("A sloping line, unless it is dotted, comes from an additional teacher.", any(node.others for node in nodes.values())),
    )
    return [sentence for sentence, needed in said if needed]


# --- error budgets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """The error budget of a path: KL(student ‖ teacher) in nats/token, divided into one part for each step of the path.

    `terms` are the parts, and they add up to the KL. `total` is a direct measurement of the KL. `added` is the sum of the later parts.
    """

    arm: ArmRecord
    terms: tuple[tuple[str, Summary], ...]
    added: Summary
    total: tuple[str, Summary]
    twin: tuple[str, Summary] | None
    """KL(student ‖ teacher) of direct distillation with the same compute. None if it was not measured."""

    @property
    def bars(self) -> list[tuple[str, Summary, float]]:
        """The parts and the total, each with the value at which its bar begins in the figure: the sum of the parts before it."""
        bases = accumulate((term.mean for _, term in self.terms[:-1]), initial=0.0)
        return [(*bar, base) for bar, base in zip((*self.terms, self.total), (*bases, 0.0), strict=True)]


def budgets(results: Results) -> list[Budget]:
    """Return the error budget of each path with assistants. A path is left out if a part of its budget was not measured."""
    found: list[Budget] = []
    for arm in (arm for arm in results.plan.arms if arm.is_chain):
        upwards = budget_models(results, arm)[::-1]  # student, last assistant, ..., teacher
        steps = [(f"{a} → {b}", f"budget/{j}") for j, (a, b) in enumerate(pairwise(upwards[1:]), start=1)]
        parts = [(f"KL({upwards[0]} ‖ {upwards[1]})", "budget/0"), *steps, (f"KL({upwards[0]} ‖ {upwards[-1]})", "reverse_kl")]
        if added := added_by_steps(results, arm):
            known = [(name, results.summaries[arm.name, MEAN, metric]) for name, metric in parts]
            twin = twin_of(results, arm)
            of_twin = results.summaries.get((twin.name, MEAN, "reverse_kl")) if twin and at_equal_compute(arm, twin) else None
            found.append(Budget(arm, tuple(known[:-1]), added, known[-1], (twin.name, of_twin) if twin and of_twin else None))
    return found


def budget_text(results: Results, b: Budget) -> str:
    """Return a sentence, without a full stop: how much of the student's divergence from its teacher comes from the steps between this
    teacher and the last assistant. The sentence claims no more than the interval of this amount shows."""
    added, last, name = b.added, b.arm.path[-2], b.arm.name
    first, total = b.terms[0][1].mean, b.total[1].mean
    if added.low < added.high < 0:
        ends = f"{number(total, 'reverse_kl')} against {number(first, 'reverse_kl')} nats/token"
        return f"{name} is closer to its teacher than to its last assistant {last}: {ends}"
    steps = f"the step{'s' if len(b.terms) > 2 else ''} between {last} and {teacher_of(results, b.arm)}"
    if not 0 < added.low < added.high:
        of = f" of {number(total, 'reverse_kl')}" if added.mean > 0 else ""
        ends = f"{summary_text(added, 'reverse_kl')}{of} nats/token"
        return f"{steps[0].upper()}{steps[1:]} may add nothing to the distance between {name} and its teacher: {ends}"
    ends = f"{number(added.mean, 'reverse_kl')} of {number(total, 'reverse_kl')} nats/token"
    return f"{100 * added.mean / total:.0f} % of the distance between {name} and its teacher comes from {steps}: {ends}"


def budget_notes(results: Results) -> list[str]:
    """Return sentences on the figures of error budgets: the dashed lines, and the arms with assistants that have no figure."""
    found = budgets(results)
    drawn, lines = [b.arm.name for b in found], [b.arm.name for b in found if b.twin]
    first = next(iter(by_importance(results)), None)
    notes = [f"{budget_text(results, found[0])}."] if found and first is not None and first.arm not in drawn else []
    if lines:
        where = "" if lines == drawn else f" (only for {some(lines)}: the study has no such baseline for the other paths)"
        notes.append(f"The dashed line is the equal-compute baseline{where}.")
    for is_chain, why in ((False, "no assistant teaches the student of {}"), (True, "it was not measured")):
        without = [arm.name for arm in results.plan.arms if arm.has_assistant and arm.is_chain == is_chain and arm.name not in drawn]
        if without:
            has, these = ("has", "this arm") if len(without) == 1 else ("have", "these arms")
            notes.append(f"{some(without)} {has} no error budget, because {why.format(these)}.")
    return notes


def budget_figures(results: Results) -> Mapping[str, Chart]:
    """Draw one waterfall chart for each path: how much each step of the path adds to the divergence. All charts have the same scale."""
    found = budgets(results)
    ends = [base + end for b in found for _, term, base in b.bars for end in (0.0, term.mean, term.low, term.high)]
    low, high = min([0.0, *ends]), max([*ends, *(b.twin[1].mean for b in found if b.twin), 1e-9])
    y = Axis(low, high + 0.18 * (high - low), "nats/token")
    return {b.arm.name: _waterfall(results, b, index, y) for index, b in enumerate(found)}


def _waterfall(results: Results, budget: Budget, index: int, y: Axis) -> Chart:
    bars = budget.bars
    names = bar_texts([name for name, *_ in bars], ("last step", *["step"] * (len(bars) - 2), "in all"), breaks="‖→")
    x = Axis(-0.55, len(bars) - 0.45, marks={float(i): name for i, name in enumerate(names)}, grid=False)
    summary = f"Error budget of {budget.arm.name}: " + "; ".join(f"{name} {summary_text(term, 'reverse_kl')}" for name, term, _ in bars)
    chart, name = Chart(f"figure-budget-{index}", summary, x, y, height=250, head=24), budget.arm.name
    colours = [looks(results)[name], *(_ADDS if term.mean > 0 else _TAKES for _, term in budget.terms[1:]), PLAIN]
    chart.rule(y=0)
    for i, ((title, term, base), colour) in enumerate(zip(bars, colours, strict=True)):
        tip = f"{title}: {summary_text(term, 'reverse_kl')} nats/token"
        chart.bar(name, (i - 0.31, i + 0.31), (base, base + term.mean), colour, tip=tip)
        chart.whisker(name, i, base + term.low, base + term.high)
        text = signed(term.mean, "reverse_kl") if 0 < i < len(bars) - 1 else number(term.mean, "reverse_kl")
        chart.text(i, max(base, base + term.mean, base + term.high), text, name=name, kind="name", shift=(0, -6))
    for i, (_, term, base) in enumerate(bars[:-1]):
        chart.segment((i, base + term.mean), (i + 1, base + term.mean), Look(GREY, "circle", "2 3"))
    if budget.twin:
        twin, mean = budget.twin[0], budget.twin[1].mean
        tip = f"{twin}: {summary_text(budget.twin[1], 'reverse_kl')} nats/token"
        chart.segment((len(bars) - 1.5, mean), (len(bars) - 0.5, mean), Look("var(--ink)", "circle", "5 4"), name=twin, tip=tip)
    return chart
