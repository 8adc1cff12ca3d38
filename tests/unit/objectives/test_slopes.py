"""The slopes of NAME_with_slope against autograd through the plain functions."""

import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tadistill import objectives
from tadistill.constants import OBJECTIVE
from tadistill.errors import ConfigError
from tadistill.objectives import checks, divergence
from tadistill.objectives.sampled import token_loss_with_slope
from tadistill.objectives.targets import WITH_SLOPE, TeacherTerm

from .cases import draw

SAMPLED = {"tokens": torch.tensor([2, 0, 7, 4, 8, 1, 3]), "log_behaviour": torch.linspace(-3, -1, 7).double()}

PARAMETERS = {
    "forward_kl": [{}],
    "reverse_kl": [{}],
    "jensen_shannon": [{"beta": beta} for beta in (0, 0.1, 0.5, 0.9, 1)],
    "skew_forward_kl": [{"alpha": alpha} for alpha in (0, 0.1, 0.9, 1)],
    "skew_reverse_kl": [{"alpha": alpha, "detach_mixture": detach} for alpha in (0, 0.1, 0.9, 1) for detach in (False, True)],
    "single_step": [{"clip": 0.2}, {"clip": 0.5, "weight": torch.linspace(0.5, 1.2, 7).double()}],
}
CASES = [partial(getattr(objectives, name), **parameters) for name, found in PARAMETERS.items() for parameters in found]


def cut(case, rows):
    """The case for the first rows, with the sampled tokens that the single step needs."""
    if case.func is not objectives.single_step:
        return case
    per_token = {name: values[:rows] for name, values in (SAMPLED | case.keywords).items() if name != "clip"}
    return partial(case.func, clip=case.keywords["clip"], **per_token)


def with_slope(case):
    return partial(WITH_SLOPE[case.func], **case.keywords)


def by_autograd(function, student, *args, **kwargs):
    leaf = student.clone().requires_grad_()
    values = function(leaf, *args, **kwargs)
    if not values.requires_grad:  # a skew of 1
        return values, torch.zeros_like(student)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def shown(case):
    shown = {name: "tensor" if isinstance(value, torch.Tensor) else value for name, value in case.keywords.items()}
    return f"{case.func.__name__}{shown}"


def test_every_entry_is_tried():
    assert {case.func for case in CASES} == set(WITH_SLOPE)
    assert all(slope.__name__ == f"{plain.__name__}_with_slope" for plain, slope in WITH_SLOPE.items())
    assert not TeacherTerm("", objectives.total_variation).has_slope(())


@pytest.fixture(params=["cpu", "gpu"])
def products(request, monkeypatch):
    """How sums of products are computed: by `vecdot`, as on a CPU, or in place, as on a GPU."""
    if request.param == "gpu":
        monkeypatch.setattr(divergence, "_VECDOT", ())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES, ids=shown)
def test_equals_autograd(case, temperature, products):
    student, teacher = draw(7, 33)
    before = student.clone(), teacher.clone()
    case = cut(case, 7)
    expected = by_autograd(case, student, teacher, temperature=temperature)
    for known in (False, True):
        with checks.finite_logits(known):
            found = with_slope(case)(student, teacher, temperature=temperature)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("case", CASES, ids=shown)
def test_impossible_tokens(case, products):
    student, teacher = draw(3, 9)
    student[0, 4] = student[1, 2] = teacher[1, 2] = teacher[2, 5] = -torch.inf
    case = cut(case, 3)
    for found, expected in zip(with_slope(case)(student, teacher), by_autograd(case, student, teacher), strict=True):
        assert found.isfinite().all()
        scale = expected.abs().amax(-1, keepdim=True).clamp(min=1) if expected.ndim > 1 else expected.abs().clamp(min=1)
        assert ((found - expected).abs() <= 1e-11 * scale).all()


@pytest.mark.parametrize("loss", [lambda log_q: -log_q, lambda log_q: (log_q + 2).square() / 2, torch.exp], ids=["ce", "k2", "ratio"])
def test_losses_of_tokens(loss):
    student, _ = draw(5, 9)
    tokens = torch.tensor([0, 3, 8, 3, 1])
    student[4, 1] = student[3, 0] = -torch.inf
    found = token_loss_with_slope(student, tokens, loss)
    expected = by_autograd(lambda z: loss(objectives.token_log_probs(z, tokens)), student)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_bad_parameter_is_refused():
    student, teacher = draw(2, 5)
    for name, parameter in (("jensen_shannon", "beta"), ("skew_forward_kl", "alpha"), ("skew_reverse_kl", "alpha")):
        with pytest.raises(ConfigError, match=parameter):
            WITH_SLOPE[getattr(objectives, name)](student, teacher, **{parameter: 1.5})


class Peak(TorchDispatchMode):
    """The largest size in bytes of all tensors that were made in the `with` block and were alive together."""

    def __init__(self):
        super().__init__()
        self.bytes, self.alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in (t.untyped_storage() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)):
            if made.data_ptr() not in self.alive:
                self.alive[made.data_ptr()] = made.nbytes()
                weakref.finalize(made, self.alive.pop, made.data_ptr(), None)
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("case", CASES, ids=shown)
def test_temporary_tensors_on_a_gpu_are_within_the_planned_size(case, monkeypatch):
    monkeypatch.setattr(divergence, "_VECDOT", ())
    student, teacher = draw(7, 4096)
    with checks.deferred(), checks.finite_logits(True), Peak() as peak:
        with_slope(cut(case, 7))(student, teacher)
    share = peak.bytes / (student.nbytes + teacher.nbytes)
    assert share <= {"reverse_kl": 1.01, "jensen_shannon": 2.51}.get(case.func.__name__, OBJECTIVE)
