"""The analysis of a study: in which metrics and on which prompts compared arms (paths of models) differ, and why they may differ.

Each difference is marked as better, worse, or undecided. For a path with assistants, three explanations are examined: sharpening (lower
entropy), the errors of its steps, and its compute. If a value was not measured, a sentence says so. All distilled arms are compared with
plain fine-tuning (SFT).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tadistill.config.arm import marked, path_text
from tadistill.metrics import METRICS, improves, metric_title, sorted_names
from tadistill.report.explain import few_text, gap_words
from tadistill.report.path_words import hop_text, some
from tadistill.results.collect import MEAN, Results, once, primary_metric, sets_with
from tadistill.results.compare import (
    BY_LENGTH,
    added_by_steps,
    bucket_difference,
    bucket_sizes,
    bucket_title,
    budget_models,
    compare,
    difference,
    direct_of,
    greedy_decoding,
)
from tadistill.results.number_text import number, size_text, span, summary_text
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import SEEDS_FOR_A_CLAIM, Comparison, by_importance, comparisons, is_clear, pairs
from tadistill.statistics import Difference, holm
from tadistill.text import form, listed

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


# --- against fine-tuning ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """The difference of a distilled arm from the fine-tuned one, with one kind of answers (`way`): sampled or greedy."""

    way: str
    metric: str
    arm: str
    difference: Difference
    seeds: int
    """Number of common training seeds."""
    p: float
    """The p-value, corrected for `family` comparisons."""
    family: int

    @property
    def enough(self) -> bool:
        """True if there are enough common seeds for a claim."""
        return self.seeds >= SEEDS_FOR_A_CLAIM

    @property
    def clear(self) -> bool:
        return is_clear(self.difference, self.p, enough=self.enough)

    @property
    def is_better(self) -> bool:
        """True if the distilled arm is clearly better than the fine-tuned one."""
        return self.clear and self.difference.mean > 0

    @property
    def is_worse(self) -> bool:
        """True if the distilled arm is clearly worse than the fine-tuned one."""
        return self.clear and self.difference.mean < 0


def student_of(results: Results) -> str:
    """Return the model that the study is about: the one that the first compared arm trains, or else the one that most arms train."""
    found = pairs(results)
    if found:
        return found[0].arm.model
    models = [arm.model for arm in results.plan.arms if arm.is_trained] or [results.plan.arms[-1].model]
    return max(dict.fromkeys(models), key=models.count)


def sft_arm(results: Results) -> ArmRecord | None:
    """Return the arm that fine-tunes the student without a teacher. If there are several, it is the one with the most training compute."""
    model = student_of(results)
    tuned = [arm for arm in results.plan.arms if arm.is_trained and arm.model == model and not arm.is_taught]
    return max(tuned, key=lambda arm: arm.flops or 0.0, default=None)


def against_sft(results: Results) -> str:
    """Return sentences that say whether distillation is better than plain fine-tuning, with sampled and with greedy answers."""
    tuned, distilled = sft_arm(results), distilled_arms(results)
    if not (distilled and results.summaries):
        return ""
    if tuned is None:
        alone = f"because no arm only fine-tunes {student_of(results)}"
        return f"The study does not compare distillation with plain fine-tuning (SFT), {alone}."
    gaps = gaps_from_sft(results)
    if not gaps:
        return f"Distillation is not compared with plain fine-tuning (SFT, {tuned.name}) yet: no finished training seed is common to both."
    ways = {way: [gap for gap in gaps if gap.way == way] for way in dict.fromkeys(gap.way for gap in gaps)}
    sentences = [_claim(ways, tuned, len(distilled))]
    sentences += [_way_text(of_way, primary_metric(results), first=not i) for i, of_way in enumerate(ways.values())]
    near = [gap for gap in gaps if gap.enough and gap.difference.mean > 0 and not gap.difference.covers_zero]
    if near and not any(gap.is_better for gap in gaps):
        sentences.append(_near_text(near, len(gaps)))
    for way, of_way in ways.items() if len(distilled) > 1 else ():
        if worse := [gap.arm for gap in of_way if gap.is_worse]:
            sentences.append(f"With {way} answers, {some(worse)} {form(len(worse), 'is', 'are')} clearly worse than {tuned.name}.")
    return " ".join(sentences)


def _claim(ways: Mapping[str, Sequence[Gap]], tuned: ArmRecord, distilled: int) -> str:
    # `ways` has the finished differences with each kind of answers, and `distilled` is the number of distilled arms
    wins = [way for way, of_way in ways.items() if any(gap.is_better for gap in of_way)]
    all_worse = all(sum(gap.is_worse for gap in of_way) == distilled for of_way in ways.values())
    claim = "is clearly better than" if wins else "is clearly worse than" if all_worse else "is not clearly better than"
    only = f", but only with {wins[0]} answers" if len(wins) == 1 < len(ways) else ""
    most = max((gap for of_way in ways.values() for gap in of_way), key=lambda gap: gap.seeds)
    few = "" if most.enough else f": {few_text(most.seeds).removesuffix('.')}"
    return f"Distillation {claim} plain fine-tuning (SFT, {tuned.name}){only}{few}."


@once
def clear_against_sft(results: Results) -> dict[frozenset[str], bool]:
    """Map each pair of the fine-tuned arm and a distilled arm to True if they clearly differ in the primary metric."""
    tuned, metric = sft_arm(results), primary_metric(results)
    return {frozenset((tuned.name, gap.arm)): gap.clear for gap in gaps_from_sft(results) if tuned and gap.metric == metric}


def distilled_arms(results: Results) -> list[str]:
    """Return the names of the arms that the study compares with plain fine-tuning."""
    model = student_of(results)
    return [arm.name for arm in results.plan.arms if arm.is_trained and arm.model == model and arm.is_taught and arm.control is None]


def gaps_from_sft(results: Results) -> list[Gap]:
    """Return the differences of all distilled arms from the fine-tuned arm, with each kind of answers."""
    if (tuned := sft_arm(results)) is None:
        return []
    distilled, metric, greedy = distilled_arms(results), primary_metric(results), greedy_decoding(results)
    main = results.plan.recipe["evaluate"].get("temperature", 1.0)
    ways = {"sampled" if main else "greedy": metric, **({"greedy": f"{metric}@{greedy}"} if greedy and main else {})}
    found = [(way, m, arm, c) for way, m in ways.items() for arm in distilled if (c := compare(results, arm, tuned.name, m))]
    family = len(ways) * len(distilled)
    adjusted = holm([gap.p for *_, (gap, _) in found], untested=family - len(found))
    tested = {frozenset((c.arm, c.other)): (c.p_holm, c.family) for c in comparisons(results)}  # the study's verdicts on the same pairs
    return [
        Gap(way, m, arm, gap, len(seeds), *((m == metric and tested.get(frozenset((arm, tuned.name)))) or (p, family)))
        for (way, m, arm, (gap, seeds)), p in zip(found, adjusted, strict=True)
    ]


def _way_text(gaps: Sequence[Gap], metric: str, *, first: bool) -> str:
    best = max(gaps, key=lambda gap: gap.difference.mean)
    who = f"the best of {len(gaps)} distilled arms ({best.arm})" if first else f"the best of them ({best.arm})"
    who = who if len(gaps) > 1 else best.arm
    size = size_text(best.difference, metric) if first else span(best.difference, metric, unit=True)
    return f"With {best.way} answers, {who} differs by {size}."


def _near_text(near: Sequence[Gap], count: int) -> str:
    first = min(near, key=lambda gap: gap.p)
    return (
        f"Of {count} such differences (one for each arm and kind of answer), {len(near)} {form(len(near), 'has', 'have')} an interval "
        f"above 0, but none is clear after correction for {first.family} comparisons (smallest p = {first.p:.3f})."
    )
