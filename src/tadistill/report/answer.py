"""The short sentences of a report: the question of a study, its answer, and its cost. Page, Markdown file and terminal show the same ones.

    found = answer(read_results(study_dir, store))
    found.question, found.answer, found.against_sft, found.cost, found.next

`tadistill.results.verdict` decides the verdicts. This module only puts them into words. `explain` has the long sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tadistill.constants import OFF_BUDGET, SEEDS_FOR_A_CLAIM
from tadistill.metrics import MEAN, metric_title, metric_unit
from tadistill.plan.throughput import spoken
from tadistill.report.against_sft import against_sft, student_of
from tadistill.report.explain import (
    doubt_text,
    failed_text,
    few_text,
    gap_words,
    missing_text,
    needed_seeds,
    needed_text,
    to_equal,
)
from tadistill.report.path_words import in_words, sized, some, taught, ways_text
from tadistill.report.tables import stage_rows
from tadistill.results.collect import Results, Summary, once, primary_metric
from tadistill.results.compare import compare, direct_of, relative_compute, teacher_of
from tadistill.results.number_text import flops_text, number, size_text, span, with_unit
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import Comparison, Word, by_importance, comparisons, competitors, pairs
from tadistill.text import counted, listed

Kind = Literal["gain", "loss", "equivalent", "open", "best", "measured", "unfinished"]
BADGES: dict[Kind, str] = {
    "gain": "Yes",
    "loss": "No",
    "equivalent": "No difference",
    "open": "Undecided",
    "best": "Clear",
    "measured": "Measured",
    "unfinished": "Unfinished",
}
VERBS: dict[Word, str] = {
    "gain": "is clearly better than",
    "loss": "is clearly worse than",
    "equivalent": "is as good as",
    "no evidence": "is not clearly better or worse than",
}
_NOT_EXACTLY = 0.01  # relative difference of compute from which the sentence on the cost gives it
_KINDS: dict[Word, Kind] = {"gain": "gain", "loss": "loss", "equivalent": "equivalent", "no evidence": "open"}
_NO_CREDIT = {
    "sharpening": "sharpening (lower entropy) may explain it",
    "farther from the teacher": "the student is farther from the teacher",
    "not measured": "sharpening (lower entropy) or the divergence from the teacher was not measured",
}


@dataclass(frozen=True)
class Answer:
    """The result of a study in sentences. A sentence that does not apply is empty."""

    kind: Kind
    """The verdict. With assistants, it is about their paths: `gain` if any path is clearly better, `loss` if all paths are clearly worse,
    else `open` (or, for a single path, `equivalent`). Without assistants, it is `best` if one arm is clearly the best, else `open`. In any
    study, `measured` means that there is no arm to compare with, and `unfinished` that results are missing."""
    question: str
    answer: str
    against_sft: str
    """The comparison of distillation with plain fine-tuning (SFT), with sampled and with greedy answers."""
    cost: str
    failed: str
    """The names of failed stages, and why they failed."""
    next: str

    @property
    def badge(self) -> str:
        """The verdict in one or two words, as the page shows it."""
        return BADGES[self.kind]

    @property
    def sentences(self) -> tuple[str, ...]:
        """All sentences that are not empty, in the order in which they are shown, without the question."""
        return tuple(text for text in (self.answer, self.against_sft, self.cost, self.failed, self.next) if text)


@once
def answer(results: Results) -> Answer:
    """Return the question that a study asks, and the answer that its results give."""
    kind, text = _answer(results)
    return Answer(kind, _question(results), text, against_sft(results), _cost(results), failed_text(results), _next(results, kind)[0])


def next_seeds(results: Results) -> int | None:
    """Return the number of training seeds that `Answer.next` names. None if it names none."""
    return _next(results, answer(results).kind)[1]


# --- the question ---------------------------------------------------------------------------------------------------------


def _question(results: Results) -> str:
    arms = results.plan.arms
    if not any(arm.is_trained for arm in arms):
        return f"How good is {arms[0].name}?" if len(arms) == 1 else f"Which of {len(arms)} models is {_best(arms, 'the best')}?"
    student, chains = sized(results, student_of(results), words=True), [arm for arm in arms if arm.has_assistant]
    return _question_on_paths(results, student, chains) if chains else _question_on_ways(results, student)


def _question_on_ways(results: Results, student: str) -> str:
    trained = [arm for arm in results.plan.arms if arm.is_trained and arm.model == student_of(results)]
    if len(trained) > 1:
        return f"Which of {len(trained)} ways to train {student} gives the {_best(trained, 'best')} model?"
    made = [f" after distillation from {sized(results, arm.path[0])}" if len(arm.path) > 1 else " after fine-tuning" for arm in trained]
    return f"How good is {student}{made[0] if made else ''}?"


def _question_on_paths(results: Results, student: str, chains: Sequence[ArmRecord]) -> str:
    found = pairs(results)
    equal = " with the same compute" if all(pair.against == "equal compute" for pair in found) else ""
    if route := next((arm for arm in chains if arm.is_routed), None):
        alone = [arm.path[0] for arm in results.plan.arms if len(arm.path) > 1 and not arm.is_routed]
        asked = f"Is {student} better" if alone else f"How good is {student}"
        than = f" than when {alone[0]} teaches it directly{equal}" if alone else ""
        return f"{asked} when each training set has its own teacher ({in_words(route.path[0])}){than}?"
    name = teacher_of(results, chains[0])
    assistants = dict.fromkeys(model for arm in chains for model in arm.models if model not in (teacher_of(results, arm), arm.model))
    # an assistant may do other things than teach the student
    through = "through" if all(arm.is_plain for arm in chains) else "with the help of"
    by_chain = f"{sized(results, name)} teaches it {through} {listed([sized(results, model) for model in assistants])}"
    if not any(pair.other for pair in found):
        return f"How good is {student} when {by_chain}?"
    return f"Is {student} better when {by_chain} than when {name} teaches it directly{equal}?"


def _best(compared: Sequence[object], of_many: str) -> str:
    return "better" if len(compared) == 2 else of_many


# --- the answer -----------------------------------------------------------------------------------------------------------


def _answer(results: Results) -> tuple[Kind, str]:
    if not results.summaries:
        done, total = sum(results.store.finished(stage.key) for stage in results.plan.stages), len(results.plan.stages)
        finished = f"{done} of {counted(total, 'stage is', 'stages are')} finished"
        return "unfinished", f"There is no answer yet: no arm is evaluated, and {finished}."
    decided = {(c.arm, c.other): c for c in comparisons(results)}
    if any(arm.has_assistant for arm in results.plan.arms):
        return _of_chains(results, decided)
    groups = [group for group in _ranked(results) if len(group) > 1]
    if not groups:
        summary, arm = _ranked(results)[0][0]
        others = "only controls" if any(a.control for a in results.plan.arms) else f"no other {'arm' if arm.is_trained else 'model'}"
        return "measured", f"{arm.name} scores {_score(results, summary)}. The study has {others} to compare it with."
    parts = [_of_group(results, group, list(decided.values())) for group in groups]
    return parts[0][0], " ".join(text for _, text in parts)


def _of_chains(results: Results, decided: dict[tuple[str, str], Comparison]) -> tuple[Kind, str]:
    found = pairs(results)
    known = [(c, pair.arm) for pair in found if pair.other and (c := decided.get((pair.arm.name, pair.other.name)))]
    if not known:
        has_other = any(pair.other for pair in found)
        return "unfinished" if has_other else "measured", _undecided(results, found[0].arm, has_other=has_other)
    if len(known) == 1:
        return _KINDS[known[0][0].word], _chain_text(*known[0])
    gains, losses = ([c for c, _ in known if c.word == word] for word in ("gain", "loss"))
    best = by_importance(results)[0]
    kind: Kind = "gain" if gains else "loss" if len(losses) == len(known) else "open"
    ways = "paths through assistants" if all(arm.is_plain for _, arm in known) else ways_text([arm for _, arm in known])
    same = " with the same compute" if all(c.against == "equal compute" for c, _ in known) else ""
    baselines = f"direct distillation{same} ({some(list(dict.fromkeys(c.other for c, _ in known)))})"
    none = "Neither" if len(known) == 2 else "None"
    group = f"{len(gains) or none} of the {len(known)} {ways} ({some([c.arm for c, _ in known])})"
    worse = f", and {len(losses)} {_are(losses)} clearly worse" if losses else ""
    first = f"{group} {_are(gains)} clearly better than {baselines}{worse}."
    return kind, f"{first} {_chain_text(best, results.arm(best.arm), best=True)}"


def _are(counted: Sequence[object]) -> str:
    return "are" if len(counted) > 1 else "is"


def _undecided(results: Results, chain: ArmRecord, *, has_other: bool) -> str:
    if not has_other:
        summary = results.summaries.get((chain.name, MEAN, primary_metric(results)))
        score = f"{chain.name} scores {_score(results, summary)}. " if summary else ""
        return f"{score}The study has no arm to compare it with; add a direct arm with `compute: as {chain.name}`."
    return f"There is no answer yet: {chain.name} and the arm with which it is compared have no finished training seed in common."


def _chain_text(c: Comparison, arm: ArmRecord, *, best: bool = False) -> str:
    other = f"direct distillation{' with the same compute' if c.against == 'equal compute' else ''} ({c.other})"
    within = "within" if c.word == "equivalent" else "but within"
    margin = (
        f", {within} the margin of ±{with_unit(number(c.margin, c.metric), c.metric)}" if c.equivalent and c.word != "no evidence" else ""
    )
    if best:
        text = f"The best of them, {c.arm} ({taught(arm)}), differs from {other} by {size_text(c.difference, c.metric)}{margin}."
    else:
        how = f"Distillation through {listed(arm.path[1:-1])} ({c.arm})" if arm.is_plain else f"{c.arm} ({taught(arm)})"
        text = f"{how} {VERBS[c.word]} {other}{margin}: {gap_words(c)}."
    if c.word == "no evidence":
        text += f" {doubt_text(c)}"
    if c.unequal:
        text += " The two arms had different training compute, so nothing is credited to the path."
    if c.credit in _NO_CREDIT:
        text += f" The path is not credited with the gain, because {_NO_CREDIT[c.credit]}."
    return text


def _ranked(results: Results) -> list[list[tuple[Summary, ArmRecord]]]:
    metric = primary_metric(results)
    groups = [
        [(s, arm) for arm in group if (s := results.summaries.get((arm.name, MEAN, metric))) and arm.control is None]
        for group in competitors(results)
    ]
    return [sorted(group, key=lambda pair: -pair[0].mean) for group in groups if group] or [
        [(summary, results.arm(name))] for (name, of_set, m), summary in results.summaries.items() if (of_set, m) == (MEAN, metric)
    ]


def _of_group(results: Results, group: list[tuple[Summary, ArmRecord]], decided: Sequence[Comparison]) -> tuple[Kind, str]:
    metric, (summary, first) = primary_metric(results), group[0]
    if number(summary.mean, metric) == number(group[-1][0].mean, metric):
        arms = "Both" if len(group) == 2 else f"All {len(group)}"
        return "open", f"{arms} arms have the same mean, {_score(results, summary)}."
    tied = [arm.name for other, arm in group if number(other.mean, metric) == number(summary.mean, metric)]
    if len(tied) > 1:
        return "open", f"{listed(tied)} have the same highest mean, {number(summary.mean, metric)} {_unit(metric)}."
    mine = [c for c in decided if first.name in (c.arm, c.other) and {c.arm, c.other} <= {arm.name for _, arm in group}]
    beaten = [c for c in mine if c.word == ("gain" if c.arm == first.name else "loss")]
    score = f"{first.name} has the highest mean, {_score(results, summary)}"
    if not mine:
        return "open", f"{score}, but has no finished training seed in common with another arm."
    few = _few_seeds(mine)
    if len(mine) == 1:
        rival = mine[0].other if mine[0].arm == first.name else mine[0].arm
        found = compare(results, first.name, rival, metric)
        ahead = f"the difference is {span(found[0], metric, unit=True)}." if found else ""
        if beaten:
            return "best", f"{score}, and clearly beats {rival}: {ahead}"
        return "open", f"{score}, but does not clearly beat {rival}: {ahead}{few}"
    if len(beaten) == len(mine):
        return "best", f"{score}, and clearly beats all others."
    return "open", f"{score}, but clearly beats {f'only {len(beaten)}' if beaten else 'none'} of the {len(mine)} others.{few}"


def _few_seeds(found: Sequence[Comparison]) -> str:
    fewest = min((len(c.seeds) for c in found if c.trained), default=SEEDS_FOR_A_CLAIM)
    return f" {few_text(fewest)}" if fewest < SEEDS_FOR_A_CLAIM else ""


def _score(results: Results, summary: Summary) -> str:
    metric = primary_metric(results)
    known = "" if summary.low == summary.high else f" (95 % interval {number(summary.low, metric)} to {number(summary.high, metric)})"
    return f"{number(summary.mean, metric)} {_unit(metric)}{known}"


def _unit(metric: str) -> str:
    return f"% {metric_title(metric)}" if metric_unit(metric).startswith("percentage") else metric_title(metric)


# --- the cost and what comes next -------------------------------------------------------------------------------------------


def _cost(results: Results) -> str:
    spent, training = _spent(results), _training_cost(results)
    if spent and training:
        return f"{training}; the study's {spent}."
    return f"{spent or training}." if spent or training else ""


def _spent(results: Results) -> str:
    seconds = [row.manifest.seconds for row in stage_rows(results) if row.manifest]
    total = len(results.plan.stages)
    done = counted(total, "stage") if len(seconds) == total else f"{counted(len(seconds), 'finished stage')} (of {total})"
    return f"{done} took {spoken(sum(seconds))} of computing" if seconds else ""


def _training_cost(results: Results) -> str:
    # the cost of the most expensive compared arm, and how many times that of direct distillation and of its equal-compute arm it is
    found = [pair.arm for pair in pairs(results) if pair.against != "pair"] or [arm for arm in results.plan.arms if arm.is_trained]
    costs = [(arm.flops, arm) for arm in found if arm.flops is not None]
    if not costs:
        return ""
    flops, arm = max(costs, key=lambda cost: cost[0])
    times, direct = list[str](), direct_of(results, arm)
    if direct and direct.flops and direct.name != arm.name:
        times.append(f"{flops / direct.flops:.2f} times direct distillation ({direct.name})")
    equal = next((p.other for p in pairs(results) if p.arm is arm and p.other and p.against == "equal compute"), None)
    if equal and equal.flops and abs((relative_compute(arm, equal) or 1.0) - 1) >= _NOT_EXACTLY:
        rule = f"up to {100 * OFF_BUDGET:.0f} % more or less counts as the same compute"
        times.append(f"{flops / equal.flops:.2f} times the compute of {equal.name} ({rule})")
    first = f"Training {arm.name} with one seed costs {flops_text(flops)} FLOPs"
    return f"{first}, {listed(times)}" if times else first


def _next(results: Results, kind: Kind) -> tuple[str, int | None]:
    """Return the sentence on what to do next, and the number of training seeds that it names, if it names one."""
    if results.missing:
        return missing_text(results), None
    compared = comparisons(results)
    if any(pair.other is None for pair in pairs(results)):
        return "Next: add the arm to compare with, and run the recipe again; finished stages are kept.", None
    if any(c.few_seeds for c in compared):
        return f"Next: give the recipe at least {SEEDS_FOR_A_CLAIM} training seeds; finished stages are kept.", SEEDS_FOR_A_CLAIM
    if kind not in ("open", "unfinished") or not any(c.trained for c in compared):
        return "", None
    first = by_importance(results)[0]
    seeds, needed = needed_seeds(first), needed_text(first)
    more = "test prompts" if needed and seeds is None else "training seeds or test prompts"
    fair = f", and {to_equal(first)} for equal compute" if first.unequal else ""
    return f"Next: add {more} to decide the question{fair}; finished stages are kept.{needed}", seeds
