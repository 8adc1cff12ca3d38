"""Figures of scores: paired differences, means, and quality over entropy."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from tadistill.charts import PLAIN, Chart, Point
from tadistill.charts.series import text_width
from tadistill.metrics import MEAN, metric_title
from tadistill.report.figures import MANY, looks, rows_axis, span_axis, titled
from tadistill.results.collect import Results, Summary, complete_seeds, primary_metric, sets_with
from tadistill.results.compare import MAIN, compare, differences_per_seed, direct_of, entropy_curve, reference_at, twin_of
from tadistill.results.compare import Point as Decoded
from tadistill.results.number_text import gap_text, number, p_text, summary_text
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import SHOWN, Comparison, comparisons, control_pairs
from tadistill.statistics import Difference
from tadistill.text import MINUS, counted

_PAIRS = 15  # with more pairs of models than this, all models are compared only with the first
_ROW, _TALL_ROW = 36, 46  # pixels of a row with one line of text and with two
_LINE = 14  # pixels from a line of text to the next
_PHONE, _BOLD = 325, 1.1  # pixels: the width of a row on a phone; and the width of a bold text relative to a plain one


@dataclass(frozen=True)
class ForestRow:
    """A row in the figure of differences: the paired difference of an arm and the arm with which it is compared.

    `word` is the verdict as the figure shows it, or None if the study does not test this difference.
    """

    arm: ArmRecord
    other: ArmRecord
    difference: Difference
    per_seed: dict[int, float]
    word: str | None
    unequal: bool = False
    """True if `arm` is a path with assistants, and `other` has different compute."""


def reference_of(results: Results, arm: ArmRecord) -> ArmRecord | None:
    """Return the baseline of an arm. Return None for the teacher, and for an arm that would be its own baseline.

    The baseline is the first of these arms that the study has:
    - for an arm with assistants, direct distillation with the same budget (`twin_of`);
      for another arm, the reference arm with the same budget (`reference_at`)
    - direct distillation (`direct_of`)
    - the first arm of the plan with the same student, or the very first arm if the study has no teacher.
    """
    teacher = results.plan.teacher
    if teacher is not None and arm.path == (teacher,):
        return None
    other = (twin_of(results, arm) if arm.has_assistant else reference_at(results, arm)) or direct_of(results, arm)
    if other is None:
        other = next(a for a in results.plan.arms if teacher is None or a.model == arm.model)
    return None if other.name == arm.name else other


def differences(results: Results) -> list[ForestRow]:
    """Return the rows of the figure of differences. Each arm has a row with the difference from its baseline (`reference_of`). An arm with
    a control has another row with the difference ``arm - control``.

    Arms with assistants come first. Within both groups, the largest difference comes first. A study without assistants that compares at
    most 15 pairs of arms has one row for each pair instead.
    """
    metric, decided = primary_metric(results), comparisons(results)
    if decided and len(decided) <= _PAIRS and all(c.against == "pair" for c in decided):
        return [ForestRow(results.arm(c.arm), results.arm(c.other), c.difference, c.per_seed, _word(c)) for c in decided]
    words = {(c.arm, c.other): (_word(c), c.unequal) for c in decided}
    found: list[ForestRow] = []
    compared_arms = [(arm, reference_of(results, arm)) for arm in results.plan.arms if arm.control is None]
    for arm, other in [*compared_arms, *control_pairs(results)]:
        compared = compare(results, arm.name, other.name, metric) if other else None
        if other and compared and (other.name, arm.name) not in words:
            per_seed = differences_per_seed(results, arm.name, other.name, metric)
            found.append(ForestRow(arm, other, compared[0], per_seed, *words.get((arm.name, other.name), (None, False))))
    return sorted(found, key=lambda entry: (not entry.arm.has_assistant, -entry.difference.mean))


def _word(c: Comparison) -> str:
    if c.word != "no evidence":
        return SHOWN[c.word]
    if c.few_seeds:
        return f"{SHOWN[c.word]}, {counted(len(c.seeds), 'seed')}"
    return f"{SHOWN[c.word]}, {p_text(c.p_holm)}"


def difference_figure(results: Results) -> Chart | None:
    """Draw the paired differences with 95 % intervals, and a dot for each training seed. Zero and the equivalence margin are marked.

    Each row has its numbers and its verdict. On a phone they may need more lines than on a wide page, so both forms are drawn, and the
    style sheet shows the one that fits.
    """
    rows = differences(results)[::-1]
    if not rows:
        return None
    metric, margin, styles = primary_metric(results), results.plan.margin, looks(results)
    ends = [value for row in rows for value in (row.difference.low, row.difference.high, *row.per_seed.values())]
    x = span_axis([*ends, -margin, margin, 0.0], f"difference in {titled(metric)}".replace("(%)", "(percentage points)"))
    summary = f"Differences in {metric_title(metric)}: " + "; ".join(
        f"{row.arm.name} {MINUS} {row.other.name} {gap_text(row.difference, metric)}" for row in rows[::-1]
    )
    narrow = [_phone_lines(row, metric) for row in rows]
    high = _TALL_ROW + _LINE * (max(map(len, narrow)) - 1)
    chart = Chart("figure-differences", summary, x, rows_axis(len(rows)), height=high * len(rows), head=4)
    below = (_LINE * max(map(len, narrow)) + 3) / high  # the texts' share of a row: zero and the margin are marked below them
    for y, (row, lines) in enumerate(zip(rows, narrow, strict=True)):
        if margin > 0:
            chart.area((-margin, margin), (y - 0.5, y + 0.5 - below))
        chart.segment((0, y - 0.5), (0, y + 0.5 - below), PLAIN, width=1.4, kind="zero")
        if y:
            chart.rule(y=y - 0.5, kind="grid")
        d, name, top = row.difference, row.arm.name, y + 0.5
        tip = f"{_pair(row)}: {gap_text(d, metric)}"
        chart.row(name, y - 0.5 + _LINE / high, (d.mean, d.low, d.high), styles[name], dots=list(row.per_seed.values()), tip=tip)
        wide = [(_pair(row), " · ".join(_parts(row, metric)))]
        for form, kind in ((wide, ""),) if lines == wide else ((wide, " wide"), (lines, " slim")):
            for index, (left, right) in enumerate(form):
                at = top - (_LINE * (index + 1) - 1) / high
                if left:
                    chart.text(None, at, left, side="start", name=name, kind=f"name{kind}")
                if right:
                    chart.text(None, at, right, side="end", name=name, kind=f"note{kind}")
    return chart


def _pair(row: ForestRow) -> str:
    return f"{row.arm.name} {MINUS} {row.other.name}"


def _parts(row: ForestRow, metric: str) -> list[str]:
    return [gap_text(row.difference, metric), *([row.word] if row.word else []), *(["not equal compute"] if row.unequal else [])]


def _phone_lines(row: ForestRow, metric: str) -> list[tuple[str, str]]:
    """Return the texts of a row, broken into lines that fit on a phone. A line has a text at its left end and a text at its right end."""
    pair = _pair(row)
    lines = [(pair, "")] if _BOLD * text_width(pair) <= _PHONE else [(f"{row.arm.name} {MINUS}", ""), (row.other.name, "")]
    for part in _parts(row, metric):
        left, right = lines[-1]
        longer = f"{right} · {part}" if right else part
        if _BOLD * text_width(left) + text_width(longer) + (_LINE if left else 0) <= _PHONE:
            lines[-1] = (left, longer)
        else:
            lines.append(("", part))
    return lines


def means_figure(results: Results) -> Chart | None:
    """Draw each arm's mean of the primary metric over test sets, with its interval and a dot for each seed. The best arm comes first."""
    metric, styles = primary_metric(results), looks(results)
    scored = [(results.summaries.get((arm.name, MEAN, metric)), arm) for arm in results.plan.arms]
    ranked: list[tuple[Summary, ArmRecord]] = sorted(((s, arm) for s, arm in scored if s is not None), key=lambda pair: pair[0].mean)
    if not ranked:
        return None
    x = span_axis([v for s, _ in ranked for v in (s.low, s.high, *s.per_seed.values())], f"{titled(metric)}, mean over sets", zero=True)
    summary = f"{metric_title(metric)}: " + "; ".join(f"{arm.name} {summary_text(s, metric)}" for s, arm in ranked[::-1])
    chart = Chart("figure-means", summary, x, rows_axis(len(ranked)), height=_ROW * len(ranked), head=4)
    for y, (s, arm) in enumerate(ranked):
        text = summary_text(s, metric)
        chart.row(arm.name, y - 0.22, (s.mean, s.low, s.high), styles[arm.name], tip=f"{arm.name}: {text}")
        chart.text(None, y + 0.18, arm.name, side="start", name=arm.name, kind="name")
        chart.text(None, y + 0.18, text, side="end", name=arm.name)
    return chart


# --- quality over entropy ---------------------------------------------------------------------------------------------


def entropy_curves(results: Results) -> Mapping[str, list[Decoded]]:
    """Return the points (entropy, metric) of each arm, one for each decoding. Arms without a measured point are omitted."""
    metric = primary_metric(results)
    sets, decodings = sets_with(results, metric), list(results.plan.decodings)
    names = [arm.name for arm in results.plan.arms]
    curves = {n: entropy_curve(results, n, metric, complete_seeds(results, n, sets, metric), decodings) for n in names}
    return {name: points for name, points in curves.items() if points}


def plane_figure(results: Results) -> Chart | None:
    """Draw the primary metric over entropy. A line connects the decodings of an arm. Return None if no arm has two decodings."""
    metric, styles, curves = primary_metric(results), looks(results), entropy_curves(results)
    if not any(len(points) > 1 for points in curves.values()):
        return None
    summaries = {name: results.summaries[name, MEAN, metric] for name in curves}
    heights = [v for name, points in curves.items() for v in (*(p.value for p in points), summaries[name].low, summaries[name].high)]
    x = span_axis([p.entropy for points in curves.values() for p in points], "entropy of the decoding (nats/token)")
    chart = Chart(
        "figure-plane",
        f"{metric_title(metric)} over entropy, one line per arm through its decodings",
        x,
        span_axis(heights, titled(metric), zero=True),
        height=330,
        head=24,
    )
    highest = max(curves, key=lambda name: max(p.value for p in curves[name]))
    for name, points in curves.items():
        s = summaries[name]
        for start, end in pairwise(points):
            chart.segment((start.entropy, start.value), (end.entropy, end.value), styles[name], width=1.6, name=name)
        for p in points:
            main = p.decoding == MAIN
            tip = f"{name}, {p.decoding}: {metric_title(metric)} {number(p.value, metric)}, {p.entropy:.2f} nats/token"
            ends = (s.low, s.high) if main else (None, None)
            label = name if main and len(curves) <= MANY else ""
            chart.points(name, [Point(p.entropy, p.value, *ends, tip)], styles[name], size=6 if main else 4, label=label)
            if name == highest and not main:
                chart.text(p.entropy, p.value, p.decoding, side="start", name=name, shift=(2, -10))
    return chart
