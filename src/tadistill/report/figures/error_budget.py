"""The error budget of each path with assistants: how much each step of the path adds to the divergence from the teacher."""

from collections.abc import Mapping
from dataclasses import dataclass

from tadistill.charts import GREY, PLAIN, Axis, Chart, Look
from tadistill.report.figures.style import looks
from tadistill.report.path_words import some
from tadistill.results.collect import MEAN, Results, Summary
from tadistill.results.compare import budget_models, twin_of
from tadistill.results.number_text import number, signed, summary_text
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import by_importance

_ADDS, _TAKES = Look("var(--worse)"), Look("var(--better)")


@dataclass(frozen=True)
class Budget:
    """The error budget of a path: KL(student ‖ teacher) in nats/token, divided into one part for each step of the path.

    `terms` are the parts, and they add up to the KL. `total` is a direct measurement of the KL.
    """

    arm: ArmRecord
    terms: tuple[tuple[str, Summary], ...]
    total: tuple[str, Summary]
    twin: tuple[str, Summary] | None
    """KL(student ‖ teacher) of direct distillation with the same compute. None if it was not measured."""


def budgets(results: Results) -> list[Budget]:
    """Return the error budget of each path with assistants. A path is left out if a part of its budget was not measured."""
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


def budget_text(results: Results, b: Budget) -> str:
    """Return a sentence, without a full stop: how much of the student's divergence from its teacher comes from the steps between this
    teacher and the last assistant."""
    added, last = sum(term.mean for _, term in b.terms[1:]), b.arm.path[-2]
    first, total = b.terms[0][1].mean, b.total[1].mean
    if added <= 0 or total <= 0:
        ends = f"{number(total, 'reverse_kl')} against {number(first, 'reverse_kl')} nats/token"
        return f"{b.arm.name} is closer to its teacher than to its last assistant {last}: {ends}"
    steps = f"the step{'s' if len(b.terms) > 2 else ''} between {last} and {results.plan.teacher or b.arm.path[0]}"
    ends = f"{number(added, 'reverse_kl')} of {number(total, 'reverse_kl')} nats/token"
    return f"{100 * added / total:.0f} % of the distance between {b.arm.name} and its teacher comes from {steps}: {ends}"


def budget_notes(results: Results) -> list[str]:
    """Return sentences on the figures of error budgets: the dashed lines, and the arms with assistants that have no figure."""
    found = budgets(results)
    lines = [b.arm.name for b in found if b.twin]
    without = [arm for arm in results.plan.arms if arm.has_assistant and arm.name not in {b.arm.name for b in found}]
    apart, unknown = ([arm.name for arm in without if arm.is_chain == chain] for chain in (False, True))
    first = next(iter(by_importance(results)), None)
    apart_from_answer = found and first is not None and first.arm not in {b.arm.name for b in found}
    where = "" if len(lines) == len(found) else f" (only for {some(lines)}: the study has no such baseline for the other paths)"
    return [
        *([f"{budget_text(results, found[0])}."] if apart_from_answer else []),
        *([f"The dashed line is the equal-compute baseline{where}."] if lines else []),
        *([f"{some(apart)} {_has(apart)} no error budget, because no assistant teaches the student of {_this(apart)}."] if apart else []),
        *([f"{some(unknown)} {_has(unknown)} no error budget, because it was not measured."] if unknown else []),
    ]


def _has(names: list[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _this(names: list[str]) -> str:
    return "this arm" if len(names) == 1 else "these arms"


def budget_figures(results: Results) -> Mapping[str, Chart]:
    """Draw one waterfall chart for each path: how much each step of the path adds to the divergence. All charts have the same scale."""
    found = budgets(results)
    if not found:
        return {}
    tops = [sum(max(term.mean, 0) for _, term in b.terms) for b in found] + [b.total[1].high for b in found]
    bottoms = [min(0.0, *_ends(b)) for b in found]
    high = max(*tops, *(b.twin[1].mean for b in found if b.twin), 1e-9)
    y = Axis(min(bottoms), high + 0.18 * (high - min(bottoms)), "nats/token")
    return {b.arm.name: _waterfall(results, b, index, y) for index, b in enumerate(found)}


def _ends(budget: Budget) -> list[float]:
    ends, at = [], 0.0
    for _, term in budget.terms:
        ends.append(min(at, at + term.mean, at + term.low))
        at += term.mean
    return ends


def _waterfall(results: Results, budget: Budget, index: int, y: Axis) -> Chart:
    bars, at = [*budget.terms, budget.total], 0.0
    names = [f"{name}\n{'trained on' if i == 0 else 'in all' if i == len(bars) - 1 else 'step'}" for i, (name, _) in enumerate(bars)]
    x = Axis(-0.55, len(bars) - 0.45, marks={float(i): name for i, name in enumerate(names)}, grid=False)
    summary = f"Error budget of {budget.arm.name}: " + "; ".join(f"{name} {summary_text(term, 'reverse_kl')}" for name, term in bars)
    chart, name = Chart(f"figure-budget-{index}", summary, x, y, height=250, head=24), budget.arm.name
    colours = [looks(results)[name], *(_ADDS if term.mean > 0 else _TAKES for _, term in budget.terms[1:]), PLAIN]
    chart.rule(y=0)
    for i, ((title, term), colour) in enumerate(zip(bars, colours, strict=True)):
        last = i == len(bars) - 1
        base = 0.0 if last else at
        tip = f"{title}: {summary_text(term, 'reverse_kl')} nats/token"
        chart.bar(name, (i - 0.31, i + 0.31), (base, base + term.mean), colour, tip=tip)
        chart.whisker(name, i, base + term.low, base + term.high)
        text = signed(term.mean, "reverse_kl") if 0 < i < len(bars) - 1 else number(term.mean, "reverse_kl")
        chart.text(i, max(base, base + term.mean, base + term.high), text, name=name, kind="name", shift=(0, -6))
        if not last:
            at += term.mean
            chart.segment((i, at), (i + 1, at), Look(GREY, "circle", "2 3"))
    if budget.twin:
        twin, mean = budget.twin[0], budget.twin[1].mean
        tip = f"{twin}: {summary_text(budget.twin[1], 'reverse_kl')} nats/token"
        chart.segment((len(bars) - 1.5, mean), (len(bars) - 0.5, mean), Look("var(--ink)", "circle", "5 4"), name=twin, tip=tip)
    return chart
