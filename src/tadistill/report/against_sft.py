"""The comparison of all distilled arms with plain fine-tuning (SFT), with sampled and with greedy answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tadistill.constants import SEEDS_FOR_A_CLAIM
from tadistill.metrics import metric_title
from tadistill.report.explain import chance_text, few_text, tested
from tadistill.report.path_words import some
from tadistill.results.collect import Results, once, primary_metric
from tadistill.results.compare import compare, greedy_decoding
from tadistill.results.number_text import size_text, span
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import SHOWN, comparisons, is_clear, pairs
from tadistill.statistics import Difference, holm
from tadistill.text import form


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


def own_against_sft(results: Results, arm: ArmRecord) -> list[str]:
    """Return sentences on one arm's difference from plain fine-tuning, with sampled and with greedy answers. They leave out a difference
    that `comparisons` has. For the fine-tuned arm, they are about all distilled arms."""
    if (tuned := sft_arm(results)) is None or arm.name not in (tuned.name, *distilled_arms(results)):
        return []
    if arm.name == tuned.name:
        return [text] if (text := against_sft(results)) else []
    known = [gap for gap in gaps_from_sft(results) if gap.arm == arm.name]
    against = f"{arm.name} against plain fine-tuning (SFT, {tuned.name})"
    if not known:
        return [f"{against}: undecided, because the two arms have no finished training seed in common."]
    metric, pair = primary_metric(results), {arm.name, tuned.name}
    said = any({c.arm, c.other} == pair for c in comparisons(results))
    return [f"{against}, {_gap_text(gap, metric)}" for gap in known if not (said and gap.metric == metric)]


def _gap_text(gap: Gap, metric: str) -> str:
    found, p = gap.difference, tested(gap.p, gap.family)
    if gap.clear:
        verdict = f"{SHOWN['gain' if found.mean > 0 else 'loss']} ({p})."
    else:
        doubt = chance_text(found, gap.p, gap.family) if gap.enough else few_text(gap.seeds)
        verdict = f"{SHOWN['no evidence']}. {doubt}"
    size = span(found, metric, unit=True)
    return f"with {gap.way} answers: the difference in {metric_title(metric)} is {size}. Verdict: {verdict}"


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
