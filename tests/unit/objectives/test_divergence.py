"""The divergences of `divergence.py`: golden values, the common checks, and their limits."""

import math

import pytest
import torch

from tadistill.objectives import (
    forward_kl,
    jeffreys,
    jensen_shannon,
    log_probs,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)

from .cases import draw, name, of, pass_checks, positive_elsewhere, zero_at_equality

TEACHER = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
STUDENT = torch.tensor([0.5, 1.5, -0.5, 0.0], dtype=torch.float64)
ALL = pytest.mark.parametrize("case", of("divergence"), ids=name)


@ALL
def test_common(case):
    pass_checks(case, zero_at_equality, positive_elsewhere)


@pytest.mark.parametrize(
    ("objective", "parameters", "golden"),
    [
        (forward_kl, {}, 0.46476023),
        (reverse_kl, {}, 0.45421961),
        (jeffreys, {}, 0.46476023 + 0.45421961),
        (jensen_shannon, {"beta": 0.1}, 0.04097594),
        (jensen_shannon, {}, 0.10953544),
        (jensen_shannon, {"beta": 0.9}, 0.04023658),
        (skew_forward_kl, {}, 0.36216873),
        (skew_reverse_kl, {}, 0.35734401),
        (skew_reverse_kl, {"detach_mixture": True}, 0.35734401),
        (total_variation, {}, 0.43956716),
    ],
)
def test_golden(objective, parameters, golden):
    assert abs(float(objective(STUDENT, TEACHER, **parameters)) - golden) < 1e-7


@ALL
def test_temperature_changes_the_value(case):
    student, teacher = draw(5, 9)
    assert (case.run(student, teacher, temperature=2.0) - case.run(student, teacher)).abs().max() > 0.01


@ALL
def test_a_constant_added_to_the_logits_changes_nothing(case):
    student, teacher = draw(5, 9)
    torch.testing.assert_close(case.run(student + 300, teacher - 200), case.run(student, teacher), atol=1e-10, rtol=0)


def test_gradients_in_closed_form():
    student, teacher = draw(4, 7)
    student.requires_grad_()
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    (forward,) = torch.autograd.grad(forward_kl(student, teacher, temperature=1).sum(), student)
    torch.testing.assert_close(forward, q - p, atol=1e-12, rtol=0)
    (reverse,) = torch.autograd.grad(reverse_kl(student, teacher).sum(), student)
    gap = q.log() - p.log()
    torch.testing.assert_close(reverse, q * (gap - (q * gap).sum(-1, keepdim=True)), atol=1e-12, rtol=0)


def test_jensen_shannon_at_the_ends():
    """D/beta -> KL(p || q) and D/(1 - beta) -> KL(q || p). The error is beta times something of the size of max p/q, hence 1e-4."""
    student, teacher = draw(6, 9)
    small = 1e-8
    torch.testing.assert_close(jensen_shannon(student, teacher, beta=small) / small, forward_kl(student, teacher), atol=1e-4, rtol=0)
    torch.testing.assert_close(jensen_shannon(student, teacher, beta=1 - small) / small, reverse_kl(student, teacher), atol=1e-4, rtol=0)
    assert torch.equal(jensen_shannon(student, teacher, beta=0), forward_kl(student, teacher))
    assert torch.equal(jensen_shannon(student, teacher, beta=1), reverse_kl(student, teacher))


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5])
def test_jensen_shannon_mirrors_and_is_bounded_by_the_entropy_of_beta(beta):
    student, teacher = draw(50, 9)
    torch.testing.assert_close(
        jensen_shannon(student, teacher, beta=beta), jensen_shannon(teacher, student, beta=1 - beta), atol=1e-12, rtol=0
    )
    apart = torch.tensor([[100.0, -100.0]], dtype=torch.float64)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert float(jensen_shannon(apart, -apart, beta=beta)) == pytest.approx(entropy, abs=1e-12)
    assert jensen_shannon(student, teacher, beta=beta).max() < entropy


@pytest.mark.parametrize(("skew", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)])
def test_skew_limits_and_bound(skew, plain):
    student, teacher = draw(6, 9)
    assert torch.equal(skew(student, teacher, alpha=0), plain(student, teacher))
    assert skew(student, teacher, alpha=1).abs().max() == 0
    torch.testing.assert_close(skew(student, teacher, alpha=1e-10), plain(student, teacher), atol=1e-6, rtol=0)  # O(alpha) off
    apart = torch.tensor([[100.0, -100.0]], dtype=torch.float64)
    assert float(skew(apart, -apart, alpha=0.1)) == pytest.approx(-math.log(0.1), abs=1e-12)


def test_skew_halves_make_the_jensen_shannon():
    student, teacher = draw(6, 9)
    halves = (skew_forward_kl(student, teacher, alpha=0.5) + skew_reverse_kl(student, teacher, alpha=0.5)) / 2
    torch.testing.assert_close(halves, jensen_shannon(student, teacher), atol=1e-12, rtol=0)


def test_detaching_the_mixture_changes_the_gradient_only():
    student, teacher = draw(4, 7)
    student.requires_grad_()
    flowing, held = skew_reverse_kl(student, teacher), skew_reverse_kl(student, teacher, detach_mixture=True)
    assert torch.equal(flowing, held)
    slopes = [torch.autograd.grad(v.sum(), student)[0] for v in (flowing, held)]
    assert (slopes[0] - slopes[1]).abs().max() > 1e-3


def test_jeffreys_is_the_sum():
    student, teacher = draw(6, 9)
    torch.testing.assert_close(jeffreys(student, teacher), forward_kl(student, teacher) + reverse_kl(student, teacher), atol=1e-12, rtol=0)


def test_total_variation_is_symmetric_and_at_most_one():
    student, teacher = draw(6, 9)
    torch.testing.assert_close(total_variation(student, teacher), total_variation(teacher, student), atol=1e-15, rtol=0)
    apart = torch.tensor([[0.0, -math.inf]])
    assert float(total_variation(apart, apart.flip(-1))) == 1


def test_a_token_that_the_first_side_excludes_costs_nothing():
    student = torch.tensor([[0.3, 0.7, -0.2]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.5, -math.inf]])
    value = forward_kl(student, teacher)
    q, p = student.detach().double().softmax(-1), teacher.double().softmax(-1)
    assert float(value.detach()) == pytest.approx(float((p[:, :2] * (p[:, :2] / q[:, :2]).log()).sum()), abs=1e-6)
    (slope,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(slope.double(), q - p, atol=1e-6, rtol=0)


def test_the_teacher_gets_a_gradient_unless_detached():
    student, teacher = draw(4, 7)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: forward_kl(student, z), teacher)
    assert not forward_kl(student, teacher.detach()).requires_grad


def test_log_probs_of_impossible_tokens_are_finite():
    found = log_probs(torch.tensor([0.0, -math.inf, 0.0]), temperature=3.0)
    torch.testing.assert_close(found[[0, 2]], torch.full((2,), -math.log(2)))
    assert torch.isfinite(found).all()
    assert float(found[1].exp()) == 0
