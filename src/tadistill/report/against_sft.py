"""The sentences of a report that compare distillation with plain fine-tuning (SFT)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tadistill.report.path_words import some
from tadistill.results.collect import Results, primary_metric
from tadistill.results.compare import compare, greedy_decoding
from tadistill.results.number_text import size_text, span
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import SEEDS_FOR_A_CLAIM, comparisons, pairs
from tadistill.statistics import Difference, holm
from tadistill.text import form

_ALPHA = 0.05


@dataclass(frozen=True)
class _Gap:
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
        return self.enough and self.p < _ALPHA and not self.difference.covers_zero


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
    tuned, distilled = sft_arm(results), _distilled(results)
    if not (distilled and results.summaries):
        return ""
    if tuned is None:
        student = student_of(results)
        return f"The study does not compare distillation with plain fine-tuning (SFT), because no arm only fine-tunes {student}."
    gaps = _gaps(results, tuned.name, distilled)
    known = {way: [gap for gap in gaps if gap.way == way] for way in dict.fromkeys(gap.way for gap in gaps)}
    if not known:
        return f"Distillation is not compared with plain fine-tuning (SFT, {tuned.name}) yet: no finished training seed is common to both."
    wins = [way for way, of_way in known.items() if any(gap.clear and gap.difference.mean > 0 for gap in of_way)]
    worse = {way: [gap.arm for gap in of_way if gap.clear and gap.difference.mean < 0] for way, of_way in known.items()}
    all_worse = all(len(worse[way]) == len(distilled) for way in known)
    claim = "is clearly better than" if wins else "is clearly worse than" if all_worse else "is not clearly better than"
    only = f", but only with {wins[0]} answers" if len(wins) == 1 < len(known) else ""
    near = [] if wins else [gap for gap in gaps if gap.enough and gap.difference.mean > 0 and not gap.difference.covers_zero]
    after = f" {_near_text(near, len(gaps))}" if near else ""
    bad = "".join(
        f" With {way} answers, {some(names)} {form(len(names), 'is', 'are')} clearly worse than {tuned.name}."
        for way, names in worse.items()
        if names and len(distilled) > 1
    )
    differs = " ".join(_way_text(of_way, primary_metric(results), first=not i) for i, of_way in enumerate(known.values()))
    return f"Distillation {claim} plain fine-tuning (SFT, {tuned.name}){only}. {differs}{after}{bad}"


def clear_against_sft(results: Results) -> dict[frozenset[str], bool]:
    """Map each pair of the fine-tuned arm and a distilled arm to True if they clearly differ in the primary metric."""
    tuned = sft_arm(results)
    gaps = _gaps(results, tuned.name, _distilled(results)) if tuned else []
    return {frozenset((tuned.name, gap.arm)): gap.clear for gap in gaps if tuned and gap.metric == primary_metric(results)}


def _distilled(results: Results) -> list[str]:
    model = student_of(results)
    return [arm.name for arm in results.plan.arms if arm.is_trained and arm.model == model and arm.is_taught and arm.control is None]


def _gaps(results: Results, tuned: str, distilled: Sequence[str]) -> list[_Gap]:
    metric, greedy, main = primary_metric(results), greedy_decoding(results), results.plan.recipe["evaluate"].get("temperature", 1.0)
    ways = {"sampled" if main else "greedy": metric, **({"greedy": f"{metric}@{greedy}"} if greedy and main else {})}
    found = [(way, m, arm, c) for way, m in ways.items() for arm in distilled if (c := compare(results, arm, tuned, m))]
    # the correction counts unfinished comparisons too, so that a claim cannot be reversed when they finish
    family = len(ways) * len(distilled)
    adjusted = holm([difference.p for *_, (difference, _) in found] + [1.0] * (family - len(found)))
    tested = {frozenset((c.arm, c.other)): (c.p_holm, c.family) for c in comparisons(results)}  # the study's verdicts on the same pairs
    gaps: list[_Gap] = []
    for (way, m, arm, (difference, seeds)), p in zip(found, adjusted, strict=False):
        verdict = tested.get(frozenset((arm, tuned))) if m == metric else None
        gaps.append(_Gap(way, m, arm, difference, len(seeds), *(verdict or (p, family))))
    return gaps


def _way_text(gaps: Sequence[_Gap], metric: str, *, first: bool) -> str:
    best = max(gaps, key=lambda gap: gap.difference.mean)
    who = f"the best of {len(gaps)} distilled arms ({best.arm})" if first else f"the best of them ({best.arm})"
    who = who if len(gaps) > 1 else best.arm
    size = size_text(best.difference, metric) if first else span(best.difference, metric, unit=True)
    return f"With {best.way} answers, {who} differs by {size}."


def _near_text(near: Iterable[_Gap], count: int) -> str:
    above = list(near)
    first = min(above, key=lambda gap: gap.p)
    return (
        f"{len(above)} of {count} such intervals (one for each arm and kind of answer) {form(len(above), 'lies', 'lie')} above 0. "
        f"But after correction for {first.family} comparisons, the smallest p-value is {first.p:.3f}, so the advantage may be chance."
    )
