"""Write the analysis of a study. It has published values, the metrics on which a chain helps or hurts, and possible explanations.

The possible explanations are sharpening, the error of each hop, and compute. Every sentence contains the numbers that it depends on.
If a value was not measured, the sentence says so.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tadistill.config.arm import path_text
from tadistill.metrics import METRICS, improves, metric_title, metric_unit
from tadistill.results.collect import MEAN, Results, sets_with, stack, summarise
from tadistill.results.compare import BUCKETS, bucket_difference, bucket_title, budget_models, difference, direct_of
from tadistill.results.study import ArmRecord
from tadistill.results.units import number, span, summary_text
from tadistill.results.verdict import Comparison, comparisons
from tadistill.statistics import Difference

_MOST_PAIRS = 6  # in a study without chains; a longer analysis would not be read


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of the analysis: a title and a few sentences."""

    title: str
    sentences: tuple[str, ...]


def explain(results: Results) -> list[Paragraph]:
    """Return the paragraphs of the analysis. The list is empty if the study has no comparison and no published value."""
    paragraphs = [_published(results)] if any(arm.published for arm in results.plan.arms) else []
    compared = comparisons(results)
    for c in compared if len(compared) <= _MOST_PAIRS or compared[0].against != "pair" else ():
        paragraphs.append(Paragraph(f"Where {c.arm} differs from {c.other}", (*_where(results, c), _UNADJUSTED)))
        if c.against != "pair":
            paragraphs.append(Paragraph(f"What explains {c.arm}", (_sharpening(c), *_hops(results, c), _compute(results, c))))
    return paragraphs


_UNADJUSTED = "These intervals are not adjusted for multiple comparisons. They show where to look; only the verdict is a claim."


# --- published values ---------------------------------------------------------------------------------------------------


def _published(results: Results) -> Paragraph:
    sentences = [_arm_published(results, arm) for arm in results.plan.arms if arm.published]
    return Paragraph("Published values", tuple(sentences))


def _arm_published(results: Results, arm: ArmRecord) -> str:
    assert arm.published is not None
    parts: list[str] = []
    for name, value in arm.published.rouge_l.items():
        summary = results.summaries.get((arm.name, name, "rouge_l"))
        said = number(value, "rouge_l")
        if summary is None:
            parts.append(f"on {name} {said} is published and not measured here")
        elif summary.low <= value <= summary.high:
            parts.append(f"on {name} {summary_text(summary, 'rouge_l')} matches the published {said}")
        else:
            apart = number(abs(summary.mean - value), "rouge_l")
            where = "above" if summary.mean > value else "below"
            parts.append(f"on {name} {summary_text(summary, 'rouge_l')} is {apart} {where} the published {said}")
    return f"{arm.name} ({metric_title('rouge_l')}, published by {arm.published.source}): {'; '.join(parts)}."


# --- where a chain helps and where it hurts -----------------------------------------------------------------------------


def _where(results: Results, c: Comparison) -> list[str]:
    metrics = dict.fromkeys((c.metric, "rouge_l"))
    sentences = [_by_set(results, c, metric) for metric in metrics if metric in results.metrics]
    return [*sentences, _by_length(results, c), *_by_metric(results, c)]


def _by_set(results: Results, c: Comparison, metric: str) -> str:
    found = [(f"on {name}", difference(results, c.arm, c.other, metric, name)) for name in sets_with(results, metric)]
    return f"{metric_title(metric)} by set: {_sorted_out(found, metric)}."


def _by_length(results: Results, c: Comparison) -> str:
    title = f"{metric_title('rouge_l')} by length of the reference"
    if "rouge_l" not in results.metrics:
        return f"{title}: not measured."
    found = [(f"at {bucket_title(b)} tokens", bucket_difference(results, c.arm, c.other, "rouge_l", b)) for b in BUCKETS]
    return f"{title}: {_sorted_out(found, 'rouge_l')}."


def _by_metric(results: Results, c: Comparison) -> list[str]:
    shown = [m.name for m in METRICS.values() if m.better and m.name in results.metrics and m.name not in (c.metric, "rouge_l")]
    better, worse, unclear = [], [], []
    for metric in shown:
        d = difference(results, c.arm, c.other, metric)
        if d is None:
            continue
        text = f"{metric_title(metric)} ({span(d, metric)} {metric_unit(metric)})"
        good = improves(metric, d.mean)
        (unclear if d.covers_zero else better if good else worse).append(text)
    sentences = []
    if better or worse or unclear:
        sentences.append(f"Other metrics, {_grouped(better, worse, unclear)}.")
    whole = [
        f"{metric_title(metric)} {number(mine.mean, metric)} against {number(theirs.mean, metric)}"
        for metric in (m.name for m in METRICS.values() if m.whole_set)
        if (mine := results.averages.get((c.arm, MEAN, metric))) and (theirs := results.averages.get((c.other, MEAN, metric)))
    ]
    return [*sentences, f"Metrics of whole sets, which have no intervals: {', '.join(whole)}."] if whole else sentences


def _sorted_out(found: Iterable[tuple[str, Difference | None]], metric: str) -> str:
    helps, hurts, unclear, unmeasured = [], [], [], []
    for where, d in found:
        if d is None:
            unmeasured.append(where)
        else:
            good = improves(metric, d.mean)
            (unclear if d.covers_zero else helps if good else hurts).append(f"{where} ({span(d, metric)})")
    parts = [f"helps {_listed(helps)}", f"hurts {_listed(hurts)}"]
    parts += [f"no clear difference {_listed(unclear)}"] if unclear else []
    parts += [f"not measured {_listed(unmeasured)}"] if unmeasured else []
    return "; ".join(parts)


def _grouped(better: list[str], worse: list[str], unclear: list[str]) -> str:
    groups = (("better", better), ("worse", worse), ("no clear difference", unclear))
    return "; ".join(f"{title}: {', '.join(texts)}" for title, texts in groups if texts)


def _listed(items: list[str]) -> str:
    return ", ".join(items) if items else "nowhere"


# --- what explains it ---------------------------------------------------------------------------------------------------


def _sharpening(c: Comparison) -> str:
    assert c.mechanism is not None
    m = c.mechanism
    entropy = f"entropy {span(m.entropy, 'entropy')} nats/token" if m.entropy else "entropy not measured"
    greedy = f"greedy {metric_title(c.metric)} {span(m.greedy, c.metric)}" if m.greedy else "greedy decoding not measured"
    if m.matched and m.at_entropy is not None:
        matched = f"at a matched entropy of {number(m.at_entropy, 'entropy')} nats/token {span(m.matched, c.metric)}"
    else:
        matched = (
            "matched entropy not measured" if m.curves == "not measured" else "the entropies of the two arms' decodings do not overlap"
        )
    return f"{_sharpening_verdict(c)} Against {c.other}: {entropy}; {greedy}; {matched}."


def _sharpening_verdict(c: Comparison) -> str:
    assert c.mechanism is not None
    m = c.mechanism
    if c.difference.low <= 0:
        return f"There is no gain that sharpening could explain ({metric_title(c.metric)} {span(c.difference, c.metric)})."
    controls = [d for d in (m.greedy, m.matched) if d is not None]
    if not controls:
        return "Sharpening is not measured."
    if all(d.low > 0 for d in controls):
        return "Sharpening does not explain the gain: it remains under the controls (greedy and matched entropy)."
    if m.entropy is not None and m.entropy.high < 0:
        return "Sharpening explains the gain: the entropy fell, and the gain vanishes under a control (greedy or matched entropy)."
    return "Sharpening may explain the gain: it vanishes under a control, but the entropy did not clearly fall."


def _hops(results: Results, c: Comparison) -> list[str]:
    """Describe a chain's error budget: KL(q ‖ teacher) = KL(q ‖ last assistant) + one term for each hop between the two."""
    arm = results.arm(c.arm)
    models = budget_models(results, arm)
    terms = [f"budget/{j}" for j in range(len(models) - 1)]
    if not all((arm.name, MEAN, metric) in results.summaries for metric in ("reverse_kl", *terms)):
        return ["The error of each hop is not measured: this arm has no error budget."]
    seeds = sorted(results.summaries[arm.name, MEAN, terms[0]].per_seed)
    sets = sets_with(results, terms[0])
    added = summarise([sum_of([stack(results, arm.name, seeds, name, t) for t in terms[1:]]) for name in sets], seeds, terms[1])
    total, first = (results.summaries[arm.name, MEAN, metric] for metric in ("reverse_kl", terms[0]))
    share = f" ({100 * added.mean / total.mean:.0f} % of the total)" if total.mean > 0 else ""
    effect = "add" if added.low > 0 else "remove" if added.high < 0 else "make no clear difference:"
    last = arm.path[-2]
    hops = [f"{hop_text(models, j)} {summary_text(results.summaries[arm.name, MEAN, t], t)}" for j, t in enumerate(terms) if j]
    return [
        f"{metric_title('reverse_kl')} is {summary_text(total, 'reverse_kl')} nats/token. {summary_text(first, terms[0])} of it is the "
        f"distance to the last assistant {last}, which training minimised. The hops above {last} {effect} "
        f"{summary_text(added, terms[1])}{share}: {', '.join(hops)}.",
        "A positive hop means that the student is closer to the hop's assistant than to the model above it.",
    ]


def sum_of(terms_SNK: list[np.ndarray]) -> np.ndarray:
    return np.sum(terms_SNK, axis=0)


def hop_text(models: tuple[str, ...], j: int) -> str:
    """Return the models of hop j >= 1 of the error budget, such as ``xl > l``. Hop 1 leads to the last assistant, hop 2 to the next."""
    return path_text((models[-2 - j], models[-1 - j]))


def _compute(results: Results, c: Comparison) -> str:
    direct = direct_of(results, results.arm(c.arm))
    if direct is None:
        return "The effect of compute is not measured: the study has no plain direct arm that trains this student."
    if c.against == "plain direct":
        return (
            f"The effect of compute is not measured: the study has no arm with `compute: as {c.arm}`, which trains directly at equal cost."
        )
    gap = difference(results, c.arm, direct.name, c.metric)
    closed = difference(results, c.other, direct.name, c.metric)
    if gap is None or closed is None:
        return f"The effect of compute is not measured yet: {direct.name} has no finished seed in common with both arms."
    numbers = (
        f"over plain direct ({direct.name}), {c.arm} gains {span(gap, c.metric)} "
        f"and its equal-compute baseline {c.other} {span(closed, c.metric)} "
        f"{metric_unit(c.metric)} of {metric_title(c.metric)}"
    )
    if gap.low <= 0:
        return f"There is no clear gap that compute could explain: {numbers}."
    share = f"closes {100 * closed.mean / gap.mean:.0f} % of the gap"
    if closed.low <= 0:
        return f"Compute is not shown to explain the gap: {numbers} (more training without an assistant {share})."
    return f"Compute explains a part: {numbers}, so more training without an assistant {share}."
