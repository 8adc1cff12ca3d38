"""The written-out gradients of `slopes.py` against autograd through the plain functions."""

from functools import partial

import pytest
import torch

from tadistill import objectives
from tadistill.errors import ConfigError
from tadistill.objectives import slopes

from .cases import draw

PARAMETERS = {
    "forward_kl": [{}],
    "reverse_kl": [{}],
    "jensen_shannon": [{"beta": beta} for beta in (0, 0.1, 0.5, 0.9, 1)],
    "skew_forward_kl": [{"alpha": alpha} for alpha in (0, 0.1, 0.9, 1)],
    "skew_reverse_kl": [{"alpha": alpha, "detach_mixture": detach} for alpha in (0, 0.1, 0.9, 1) for detach in (False, True)],
}
CASES = [partial(getattr(objectives, name), **parameters) for name, found in PARAMETERS.items() for parameters in found]


def by_autograd(function, student, *args, **kwargs):
    leaf = student.clone().requires_grad_()
    values = function(leaf, *args, **kwargs)
    if not values.requires_grad:  # a skew of 1
        return values, torch.zeros_like(student)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def shown(case):
    return f"{case.func.__name__}{case.keywords}"


def test_every_entry_is_tried():
    assert {case.func for case in CASES} == set(slopes.SLOPES)
    assert slopes.written_out(objectives.total_variation) is None


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES, ids=shown)
def test_equals_autograd(case, temperature):
    student, teacher = draw(7, 33)
    before = student.clone(), teacher.clone()
    written = slopes.written_out(case)
    assert written is not None
    for found, expected in zip(
        written(student, teacher, temperature=temperature), by_autograd(case, student, teacher, temperature=temperature), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("case", CASES, ids=shown)
def test_impossible_tokens(case):
    student, teacher = draw(3, 9)
    student[0, 4] = student[1, 2] = teacher[1, 2] = teacher[2, 5] = -torch.inf
    written = slopes.written_out(case)
    assert written is not None
    for found, expected in zip(written(student, teacher), by_autograd(case, student, teacher), strict=True):
        assert found.isfinite().all()
        scale = expected.abs().amax(-1, keepdim=True).clamp(min=1) if expected.ndim > 1 else expected.abs().clamp(min=1)
        assert ((found - expected).abs() <= 1e-11 * scale).all()


@pytest.mark.parametrize("loss", [lambda log_q: -log_q, lambda log_q: (log_q + 2).square() / 2, torch.exp], ids=["ce", "k2", "ratio"])
def test_losses_of_tokens(loss):
    student, _ = draw(5, 9)
    tokens = torch.tensor([0, 3, 8, 3, 1])
    student[4, 1] = student[3, 0] = -torch.inf
    found = slopes.of_tokens(student, tokens, loss)
    expected = by_autograd(lambda z: loss(objectives.token_log_probs(z, tokens)), student)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_bad_parameter_is_refused():
    student, teacher = draw(2, 5)
    for name, parameter in (("jensen_shannon", "beta"), ("skew_forward_kl", "alpha"), ("skew_reverse_kl", "alpha")):
        written = slopes.written_out(getattr(objectives, name), **{parameter: 1.5})
        assert written is not None
        with pytest.raises(ConfigError, match=parameter):
            written(student, teacher)
