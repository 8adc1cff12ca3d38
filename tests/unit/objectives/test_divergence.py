"""The divergences against golden values, an independent float64 reference, finite differences and their limits."""

import math

import pytest
import torch

from tadistill.objectives import cross_entropy, forward_kl, reverse_kl

TEACHER = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
STUDENT = torch.tensor([0.5, 1.5, -0.5, 0.0], dtype=torch.float64)
BOTH = pytest.mark.parametrize("objective", [forward_kl, reverse_kl])


def reference(name: str, student: list[float], teacher: list[float]) -> float:
    """From the definition, in probability space, in plain Python."""

    def softmax(z):
        weights = [math.exp(x - max(z)) for x in z]
        return [w / math.fsum(weights) for w in weights]

    q, p = softmax(student), softmax(teacher)
    a, b = (p, q) if name == "forward_kl" else (q, p)
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


@pytest.mark.parametrize(("objective", "golden"), [(forward_kl, 0.46476023), (reverse_kl, 0.45421961)])
def test_golden(objective, golden):
    assert abs(float(objective(STUDENT, TEACHER)) - golden) < 1e-7


@BOTH
def test_reference(objective):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, 11, dtype=torch.float64) * 3, torch.randn(5, 7, 11, dtype=torch.float64) * 3
    values = objective(student, teacher)
    assert values.shape == (5, 7)
    for b in range(5):
        expected = reference(objective.__name__, student[b, 3].tolist(), teacher[b, 3].tolist())
        assert abs(float(values[b, 3]) - expected) < 1e-10


@BOTH
def test_gradcheck(objective):
    torch.manual_seed(0)
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: objective(z, teacher, temperature=1.7), student)


@BOTH
def test_zero_at_equality_and_positive_elsewhere(objective):
    torch.manual_seed(0)
    a, b = torch.randn(100, 9), torch.randn(100, 9)
    assert objective(a, a).abs().max() < 1e-6
    assert objective(a, b).min() > 0


@BOTH
def test_temperature_divides_both_logits(objective):
    assert torch.allclose(objective(STUDENT, TEACHER, temperature=2.0), objective(STUDENT / 2, TEACHER / 2))


@BOTH
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(objective, extreme):
    student = torch.tensor([[extreme, 0.0, 1.0]], requires_grad=True)
    objective(student, torch.tensor([[0.0, 1.0, 0.5]])).sum().backward()
    assert torch.isfinite(student.grad).all()


@BOTH
def test_half_precision_is_computed_in_float32(objective):
    student, teacher = torch.randn(4, 50).bfloat16(), torch.randn(4, 50).bfloat16()
    assert objective(student, teacher).dtype == torch.float32
    assert torch.equal(objective(student, teacher), objective(student.float(), teacher.float()))


def test_a_word_that_the_first_side_excludes_costs_nothing():
    student = torch.tensor([[0.3, 0.7, -0.2]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.5, -math.inf]])
    value = forward_kl(student, teacher)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(student.grad).all()


def test_cross_entropy_equals_torch():
    torch.manual_seed(0)
    logits, tokens = torch.randn(6, 10), torch.randint(10, (6,))
    assert torch.allclose(cross_entropy(logits, tokens), torch.nn.functional.cross_entropy(logits, tokens, reduction="none"))
