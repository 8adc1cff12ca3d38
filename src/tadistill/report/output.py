"""Files for other programs: ``results.json``, and its rows as ``results.csv``."""

import csv
import io
from dataclasses import asdict, fields
from typing import Any

from tadistill.disk import write_json, write_text
from tadistill.report.text import undecided_text, verdict_text
from tadistill.results.collect import Results, Row
from tadistill.results.verdict import Comparison, comparisons, pairs
from tadistill.statistics import Difference


def write_results(results: Results) -> None:
    """Write ``results.json`` and ``results.csv`` into the study's directory."""
    content = {
        "study": results.plan.study,
        "created": results.plan.created,
        "command": results.plan.command,
        "rows": [asdict(row) for row in results.rows],
        "comparisons": [_comparison(comparison) for comparison in comparisons(results)],
        "verdicts": verdicts(results),
    }
    write_json(results.study_dir / "results.json", content, allow_nan=False)
    write_text(results.study_dir / "results.csv", _csv(results))


def verdicts(results: Results) -> list[dict[str, str | None]]:
    """Return one word and one sentence for every pair that the study compares."""
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
        "detectable": _rounded(c.detectable),
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
    writer.writerows(asdict(row) for row in results.rows)
    return text.getvalue()
