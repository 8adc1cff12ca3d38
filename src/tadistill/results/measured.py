"""Read the files of finished evaluations and analyses: scores, values of metrics with one value per test set, and predictions.

If a file cannot be read, a `StoreError` names it, because a report must not leave out numbers silently.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tadistill.disk import damaged, read_json, read_jsonl
from tadistill.errors import StoreError
from tadistill.metrics import metric_of
from tadistill.statistics import ROUNDING
from tadistill.store import Store

Scores = dict[str, dict[str, NDArray[np.float64]]]  # set -> metric -> (prompts, decoding seeds)
READ = ("scores.json", "corpus.json", "exposure.json", "predictions.jsonl", "metrics.jsonl")
"""The files of stages that a report reads."""


def load_scores(store: Store, key: str) -> Scores:
    """Read the scores of an evaluation as arrays (prompts, decoding seeds).

    Raises:
        StoreError: the file has changed or is damaged, or contains a metric that this version does not know.
    """
    path = store.artifact(key, "scores.json")
    content = read_json(path, fix=store.redo(key))
    if not isinstance(content, dict) or not all(isinstance(metrics, dict) for metrics in content.values()):
        raise damaged(path, "the file must map sets to metrics", store.redo(key))
    found: Scores = {name: {} for name in content}
    for name, metrics in content.items():
        for metric, values in metrics.items():
            _check_known(path, metric)
            array = _table(values)
            if isinstance(array, str):
                raise damaged(path, f"{name}/{metric} {array}", store.redo(key))
            _check_bounds(path, metric, array)
            found[name][metric] = array
    return found


def _check_bounds(path: Path, metric: str, values: NDArray[np.float64]) -> None:
    low, high = metric_of(metric).bounds
    if np.isinf(high):
        return
    wrong = values[(values < low - ROUNDING) | (values > high + ROUNDING)]
    if wrong.size:
        raise StoreError(
            f"{path}: {wrong.size} scores of `{metric}` lie outside {low:g} to {high:g}, the bounds of its unit "
            f"`{metric_of(metric).unit}`, for instance {wrong[0]:g}; give the metric another `unit` in the recipe"
        )


def _table(values: Any) -> NDArray[np.float64] | str:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return "is not a table of numbers"
    if array.ndim != 2 or array.size == 0:
        return "must have one row per prompt and one column per decoding seed"
    return array if np.isfinite(array).all() else "contains NaN or infinite values"


def load_corpus(store: Store, key: str) -> dict[str, dict[str, Any]]:
    """Read what an evaluation measured on each test set as a whole. The result maps the name of a set to its values.

    The keys of the values are `numbers`, `calibration`, `reference_length`, `rows` and `unseen`.
    """
    path = store.artifact(key, "corpus.json")
    content = read_json(path, fix=store.redo(key))
    try:
        for found in content.values():
            np.asarray(found["reference_length"], dtype=np.int64)
            for metric, value in found["numbers"].items():
                _check_known(path, metric)
                float(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = "the file must map sets to their numbers and reference lengths"
        raise damaged(path, f"{reason}: {type(error).__name__} {error}", store.redo(key)) from error
    return content


def _check_known(path: Path, metric: str) -> None:
    try:
        metric_of(metric)
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error


def load_predictions(store: Store, key: str) -> list[dict[str, Any]]:
    """Read every prediction of an evaluation, in the order of the file."""
    path = store.artifact(key, "predictions.jsonl")
    rows = read_jsonl(path, fix=store.redo(key))
    for number, row in enumerate(rows, start=1):
        known = isinstance(row.get("set"), str) and isinstance(row.get("index"), int) and isinstance(row.get("seed"), int)
        texts = all(isinstance(row.get(name), str) for name in ("prompt", "prediction"))
        references = row.get("references")
        if not (known and texts and isinstance(references, list) and references):
            raise damaged(path, f"line {number} is not a prediction", store.redo(key))
    return rows
