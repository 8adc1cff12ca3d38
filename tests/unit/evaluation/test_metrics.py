"""Scores of text: Rouge-L equals the library's, fact accuracy by hand, errors."""

import pytest
from rouge_score import rouge_scorer

from tadistill.errors import DataError
from tadistill.evaluation.metrics import fact_accuracy, rouge_l


def test_rouge_l_is_the_best_stemmed_f_measure():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    predictions = ["the cats are running home", "", "Ünïcode, naïve!", "one two three"]
    references = [["a cat runs home", "the cat is running"], ["something"], ["naive unicode", "Ünïcode naïve"], ["three two one"]]
    for found, prediction, refs in zip(rouge_l(predictions, references), predictions, references, strict=True):
        assert found == 100 * max(scorer.score(r, prediction)["rougeL"].fmeasure for r in refs)
    assert rouge_l([""], [["x"]]) == [0.0]
    assert rouge_l(["the runner runs"], [["the runner runs"]]) == [100.0]


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("the pet of bavan is a rat .", 100),
        ("the pet of bavan is a cat .", 0),
        ("a rat or a cat", 0),  # naming both is no knowledge
        ("rather", 0),  # whole words only
        ("", 0),
    ],
)
def test_fact_accuracy(prediction, score):
    assert fact_accuracy([prediction], [[("rat", ("cat", "dog"))]]) == [score]


def test_fact_accuracy_is_the_share_of_facts():
    facts = [("rat", ("cat",)), ("blue", ("red",)), ("2 5 9", ())]
    assert fact_accuracy(["a rat , 2 5 9 , red"], [facts]) == [pytest.approx(200 / 3)]


def test_lengths_that_differ_are_an_error_not_a_cut():
    with pytest.raises(DataError, match="2 predictions but 1 rows"):
        rouge_l(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="no reference"):
        rouge_l(["a"], [[]])
