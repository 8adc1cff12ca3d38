"""Distinct-n by hand; self-BLEU against BLEU-4 written from its definition."""

import math
from collections import Counter

import pytest

from tadistill.evaluation.text_scores import distinct, self_bleu


@pytest.mark.parametrize(
    ("predictions", "n", "score"),
    [
        (["a b a b"], 1, 50),
        (["a b a b"], 2, 200 / 3),
        (["a b", "a b"], 2, 50),
        (["a b", "c d"], 3, 0),  # no n-gram at all: none crosses answers
        (["a b c", ""], 3, 100),
        (["", ""], 1, 0),
        (["A a\ta\n"], 1, 200 / 3),  # case counts, any white space parts
    ],
)
def test_distinct(predictions, n, score):
    assert distinct(predictions, n) == pytest.approx(score)


def bleu(answer: list[str], others: list[list[str]]) -> float:
    """BLEU (Papineni et al. 2002, sections 2.1 and 2.2) with 0.1 in place of a zero count."""
    order, product = min(4, len(answer)), 1.0
    for n in range(1, order + 1):
        said, *told = (Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (answer, *others))
        clipped = sum(min(count, max(other[gram] for other in told)) for gram, count in said.items())
        if n == 1 and not clipped:
            return 0.0
        product *= (clipped or 0.1) / sum(said.values())
    closest = min((abs(len(o) - len(answer)), len(o)) for o in others)[1]
    return min(1.0, math.exp(1 - closest / len(answer))) * product ** (1 / order)


ANSWERS = [
    ["the cat sat on the mat", "the cat lay on the mat today", "a dog ran off"],
    ["rat", "rat", "cat"],
    ["it is a rat .", "it is a cat .", "the pet of bavan is a rat ."],
    ["one two", "one two three four five six", "seven"],
]


def test_self_bleu_is_the_mean_bleu_of_each_answer_against_the_others():
    for found, row in zip(self_bleu(ANSWERS), ANSWERS, strict=True):
        words = [a.split() for a in row]
        assert found == pytest.approx(100 * sum(bleu(w, words[:i] + words[i + 1 :]) for i, w in enumerate(words)) / len(row))


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        (["a b c d e"] * 3, 100),
        (["rat"] * 2, 100),  # shorter than a 4-gram
        (["", ""], 100),
        (["", "a b c d"], 0),
        (["a b c d", "e f g h"], 0),
    ],
)
def test_self_bleu_of_answers_all_alike_or_all_different(answers, score):
    assert self_bleu([answers]) == [pytest.approx(score)]


def test_self_bleu_does_not_depend_on_the_order_of_the_seeds():
    assert self_bleu([row[::-1] for row in ANSWERS]) == pytest.approx(self_bleu(ANSWERS))
