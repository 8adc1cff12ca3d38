"""Divergences between different vocabularies: the common checks, limiting cases, and what a lumped rest does not see."""

import math
from typing import Any

import pytest
import torch

from tadistill.errors import ConfigError
from tadistill.objectives import (
    SharedVocabulary,
    forward_kl,
    hybrid_distance,
    jensen_shannon,
    reverse_kl,
    shared_divergence,
    sorted_distance,
    total_variation,
)

from .cases import Case, draw, name, of, pass_checks

EVERY = torch.arange(9)


@pytest.mark.parametrize("case", of("vocabularies"), ids=name)
def test_common(case: Case):
    pass_checks(case)


def pair(student, teacher, sizes, rest: Any = "lump") -> SharedVocabulary:
    return SharedVocabulary(torch.tensor(student), torch.tensor(teacher), sizes, rest)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_by_hand():
    # student: x .5, y .25, own .25; teacher: own .2, y .4, own .1, x .3
    student, teacher = logs(0.5, 0.25, 0.25), logs(0.2, 0.4, 0.1, 0.3)
    shared = pair([0, 1], [3, 1], (3, 4))
    by_hand = 0.3 * math.log(0.3 / 0.5) + 0.4 * math.log(0.4 / 0.25) + 0.3 * math.log(0.3 / 0.25)
    assert float(shared_divergence(forward_kl, student, teacher, shared)) == pytest.approx(by_hand, abs=1e-12)
    dropped = pair([0, 1], [3, 1], (3, 4), "drop")
    by_hand = 3 / 7 * math.log(3 / 7 * 3 / 2) + 4 / 7 * math.log(4 / 7 * 3)
    assert float(shared_divergence(forward_kl, student, teacher, dropped)) == pytest.approx(by_hand, abs=1e-12)
    assert float(sorted_distance(student, teacher)) == pytest.approx(0.1 + 0.05 + 0.05 + 0.1, abs=1e-12)  # .5 .25 .25, .4 .3 .2 .1
    before = [*logs(0.5, 0.25)]
    assert float(sorted_distance(student, teacher, before=before)) == pytest.approx(0.15 + 0.05 + 0.075 + 0.025, abs=1e-12)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon, total_variation])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_one_vocabulary_is_the_plain_divergence_bit_for_bit(divergence, temperature):
    student, teacher = draw(5, 9, dtype=torch.float32)
    values, slopes = [], []
    for run in (divergence, lambda q, p, **kw: shared_divergence(divergence, q, p, SharedVocabulary(EVERY, EVERY, (9, 9)), **kw)):
        leaf = student.clone().requires_grad_()
        values.append(run(leaf, teacher, temperature=temperature))
        slopes.append(torch.autograd.grad(values[-1].sum(), leaf)[0])
    assert torch.equal(*values)
    assert torch.equal(*slopes)


def test_the_same_tokens_in_another_order_are_the_plain_divergence():
    student, teacher = draw(5, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    shared = SharedVocabulary(EVERY, order, (9, 9))
    there = torch.empty_like(teacher)
    there[:, order] = teacher  # the teacher's id of token v is order[v]
    found = shared_divergence(reverse_kl, student, there, shared, temperature=1.3)
    torch.testing.assert_close(found, reverse_kl(student, teacher, temperature=1.3), atol=1e-12, rtol=0)


def test_the_lumped_rest_does_not_see_which_other_tokens_are_likely():
    student, teacher = draw(5, 9)
    shared = pair([0, 4], [2, 1], (9, 9))
    moved = teacher.clone()
    moved[:, [0, 3, 5]] = teacher[:, [5, 0, 3]]  # all are the teacher's own
    for divergence in (forward_kl, reverse_kl, total_variation):
        values = [shared_divergence(divergence, student, t, shared) for t in (teacher, moved)]
        torch.testing.assert_close(*values, atol=1e-12, rtol=0)


def test_zero_where_all_shared_tokens_are_equally_likely():
    student, _ = draw(5, 9)
    shared = pair([1, 2, 5], [2, 0, 3], (9, 5))
    rest = student[:, [0, 3, 4, 6, 7, 8]].logsumexp(-1)
    half = rest - math.log(2)
    teacher = torch.stack([student[:, 2], half, student[:, 1], student[:, 5], half], -1)
    assert shared_divergence(forward_kl, student, teacher, shared).abs().max() < 1e-12
    assert shared_divergence(jensen_shannon, student, teacher, shared).abs().max() < 1e-12


def test_lumping_tokens_of_one_vocabulary_gives_a_lower_bound():
    student, teacher = draw(200, 9)
    shared = pair([0, 4, 6], [0, 4, 6], (9, 9))
    for divergence in (forward_kl, reverse_kl, jensen_shannon, total_variation):
        assert (shared_divergence(divergence, student, teacher, shared) <= divergence(student, teacher) + 1e-12).all()


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
    assert float(shared_divergence(reverse_kl, logs(0.2, 0.2, 0.6), teacher, shared)) > 0.1


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: pair([0], [0], (1, 3)), ("teacher has 2 tokens", "rest='drop'")),
        (lambda: pair([0], [0], (3, 1)), ("student has 2 tokens", "rest='drop'")),
        (lambda: pair([0, 1], [0], (3, 3)), ("student_ids",)),
        (lambda: pair([0, 3], [0, 1], (3, 3)), ("student_ids", "0 to 2")),
        (lambda: pair([0, 1], [1, 1], (3, 3)), ("teacher_ids", "different")),
        (lambda: pair([0], [0], (3, 3), "keep"), ("rest", "keep")),
        (lambda: shared_divergence(forward_kl, torch.ones(2, 4), torch.ones(2, 3), pair([0], [0], (3, 3))), ("4 logits", "3 tokens")),
        (lambda: shared_divergence(forward_kl, torch.ones(2, 3), torch.ones(1, 3), pair([0], [0], (3, 3))), ("(2, 3)", "(1, 3)")),
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
