"""Answers of all arms to the same prompts, side by side: the data behind the page's sample browser."""

from typing import Any

from tadistill.report.collect import Results
from tadistill.report.files import load_predictions
from tadistill.report.text import metric_title, number

_PROMPTS = 8  # of each set: enough to read, little enough to embed


def samples(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Set -> the first prompts, each with its references and every arm's answer.

    Of each arm, the first finished training seed and its first decoding seed: no choice that could flatter one.
    """
    by_set: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in results.sets}
    for arm in results.plan.arms:
        finished = results.scores[arm.name]
        if not finished:
            continue
        for row in _first_answers(load_predictions(results.store_dir, arm.evaluate[min(finished)])):
            prompt = by_set[row["set"]].setdefault(
                row["index"],
                {"index": row["index"], "prompt": row["prompt"], "references": row["references"], "answers": {}},
            )
            prompt["answers"][arm.name] = {"text": row["prediction"], "scores": _scores(row)}
    return {name: [prompts[index] for index in sorted(prompts)] for name, prompts in by_set.items() if prompts}


def _first_answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each set, the rows of the lowest indices under the lowest decoding seed."""
    chosen: list[dict[str, Any]] = []
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        seed = min(row["seed"] for row in of_set)
        first = sorted((row for row in of_set if row["seed"] == seed), key=lambda row: row["index"])
        chosen += first[:_PROMPTS]
    return chosen


def _scores(row: dict[str, Any]) -> str:
    """``ROUGE-L 31.2 · answer length 14.0``, with what the row has."""
    shown = ("fact_accuracy", "rouge_l", "length")
    return " · ".join(f"{metric_title(m)} {number(row[m], m)}" for m in shown if row.get(m) is not None)
