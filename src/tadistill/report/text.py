"""The short sentences of a report: the question of a study, its answer, and its cost. Page, Markdown and terminal show the same sentences.

    found = answer(read_results(study_dir, store))
    found.question, found.answer, found.against_sft, found.cost, found.next

`tadistill.results.verdict` decides the verdicts. This module only puts them into words. `explain` has the long sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tadistill.metrics import metric_title, metric_unit
from tadistill.plan.throughput import spoken
from tadistill.report.explain import failed_text, missing_text, needed_text, seeds_text
from tadistill.report.routes import in_words, listed, some, taught, ways_text
from tadistill.report.tables import stage_rows
from tadistill.results.collect import MEAN, Results, Summary, primary_metric
from tadistill.results.compare import difference, direct_of, greedy_decoding
from tadistill.results.study import ArmRecord
from tadistill.results.units import detectable_text, flops_text, number, p_text, parameters_text, signed, spoken_interval, with_unit
from tadistill.results.verdict import SEEDS_FOR_A_CLAIM, Comparison, Word, by_importance, comparisons, competitors, pairs
from tadistill.statistics import Difference, holm

_ALPHA = 0.05
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
_KINDS: dict[Word, Kind] = {"gain": "gain", "loss": "loss", "equivalent": "equivalent", "no evidence": "open"}


@dataclass(frozen=True)
class Answer:
    """The result of a study in sentences. A sentence that does not apply is empty."""

    kind: Kind
    """The kind of verdict. Without assistants, it is `best` if one arm is clearly the best. A single arm is `measured`."""
    question: str
    answer: str
    against_sft: str
    """Says whether distillation beat plain fine-tuning (SFT), with sampled and with greedy answers."""
    cost: str
    failed: str
    """The stages that failed, with their reasons."""
    next: str
    """What the user should do or look at next."""

    @property
    def badge(self) -> str:
        """The verdict in one or two words, as the page shows it."""
        return BADGES[self.kind]

    @property
    def sentences(self) -> tuple[str, ...]:
        """All sentences except the question, in the order in which they are shown."""
        return tuple(text for text in (self.answer, self.against_sft, self.cost, self.failed, self.next) if text)


def answer(results: Results) -> Answer:
    """Return the question that a study asks, and the answer that its results give."""
    return results.once("answer", lambda: _make(results))


def _make(results: Results) -> Answer:
    kind, said = _answer(results)
    return Answer(kind, _question(results), said, _against_sft(results), _cost(results), failed_text(results), _next(results, kind))


def student_of(results: Results) -> str:
    """Return the model that the study is about: the one that the first compared arm trains, or else the one that most arms train."""
    found = pairs(results)
    if found:
        return found[0].arm.model
    models = [arm.model for arm in results.plan.arms if arm.is_trained] or [results.plan.arms[-1].model]
    return max(dict.fromkeys(models), key=models.count)


def sized(results: Results, model: str, *, words: bool = False) -> str:
    """Return the name of a model with its number of parameters, such as ``s (23.8 k)``."""
    if model not in results.plan.parameters:  # the teachers of a route
        return in_words(model)
    count = parameters_text(results.plan.parameters[model])
    return f"{model} ({count} parameters)" if words else f"{model} ({count})"


# --- the question ---------------------------------------------------------------------------------------------------------


def _question(results: Results) -> str:
    arms = results.plan.arms
    chains = [arm for arm in arms if arm.has_assistant]
    if not any(arm.is_trained for arm in arms):
        return f"How good is {arms[0].name}?" if len(arms) == 1 else f"Which of {len(arms)} models is the best?"
    student = sized(results, student_of(results), words=True)
    if not chains:
        trained = [arm for arm in arms if arm.is_trained and arm.model == student_of(results)]
        if len(trained) > 1:
            return f"Which of {len(trained)} ways to train {student} gives the best model?"
        made = [f" after distillation from {sized(results, arm.path[0])}" if len(arm.path) > 1 else " after fine-tuning" for arm in trained]
        return f"How good is {student}{made[0] if made else ''}?"
    teacher = sized(results, results.plan.teacher or chains[0].path[0])
    original = results.plan.teacher
    assistants = list(dict.fromkeys(m for arm in chains for m in arm.models if m not in (original or arm.path[0], arm.model)))
    through = listed([sized(results, model) for model in assistants])
    found, plain = pairs(results), all(arm.is_plain for arm in chains)
    equal = " with the same compute" if all(pair.against == "equal compute" for pair in found) else ""
    with_assistants = f"{'through' if plain else 'with the help of'} {through}"  # an assistant may do other things than teach the student
    if route := next((arm for arm in chains if arm.is_routed), None):
        alone = [arm.path[0] for arm in arms if len(arm.path) > 1 and not arm.is_routed]
        asked = f"Is {student} better" if alone else f"How good is {student}"
        than = f" than when {alone[0]} teaches it directly{equal}" if alone else ""
        return f"{asked} when each training set has its own teacher ({in_words(route.path[0])}){than}?"
    if not any(pair.other for pair in found):
        return f"How good is {student} when {teacher} teaches it {with_assistants}?"
    return f"Is {student} better when {teacher} teaches it {with_assistants} than when {teacher.split(' ')[0]} teaches it directly{equal}?"


# --- the answer -----------------------------------------------------------------------------------------------------------


def _answer(results: Results) -> tuple[Kind, str]:
    if not results.summaries:
        done = sum(results.store.finished(stage.key) for stage in results.plan.stages)
        return "unfinished", f"There is no answer yet: no arm is evaluated, and {done} of {len(results.plan.stages)} stages are finished."
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
        return _KINDS[known[0][0].word], _chain_text(results, *known[0])
    gains, losses = ([c for c, _ in known if c.word == word] for word in ("gain", "loss"))
    best = by_importance(results)[0]
    kind: Kind = "gain" if gains else "loss" if len(losses) == len(known) else "open"
    ways = "paths through assistants" if all(arm.is_plain for _, arm in known) else ways_text([arm for _, arm in known])
    same = " with the same compute" if all(c.against == "equal compute" for c, _ in known) else ""
    baselines = f"direct distillation{same} ({some(list(dict.fromkeys(c.other for c, _ in known)))})"
    counts = f"{len(gains) or 'None'} of {len(known)} {ways} ({some([c.arm for c, _ in known])}) clearly beat {baselines}"
    worse = f", and {len(losses)} did clearly worse" if losses else ""
    return kind, f"{counts}{worse}. {_chain_text(results, best, results.arm(best.arm), best=True)}"


def _undecided(results: Results, chain: ArmRecord, *, has_other: bool) -> str:
    if not has_other:
        add = f"add a direct arm with `compute: as {chain.name}`"
        summary = results.summaries.get((chain.name, MEAN, primary_metric(results)))
        score = f"{chain.name} scores {_score(results, summary)}. " if summary else ""
        return f"{score}The study has no arm to compare it with; {add}."
    return f"There is no answer yet: {chain.name} and the arm to compare it with share no finished seed."


def _chain_text(results: Results, c: Comparison, arm: ArmRecord, *, best: bool = False) -> str:
    how = f"Distilling through {listed(arm.path[1:-1])} ({c.arm})" if arm.is_plain else f"{c.arm} ({taught(arm)})"
    how = f"The best, {c.arm} ({taught(arm)})," if best else how
    other = f"direct distillation{' with the same compute' if c.against == 'equal compute' else ''} ({c.other})"
    text = f"{_claim(how, other, c)}: {_gap(c.difference, c.metric)}.{_limits(c)}"
    if c.against == "plain direct":
        return f"{text} The two had different compute, so nothing can be credited to the path."
    if c.credit not in (None, "credited"):
        return f"{text} The gain is not credited to the path ({c.credit})."
    return text


def _claim(one: str, other: str, c: Comparison) -> str:
    small = " (a difference within the margin)" if c.word in ("gain", "loss") and c.equivalent else ""
    return {
        "gain": f"{one} beat {other}{small}",
        "loss": f"{one} did worse than {other}{small}",
        "equivalent": f"{one} is as good as {other}, within the margin of ±{number(c.margin, c.metric)}",
        "no evidence": f"{one} did not{'' if c.difference.mean < 0 else ' clearly'} beat {other}",
    }[c.word]


def _gap(d: Difference, metric: str) -> str:
    return f"{with_unit(signed(d.mean, metric), metric)} of {metric_title(metric)}, {spoken_interval(d, metric)}"


def _limits(c: Comparison) -> str:
    if c.word != "no evidence":
        return ""
    if c.trained and len(c.seeds) < SEEDS_FOR_A_CLAIM:
        return f" {seeds_text(len(c.seeds))} cannot decide it: a claim needs at least {SEEDS_FOR_A_CLAIM}."
    if c.difference.se == 0:
        return " Nothing varies over these prompts."
    after = "" if c.difference.covers_zero else f" After adjustment for {c.family} comparisons this may be chance."
    if c.detectable is None:
        return after
    return f"{after} This design finds a difference of {detectable_text(c.detectable, c.metric, unit=True)} with 80 % power."


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
    if mine and len(beaten) == len(mine):
        return (
            "best",
            f"{score}, and clearly beats {'all others' if len(mine) > 1 else mine[0].other if mine[0].arm == first.name else mine[0].arm}.",
        )
    few = _few_seeds(mine)
    if len(mine) == 1:
        return "open", f"{score}, but does not clearly beat {group[1][1].name}.{few}"
    return "open", f"{score}, but clearly beats {f'only {len(beaten)}' if beaten else 'none'} of the {len(mine)} others.{few}"


def _few_seeds(found: Sequence[Comparison]) -> str:
    seeds = [len(c.seeds) for c in found if c.trained]
    short = seeds and min(seeds) < SEEDS_FOR_A_CLAIM
    return f" {seeds_text(min(seeds))} cannot decide it: a claim needs at least {SEEDS_FOR_A_CLAIM}." if short else ""


def _score(results: Results, summary: Summary) -> str:
    metric = primary_metric(results)
    return f"{number(summary.mean, metric)} {_unit(metric)} (95 % interval {number(summary.low, metric)} to {number(summary.high, metric)})"


def _unit(metric: str) -> str:
    return f"% {metric_title(metric)}" if metric_unit(metric).startswith("percentage") else metric_title(metric)


# --- against fine-tuning ----------------------------------------------------------------------------------------------------


def sft_arm(results: Results) -> ArmRecord | None:
    """Return the arm that fine-tunes the student without a teacher. If there are several, it is the one with the most training compute."""
    model = student_of(results)
    tuned = [arm for arm in results.plan.arms if arm.is_trained and arm.model == model and not arm.is_taught]
    return max(tuned, key=lambda arm: arm.flops or 0.0, default=None)


def _against_sft(results: Results) -> str:
    model, tuned = student_of(results), sft_arm(results)
    distilled = [arm for arm in results.plan.arms if arm.is_trained and arm.model == model and arm.is_taught and arm.control is None]
    if not (distilled and results.summaries):
        return ""
    if tuned is None:
        return f"The study cannot tell if distillation beat plain fine-tuning (SFT): no arm only fine-tunes {model}."
    metric, greedy, main = primary_metric(results), greedy_decoding(results), results.plan.recipe["evaluate"].get("temperature", 1.0)
    ways = {"sampled" if main else "greedy": metric, **({"greedy": f"{metric}@{greedy}"} if greedy and main else {})}
    known = {w: ds for w, m in ways.items() if (ds := [(d, a) for a in distilled if (d := difference(results, a.name, tuned.name, m))])}
    if not known:
        return f"Distillation is not compared with plain fine-tuning ({tuned.name}) yet: they share no finished seed."
    every = [(way, d, arm) for way, ds in known.items() for d, arm in ds]
    adjusted = [(*each, p) for each, p in zip(every, holm([d.p for _, d, _ in every]), strict=True) if not each[1].covers_zero]
    clear = {way: [(d, arm) for w, d, arm, p in adjusted if w == way and p < _ALPHA] for way in known}
    if few := min(len(results.scores[arm.name]) for arm in (tuned, *distilled)) < SEEDS_FOR_A_CLAIM:
        clear = {way: [] for way in known}
    wins = [way for way in known if any(d.mean > 0 for d, _ in clear[way])]
    claim = "did not clearly beat" if not wins else "beat" if len(wins) == len(known) else f"beat, with {wins[0]} answers only,"
    worse = {way: [arm.name for d, arm in found if d.mean < 0] for way, found in clear.items()}
    if all(len(worse[way]) == len(ds) for way, ds in known.items()):
        claim = "did worse than"
    best = distilled[0].name if len(distilled) == 1 else f"the best of {len(distilled)} arms"
    near = [] if few or wins else [p for _, d, _, p in adjusted if d.mean > 0]
    after = f" An interval excludes 0, but after the correction for {len(every)} comparisons {p_text(min(near))}." if near else ""
    bad = "".join(
        f" With {way} answers, {some(names)} {'is' if len(names) == 1 else 'are'} clearly worse."
        for way, names in worse.items()
        if names and len(distilled) > 1
    )
    differs = " and ".join(_way_text(way, ds, ways[way], unit=not i) for i, (way, ds) in enumerate(known.items()))
    return f"Distillation {claim} plain fine-tuning (SFT, {tuned.name}): {best} differs by {differs}.{after}{bad}"


def _way_text(way: str, found: Sequence[tuple[Difference, ArmRecord]], metric: str, *, unit: bool) -> str:
    best, arm = max(found, key=lambda entry: entry[0].mean)
    name = f"{arm.name}, " if len(found) > 1 else ""
    size = signed(best.mean, metric)
    return f"{with_unit(size, metric) if unit else size} with {way} answers ({name}{spoken_interval(best, metric)})"


# --- the cost and what comes next -------------------------------------------------------------------------------------------


def _cost(results: Results) -> str:
    seconds = [row.manifest.seconds for row in stage_rows(results) if row.manifest]
    total = len(results.plan.stages)
    done = (
        f"{len(seconds)} stage{'' if len(seconds) == 1 else 's'}"
        if len(seconds) == total
        else f"{len(seconds)} finished stages (of {total})"
    )
    spent = f"{done} took {spoken(sum(seconds))} of computing" if seconds else ""
    found = [pair.arm for pair in pairs(results) if pair.against != "pair"] or [arm for arm in results.plan.arms if arm.is_trained]
    known = [arm for arm in found if arm.flops is not None]
    if not known:
        return f"{spent}." if spent else ""
    arm = max(known, key=lambda arm: arm.flops or 0.0)
    direct = direct_of(results, arm)
    times = ""
    if direct and direct.flops and direct.name != arm.name:
        times = f", {(arm.flops or 0.0) / direct.flops:.2f} times direct distillation ({direct.name})"
    first = f"Training one {arm.name} costs {flops_text(arm.flops)} FLOPs{times}"
    return f"{first}; the study's {spent}." if spent else f"{first}."


def _next(results: Results, kind: Kind) -> str:
    if results.missing:
        return missing_text(results)
    compared = comparisons(results)
    few = any(c.trained and len(c.seeds) < SEEDS_FOR_A_CLAIM for c in compared)
    if any(pair.other is None for pair in pairs(results)):
        return "Next: add the arm to compare with, and run the recipe again; finished stages are kept."
    if few:
        return f"Next: give the recipe at least {SEEDS_FOR_A_CLAIM} training seeds; finished stages are kept."
    if kind in ("open", "unfinished") and any(c.trained for c in compared):
        first = by_importance(results)[0]
        fair = f", and a direct arm with `compute: as {first.arm}` for equal compute" if first.against == "plain direct" else ""
        return f"Next: add training seeds or test prompts to decide it{fair}; finished stages are kept.{needed_text(first)}"
    return ""
