"""Scores of generated text, from 0 to 100: agreement with references, facts, repetition and variety.

`score_answers` computes all of one decoding seed and `score_seeds` and `score_set` those that need all of them; a new
text metric is a line in one of the three and a row in `tadistill.metrics`. A word is what white space separates.
"""

import re
import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tadistill.data.datasets import Example, Facts
from tadistill.errors import DataError

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_BLEU_ORDER = 4
_DISTINCT = (1, 2, 4)
_PUNCTUATION = str.maketrans("", "", string.punctuation)

# --- all scores of a set --------------------------------------------------------------------------------------------------


def score_quality(predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, list[float]]:
    """Return rouge_l of every prediction, and fact_accuracy where every example knows its facts. Dev evaluations need no more."""
    scores = {"rouge_l": rouge_l(predictions, [e.references for e in examples])}
    if all(e.facts for e in examples):
        scores["fact_accuracy"] = fact_accuracy(predictions, [e.facts for e in examples])
    return scores


def score_answers(predictions: Sequence[str], tokens: Sequence[Sequence[int]], examples: Sequence[Example]) -> dict[str, list[float]]:
    """Return every score of one decoding seed's answers, one number per prompt; `tokens` are the answers' token ids."""
    return score_quality(predictions, examples) | {
        "exact_match": exact_match(predictions, [e.references for e in examples]),
        "length": [float(len(ids)) for ids in tokens],
        "repetition": repetition(tokens),
    }


def score_seeds(predictions: Mapping[int, Sequence[str]]) -> dict[str, list[float]]:
    """Return the scores that compare the answers of several decoding seeds, one number per prompt; none for a single seed."""
    return {"self_bleu": self_bleu(list(zip(*predictions.values(), strict=True)))} if len(predictions) > 1 else {}


def score_set(predictions: Mapping[int, Sequence[str]]) -> dict[str, float]:
    """Return the scores that only a whole set has: distinct n-grams, as means over the decoding seeds."""
    return {f"distinct_{n}": float(np.mean([distinct(of_seed, n) for of_seed in predictions.values()])) for n in _DISTINCT}


# --- agreement with references ----------------------------------------------------------------------------------------------


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return Rouge-L as MiniLLM reports it: F-measure with Porter stemming, the best over a prediction's references, times 100.

    Raises:
        DataError: the lengths differ, or a prediction has no reference.
    """
    _check(predictions, references)
    scorer = _scorer()
    return [100 * max(scorer.score(r, p)["rougeL"].fmeasure for r in refs) for p, refs in zip(predictions, references, strict=True)]


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return 100 where the prediction equals one of its references after normalisation, 0 elsewhere.

    Normalisation is MiniLLM's variant of SQuAD's (arXiv:1606.05250): lower case, ASCII punctuation removed, white space
    collapsed; articles are kept.

    Raises:
        DataError: the lengths differ, or a prediction has no reference.
    """
    _check(predictions, references)
    return [100.0 * (_plain(p) in map(_plain, refs)) for p, refs in zip(predictions, references, strict=True)]


def fact_accuracy(predictions: Sequence[str], facts: Sequence[Facts]) -> list[float]:
    """Return the share of a prompt's facts that the answer states, times 100. A fact is stated by its value without a rival value.

    Raises:
        DataError: the lengths differ, or a prediction has no fact.
    """
    _check(predictions, facts)
    return [100 * sum(_states(p, v, rivals) for v, rivals in known) / len(known) for p, known in zip(predictions, facts, strict=True)]


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def _states(text: str, value: str, rivals: Sequence[str]) -> bool:
    return _says(text, value) and not any(_says(text, rival) for rival in rivals)


def _says(text: str, phrase: str) -> bool:
    """Return True when the phrase occurs as whole words."""
    return phrase in text and re.search(rf"(?<!\S){re.escape(phrase)}(?!\S)", text) is not None


@lru_cache
def _scorer() -> "RougeScorer":
    from rouge_score import rouge_scorer  # here: it imports nltk and scipy.stats, which most stages do not need

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _check(predictions: Sequence, other: Sequence) -> None:
    if len(predictions) != len(other):
        raise DataError(f"{len(predictions)} predictions but {len(other)} rows of references; give one row per prediction")
    if any(len(row) == 0 for row in other):
        raise DataError("a row has no reference; every prediction needs at least one")


# --- repetition and variety -------------------------------------------------------------------------------------------------


def repetition(responses: Sequence[Sequence[int]], n: int = 4) -> list[float]:
    """Return the share of an answer's n-grams of token ids that occur in it before, times 100; 0 where it has fewer than n tokens."""
    return [_repeated(ids, n) for ids in responses]


def _repeated(ids: Sequence[int], n: int) -> float:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def distinct(predictions: Sequence[str], n: int) -> float:
    """Return distinct-n (Li et al., arXiv:1510.03055): the share of distinct n-grams among all word n-grams of the predictions, times 100.

    No n-gram crosses from one prediction into the next. Returns 0 when no prediction has n words.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, predictions) for i in range(len(words) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(answers: Sequence[Sequence[str]]) -> list[float]:
    """Return Self-BLEU (Zhu et al., arXiv:1802.01886) of each prompt: the mean BLEU-4 of an answer against the prompt's other answers.

    BLEU is nltk's, with its smoothing method 1 (Chen & Cherry 2014: 0.1 in place of a count of zero). An answer of fewer
    than four words is scored by the n-grams it can have; an empty one scores 100 if another is empty too, else 0.

    Args:
        answers: for each prompt its answers, one per decoding seed.

    Returns:
        One number per prompt, 0 (no word in common) to 100 (all alike).

    Raises:
        DataError: a prompt has fewer than two answers.
    """
    short = next((i for i, row in enumerate(answers) if len(row) < 2), None)
    if short is not None:
        raise DataError(
            f"prompt {short + 1} has {len(answers[short])} answers; self-BLEU compares two or more, so give more decoding seeds"
        )
    return [_likeness([answer.split() for answer in row]) for row in answers]


def _likeness(answers: list[list[str]]) -> float:
    scores = [_bleu(answer, answers[:i] + answers[i + 1 :]) for i, answer in enumerate(answers)]
    return 100 * sum(scores) / len(scores)


def _bleu(answer: list[str], others: list[list[str]]) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # here: it imports scipy.stats, which most stages do not need

    if not answer:
        return float([] in others)
    order = min(_BLEU_ORDER, len(answer))
    score = sentence_bleu(others, answer, weights=(1 / order,) * order, smoothing_function=SmoothingFunction().method1)
    return float(score)  # type: ignore[arg-type]  # a list only for a list of weights
