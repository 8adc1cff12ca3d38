"""Forest plots: each arm's paired difference to its reference, and the arms' own means."""

from dataclasses import dataclass

import plotly.graph_objects as go

from tadistill.report.figures.style import GREY, GRID, Look, div, escaped, line, looks, row_text, separate_rows
from tadistill.results.collect import MEAN, Results, Summary, compare, differences_per_seed, direct_arm, primary_metric, twin_of
from tadistill.results.files import Arm
from tadistill.results.units import MINUS, interval, metric_title, metric_unit, number, summary_text
from tadistill.results.verdict import comparisons
from tadistill.statistics import Difference

_PAIRS = 15  # more pairs of models than this would be a list nobody reads: then all are compared with the first
_ROW, _TALL_ROW = 54, 70  # pixels of a row with one line of text and with two


@dataclass(frozen=True)
class Against:
    """The paired difference of the primary metric between an arm and its reference; `word` where the study decides about it."""

    arm: Arm
    other: Arm
    difference: Difference
    per_seed: dict[int, float]
    word: str | None


def reference_of(results: Results, arm: Arm) -> Arm | None:
    """What an arm is compared with: a chain with its equal-compute twin, else the direct arm, else the first that competes."""
    teacher = results.plan.teacher
    if teacher is not None and arm.path == (teacher,):
        return None
    other = (twin_of(results, arm) if arm.has_assistant else None) or direct_arm(results, arm)
    if other is None:
        other = next(a for a in results.plan.arms if teacher is None or a.model == arm.model)
    return None if other.name == arm.name else other


def differences(results: Results) -> list[Against]:
    """Chains first, then the other arms; each group by its difference, highest first. Models in pairs where nothing is distilled."""
    metric, decided = primary_metric(results), comparisons(results)
    if decided and len(decided) <= _PAIRS and all(c.against == "pair" for c in decided):
        return [Against(results.arm(c.arm), results.arm(c.other), c.difference, c.per_seed, c.word) for c in decided]
    words = {(c.arm, c.other): c.word for c in decided}
    found: list[Against] = []
    for arm in results.plan.arms:
        other = reference_of(results, arm)
        compared = compare(results, arm.name, other.name, metric) if other else None
        if other and compared:
            per_seed = differences_per_seed(results, arm.name, other.name, metric)
            found.append(Against(arm, other, compared[0], per_seed, words.get((arm.name, other.name))))
    return sorted(found, key=lambda entry: (not entry.arm.has_assistant, -entry.difference.mean))


def difference_figure(results: Results) -> str | None:
    """The paired differences with 95 % intervals, a dot for each training seed, the zero line and the equivalence band."""
    rows = differences(results)[::-1]
    if not rows:
        return None
    metric, margin, styles = primary_metric(results), results.plan.margin, looks(results)
    figure = go.Figure()
    if margin > 0:
        figure.add_shape(
            type="rect", x0=-margin, x1=margin, yref="paper", y0=0, y1=1, fillcolor=GREY, opacity=0.16, line_width=0, layer="below"
        )
    line(figure, colour=GREY, width=1.5, x0=0, x1=0, yref="paper", y0=0, y1=1)
    for y, row in enumerate(rows):
        d, name, other = row.difference, escaped(row.arm.name), escaped(row.other.name)
        sign = "+" if d.mean > 0 else ""
        text = f"{sign}{number(d.mean, metric, more=1)} {interval(d.low, d.high, metric, more=1)}"
        equal = ", equal compute" if row.other.compute == f"as {row.arm.name}" else ""
        _row(figure, y - 0.14, styles[row.arm.name], (d.mean, d.low, d.high), row.per_seed, f"{name} {MINUS} {other}: {text}", row.arm.name)
        figure.add_annotation(**row_text(y + 0.35, f"<b>{name}</b>"))
        figure.add_annotation(**row_text(y + 0.35, text, right=True))
        figure.add_annotation(**row_text(y + 0.12, f"{MINUS} {other}{equal}", size=11))
        if row.word:
            figure.add_annotation(**row_text(y + 0.12, f"<b>{row.word}</b>", right=True, size=11))
    low = min(-margin, *(min(r.difference.low, *r.per_seed.values()) for r in rows))
    high = max(margin, *(max(r.difference.high, *r.per_seed.values()) for r in rows))
    unit = metric_unit(metric)
    _finish(figure, len(rows), (low, high), f"difference in {metric_title(metric)}{f' ({unit})' if unit else ''}")
    return div(figure, "figure-differences", height=_TALL_ROW * len(rows) + 70)


def means_figure(results: Results) -> str | None:
    """The primary metric's mean over sets per arm, best first, with its interval and a dot for each seed."""
    metric, styles = primary_metric(results), looks(results)
    scored = [(results.summaries.get((arm.name, MEAN, metric)), arm) for arm in results.plan.arms]
    ranked: list[tuple[Summary, Arm]] = sorted(((s, arm) for s, arm in scored if s is not None), key=lambda pair: pair[0].mean)
    if len(ranked) < 2:
        return None
    figure = go.Figure()
    for y, (summary, arm) in enumerate(ranked):
        name, text = escaped(arm.name), summary_text(summary, metric)
        _row(figure, y, styles[arm.name], (summary.mean, summary.low, summary.high), dict(summary.per_seed), f"{name}: {text}", arm.name)
        figure.add_annotation(**row_text(y + 0.34, f"<b>{name}</b>"))
        figure.add_annotation(**row_text(y + 0.34, text, right=True))
    values = [value for s, _ in ranked for value in (s.low, s.high, *s.per_seed.values())]
    _finish(figure, len(ranked), (min(values), max(values)), f"{metric_title(metric)}, mean over sets")
    return div(figure, "figure-means", height=_ROW * len(ranked) + 70)


def _row(
    figure: go.Figure, y: float, look: Look, span: tuple[float, float, float], per_seed: dict[int, float], hover: str, name: str
) -> None:
    """Mean and interval, and below them the seeds' own values."""
    mean, low, high = span
    figure.add_scatter(
        x=[low, high], y=[y, y], mode="lines", line={"color": look.colour, "width": 3}, hoverinfo="skip", meta=[name, "interval"]
    )
    figure.add_scatter(
        x=[mean],
        y=[y],
        mode="markers",
        marker={"color": look.colour, "size": 11, "symbol": look.marker, "line": {"width": 2, "color": look.colour}},
        hovertemplate=f"{hover}<extra></extra>",
        meta=[name, "mean"],
    )
    figure.add_scatter(
        x=list(per_seed.values()),
        y=[y - 0.22] * len(per_seed),
        mode="markers",
        customdata=list(per_seed),
        marker={"color": look.colour, "size": 6, "opacity": 0.65},
        hovertemplate="seed %{customdata}: %{x:.2f}<extra></extra>",
        meta=[name, "seeds"],
    )


def _finish(figure: go.Figure, rows: int, span: tuple[float, float], title: str) -> None:
    separate_rows(figure, rows)
    pad = 0.04 * (span[1] - span[0]) or 1.0
    figure.update_xaxes(title=title, range=[span[0] - pad, span[1] + pad], gridcolor=GRID, zeroline=False)
    figure.update_yaxes(range=[-0.52, rows - 0.48], visible=False)
