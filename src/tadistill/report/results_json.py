"""The results of a study for programs: results.json and two CSV files. `docs/reference/results-json.md` describes them."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tadistill.disk import finite, write_text
from tadistill.metrics import MEAN
from tadistill.report.analysis import analyses
from tadistill.report.answer import answer
from tadistill.report.explain import cautions, undecided_text, verdict_text
from tadistill.report.figures import scores
from tadistill.report.figures.paths import lattice
from tadistill.report.findings import sections
from tadistill.report.path_words import arm_words
from tadistill.report.tables import CostRow, cost_rows, ledger_rows, stage_rows, versions
from tadistill.results.budget_curves import BudgetCurve, budget_curves
from tadistill.results.collect import Results, Row, Summary, primary_metric, rounded
from tadistill.results.compare import BY_LENGTH, bucket_sizes, bucket_summary
from tadistill.results.curves import Curve, ExposureBias, exposures, last_dev_value, learning_curves, reliabilities
from tadistill.results.sample_answers import references
from tadistill.results.verdict import Comparison, comparisons, pairs
from tadistill.statistics import Difference
from tadistill.text import guarded


def reported(study_dir: Path) -> set[str]:
    """Return the keys of the stages whose numbers a study's results.json has."""
    try:
        return {str(row.get("stage")) for row in json.loads((study_dir / "results.json").read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def write_results(results: Results) -> None:
    content = {
        "study": results.plan.study,
        "created": results.plan.created,
        "command": results.plan.command,
        "data": [split.record for split in results.used],
        "answer": asdict(answer(results)),
        "findings": {section.anchor: section.finding for section in sections(results)},
        "training_shares": results.plan.drawn,
        "cautions": cautions(results) if results.summaries else [],
        "models": results.plan.parameters,
        "arms": [_arm(results, row, arm_words(results).get(row.arm.name, "")) for row in cost_rows(results)],
        "rows": [vars(row) for row in results.rows],
        "means": means(results),
        "references": _references(results),
        "differences": differences(results),
        "comparisons": [_comparison(comparison) for comparison in comparisons(results)],
        "verdicts": verdicts(results),
        "explanations": explanations(results),
        "budgets": [_budget(curve) for curve in budget_curves(results)],
        "paths": distillations(results),
        "lengths": lengths(results),
        "curves": curves(results),
        "exposure": exposure(results),
        "calibration": calibration(results),
        "ledger": [asdict(row) for row in ledger_rows(results)],
        "stages": [{"key": r.stage.key, "label": r.stage.label, "seconds": r.manifest and r.manifest.seconds} for r in stage_rows(results)],
        "versions": versions(stage_rows(results)),
    }
    write_text(results.study_dir / "results.json", _json(content))
    write_text(results.study_dir / "results.csv", _csv(results))
    write_text(results.study_dir / "results-summary.csv", _summary_csv(content))


def _json(content: dict[str, Any]) -> str:
    """Return JSON with one line for each row of a table, so that two files can be compared by line."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(map(text, value)) + "\n ]"
        return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)

    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {text(value)}" for key, value in content.items()) + "\n}\n"


def _arm(results: Results, row: CostRow, words: str) -> dict[str, Any]:
    arm = row.arm
    return {
        "arm": arm.name,
        "words": words,
        "path": arm.path_text,
        "method": arm.method,
        "inexact": list(arm.inexact),
        "phases": [asdict(phase) for phase in arm.phases],
        "model": arm.model,
        "parameters": results.plan.parameters[arm.model],
        "compute": arm.compute,
        "of_budget": _rounded(arm.of_budget),
        "across": [list(step) for step in arm.across],
        "teacher_budget": arm.teacher_budget,
        "teacher_tokens": arm.teacher_tokens,
        "flops": arm.flops,
        "relative": _rounded(row.relative),
        "relative_to": row.direct,
        "seeds": sorted(results.scores[arm.name]),
        "planned_seeds": sorted(arm.evaluate),
        "published": arm.published.model_dump() if arm.published else None,
    }


def means(results: Results) -> list[dict[str, Any]]:
    """Return the means over training seeds that the page shows: one for each test set, and the mean over all sets (the set `mean`)."""
    return [
        {"arm": arm, "set": of_set, "metric": metric} | _summary(s) | {"per_seed": _per_seed(s.per_seed)}
        for (arm, of_set, metric), s in results.summaries.items()
    ]


def _references(results: Results) -> list[dict[str, Any]]:
    # the means of models that the study measured although they are no arms
    beside = references(results)
    models = {arm.name: arm.model for arm in beside.plan.arms} if beside else {}
    return [{"model": models[row.pop("arm")], **row} for row in means(beside)] if beside else []


def differences(results: Results) -> list[dict[str, Any]]:
    """Return the paired differences that the page shows: each arm against its baseline, and the rows of the analysis."""
    metric = primary_metric(results)
    rows = scores.differences(results) if results.summaries else []
    shown = {(row.arm.name, row.other.name, metric, MEAN): row.difference for row in rows}
    per_seed = {(row.arm.name, row.other.name, metric, MEAN): _per_seed(row.per_seed) for row in rows}
    for found in analyses(results) if results.summaries else ():
        for row in found.rows:
            if row.difference is not None:
                shown[found.arm, found.other, row.metric, row.where] = row.difference
    names = ("arm", "other", "metric", "where")
    return [dict(zip(names, at, strict=True)) | _difference(d) | {"per_seed": per_seed.get(at)} for at, d in shown.items()]


def verdicts(results: Results) -> list[dict[str, str | None]]:
    """Return the verdict on each pair of compared arms, as a word and as a sentence."""
    decided = {(c.arm, c.other): c for c in comparisons(results)}
    found: list[dict[str, str | None]] = []
    for pair in pairs(results):
        other = pair.other.name if pair.other else None
        comparison = decided.get((pair.arm.name, other or ""))
        word = comparison.word if comparison else "no evidence"
        sentence = verdict_text(results, comparison) if comparison else undecided_text(pair)
        credit = comparison.credit if comparison else None
        found.append({"arm": pair.arm.name, "other": other, "verdict": word, "credit": credit, "sentence": sentence})
    return found


def _comparison(c: Comparison) -> dict[str, Any]:
    why = c.mechanism
    controls = {} if why is None else {n: getattr(why, n) for n in ("forward_kl", "reverse_kl", "entropy", "greedy", "matched")}
    return {
        "arm": c.arm,
        "other": c.other,
        "against": c.against,
        "metric": c.metric,
        "sets": c.n_sets,
        "prompts": c.n_prompts,
        "seeds": list(c.seeds),
        **_difference(c.difference),
        "p": rounded(c.difference.p),
        "p_holm": rounded(c.p_holm),
        "comparisons": c.family,
        "sign_flip": None if c.sign_flip is None else asdict(c.sign_flip),
        "margin": c.margin,
        "equivalent": c.equivalent,
        "detectable": _rounded(c.detectable),
        "seeds_needed": c.seeds_needed,
        "per_seed": _per_seed(c.per_seed),
        "verdict": c.word,
        "credit": c.credit,
        "controls": {name: None if d is None else _difference(d) for name, d in controls.items()},
        "matched_entropy": _rounded(why and why.at_entropy),
        "selection": None if c.selection is None else asdict(c.selection),
        "decoding_seeds": list(c.decoding_seeds),
    }


def explanations(results: Results) -> list[dict[str, Any]]:
    """Return the possible explanations of each comparison, as the page shows them."""
    return [
        {"arm": found.arm, "other": found.other, "title": title, "sentences": sentences}
        for found in (analyses(results) if results.summaries else ())
        for title, sentences in found.explanations.items()
    ]


# --- the values of figures ----------------------------------------------------------------------------------------------


def _budget(curve: BudgetCurve) -> dict[str, Any]:
    points = [
        {"times": p.times, "arm": p.arm, "flops": p.flops} | _summary(p.summary) | {"gap": p.gap and _difference(p.gap)}
        for p in curve.points
    ]
    ends = {name: None if (found := getattr(curve, name)) is None else asdict(found) for name in ("crossing", "limit")}
    return {"arm": curve.name, "points": points, **ends, "last_gain": curve.last_gain and _difference(curve.last_gain)}


def distillations(results: Results) -> list[dict[str, Any]]:
    """Return the distillations in the figure of paths. `flops` is for one seed.

    `dev` is the last dev value of the learner. It is None if the learner is the student. `pruned_from` is the model from which the learner
    starts, and `more_teachers` are its other teachers.
    """
    nodes, metric = lattice(results), primary_metric(results)
    found: list[dict[str, Any]] = []
    for at, node in nodes.items():
        if node.parent is not None:
            dev = None if at[0] == "arm" else last_dev_value(results, node.arms[0].name, node.model, metric)
            facts = {"teacher": nodes[node.parent].model, "student": node.model, "method": node.kind, "flops": node.flops}
            facts["pruned_from"] = nodes[node.start].model if node.start else None
            facts["more_teachers"] = [nodes[at].model for at in node.others]
            found.append({"arms": [arm.name for arm in node.arms]} | facts | {"dev": _rounded(dev)})
    return found


def lengths(results: Results) -> list[dict[str, Any]]:
    """Return each arm's mean ROUGE-L for each range of reference lengths. The length is that of a prompt's first reference.

    `first` and `last` are the ends of the range, in tokens. `last` is None if the range has no upper end.
    """
    return [
        {"arm": arm.name, "metric": BY_LENGTH, "first": b[0], "last": b[1], "prompts": size} | _summary(s)
        for arm in results.plan.arms
        for b, size in bucket_sizes(results).items()
        if (s := bucket_summary(results, arm.name, b))
    ]


def curves(results: Results) -> list[dict[str, Any]]:
    """Return the learning curves of the last training of each arm. Each entry is one seed, or the mean over seeds (`seed` is None)."""
    found: list[dict[str, Any]] = []
    for curve in (curve for curve in learning_curves(results) if curve.arm is not None):
        for seed, (steps, values) in _series(curve):
            found.append({"arm": curve.name, "metric": curve.metric, "seed": seed, "steps": steps, "values": values})
    return found


def exposure(results: Results) -> list[dict[str, Any]]:
    """Return the exposure bias of each arm at positions 1, 2, … Each entry is one seed, or the mean over seeds (`seed` is None)."""
    found: list[dict[str, Any]] = []
    for arm, bias in exposures(results).items():
        found += [
            {"arm": arm, "seed": seed, "solid": bias.solid, "values": [round(float(v), 4) for v in values]}
            for seed, values in _series(bias)
            if np.isfinite(values).any()
        ]
    return found


def calibration(results: Results) -> list[dict[str, Any]]:
    """Return the reliability diagrams: the mean confidence and the share of correct predictions in each bin, in per cent."""
    return [
        {"arm": arm, "what": what} | {name: getattr(bins, name).round(3).tolist() for name in ("confidence", "correct", "count")}
        for what in ("tokens", "labels")
        for arm, bins in reliabilities(results, what).items()
    ]


def _summary(s: Summary) -> dict[str, Any]:
    low, high = (None, None) if s.low == s.high else (rounded(s.low), rounded(s.high))
    return {"value": rounded(s.mean), "low": low, "high": high}


def _rounded(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _series(curve: Curve | ExposureBias) -> Iterable[tuple[int | None, Any]]:
    """Return pairs of a seed and its values. The mean over seeds comes first, with None as its seed. A single seed is not repeated."""
    return {None: curve.mean, **(curve.seeds if len(curve.seeds) > 1 else {})}.items()


def _per_seed(values: Mapping[int, float]) -> dict[str, float]:
    return {str(seed): rounded(value) for seed, value in values.items()}


def _difference(d: Difference) -> dict[str, float | None]:
    ends = {name: None if d.one_prompt else rounded(end) for name, end in (("low", d.low), ("high", d.high))}
    return {"mean": rounded(d.mean)} | ends


def _csv(results: Results) -> str:
    beside = references(results)
    rows = (*results.rows, *(replace(row, arm="") for row in (beside.rows if beside else ())))
    return _table([field.name for field in fields(Row)], map(vars, rows))


def _summary_csv(content: Mapping[str, Any]) -> str:
    # means, and below them differences; with a column for each training seed, a study with more seeds would have other columns
    names = ("arm", "other", "model", "set", "metric", "value", "low", "high", "seeds")
    models = {arm["arm"]: arm["model"] for arm in content["arms"]}
    rows = [row | {"model": row.get("model") or models[row["arm"]]} for row in (*content["means"], *content["references"])]
    rows += [row | {"model": models[row["arm"]], "set": row["where"], "value": row["mean"]} for row in content["differences"]]
    return _table(names, ({name: row.get(name) for name in names} | {"seeds": len(row["per_seed"] or ()) or None} for row in rows))


def _table(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: guarded(cell) if isinstance(cell, str) else cell for name, cell in row.items()})
    return text.getvalue()
