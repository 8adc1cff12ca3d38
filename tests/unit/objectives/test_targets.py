"""Mixtures of teachers and top-k signals: the identities behind them, the common checks, and k = V."""

import itertools
import math

import numpy as np
import pytest
import torch

from tadistill.objectives import TargetMixture, TopK, forward_kl, log_probs, reverse_kl, top_k, top_k_forward_kl, top_k_reverse_kl

from . import reference
from .cases import draw, name, of, pass_checks, zero_at_equality

ALL = pytest.mark.parametrize("case", of("targets"), ids=name)
SIDES = pytest.mark.parametrize(("sparse", "dense"), [(top_k_forward_kl, forward_kl), (top_k_reverse_kl, reverse_kl)])
WEIGHTS = (1.0, 3.0, 0.5)


@ALL
def test_common(case):
    pass_checks(case, zero_at_equality)


# --- mixtures -----------------------------------------------------------------------------------------------------------


def teachers(count: int = 3) -> list[torch.Tensor]:
    return [draw(4, 9, seed=10 + k)[1] for k in range(count)]


def test_reverse_kl_to_all_teachers_is_reverse_kl_to_the_geometric_mixture():
    """sum_k w_k KL(q || p_k) = KL(q || p_geo) - log Z, Z the mass of prod_k p_k^w_k."""
    (student, _), targets, shares = draw(4, 9), teachers(), [w / sum(WEIGHTS) for w in WEIGHTS]
    each = sum(w * reverse_kl(student, z) for w, z in zip(shares, targets, strict=True))
    mass = torch.stack([z.softmax(-1) ** w for w, z in zip(shares, targets, strict=True)]).prod(0).sum(-1)
    mixed = reverse_kl(student, TargetMixture("geometric", WEIGHTS).logits(targets))
    torch.testing.assert_close(each, mixed - mass.log(), atol=1e-12, rtol=0)
    assert mass.max() < 0.9


def test_forward_kl_from_all_teachers_is_forward_kl_from_the_arithmetic_mixture_and_a_constant():
    """sum_k w_k KL(p_k || q) - KL(p_arith || q) is H(p_arith) - sum_k w_k H(p_k), whatever q."""
    targets, shares = teachers(), [w / sum(WEIGHTS) for w in WEIGHTS]
    mixed = TargetMixture("arithmetic", WEIGHTS).logits(targets)
    found = []
    for seed in range(3):
        student, _ = draw(4, 9, seed=seed)
        found.append(sum(w * forward_kl(student, z) for w, z in zip(shares, targets, strict=True)) - forward_kl(student, mixed))
    entropy = [-(z.softmax(-1) * z.log_softmax(-1)).sum(-1) for z in (mixed, *targets)]
    expected = entropy[0] - sum(w * h for w, h in zip(shares, entropy[1:], strict=True))
    for value in found:
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    assert expected.min() > 0.01


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_mixtures_are_exact_at_any_temperature(temperature):
    """Softmax at the temperature gives the mixture of softmaxes at the temperature."""
    targets, shares = teachers(), [w / sum(WEIGHTS) for w in WEIGHTS]
    tempered = [np.stack([reference.softmax(row, temperature) for row in z.numpy()]) for z in targets]
    arithmetic = sum(w * p for w, p in zip(shares, tempered, strict=True))
    geometric = np.prod([p**w for w, p in zip(shares, tempered, strict=True)], axis=0)
    for kind, expected in (("arithmetic", arithmetic), ("geometric", geometric / geometric.sum(-1, keepdims=True))):
        logits = TargetMixture(kind, WEIGHTS).logits(targets, temperature=temperature)
        np.testing.assert_allclose((logits / temperature).softmax(-1).numpy(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
def test_mixture_of_one_is_that_teacher_and_zero_weight_leaves_out(kind):
    a, b, c = teachers()
    for weights, expected in (((2.0,), [a]), ((0.0, 5.0, 0.0), [b])):
        found = TargetMixture(kind, weights).logits([a, b, c][: len(weights)])
        torch.testing.assert_close(found.softmax(-1), expected[0].softmax(-1), atol=1e-12, rtol=0)
    poisoned = TargetMixture(kind, (1.0, 0.0)).logits([a, torch.full_like(a, math.nan)])  # a teacher without a forward pass
    assert torch.isfinite(poisoned).all()


def test_impossible_tokens_in_mixtures():
    """A geometric mixture keeps what all teachers allow, an arithmetic one what any does."""
    a, b = torch.tensor([0.0, -math.inf, 1.0]), torch.tensor([0.0, 2.0, -math.inf])
    for kind, possible in (("geometric", [True, False, False]), ("arithmetic", [True, True, True])):
        probs = TargetMixture(kind, (0.5, 0.5)).logits([a, b]).softmax(-1)
        assert [float(x) > 0 for x in probs] == possible


def test_drawn_is_deterministic_never_empty_and_of_the_right_frequency():
    mixture = TargetMixture("geometric", (1.0, 2.0), drop=0.7)
    draws = [mixture.drawn(g).weights for g in [np.random.default_rng(5)] for _ in range(4000)]
    again = [mixture.drawn(g).weights for g in [np.random.default_rng(5)] for _ in range(4000)]
    assert draws == again
    assert draws != [mixture.drawn(g).weights for g in [np.random.default_rng(6)] for _ in range(4000)]
    assert set(draws) == {(1.0, 0.0), (0.0, 2.0), (1.0, 2.0)}
    # given that one is left, each stays with probability 0.3 / (1 - 0.7^2) = 0.588; 0.035 is more than four standard errors
    for k in range(2):
        assert sum(w[k] > 0 for w in draws) / 4000 == pytest.approx(0.3 / 0.51, abs=0.035)


def test_drawn_keeps_all_without_dropping_and_never_only_weight_zero():
    generator = np.random.default_rng(0)
    assert TargetMixture("arithmetic", (1.0, 2.0)).drawn(generator).weights == (1.0, 2.0)
    for _ in range(200):
        kept = TargetMixture("arithmetic", (1.0, 0.0), drop=0.9).drawn(generator)
        assert kept.weights == (1.0, 0.0)
        assert (kept.kind, kept.drop) == ("arithmetic", 0.0)


# --- top-k --------------------------------------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize("tail", ["lump", "drop"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_whole_vocabulary_is_dense(sparse, dense, tail, temperature):
    student, teacher = draw(4, 9)
    found = sparse(student, teacher, k=9, tail=tail, temperature=temperature)
    torch.testing.assert_close(found, dense(student, teacher, temperature=temperature), atol=1e-12, rtol=0)


@SIDES
def test_lumped_is_a_lower_bound_that_grows_with_k(sparse, dense):
    student, teacher = draw(20, 9)
    values = [sparse(student, teacher, k=k) for k in range(1, 10)]
    for smaller, larger in itertools.pairwise(values):
        assert (larger - smaller).min() > -1e-12
    assert (dense(student, teacher) - values[0]).min() > 0


def test_dropping_leaves_the_student_alone_elsewhere():
    student, teacher = draw(4, 9)
    student.requires_grad_()
    (dropped,) = torch.autograd.grad(top_k_forward_kl(student, teacher, k=3, tail="drop").sum(), student)
    (lumped,) = torch.autograd.grad(top_k_forward_kl(student, teacher, k=3, tail="lump").sum(), student)
    outside = torch.ones_like(student, dtype=torch.bool).scatter(-1, teacher.topk(3).indices, False)
    assert dropped[outside].abs().max() == 0
    assert lumped[outside].abs().min() > 0


def test_top_k_holds_the_teachers_log_probabilities():
    _, teacher = draw(2, 3, 9)
    for temperature in (1.0, 2.0):
        found = top_k(teacher, 4, temperature=temperature)
        log_p = (teacher / temperature).log_softmax(-1)
        torch.testing.assert_close(found.log_probs, log_p.sort(-1, descending=True).values[..., :4], atol=1e-12, rtol=0)
        torch.testing.assert_close(log_p.gather(-1, found.ids), found.log_probs, atol=1e-12, rtol=0)
        assert found.tail is not None
        torch.testing.assert_close(
            found.log_probs.exp().sum(-1) + found.tail.exp(), torch.ones(2, 3, dtype=torch.float64), atol=1e-12, rtol=0
        )
    assert top_k(teacher, 4, tail="drop").tail is None


def test_the_tail_of_a_confident_teacher_does_not_round_to_nothing():
    """In float32, 1 - p(top) is 0 here; the sum of the rest is 3 e^-40."""
    found = top_k(torch.tensor([40.0, 0.0, 0.0, 0.0]), 1)
    assert found.tail is not None
    assert float(found.tail) == pytest.approx(math.log(3) - 40, abs=1e-4)


@pytest.mark.parametrize("tail", ["lump", "drop"])
def test_a_cached_signal_gives_what_the_live_teacher_gives(tail):
    student, teacher = draw(4, 9)
    cached = top_k(teacher, 3, tail=tail)
    torch.testing.assert_close(forward_kl(*cached.align(student)), top_k_forward_kl(student, teacher, k=3, tail=tail), atol=1e-12, rtol=0)
    shuffled = torch.tensor([2, 0, 1])  # the order of the tokens does not matter
    other = TopK(cached.ids[:, shuffled], cached.log_probs[:, shuffled], cached.tail)
    torch.testing.assert_close(reverse_kl(*other.align(student)), top_k_reverse_kl(student, teacher, k=3, tail=tail), atol=1e-12, rtol=0)


def test_a_dropped_tail_may_be_tempered_later():
    student, teacher = draw(4, 9)
    late = forward_kl(*top_k(teacher, 3, tail="drop").align(student, 2.0))
    torch.testing.assert_close(late, top_k_forward_kl(student, teacher, k=3, tail="drop", temperature=2.0), atol=1e-12, rtol=0)


def test_default_k_is_64():
    student, teacher = draw(2, 80)
    assert torch.equal(top_k_forward_kl(student, teacher), top_k_forward_kl(student, teacher, k=64, tail="lump"))


@SIDES
@pytest.mark.parametrize("tail", ["lump", "drop"])
def test_a_vocabulary_of_one(sparse, dense, tail):
    student = torch.tensor([[3.0]], requires_grad=True)
    value = sparse(student, torch.tensor([[-1.0]]), k=1, tail=tail)
    assert float(value.detach()) == 0
    assert float(torch.autograd.grad(value.sum(), student)[0]) == 0


def test_fewer_possible_tokens_than_k():
    """The teacher's third token is impossible: it is kept with a probability of 0."""
    teacher, student = torch.tensor([[1.0, 0.0, -math.inf, -math.inf]]), torch.tensor([[0.0, 0.5, 0.2, -0.1]])
    for tail in ("lump", "drop"):
        found = top_k(teacher, 3, tail=tail)
        assert float(found.log_probs[0, 2].exp()) == 0
        assert torch.isfinite(top_k_forward_kl(student, teacher, k=3, tail=tail)).all()
    torch.testing.assert_close(top_k_forward_kl(student, teacher, k=3), forward_kl(student, teacher))
    assert float(log_probs(teacher)[0, 3].exp()) == 0
