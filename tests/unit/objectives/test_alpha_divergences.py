"""The two-parameter families: golden values, the common checks, limits, and the members with names of their own."""

import math

import pytest
import torch

from tadistill.objectives import alpha_beta, alpha_mixture, forward_kl, reverse_kl, skew_forward_kl, skew_reverse_kl

from .cases import draw, extreme, name, of, pass_checks, positive_elsewhere, zero_at_equality
from .test_divergence import STUDENT, TEACHER

ALL = pytest.mark.parametrize("case", of("families"), ids=name)
PAIRS = ("pr", "rp", "qr", "rq")


@ALL
def test_common(case):
    pass_checks(case, zero_at_equality, positive_elsewhere)


@pytest.mark.parametrize(
    ("parameters", "golden"),
    [
        ({}, 0.50858237),
        ({"alpha": 0.2, "beta": 0.7}, 0.50858237),
        ({"alpha": 0.5, "beta": 0.5}, 0.44848503),
        ({"alpha": 1, "beta": 1}, 0.15617356),
    ],
)
def test_alpha_beta_golden(parameters, golden):
    assert abs(float(alpha_beta(STUDENT, TEACHER, **parameters)) - golden) < 1e-7


@pytest.mark.parametrize(
    ("alpha", "from_teacher", "from_student"),
    [(-5, 0.1054329, 0.11667124), (-1, 0.10831805, 0.11075283), (0, 0.11046919, 0.1091755), (1, 0.11346002, 0.10818971)],
)
def test_alpha_mixture_golden(alpha, from_teacher, from_student):
    assert abs(float(alpha_mixture(STUDENT, TEACHER, alpha=alpha, lam=0.5, pair="pr")) - from_teacher) < 1e-7
    assert abs(float(alpha_mixture(STUDENT, TEACHER, alpha=alpha, lam=0.5, pair="qr")) - from_student) < 1e-7


def test_alpha_mixture_defaults():
    assert abs(float(alpha_mixture(STUDENT, TEACHER)) - 0.1054329) < 1e-7


# --- alpha-beta ---------------------------------------------------------------------------------------------------------


def test_alpha_beta_members():
    student, teacher = draw(6, 9)
    q, p = student.softmax(-1), teacher.softmax(-1)
    for parameters, expected in {
        (1.0, 0.0): forward_kl(student, teacher),
        (0.0, 1.0): reverse_kl(student, teacher),
        (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(-1),  # four times the squared Hellinger distance
        (1.0, 1.0): (p - q).square().sum(-1) / 2,
        (0.0, 0.0): (p.log() - q.log()).square().sum(-1) / 2,
        (2.0, -1.0): ((p - q).square() / q).sum(-1) / 2,  # half the chi-squared of Pearson
    }.items():
        found = alpha_beta(student, teacher, alpha=parameters[0], beta=parameters[1])
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("alpha", "beta", "along"),
    [
        (1, 0, (0, 1)),
        (0, 1, (1, 0)),
        (0.6, 0, (0, 1)),
        (0, 0.6, (1, 0)),
        (0.5, -0.5, (1, 1)),
        (-0.4, 0.4, (1, 0)),
        (0, 0, (1, 2)),
        (0, 0, (1, -1)),
    ],
)
def test_alpha_beta_is_continuous_at_its_limits(alpha, beta, along):
    """The mean of both sides differs from the limit by O(step^2), plus rounding of about 1e-16 / step^2: 1e-4 leaves 1e-6 of both."""
    student, teacher = (z / 2 for z in draw(6, 9))
    step = 1e-4
    near = [alpha_beta(student, teacher, alpha=alpha + s * along[0] * step, beta=beta + s * along[1] * step) for s in (1, -1)]
    limit = alpha_beta(student, teacher, alpha=alpha, beta=beta)
    torch.testing.assert_close((near[0] + near[1]) / 2, limit, atol=1e-6, rtol=1e-6)
    assert (near[0] - limit).abs().max() > 1e-8  # the neighbours are not the limit itself


def test_alpha_beta_swaps_its_sides_with_its_parameters():
    student, teacher = draw(6, 9)
    for alpha, beta in [(0.2, 0.7), (0, 0.6), (0.8, 0), (0.5, -0.5)]:
        torch.testing.assert_close(
            alpha_beta(student, teacher, alpha=alpha, beta=beta),
            alpha_beta(teacher, student, alpha=beta, beta=alpha),
            atol=1e-12,
            rtol=1e-12,
        )


# --- alpha-mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.8])
def test_arithmetic_mixture_is_the_skew_divergence(lam):
    student, teacher = draw(6, 9)
    skewed = skew_forward_kl(student, teacher, alpha=lam)
    torch.testing.assert_close(alpha_mixture(student, teacher, alpha=-1, lam=lam, pair="pr"), skewed, atol=1e-12, rtol=0)
    skewed = skew_reverse_kl(student, teacher, alpha=1 - lam)
    torch.testing.assert_close(alpha_mixture(student, teacher, alpha=-1, lam=lam, pair="qr"), skewed, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_geometric_and_harmonic_mixtures(pair):
    student, teacher = draw(6, 9)
    q, p, lam = student.softmax(-1), teacher.softmax(-1), 0.3
    for alpha, r in ((1, p**lam * q ** (1 - lam)), (3, 1 / (lam / p + (1 - lam) / q))):
        sides = {"p": p, "q": q, "r": r / r.sum(-1, keepdim=True)}
        first, second = sides[pair[0]], sides[pair[1]]
        expected = (first * (first / second).log()).sum(-1)
        torch.testing.assert_close(alpha_mixture(student, teacher, alpha=alpha, lam=lam, pair=pair), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", [-5.0, -1.0, 1.0, 3.0])
def test_alpha_mixture_at_the_ends_of_lam(alpha):
    student, teacher = draw(6, 9)
    expected = {
        ("pr", 0): forward_kl(student, teacher), ("rp", 0): reverse_kl(student, teacher),
        ("qr", 1): reverse_kl(student, teacher), ("rq", 1): forward_kl(student, teacher),
    }  # fmt: skip
    for pair in PAIRS:
        for lam in (0, 1):
            found = alpha_mixture(student, teacher, alpha=alpha, lam=lam, pair=pair)
            torch.testing.assert_close(found, expected.get((pair, lam), torch.zeros_like(found)), atol=1e-12, rtol=0)


def test_alpha_mixture_is_continuous_at_the_geometric_one():
    student, teacher = draw(6, 9)
    near = [alpha_mixture(student, teacher, alpha=1 + s * 1e-5) for s in (1, -1)]
    torch.testing.assert_close((near[0] + near[1]) / 2, alpha_mixture(student, teacher, alpha=1), atol=1e-8, rtol=0)


def test_alpha_mixture_in_other_divergences():
    """`ab_parameters` are those of `alpha_beta` on the same two sides."""
    student, teacher = draw(6, 9)
    mixed = math.log(0.5) + torch.logaddexp(student.log_softmax(-1), teacher.log_softmax(-1))  # alpha = -1, lam = 0.5
    for pair, (second, first) in {"pr": (mixed, teacher), "rp": (teacher, mixed), "qr": (mixed, student), "rq": (student, mixed)}.items():
        found = alpha_mixture(student, teacher, alpha=-1, lam=0.5, pair=pair, ab_parameters=(0.2, 0.7))
        torch.testing.assert_close(found, alpha_beta(second, first, alpha=0.2, beta=0.7), atol=1e-12, rtol=0)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("alpha", [-5.0, -1.0, 1.0, 3.0])
def test_alpha_mixture_survives_impossible_tokens(alpha, pair):
    student, teacher = extreme(9)
    student.requires_grad_()
    for parameters in ((1.0, 0.0), (0.2, 0.7)):
        value = alpha_mixture(student, teacher, alpha=alpha, lam=0.3, pair=pair, ab_parameters=parameters)
        (slope,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(value).all()
        assert torch.isfinite(slope).all()
