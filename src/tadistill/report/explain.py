"""The long sentences of a report: each verdict with its numbers and sample sizes, and cautions about the numbers.

`tadistill.results.verdict` decides the verdicts. This module only puts them into words. The module `tadistill.report.answer` has the short
sentences.
"""

from collections.abc import Sequence

from tadistill.config.arm import flat
from tadistill.constants import OFF_BUDGET, SEEDS_FOR_A_CLAIM, misses_budget
from tadistill.evaluation.text_scores import UNSEEN
from tadistill.metrics import METRICS, metric_title, metric_unit
from tadistill.plan.graph import distinct_labels
from tadistill.report.path_words import some
from tadistill.results.collect import Results, primary_metric
from tadistill.results.curves import exposures
from tadistill.results.number_text import number, one_row_text, p_text, ratio_text, rows_text, span, with_unit
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import SHOWN, ComparedPair, Comparison, by_importance
from tadistill.runner.local import local_runs
from tadistill.statistics import Difference
from tadistill.store import FAILURE
from tadistill.text import counted, form, listed, one_line, shortened

_OFF = f"{100 * OFF_BUDGET:.0f} %"
_NAMED = 5  # most arms that one sentence names


def _path_text(arm: ArmRecord) -> str:
    return f"{'TA path' if arm.assistants else 'Path'} {arm.shown_path} ({arm.name})"


def undecided_text(pair: ComparedPair) -> str:
    """Return the sentence for a path that cannot be compared: the study has no arm to compare it with, or the two arms have no finished
    training seed in common."""
    name = _path_text(pair.arm)
    if pair.other is None:
        return f"{name}: undecided, because the study has no arm to compare it with; add a direct arm with `compute: as {pair.arm.name}`."
    return f"{name}: undecided, because it has no finished training seed in common with {_other(pair.against, pair.other.name)}."


def _other(against: str, name: str) -> str:
    direct = "direct distillation with "
    other = {"equal compute": f"{direct}the same compute", "pair": "model"}.get(against, f"{direct}other compute")
    return f"{other} ({name})"


def verdict_text(results: Results, c: Comparison) -> str:
    """Return sentences that give the difference and the verdict of a comparison.

    For a gain over direct distillation with the same compute, they also say whether the gain is credited to the path. If direct
    distillation had different compute, they say that nothing is credited to the path.
    """
    arm, other = (c.arm, c.other) if c.against == "pair" else (_path_text(results.arm(c.arm)), _other(c.against, c.other))
    return " ".join([f"{arm} against {other}: {gap_words(c)}.", f"Verdict: {_word_text(c)}", *_credit_text(c)])


def gap_words(c: Comparison) -> str:
    """Return the difference of a comparison, such as "the difference in ROUGE-L is +0.3 points (95 % interval −0.4 to 1.0)"."""
    return f"the difference in {metric_title(c.metric)} is {span(c.difference, c.metric, unit=True)}"


def _word_text(c: Comparison) -> str:
    if c.word in ("gain", "loss"):
        small = f"; the difference is smaller than the margin of {number(c.margin, c.metric)}" if c.equivalent else ""
        return f"{SHOWN[c.word]} ({tested(c.p_holm, c.family)}{small})."
    if c.word == "equivalent":
        return f"equivalent, within the margin of ±{number(c.margin, c.metric)}."
    return f"{SHOWN[c.word]}. {doubt_text(c)}"


def tested(p: float, family: int) -> str:
    """Return the p-value of a comparison as text, with the number of comparisons for which it is corrected."""
    return p_text(p) + (f" after Holm's correction for {family} comparisons" if family > 1 else "")


def few_text(seeds: int) -> str:
    """Return a sentence that says that the number of training seeds is too small for a claim."""
    return f"{counted(seeds, 'seed is', 'seeds are')} too few for a claim (at least {SEEDS_FOR_A_CLAIM} are needed)."


def doubt_text(c: Comparison) -> str:
    """Return sentences on an undecided comparison: why its difference may be chance, and which differences the study may miss."""
    if c.few_seeds:
        return few_text(len(c.seeds))
    chance = chance_text(c.difference, c.p_holm, c.family)
    if c.detectable is None or not float(size := number(c.detectable, c.metric)):
        return chance
    return f"{chance} A true difference below {with_unit(size, c.metric)} would often be missed (power below 80 %)."


def chance_text(difference: Difference, p: float, family: int) -> str:
    """Return a sentence that says why a difference that is not clear may be chance, or why it cannot be tested."""
    if difference.one_prompt:
        return "A test set has only one prompt, so the difference cannot be tested."
    if difference.se == 0:
        return "The difference does not vary over these prompts, so it cannot be tested."
    why = "The interval contains 0" if difference.covers_zero else f"The interval excludes 0, but {tested(p, family)}"
    return f"{why}, so the difference may be chance."


def _credit_text(c: Comparison) -> list[str]:
    if c.against == "off budget":
        return [f"The compute of {c.arm} and {c.other} differs by more than {_OFF}, so nothing is credited to the path."]
    if c.against == "plain direct":
        return [f"The arms had different compute: the study has no arm with `compute: as {c.arm}`, so nothing is credited to the path."]
    if c.credit is None or c.mechanism is None:
        return []
    if c.credit == "credited":
        return ["The gain is credited to the path: it is not sharpening, and the divergence from the teacher is not shown to be worse."]
    if c.credit == "not measured":
        return ["The gain is not credited to the path: the divergence from the teacher or a control for sharpening was not measured."]
    worse = [
        f"{metric_title(metric)} {span(d, metric)}"
        for metric, d in (("forward_kl", c.mechanism.forward_kl), ("reverse_kl", c.mechanism.reverse_kl))
        if d is not None and d.above_zero
    ]
    farther = f"farther from the teacher: {'; '.join(worse)}"
    if c.credit == "farther from the teacher":
        return [f"The gain is not credited to the path, because the student is {farther}."]
    controls = (("with greedy decoding", c.mechanism.greedy), ("at matched entropy", c.mechanism.matched))
    gone = [f"{where} the difference is {span(d, c.metric)}" for where, d in controls if d is not None and not d.above_zero]
    fell = c.mechanism.entropy is not None and c.mechanism.entropy.below_zero
    why = "but to sharpening" if fell else "because sharpening cannot be ruled out"
    sharpening = f"The gain is not credited to the path, {why}: {' and '.join(gone)}."
    return [sharpening, f"The student is also {farther}."] if worse else [sharpening]


def needed_seeds(c: Comparison) -> int | None:
    """Return `Comparison.seeds_needed`, rounded up to two digits, as it is an estimate. None also if the difference is shown as 0."""
    if c.seeds_needed is None or not float(number(abs(c.difference.mean), c.metric)):
        return None
    digits = 10 ** max(0, len(str(c.seeds_needed)) - 2)
    return -(-c.seeds_needed // digits) * digits


def needed_text(c: Comparison) -> str:
    """Return a sentence, after a space, that says how many training seeds would detect a difference of the observed size.

    It is empty if the comparison is decided, or if the variance between seeds is not known.
    """
    size = number(abs(c.difference.mean), c.metric)
    if c.word != "no evidence" or c.detectable is None or len(c.seeds) < SEEDS_FOR_A_CLAIM or not float(size):
        return ""
    who = "More training seeds alone would not" if (seeds := needed_seeds(c)) is None else f"About {seeds:,} training seeds would"
    between = f" between {c.arm} and {c.other}" if c.against == "pair" else ""
    found = f"a true difference of the observed size{between} ({with_unit(size, c.metric)})"
    return f" {who} detect {found} with 80 % power, if the true variances are the observed ones."


def missing_text(results: Results) -> str:
    """Return sentences that list the unfinished evaluations, and name the command that continues them."""
    by_arm: dict[str, list[int]] = {}
    for entry in results.missing:
        by_arm.setdefault(entry.arm, []).append(entry.seed)
    total = sum(len(arm.evaluate) for arm in results.plan.arms)
    named = [f"{arm} ({form(len(seeds), 'seed', 'seeds')} {', '.join(map(str, seeds))})" for arm, seeds in by_arm.items()]
    left = f"{len(results.missing)} of {total} evaluations are not finished: {_first(named)}."
    if len(results.missing) == total:
        left = f"None of {total} evaluations is finished." if total > 1 else "The evaluation is not finished."
    return f"{left} `{results.plan.command}` continues where it stopped."


def failed_text(results: Results) -> str:
    """Return a sentence that lists the failed stages with their reasons. It is empty if no stage failed."""
    labels = distinct_labels((stage.key, stage.label, stage.arms) for stage in results.plan.stages)
    reasons = {key: reason for run in local_runs(results.study_dir) for key, reason in run.failed.items()}
    texts = []
    for stage in results.plan.stages:
        job = results.store.folder(stage.key) / FAILURE
        reason = job.read_text(encoding="utf-8") if job.is_file() else reasons.get(stage.key, "")
        if reason and not results.store.finished(stage.key):
            texts.append(f"{labels[stage.key]} ({shortened(one_line(reason.strip()))})")
    more = f"; and {len(texts) - 3} more" if len(texts) > 3 else ""
    return f"{counted(len(texts), 'stage')} failed: {'; '.join(texts[:3])}{more}." if texts else ""


def _first(texts: Sequence[str], separator: str = "; ") -> str:
    """Join the texts on the first arms, and say how many more arms there are."""
    more = [f"and {counted(len(texts) - _NAMED, 'more arm')}"] if len(texts) > _NAMED else []
    return separator.join([*texts[:_NAMED], *more])


def cautions(results: Results) -> list[str]:
    """Return cautions about the numbers: test sets with training prompts, rows left out, test sets with one row, letters that the metric
    ignores, arms that were not treated equally, and too few seeds.
    """
    known = (rows_text(results.used), one_row_text(results.compared, len(results.plan.arms)), _unseen_text(results))
    about = (*known, _unequal_text(results), _off_budget_text(results), _unmeasured_text(results))
    texts = [*(f"{sentence}." for sentence in results.plan.seen), *filter(None, about)]
    texts += vocabulary_texts(results)
    for c in by_importance(results):
        texts += caution_texts(c)
    trained = {arm.name: len(results.scores[arm.name]) for arm in results.plan.arms if arm.is_trained and results.scores[arm.name]}
    few = [f"{name}: {counted(count, 'seed')}" for name, count in trained.items() if count < SEEDS_FOR_A_CLAIM]
    if few:
        same = len(few) == len(trained) and len(set(trained.values())) == 1
        said = counted(min(trained.values()), "seed") if same else _first(few, ", ")
        only = "" if max(trained.values()) > 1 else " The intervals cover prompts only, not the variation between trainings."
        texts.append(f"{said}: too few for a claim (at least {SEEDS_FOR_A_CLAIM} are needed).{only}")
    return texts


def _unmeasured_text(results: Results) -> str:
    who = results.plan.teacher
    strangers = {model for family in results.plan.tokenizers if who not in family for model in family}  # `vocabulary_texts` names these
    analysed = any(arm.analyse and results.scores[arm.name] and arm.model not in strangers for arm in results.plan.arms)
    why = f"it needs answers of the teacher {who}, and the server of {who} wrote none"
    return f"The exposure bias is not measured, because {why}." if analysed and not exposures(results) else ""


def _unequal_text(results: Results) -> str:
    unequal = [c for c in by_importance(results)[1:] if c.against == "plain direct"]  # the answer says it of the first comparison
    if not unequal:
        return ""
    named = _first([unequal_text(results, c) for c in unequal])
    arm = unequal[0].arm if len(unequal) == 1 else "ARM"
    return f"Not compared at equal compute: {named}. For equal compute, add a direct arm with `compute: as {arm}`."


def _off_budget_text(results: Results) -> str:
    off = [arm for arm in results.plan.arms if misses_budget(arm.of_budget)]
    if not off:
        return ""
    named = _first([f"{arm.name} has {arm.of_budget:.2g} times the FLOPs that `compute: {arm.compute}` sets" for arm in off])
    return f"A budget is missed by more than {_OFF}: {named}. `tadistill plan RECIPE` says why."


def to_equal(c: Comparison) -> str:
    """Return what would give the two compared arms equal compute: another arm, or other settings."""
    if c.against == "off budget":
        return "make rounds or batches smaller"
    return f"a direct arm with `compute: as {c.arm}`"


def unequal_text(results: Results, c: Comparison) -> str:
    """Return the compute of an arm relative to the arm with which it is compared, such as "chain has 1.17× the compute of direct"."""
    mine, theirs = (results.arm(name).flops for name in (c.arm, c.other))
    times = ratio_text(mine / theirs) if mine and theirs else "another amount than"
    return f"{c.arm} has {times} the compute of {c.other}"


def _unseen_text(results: Results) -> str:
    shares = {name: share for name, share in results.unseen.items() if share >= UNSEEN}
    if not shares or "rouge_l" not in results.metrics:
        return ""
    ignored = ", ".join(f"{100 * share:.0f} % in {name}" for name, share in shares.items())
    text = f"{metric_title('rouge_l')} uses only the letters a-z and digits, and ignores the other letters of the references: {ignored}"
    if "rouge_l_unicode" not in results.metrics:
        return f"{text}."
    used = ", and arms are compared by this metric" if primary_metric(results) == "rouge_l_unicode" else ""
    return f"{text}. {metric_title('rouge_l_unicode')} uses all letters{used}."


def caution_texts(c: Comparison) -> list[str]:
    """Return warnings if one of the compared arms chose among more checkpoints, if the arms have different numbers of decoding seeds, or if
    different training seeds have finished."""
    texts: list[str] = []
    if c.selection is not None:
        s = c.selection
        theirs = f"those of {c.other} among {s.theirs}" if s.theirs else f"those of {c.other} had no choice"
        shared = "trainings that both arms share are not counted"
        text = f"The trainings of {c.arm} chose among {s.mine} checkpoints on dev, {theirs} ({shared}). "
        if s.inflation is None:
            text += (
                f"By chance, a choice among more checkpoints may raise the score of {c.arm}. The amount is unknown, because "
                f"{metric_title(c.metric)} was not measured on dev."
            )
        else:
            text += (
                f"By chance, a choice among more checkpoints raises the score of {c.arm} by at most "
                f"{number(s.inflation, c.metric, more=1)} {metric_unit(c.metric)} "
                f"(computed from the standard deviation between checkpoints on dev, {number(s.sigma or 0.0, c.metric, more=1)})."
            )
        texts.append(text)
    if c.decoding_seeds[0] != c.decoding_seeds[1]:
        mine, theirs = (counted(seeds, "decoding seed") for seeds in c.decoding_seeds)
        texts.append(f"{c.arm} answered the test sets with {mine}, {c.other} with {theirs}.")
    if c.trained and any(set(seeds) != set(c.seeds) for seeds in c.planned_seeds):
        texts.append(f"{c.arm} and {c.other} are compared on the training seeds that both have finished: {', '.join(map(str, c.seeds))}.")
    return texts


# --- models with different tokenizers -------------------------------------------------------------------------------------


def vocabulary_texts(results: Results) -> list[str]:
    """Return the cautions about tokenizers. If all models share one tokenizer, they only say which answers were cut or left out on their
    way to another model."""
    several = len(results.plan.tokenizers) > 1
    found = [_undefined_text(results), _budget_text(results), _by_token_text(results)] if several else []
    return [text for text in (*found, _handed_text(results)) if text]


def _family(results: Results, model: str | None) -> tuple[str, ...]:
    return next((family for family in results.plan.tokenizers if model in family), ())


def _measured(results: Results) -> list[ArmRecord]:
    return [arm for arm in results.plan.arms if results.scores[arm.name]]


def _undefined_text(results: Results) -> str:
    analysed = results.plan.recipe.get("analyse", True)  # otherwise the vocabularies are not the reason
    teacher = results.plan.teacher if analysed else None
    others = [arm for arm in _measured(results) if teacher and arm.model not in _family(results, teacher)]
    if not others:
        return ""
    bits = all(arm.analyse for arm in others)
    return (
        f"The divergence from {teacher}, the error budget and the exposure bias are not defined across vocabularies, so they are left out "
        f"for {some([arm.name for arm in others])}.{' The bits per byte of their answers are reported instead.' * bits}"
    )


def _budget_text(results: Results) -> str:
    inside = _family(results, results.plan.teacher)
    cut = [arm for arm in _measured(results) if arm.analyse and arm.model in inside and any(name not in inside for name in flat(arm.path))]
    if not cut:
        return ""
    names = some([arm.name for arm in cut])
    return f"The error budget of {names} is left out, because a model of the path has another vocabulary than {results.plan.teacher}."


def _by_token_text(results: Results) -> str:
    models = {arm.model for arm in _measured(results)}
    families = [f"({', '.join(own)})" for family in results.plan.tokenizers if (own := [name for name in family if name in models])]
    metrics = [metric_title(name) for name, row in METRICS.items() if row.by_token and (row.whole_set or name in results.metrics)]
    if len(families) < 2 or not metrics:
        return ""
    return (
        f"{listed(metrics)[:1].upper()}{listed(metrics)[1:]} count a model's own tokens. They can be compared only among models that share "
        f"a tokenizer: {', '.join(families)}."
    )


def _handed_text(results: Results) -> str:
    texts = []
    for stage in results.plan.stages:
        manifest = results.manifests.get(stage.key) if stage.kind in ("retokenise", "analyse") else None
        texts += [f"{stage.label}: {'; '.join(manifest.notes)}"] if manifest and manifest.notes else []
    return f"{'. '.join(texts)}." if texts else ""
