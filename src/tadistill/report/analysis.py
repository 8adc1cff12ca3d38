"""The analysis of a study: in which metrics and on which prompts compared arms (paths of models) differ, and why they may differ.

Each difference is marked as better, worse, or undecided. For a path with assistants, three explanations are examined: sharpening (lower
entropy), the errors of its steps, and its compute. If a value was not measured, a sentence says so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tadistill.config.arm import marked, path_text
from tadistill.metrics import MEAN, METRICS, improves, metric_title, sorted_names
from tadistill.report.explain import gap_words
from tadistill.report.path_words import hop_text
from tadistill.results.collect import Results, once, sets_with
from tadistill.results.compare import (
    BY_LENGTH,
    added_by_steps,
    bucket_difference,
    bucket_sizes,
    bucket_title,
    budget_models,
    difference,
    direct_of,
)
from tadistill.results.number_text import number, span, summary_text
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import Comparison, by_importance
from tadistill.statistics import Difference
from tadistill.text import listed

_MOST_PAIRS = 6  # a study without assistants and with more pairs of arms has no analysis, because it would be too long
Mark = Literal["better", "worse", "undecided", "not measured"]
MARKS: dict[Mark, str] = {"better": "▲", "worse": "▼", "undecided": "○", "not measured": "–"}


@dataclass(frozen=True)
class Row:
    """The difference of two arms in one metric. `where` is a test set, a range of reference lengths, or ``mean`` (the mean over sets)."""

    metric: str
    where: str
    difference: Difference | None

    @property
    def place(self) -> str:
        """The test set or range of reference lengths as text: `where`, but "mean over sets" for ``mean``."""
        return "mean over sets" if self.where == MEAN else self.where

    @property
    def mark(self) -> Mark:
        """The mark (better, worse, or undecided). It uses the 95 % interval of this row, without a correction for the number of rows."""
        if self.difference is None:
            return "not measured"
        if self.difference.covers_zero:
            return "undecided"
        return "better" if improves(self.metric, self.difference.mean) else "worse"


@dataclass(frozen=True)
class Analysis:
    """The comparison of `arm` with `other`, with a row for each difference."""

    arm: str
    other: str
    rows: tuple[Row, ...]
    whole: tuple[tuple[str, str, str], ...]
    """Metrics without an interval, because they have only one value per test set: (title, value of `arm`, value of `other`). The values are
    means over the test sets."""
    explanations: Mapping[str, list[str]]
    """Possible reasons for the differences, with sentences about each. Empty if `arm` is not a path with assistants."""
    unequal: bool
    """True if the arm is a path with assistants, and the two arms had different compute."""


@once
def analyses(results: Results) -> list[Analysis]:
    """Return one analysis for each pair of compared arms. The pair in the report's answer comes first.

    The list is empty if the study has no assistants and compares more than six pairs.
    """
    compared = by_importance(results)
    if len(compared) > _MOST_PAIRS and compared[0].against == "pair":
        return []
    return [
        Analysis(c.arm, c.other, tuple(_rows(results, c)), tuple(_whole(results, c)), _explanations(results, c), c.unequal)
        for c in compared
    ]


def _rows(results: Results, c: Comparison) -> Iterable[Row]:
    main = [metric for metric in dict.fromkeys((c.metric, BY_LENGTH)) if metric in results.metrics]
    for metric in main:
        sets = sets_with(results, metric)
        for name in (MEAN, *sets) if len(sets) > 1 else sets:
            yield Row(metric, name, difference(results, c.arm, c.other, metric, name))
    for bucket in bucket_sizes(results):
        yield Row(BY_LENGTH, f"references of {bucket_title(bucket)} tokens", bucket_difference(results, c.arm, c.other, bucket))
    for metric in (m for m in sorted_names(results.metrics, lambda metric: bool(metric.better)) if m not in main):
        yield Row(metric, MEAN, difference(results, c.arm, c.other, metric))


def _whole(results: Results, c: Comparison) -> Iterable[tuple[str, str, str]]:
    for metric in (m.name for m in METRICS.values() if m.whole_set):
        mine, theirs = (results.summaries.get((arm, MEAN, metric)) for arm in (c.arm, c.other))
        if mine and theirs:
            yield metric_title(metric), number(mine.mean, metric), number(theirs.mean, metric)


def _explanations(results: Results, c: Comparison) -> Mapping[str, list[str]]:
    if c.against == "pair":
        return {}
    return {"sharpening": [_sharpening(c)], "error of each step": _steps(results, c), "compute": [_compute(results, c)]}


def published(results: Results) -> list[str]:
    """Return one sentence for each arm with published scores. It compares the study's score with the published score on each test set."""
    return [_arm_published(results, arm) for arm in results.plan.arms if arm.published]


def _arm_published(results: Results, arm: ArmRecord) -> str:
    assert arm.published is not None
    parts: list[str] = []
    for name, value in arm.published.rouge_l.items():
        summary = results.summaries.get((arm.name, name, "rouge_l"))
        said = number(value, "rouge_l")
        if summary is None:
            parts.append(f"on {name} {said} is published, and nothing was measured here")
        elif summary.low <= value <= summary.high:
            parts.append(f"on {name} the interval of {summary_text(summary, 'rouge_l')} contains the published {said}")
        else:
            apart = number(abs(summary.mean - value), "rouge_l")
            where = "above" if summary.mean > value else "below"
            parts.append(f"on {name} {summary_text(summary, 'rouge_l')} is {apart} {where} the published {said}")
    return f"{arm.name} ({metric_title('rouge_l')}, published by {arm.published.source}): {'; '.join(parts)}."


# --- what explains it ---------------------------------------------------------------------------------------------------


def _sharpening(c: Comparison) -> str:
    assert c.mechanism is not None
    m = c.mechanism
    title = metric_title(c.metric)
    entropy = f"entropy {span(m.entropy, 'entropy', unit=True)}" if m.entropy else "entropy not measured"
    greedy = f"{title} with greedy decoding {span(m.greedy, c.metric)}" if m.greedy else "greedy decoding not measured"
    if m.matched and m.at_entropy is not None:
        matched = f"{title} at a matched entropy of {number(m.at_entropy, 'entropy')} nats/token {span(m.matched, c.metric)}"
    elif m.curves == "not measured":
        matched = "matched entropy not measured"
    else:
        matched = "no matched entropy, because the decodings of one arm do not reach the entropy of the other arm"
    return f"{_sharpening_verdict(c)} Differences from {c.other}: {entropy}; {greedy}; {matched}."


def _sharpening_verdict(c: Comparison) -> str:
    assert c.mechanism is not None
    m = c.mechanism
    if c.word != "gain":
        return f"Sharpening explains nothing here, because there is no clear gain: {gap_words(c)}."
    controls = [d for d in (m.greedy, m.matched) if d is not None]
    if not controls:
        return "Sharpening is not measured."
    if all(d.above_zero for d in controls):
        return "Sharpening does not explain the gain: the gain remains under each measured control (greedy decoding, matched entropy)."
    gone = "the gain vanishes with greedy decoding or at matched entropy"
    if m.entropy is not None and m.entropy.below_zero:
        return f"Sharpening explains the gain: the entropy is lower, and {gone}."
    return f"Sharpening may explain the gain: {gone}, but the entropy is not shown to be lower."


def _steps(results: Results, c: Comparison) -> list[str]:
    arm = results.arm(c.arm)
    models = budget_models(results, arm)
    terms, added = [f"budget/{j}" for j in range(len(models) - 1)], added_by_steps(results, arm)
    if added is None:
        if arm.across:
            steps = listed([marked(path_text(step), [step]) for step in arm.across])
            return [f"The error of each step is not defined across vocabularies ({steps}). See the bits per byte instead."]
        why = "the arm has no error budget" if arm.is_chain else "no assistant teaches the student"
        return [f"The error of each step is not measured, because {why}."]
    total, first = (results.summaries[arm.name, MEAN, metric] for metric in ("reverse_kl", terms[0]))
    amount = summary_text(added, terms[1])
    effect = f"change the distance by {amount}" if added.low < added.high < 0 else f"may change nothing ({amount})"
    if 0 < added.low < added.high:
        effect = f"add {amount} ({100 * added.mean / total.mean:.0f} % of the total)"
    last = arm.path[-2]
    inside = f"{summary_text(first, terms[0])} of it is the distance to the last assistant {last}, which taught {models[-1]}."
    if added.mean < 0:  # the distance to the assistant is not a part of a smaller one
        inside = f"The distance to the last assistant {last}, which taught {models[-1]}, is {summary_text(first, terms[0])}."
    above = [f"{hop_text(models, j)} {summary_text(results.summaries[arm.name, MEAN, t], t)}" for j, t in enumerate(terms) if j]
    return [
        f"{metric_title('reverse_kl')} is {summary_text(total, 'reverse_kl')} nats/token. {inside} "
        f"The steps from {models[0]} to {last} {effect}: {', '.join(above)}.",
        f"A step such as {hop_text(models, 1)} is positive if {models[-1]} is closer to {models[-2]} than to {models[-3]}.",
    ]


def _compute(results: Results, c: Comparison) -> str:
    direct = direct_of(results, results.arm(c.arm))
    if direct is None:
        return "The effect of compute is not measured: the study has no direct arm that trains this student."
    if c.against == "plain direct":
        return (
            f"The effect of compute is not measured: the study has no arm with `compute: as {c.arm}`, which trains directly at equal cost."
        )
    if c.against == "off budget":
        return f"The effect of compute is not measured, because {c.arm} and {c.other} do not have the same FLOPs."
    if c.other == direct.name:
        return f"Compute explains no difference, because {c.arm} and {c.other} have the same compute."
    gap = difference(results, c.arm, direct.name, c.metric)
    closed = difference(results, c.other, direct.name, c.metric)
    if gap is None or closed is None:
        return f"The effect of compute is not measured yet: {direct.name} has no finished seed in common with both arms."
    numbers = (
        f"The difference in {metric_title(c.metric)} from direct distillation ({direct.name}) is {span(gap, c.metric, unit=True)} "
        f"for {c.arm}, and {span(closed, c.metric)} for its equal-compute baseline {c.other}."
    )
    if not gap.above_zero:
        return f"Compute explains nothing here, because no gain over direct distillation is shown. {numbers}"
    share = f"{100 * closed.mean / gap.mean:.0f} %" if closed.mean > 0 else "no part"
    share = f"More training without an assistant closes {share} of the gap between {direct.name} and {c.arm}"
    if not closed.above_zero:
        return f"Compute is not shown to explain the gain. {numbers} {share}, which may be chance."
    return f"Compute explains a part of the gain. {numbers} {share}."
