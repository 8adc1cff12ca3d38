"""The headings of the sections of the page. Each heading states the main finding of its section, in one sentence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tadistill.constants import SEEDS_FOR_A_CLAIM
from tadistill.metrics import metric_title
from tadistill.plan.throughput import spoken
from tadistill.report.against_sft import clear_against_sft
from tadistill.report.answer import VERBS
from tadistill.report.figures.paths import budget_text, budgets
from tadistill.report.figures.scores import ForestRow, differences, entropy_curves
from tadistill.report.path_words import some, steps, ways_text
from tadistill.report.tables import stage_rows
from tadistill.results.budget_curves import budget_curves
from tadistill.results.collect import Results, primary_metric, seeds_of
from tadistill.results.compare import MAIN
from tadistill.results.curves import Curve, learning_curves
from tadistill.results.number_text import span
from tadistill.results.sample_answers import Samples, samples
from tadistill.results.verdict import Comparison, by_importance, comparisons, enough_seeds, is_clear
from tadistill.statistics import holm
from tadistill.text import counted, form, listed


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor in the address, its name in the navigation, and its heading."""

    anchor: str
    name: str
    finding: str


def sections(results: Results) -> list[Section]:
    """Return the sections of the page with their headings. A section without content is omitted."""
    measured, curves, found = bool(results.summaries), learning_curves(results), samples(results)
    candidates = (
        ("against", "Comparison", measured, lambda: against(results)),
        ("compute", "Compute", measured and any(len(curve.points) > 1 for curve in budget_curves(results)), lambda: over_compute(results)),
        ("paths", "Paths", any(len(arm.path) > 1 for arm in results.plan.arms), lambda: paths(results)),
        ("learning", "Learning", any(curve.arm is not None for curve in curves), lambda: learning(results, curves)),
        ("answers", "Answers", found, lambda: answers(results, found)),
        ("behaviour", "Behaviour", measured, lambda: behaviour(results)),
        ("how", "How", True, lambda: how(results)),
    )
    return [Section(anchor, name, finding()) for anchor, name, needed, finding in candidates if needed]


def against(results: Results) -> str:
    """Return a sentence that says which arms are clearly better or worse than the arm with which they are compared."""
    rows = differences(results)
    if not rows:
        what = "arm" if any(arm.is_trained for arm in results.plan.arms) else "model"
        return _sentence(f"{metric_title(primary_metric(results))} by {what} and test set")
    decided = comparisons(results)
    if not decided:
        clear = _clear(results, rows)
        if len(rows) == 1:
            return f"{rows[0].arm.name} {'differs' if clear else 'does not clearly differ'} from {rows[0].other.name}"
        return f"{len(clear) or 'None'} of {len(rows)} differences {'is' if len(clear) < 2 else 'are'} clear"
    named = {(c.arm, c.other) for c in decided}
    more = [row for row in _clear(results, rows) if (row.arm.name, row.other.name) not in named]
    said = [_decided(results, decided)]
    said += [_beyond(more, other) for other in dict.fromkeys(row.other.name for row in more)]
    return "; ".join(said)


def _decided(results: Results, found: Sequence[Comparison]) -> str:
    if len(found) == 1:
        c = found[0]
        return f"{c.arm} {VERBS[c.word]} {c.other}{' (not at equal compute)' if c.unequal else ''}"
    if all(c.against == "pair" for c in found):
        better = [f"{c.arm} than {c.other}" if c.word == "gain" else f"{c.other} than {c.arm}" for c in found if c.word in ("gain", "loss")]
        which = f": better {form(len(better), 'is', 'are')} {some(better)}" if better else ""
        return f"{len(better) or 'None'} of {counted(len(found), 'pair')} differ{'' if len(better) > 1 else 's'} clearly{which}"
    arms = {word: [c.arm for c in found if c.word == word] for word in VERBS}
    clear = [f"{_named(arms[word])} {VERBS[word].removeprefix('is ')}" for word in ("gain", "loss", "equivalent") if arms[word]]
    rest, unequal = arms["no evidence"], [c.arm for c in found if c.unequal]
    if not clear:
        none = "Neither" if len(found) == 2 else "None"
        ways = ways_text([results.arm(c.arm) for c in found])
        said = f"{none} of {len(found)} {ways} is clearly better or worse than direct distillation"
    else:
        said = f"{listed(clear)} direct distillation" + (f"; {_named(rest)} not clearly better or worse" if rest else "")
    return said + (f" ({some(unequal)}: not at equal compute)" if unequal else "")


def _beyond(rows: list[ForestRow], other: str) -> str:
    mine = [row for row in rows if row.other.name == other]
    better = [row.arm.name for row in mine if row.difference.mean > 0]
    sides = {"better": better, "worse": [row.arm.name for row in mine if row.arm.name not in better]}
    return f"{listed([f'{_named(names)} clearly {side}' for side, names in sides.items() if names])} than {other}"


def _named(names: list[str]) -> str:
    return f"{listed(names) if len(names) <= 4 else some(names)} {form(len(names), 'is', 'are')}"


def _clear(results: Results, rows: Sequence[ForestRow]) -> list[ForestRow]:
    known = clear_against_sft(results)  # as in the report's answer
    adjusted = holm([row.difference.p for row in rows], untested=sum(not results.scores[arm.name] for arm in results.plan.arms))
    found = []
    for row, p in zip(rows, adjusted, strict=True):
        clear = is_clear(row.difference, p, enough=enough_seeds(row.arm, row.other, len(row.per_seed)))
        found += [row] if known.get(frozenset((row.arm.name, row.other.name)), clear) else []
    return found


def over_compute(results: Results) -> str:
    """Return a sentence that names the arms and budgets with a clear difference from the reference arm at the same budget."""
    curves = budget_curves(results)
    gaps = [(f"{curve.name} at {p.times:g}×", p.gap) for curve in curves for p in curve.points if p.gap]
    seeds = min(len(p.summary.per_seed) for curve in curves for p in curve.points)
    if seeds < SEEDS_FOR_A_CLAIM:
        what = f"{metric_title(primary_metric(results))} of {counted(len(curves), 'arm')} over training compute"
        return _sentence(f"{what}; {SEEDS_FOR_A_CLAIM} training seeds are needed for a claim")
    found = list(zip(gaps, holm([gap.p for _, gap in gaps]), strict=True))
    clear = [(name, gap.mean > 0) for (name, gap), p in found if is_clear(gap, p, enough=True)]
    better, worse = ([name for name, is_above in clear if is_above == above] for above in (True, False))
    if not better and not worse:
        return f"None of {counted(len(gaps), 'comparison')} with {curves[0].name} at the same budget is clear"
    against = f"Against {curves[0].name} at the same budget"
    sides = [f"{_named(names)} clearly {side}" for side, names in (("better", better), ("worse", worse)) if names]
    return f"{against}, {'; '.join(sides)}"


def paths(results: Results) -> str:
    """Return a sentence on the path with assistants in the report's answer. It says how much of the divergence from the teacher comes from
    the steps between the teacher and the last assistant. If this is unknown, the sentence lists the steps.

    If the report compares no path with assistants, the sentence gives the number of arms with a teacher.
    """
    chains = [c.arm for c in by_importance(results) if results.arm(c.arm).has_assistant]
    found = [b for b in budgets(results) if b.arm.name in chains[:1]] or ([] if chains else budgets(results))
    if found:
        return budget_text(results, found[0])
    if chains:
        return f"{chains[0]}: {steps(results.arm(chains[0]))}"
    distilled = [arm for arm in results.plan.arms if len(arm.path) > 1]
    if len(distilled) == 1:
        return f"{distilled[0].name} learns from {distilled[0].path[0]}"
    return f"{len(distilled)} of {len(results.plan.arms)} arms learn from a teacher"


def learning(results: Results, curves: Iterable[Curve]) -> str:
    """Return a sentence that says how many arms had their best dev value at the end of training. An arm whose dev value never changed has
    no best value."""
    metric = f"dev/{primary_metric(results)}"
    found = [curve for curve in curves if curve.arm is not None and curve.metric == metric and len(curve.mean[1]) > 1]
    if not found:
        return "How training went"
    title = metric_title(primary_metric(results))
    changing = [curve for curve in found if min(curve.mean[1]) < max(curve.mean[1])]
    if not changing:
        return f"{_sentence(title)} on dev did not change during training"
    rising = [curve.name for curve in changing if int(np.argmax(curve.mean[1])) == len(curve.mean[1]) - 1]
    them = "it" if len(found) == 1 else "them"
    when = f"at the end: more training may still help {them}" if rising else "before the end of training"
    if len(found) == 1:
        return f"{found[0].name} had its best {title} on dev {when}"
    named = rising or changing
    everyone = "Both" if len(found) == 2 else f"All {len(found)}"
    arms = everyone if len(named) == len(found) else f"{len(named)} of {len(found)}"
    return f"{arms} arms had their best {title} on dev {when}"


def answers(results: Results, found: Samples) -> str:
    """Return a sentence that says how often the two arms that the report's answer compares gave the same answer to a prompt."""
    prompts = [prompt for of_set in found.values() for prompt in of_set]
    compared = by_importance(results)
    if compared:
        arm, other = compared[0].arm, compared[0].other
        both = [p["answers"] for p in prompts if arm in p["answers"] and other in p["answers"]]
        same = sum(said[arm]["text"].strip() == said[other]["text"].strip() for said in both)
        if both:
            return f"{arm} and {other} give the same answer to {same} of {counted(len(both), 'prompt')}"
    return f"The answers to {counted(len(prompts), 'prompt')}{', side by side' if len(results.plan.arms) > 1 else ''}"


def behaviour(results: Results) -> str:
    """Return a sentence on how much the entropies differ between the two arms that the report's answer compares. Without such arms, the
    sentence gives the range of entropies."""
    compared = [(c, c.mechanism.entropy) for c in by_importance(results) if c.mechanism and c.mechanism.entropy]
    if compared:
        c, d = compared[0]
        clear = is_clear(d, d.p, enough=enough_seeds(results.arm(c.arm), results.arm(c.other), len(c.seeds)))
        word = "not clearly different from" if not clear else "clearly lower than" if d.mean < 0 else "clearly higher than"
        return f"The entropy of {c.arm} is {word} that of {c.other}: {span(d, 'entropy', unit=True)}"
    curves = entropy_curves(results)
    mains = {name: p.entropy for name, points in curves.items() for p in points if p.decoding == MAIN}
    if len(mains) > 1:
        low, high = min(mains, key=mains.__getitem__), max(mains, key=mains.__getitem__)
        return f"Entropy goes from {mains[low]:.2f} ({low}) to {mains[high]:.2f} ({high}) nats/token"
    return "How the models answer: length, repetition, variety"


def how(results: Results) -> str:
    """Return a sentence with the numbers of arms, training seeds, test sets and stages, and the computing time."""
    plan = results.plan
    seconds = sum(row.manifest.seconds for row in stage_rows(results) if row.manifest)
    trained = any(arm.is_trained for arm in plan.arms)
    seeds = len(seeds_of(results))
    parts = [counted(len(plan.arms), "arm" if trained else "model")]
    parts += [counted(seeds, "training seed")] if trained else []
    parts += [counted(len(results.sets), "test set")] if results.sets else []
    time = f", {spoken(seconds)} of computing" if seconds else ""
    return f"{', '.join(parts)}: {counted(len(plan.stages), 'stage')}{time}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
