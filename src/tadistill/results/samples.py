"""Answers of all arms to the same prompts, side by side: the data behind the page's sample browser."""

import json
from typing import Any

from tadistill.results.collect import Results
from tadistill.results.files import load_predictions
from tadistill.results.units import metric_title, number
from tadistill.results.verdict import comparisons

_PROMPTS = 50  # of each set at most: enough to read and search
_BYTES = 2_500_000  # of all answers together; fewer prompts are embedded when they are longer, and never fewer than `_FEWEST`
_FEWEST = 5

Samples = dict[str, list[dict[str, Any]]]


def samples(results: Results) -> Samples:
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
    found = {name: [prompts[index] for index in sorted(prompts)] for name, prompts in by_set.items() if prompts}
    count = _how_many(found)
    return {name: prompts[:count] for name, prompts in found.items()}


def shown_first(results: Results) -> list[str]:
    """The arms whose answers are open at first: up to four all, else the first that are compared with each other."""
    names = [arm.name for arm in results.plan.arms if results.scores[arm.name]]
    if len(names) <= 4:
        return names
    compared = comparisons(results)
    return [compared[0].arm, compared[0].other] if compared else names[:2]


def _how_many(found: Samples) -> int:
    """As many prompts of each set as fit into `_BYTES`: the same number, so that sets are shown alike."""
    size = 0
    for count in range(_PROMPTS):
        size += sum(len(json.dumps(prompts[count], ensure_ascii=False).encode()) for prompts in found.values() if count < len(prompts))
        if size > _BYTES:
            return max(_FEWEST, count)
    return _PROMPTS


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
