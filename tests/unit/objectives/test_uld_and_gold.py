"""Divergences between different vocabularies: the common checks, limiting cases, and what a lumped rest does not see."""

import math

import pytest
import torch

from tadistill.errors import ConfigError
from tadistill.objectives import (
    SharedVocabulary,
    hybrid_distance,
    sorted_distance,
)

from .cases import Case, draw, name, of, pass_checks

EVERY = torch.arange(9)


@pytest.mark.parametrize("case", of("vocabularies"), ids=name)
def test_common(case: Case):
    pass_checks(case)


def pair(student, teacher, sizes) -> SharedVocabulary:
    return SharedVocabulary(torch.tensor(student), torch.tensor(teacher), sizes)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_by_hand():
    # student: x .5, y .25, own .25; teacher: own .2, y .4, own .1, x .3
    student, teacher = logs(0.5, 0.25, 0.25), logs(0.2, 0.4, 0.1, 0.3)
    assert float(sorted_distance(student, teacher)) == pytest.approx(0.1 + 0.05 + 0.05 + 0.1, abs=1e-12)  # .5 .25 .25, .4 .3 .2 .1
    before = [*logs(0.5, 0.25)]
    assert float(sorted_distance(student, teacher, before=before)) == pytest.approx(0.15 + 0.05 + 0.075 + 0.025, abs=1e-12)


def test_the_sorted_distance_does_not_see_which_tokens_are_likely():
    student, _ = draw(5, 9)
    assert sorted_distance(student, student.flip(-1)).abs().max() < 1e-12
    sure, other = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0] * 1000])
    assert float(sorted_distance(sure, other)) == pytest.approx(2 - 2 / 1000, abs=1e-5)


def test_golds_reverse_kl_is_smallest_away_from_the_teacher():
    """The fault that `hybrid_distance` names: q log(q / p) without renormalisation is negative where q < p."""
    shared = pair([0, 1], [0, 1], (3, 3))
    teacher = logs(0.4, 0.4, 0.2)
    equal, smaller = (
        hybrid_distance(logs(*q), teacher, shared=shared, beta=1, term_weights=(1, 0)) for q in ([0.4, 0.4, 0.2], [0.2, 0.2, 0.6])
    )
    assert float(equal) == pytest.approx(0, abs=1e-12)
    assert float(smaller) == pytest.approx(0.4 * math.log(0.5), abs=1e-12)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: pair([0, 1], [0], (3, 3)), ("student_ids",)),
        (lambda: pair([0, 3], [0, 1], (3, 3)), ("student_ids", "0 to 2")),
        (lambda: pair([0, 1], [1, 1], (3, 3)), ("teacher_ids", "different")),
        (lambda: sorted_distance(torch.ones(2, 3), torch.ones(3)), ("(2, 3)", "(3,)")),
        (lambda: sorted_distance(torch.ones(2, 0), torch.ones(2, 0)), ("(2, 0)", "at least 1")),
        (lambda: sorted_distance(torch.tensor(1.0), torch.tensor(1.0)), ("()", "at least 1")),
        (lambda: sorted_distance(torch.tensor([math.nan, 0]), torch.ones(2)), ("student_logits", "NaN")),
        (lambda: sorted_distance(torch.ones(2), torch.ones(2), temperature=0), ("temperature",)),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ConfigError) as error:
        build()
    assert all(word in str(error.value) for word in words), error.value
