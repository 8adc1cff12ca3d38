"""The error budget of a chain: what training minimised, and what each hop to the original teacher adds."""

from collections.abc import Mapping
from dataclasses import dataclass

import plotly.graph_objects as go

from tadistill.report.figures.style import GREY, GRID, div, escaped, line, looks
from tadistill.results.collect import MEAN, Results, Summary, ladder, twin_of
from tadistill.results.files import Arm
from tadistill.results.units import interval, number, summary_text

_ADDS, _TAKES = "#E0475B", "#17A673"


@dataclass(frozen=True)
class Budget:
    """KL(q ‖ p_T) of a chain in parts (nats/token): `terms` in the order of the sum, `total` is measured apart from them."""

    arm: Arm
    terms: tuple[tuple[str, Summary], ...]
    total: tuple[str, Summary]
    twin: tuple[str, Summary] | None
    """The equal-compute twin's own KL(q ‖ p_T)."""


def budgets(results: Results) -> list[Budget]:
    """The budgets of all chains whose terms were measured; see ``budget/J`` of the analyse stage for the identity."""
    found: list[Budget] = []
    for arm in (arm for arm in results.plan.arms if arm.is_chain):
        upwards = ladder(results, arm)[::-1]  # student, last assistant, ..., teacher
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
    """Chain -> its waterfall; all have the same height of a nat, so that they can be compared."""
    found = budgets(results)
    if not found:
        return {}
    tops = [sum(max(term.mean, 0) for _, term in b.terms) for b in found] + [b.total[1].high for b in found]
    bottoms = [min(0.0, *_ends(b)) for b in found]
    span = (min(bottoms), max(*tops, *(b.twin[1].mean for b in found if b.twin), 0.0))
    return {b.arm.name: _waterfall(results, b, index, span) for index, b in enumerate(found)}


def _ends(budget: Budget) -> list[float]:
    """Where each bar ends, the interval's lower end included."""
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
    """A tick of two lines: the term, and what it is."""
    return f"{escaped(name)}<br>{'trained on' if first else 'in all' if last else 'hop'}"
