"""The results of a study for programs: ``results.json`` and ``results.csv``. `docs/reference/results-json.md` describes them."""

import csv
import io
import json
import math
from dataclasses import asdict, fields
from typing import Any

from tadistill.disk import write_text
from tadistill.report.analysis import analyses
from tadistill.report.explain import undecided_text, verdict_text
from tadistill.report.figures import scores
from tadistill.report.text import answer
from tadistill.results.collect import MEAN, Results, Row, primary_metric
from tadistill.results.verdict import Comparison, comparisons, pairs
from tadistill.statistics import Difference
from tadistill.visible import guarded


def write_results(results: Results) -> None:
    content = {
        "study": results.plan.study,
        "created": results.plan.created,
        "command": results.plan.command,
        "data": [split.record for split in results.used],
        "answer": asdict(answer(results)),
        "rows": [vars(row) for row in results.rows],
        "means": means(results),
        "differences": differences(results),
        "comparisons": [_comparison(comparison) for comparison in comparisons(results)],
        "verdicts": verdicts(results),
    }
    write_text(results.study_dir / "results.json", _json(content))
    write_text(results.study_dir / "results.csv", _csv(results))


def _json(content: dict[str, Any]) -> str:
    """Return JSON with one line for each row of a table, so that two files can be compared by line."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(map(text, value)) + "\n ]"
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)

    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {text(value)}" for key, value in content.items()) + "\n}\n"


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not allow by null, such as the infinite perplexity of a diverged model."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def means(results: Results) -> list[dict[str, Any]]:
    """Return all means over training seeds that the page shows: for each test set, and over all sets (the set `mean`)."""
    found: list[dict[str, Any]] = []
    for (arm, of_set, metric), s in (*results.summaries.items(), *results.averages.items()):
        ends = {name: None if (end := getattr(s, name, None)) is None else _rounded(end) for name in ("low", "high")}
        per_seed = {str(seed): _rounded(value) for seed, value in s.per_seed.items()}
        found.append({"arm": arm, "set": of_set, "metric": metric, "value": _rounded(s.mean), **ends, "per_seed": per_seed})
    return found


def differences(results: Results) -> list[dict[str, Any]]:
    """Return the paired differences that the page shows: each arm against its reference arm, and the rows of the analysis."""
    metric = primary_metric(results)
    shown = (
        {(row.arm.name, row.other.name, metric, MEAN): row.difference for row in scores.differences(results)} if results.summaries else {}
    )
    for found in analyses(results) if results.summaries else ():
        for row in found.rows:
            if row.difference is not None:
                shown[found.arm, found.other, row.metric, row.where] = row.difference
    names = ("arm", "other", "metric", "where")
    return [dict(zip(names, at, strict=True)) | _difference(d) for at, d in shown.items()]


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
        "p": _rounded(c.difference.p),
        "p_holm": _rounded(c.p_holm),
        "comparisons": c.family,
        "sign_flip": None if c.sign_flip is None else asdict(c.sign_flip),
        "margin": c.margin,
        "equivalent": c.equivalent,
        "detectable": None if c.detectable is None else _rounded(c.detectable),
        "per_seed": {str(seed): _rounded(value) for seed, value in c.per_seed.items()},
        "verdict": c.word,
        "credit": c.credit,
        "controls": {name: None if d is None else _difference(d) for name, d in controls.items()},
        "matched_entropy": None if why is None or why.at_entropy is None else _rounded(why.at_entropy),
        "selection": None if c.selection is None else asdict(c.selection),
        "decoding_seeds": list(c.decoding_seeds),
    }


def _difference(d: Difference) -> dict[str, float]:
    return {name: _rounded(value) for name, value in (("mean", d.mean), ("low", d.low), ("high", d.high))}


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0


def _csv(results: Results) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in results.rows:
        writer.writerow({name: guarded(cell) if isinstance(cell, str) else cell for name, cell in vars(row).items()})
    return text.getvalue()
