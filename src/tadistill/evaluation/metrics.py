"""Scores of generated text: one number per prediction, in 0-100."""

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from tadistill.errors import DataError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Facts = Sequence[tuple[str, Sequence[str]]]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Rouge-L as MiniLLM reports it: F-measure with Porter stemming, the best over a prediction's references, times 100.

    Raises:
        DataError: the lengths differ, or a prediction has no reference.
    """
    _check(predictions, references)
    scorer = _scorer()
    return [100 * max(scorer.score(r, p)["rougeL"].fmeasure for r in refs) for p, refs in zip(predictions, references, strict=True)]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """100 where the prediction equals one of its references after normalisation, 0 elsewhere.

    Normalisation is MiniLLM's variant of SQuAD's (arXiv:1606.05250): lower case, ASCII punctuation removed, white space
    collapsed; articles are kept.

    Raises:
        DataError: the lengths differ, or a prediction has no reference.
    """
    _check(predictions, references)
    return [100.0 * (_plain(p) in map(_plain, refs)) for p, refs in zip(predictions, references, strict=True)]


def repetition(responses: Sequence[Sequence[int]], n: int = 4) -> list[float]:
    """The share of an answer's n-grams of token ids that it has said before, times 100; 0 where it is shorter than n tokens."""
    return [_repeated(ids, n) for ids in responses]


def fact_accuracy(predictions: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """The share of a prompt's facts that the answer states: it says the value and none of the rival values, times 100."""
    _check(predictions, facts)
    return [100 * sum(_states(p, v, rivals) for v, rivals in known) / len(known) for p, known in zip(predictions, facts, strict=True)]


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def _repeated(ids: Sequence[int], n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def _states(text: str, value: str, rivals: Sequence[str]) -> bool:
    return _says(text, value) and not any(_says(text, rival) for rival in rivals)


def _says(text: str, phrase: str) -> bool:
    """Whether the phrase occurs as whole words."""
    return phrase in text and re.search(rf"(?<!\S){re.escape(phrase)}(?!\S)", text) is not None


@lru_cache
def _scorer() -> "RougeScorer":
    from rouge_score import rouge_scorer  # here: it imports nltk, and that scipy.stats, which most stages do not need

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _check(predictions: Sequence, other: Sequence) -> None:
    if len(predictions) != len(other):
        raise DataError(f"{len(predictions)} predictions but {len(other)} rows of references; give one row per prediction")
    if any(len(row) == 0 for row in other):
        raise DataError("a row has no reference; every prediction needs at least one")
