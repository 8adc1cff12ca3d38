"""Scores of generated text: one number per prediction, in 0-100."""

import re
from collections.abc import Sequence
from functools import lru_cache

from rouge_score import rouge_scorer

from tadistill.errors import DataError

Facts = Sequence[tuple[str, Sequence[str]]]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Rouge-L as MiniLLM reports it: F-measure with Porter stemming, the best over a prediction's references, times 100.

    Raises:
        DataError: the lengths differ, or a prediction has no reference.
    """
    _check(predictions, references)
    scorer = _scorer()
    return [100 * max(scorer.score(r, p)["rougeL"].fmeasure for r in refs) for p, refs in zip(predictions, references, strict=True)]


def fact_accuracy(predictions: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """The share of a prompt's facts that the answer states: it says the value and none of the rival values, times 100."""
    _check(predictions, facts)
    return [100 * sum(_states(p, v, rivals) for v, rivals in known) / len(known) for p, known in zip(predictions, facts, strict=True)]


def _states(text: str, value: str, rivals: Sequence[str]) -> bool:
    return _says(text, value) and not any(_says(text, rival) for rival in rivals)


def _says(text: str, phrase: str) -> bool:
    """Whether the phrase occurs as whole words."""
    return phrase in text and re.search(rf"(?<!\S){re.escape(phrase)}(?!\S)", text) is not None


@lru_cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _check(predictions: Sequence, other: Sequence) -> None:
    if len(predictions) != len(other):
        raise DataError(f"{len(predictions)} predictions but {len(other)} rows of references; give one row per prediction")
    if any(len(row) == 0 for row in other):
        raise DataError("a row has no reference; every prediction needs at least one")
