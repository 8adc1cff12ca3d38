"""How varied answers are: distinct n-grams within one decoding seed, and likeness between the seeds of a prompt.

Words are what white space separates.
"""

from collections.abc import Sequence

from tadistill.errors import DataError

_ORDER = 4


def distinct(predictions: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al., arXiv:1510.03055): the share of distinct ones among all word n-grams of the predictions, times 100.

    No n-gram crosses from one prediction into the next. 0 when no prediction has n words: silence shows no variety.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, predictions) for i in range(len(words) - n + 1)]
    return 100 * len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(answers: Sequence[Sequence[str]]) -> list[float]:
    """Self-BLEU (Zhu et al., arXiv:1802.01886) of each prompt: the mean BLEU-4 of an answer against the prompt's other answers.

    BLEU is nltk's, with its smoothing method 1 (Chen & Cherry 2014: 0.1 in place of a count of zero). An answer of fewer
    than four words is judged by the n-grams it can have; one of no words scores 100 if another is empty too, else 0.

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
    order = min(_ORDER, len(answer))
    score = sentence_bleu(others, answer, weights=(1 / order,) * order, smoothing_function=SmoothingFunction().method1)
    return float(score)  # type: ignore[arg-type]  # a list only for a list of weights
