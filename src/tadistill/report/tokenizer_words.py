"""Cautions for a study whose models have different tokenizers: measures that are not defined or not comparable, and notes of the stages
that re-tokenised texts."""

from tadistill.config.arm import flat
from tadistill.metrics import METRICS, metric_title
from tadistill.report.path_words import listed, some
from tadistill.results.collect import Results
from tadistill.results.measured import load_manifest
from tadistill.results.study import ArmRecord


def vocabulary_texts(results: Results) -> list[str]:
    """Return the cautions about tokenizers. The list is empty if all models share one tokenizer."""
    if len(results.plan.tokenizers) < 2:
        return []
    found = [_undefined_text(results), _budget_text(results), _by_token_text(results), _handed_text(results)]
    return [text for text in found if text]


def _family(results: Results, model: str | None) -> tuple[str, ...]:
    return next((family for family in results.plan.tokenizers if model in family), ())


def _measured(results: Results) -> list[ArmRecord]:
    return [arm for arm in results.plan.arms if results.scores[arm.name]]


def _undefined_text(results: Results) -> str:
    teacher = results.plan.teacher
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
        manifest = load_manifest(results.store, stage.key) if stage.kind == "retokenise" else None
        texts += [f"{stage.label}: {'; '.join(manifest.notes)}"] if manifest and manifest.notes else []
    return f"{'. '.join(texts)}." if texts else ""
