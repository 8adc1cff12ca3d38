"""Cross-entropy and the k estimators; MiniLLM's returns by hand, and its gradient against autograd of the exact sequence KL."""

import itertools
import math

import pytest
import torch

from tadistill.objectives import (
    clipped_ratio,
    cross_entropy,
    forward_kl,
    k1,
    k2,
    k3,
    moments,
    no_teacher,
    policy_gradient,
    returns,
    reverse_kl,
    token_log_probs,
    whiten,
)

from .cases import draw, name, of, pass_checks

V, EOS, LENGTH = 3, 0, 3


def test_estimates_compute_in_float32():
    """The mean of k3 over bfloat16 values was 0.8 % low."""
    log_q = torch.randn(4000, generator=torch.Generator().manual_seed(0)) - 4
    log_p = (log_q + 0.05 * torch.randn(4000, generator=torch.Generator().manual_seed(1))).bfloat16()
    log_q = log_q.bfloat16()
    for estimate in (k1, k2, k3):
        found = estimate(log_q, log_p)
        assert found.dtype == torch.float32
        assert float(found.mean()) == pytest.approx(float(estimate(log_q.double(), log_p.double()).mean()), rel=1e-3)


@pytest.mark.parametrize("case", of("sampled"), ids=name)
def test_common(case):
    pass_checks(case)


def test_cross_entropy_by_hand():
    logits = torch.tensor([0.5, 1.5, -0.5, 0.0], dtype=torch.float64)
    # log(e^0.5 + e^1.5 + e^-0.5 + 1) = log 7.7369410
    found = cross_entropy(logits.expand(4, 4), torch.arange(4))
    torch.testing.assert_close(found, math.log(7.7369410011) - logits, atol=1e-9, rtol=0)
    assert torch.equal(token_log_probs(logits.expand(4, 4), torch.arange(4)), -found)


def test_cross_entropy_equals_torch():
    logits, _ = draw(6, 10)
    tokens = torch.randint(10, (6,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cross_entropy(logits, tokens), torch.nn.functional.cross_entropy(logits, tokens, reduction="none"))


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased_for_the_reverse_kl(estimator):
    student, teacher = draw(5, 9)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close((log_q.exp() * estimator(log_q, log_p)).sum(-1), reverse_kl(student, teacher), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("estimator", "target"), [(k1, None), (k2, reverse_kl), (k3, forward_kl)], ids=name)
def test_expected_gradients_of_the_estimators(estimator, target):
    """The draw is from q, but no gradient goes through the drawing: E_q[grad k1] = 0, of k2 grad KL(q || p), of k3 grad KL(p || q)."""
    student, teacher = draw(5, 9)
    student.requires_grad_()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    (found,) = torch.autograd.grad((log_q.exp().detach() * estimator(log_q, log_p)).sum(), student, retain_graph=True)
    expected = torch.zeros_like(found) if target is None else torch.autograd.grad(target(student, teacher).sum(), student)[0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_k_estimators_by_hand():
    """log q = -1, log p = -3: the gap is 2, the ratio p/q e^-2."""
    log_q, log_p = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    assert float(k1(log_q, log_p)) == 2
    assert float(k2(log_q, log_p)) == 2
    assert float(k3(log_q, log_p)) == pytest.approx(math.exp(-2) - 1 + 2, abs=1e-15)
    close = torch.tensor(-1.0 - 1e-5)  # float32: the difference of a gap this small must not round to 0 or below
    assert float(k3(torch.tensor(-1.0), close)) == pytest.approx(5e-11, rel=0.5)


def test_returns_by_hand():
    rewards = torch.tensor([[9.0, 1.0, -2.0, 0.5, 3.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, True, False]])
    assert torch.allclose(returns(rewards, mask, length_normalisation="none"), torch.tensor([[0, 1.5, 3.5, 3.0, 0, 0]]))
    # divisors T - t - 1 = 2, 1, (0 -> 1)
    assert torch.allclose(returns(rewards, mask), torch.tensor([[0, 0.75, 3.5, 3.0, 0, 0]]))


@pytest.mark.parametrize(
    ("length_normalisation", "expected"),
    [
        ("none", [2.123375, 1.1825, 3.35, 3]),
        ("remaining", [0.530844, 0.394167, 1.675, 3]),
        ("discounts", [0.572358, 0.414549, 1.717949, 3]),
    ],
)
def test_golden_returns_of_the_released_code(length_normalisation, expected):
    rewards = torch.tensor([[1, -2, 0.5, 3]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = returns(rewards, mask, discount=0.95, include_current=True, length_normalisation=length_normalisation)
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("include_current", [False, True])
@pytest.mark.parametrize("length_normalisation", ["after", "remaining", "discounts", "none"])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_returns_are_their_sums(discount, length_normalisation, include_current):
    rewards = torch.randn(1, 6, dtype=torch.float64)[0]
    settings = {"discount": discount, "include_current": include_current, "length_normalisation": length_normalisation}
    found = returns(rewards.unsqueeze(0), torch.ones(1, 6, dtype=torch.bool), **settings)[0]
    for t in range(6):
        first = t if include_current else t + 1
        weights = [discount**k for k in range(6 - first)]
        total = sum(w * float(r) for w, r in zip(weights, rewards[first:], strict=True))
        divisor = {"after": 6 - t - 2, "remaining": 6 - t, "discounts": sum(weights), "none": 1}[length_normalisation]
        assert float(found[t]) == pytest.approx(total / max(divisor, 1), abs=1e-12)


@pytest.mark.parametrize("length_normalisation", ["after", "remaining", "discounts", "none"])
def test_returns_ignore_padding(length_normalisation):
    settings = {"discount": 0.9, "include_current": True, "length_normalisation": length_normalisation}
    rewards, mask = torch.randn(2, 5), torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3])
    wide = torch.nn.functional.pad(rewards, (2, 3), value=7.0)
    wide_mask = torch.nn.functional.pad(mask, (2, 3), value=False)
    assert torch.allclose(returns(wide, wide_mask, **settings)[:, 2:7], returns(rewards, mask, **settings))
    assert returns(wide, wide_mask, **settings)[~wide_mask].abs().max() == 0


def test_whitening_over_tokens_and_over_padded_places():
    values = torch.tensor([[1.0, 2.0, 6.0, 7.0], [3.0, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    counted = values[mask].double()
    sums = moments(values, mask)
    found = whiten(values, sums, 4)[mask].double()
    torch.testing.assert_close(found, (counted - 3) / counted.var(correction=0).sqrt(), atol=1e-6, rtol=0)
    padded = torch.where(mask, values, 0.0).flatten()  # 8 places, zeros included
    expected = (padded - padded.mean()) / padded.var(correction=0).sqrt()
    torch.testing.assert_close(whiten(values, sums, 8)[mask], expected[mask.flatten()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5])
def test_ppo_clips_where_the_ratio_has_gone_too_far_in_the_advantages_direction(ratio, advantage):
    log_q = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    loss = policy_gradient(log_q, torch.zeros_like(log_q), torch.tensor(advantage).double(), clip=0.2, clipping="ppo")
    clipped = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(max(-advantage * ratio, -advantage * clipped))
    idle = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    (slope,) = torch.autograd.grad(loss, log_q)
    assert float(slope) == pytest.approx(0 if idle else -advantage * ratio)


@pytest.mark.parametrize(("log_ratio", "expected"), [(0.0, 1.0), (math.log(1.5), 1.2), (math.log(0.5), 0.5), (math.log(1.1), 1.1)])
def test_ratio_is_the_minimum_of_itself_and_its_clip(log_ratio, expected):
    assert float(clipped_ratio(torch.tensor(log_ratio), torch.tensor(0.0), clip=0.2)) == pytest.approx(expected, rel=1e-6)


def sequences() -> list[tuple[int, ...]]:
    """All responses over V words that end at EOS or at LENGTH."""
    found = [(*head, EOS) for n in range(LENGTH) for head in itertools.product(range(1, V), repeat=n)]
    return found + list(itertools.product(range(1, V), repeat=LENGTH))


class Toy:
    """Logits of a toy language model: one row of parameters per prefix."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(1, V), repeat=n)]
        self.index = {p: i for i, p in enumerate(prefixes)}
        self.table = torch.randn(len(prefixes), V, generator=generator, dtype=torch.float64, requires_grad=True)

    def logits(self, sequence: tuple[int, ...]) -> torch.Tensor:
        return torch.stack([self.table[self.index[sequence[:t]]] for t in range(len(sequence))])


def test_gradient_equals_that_of_the_exact_kl():
    """E[policy gradient] + single-step gradient = grad KL(q || p) over sequences (no mixing, clip or normalisation)."""
    student, teacher = Toy(0), Toy(1)
    exact = torch.zeros((), dtype=torch.float64)
    surrogate = torch.zeros((), dtype=torch.float64)
    for sequence in sequences():
        tokens = torch.tensor(sequence)
        logits, target = student.logits(sequence), teacher.logits(sequence).detach()
        log_q, log_p = token_log_probs(logits, tokens), token_log_probs(target, tokens)
        exact = exact + log_q.sum().exp() * (log_q.sum() - log_p.sum())
        mask = torch.ones(1, len(sequence), dtype=torch.bool)
        advantage = returns((log_p - log_q).detach().unsqueeze(0), mask, length_normalisation="none")[0]
        weight = log_q.sum().exp().detach()  # the probability of drawing this sequence
        policy = policy_gradient(log_q, log_q.detach(), advantage, clip=math.inf)
        surrogate = surrogate + weight * (policy + reverse_kl(logits, target)).sum()
    (expected,) = torch.autograd.grad(exact, student.table, retain_graph=True)
    (found,) = torch.autograd.grad(surrogate, student.table)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_importance_weights_make_mixed_sampling_unbiased_for_one_token():
    """With one-token responses the weighted single-step term over p~ has the exact gradient."""
    logits = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    q, p = logits.softmax(-1).detach(), target.softmax(-1)
    mixed = 0.8 * q + 0.2 * p
    total = torch.zeros((), dtype=torch.float64)
    for y in range(3):
        ratio = clipped_ratio(logits.log_softmax(-1)[y], mixed[y].log(), clip=math.inf).detach()
        total = total + mixed[y] * ratio * reverse_kl(logits, target)
    (found,) = torch.autograd.grad(total, logits)
    (expected,) = torch.autograd.grad(reverse_kl(logits, target), logits)
    torch.testing.assert_close(found, expected)


def test_no_teacher_is_the_policy_gradient_of_a_constant_negative_advantage():
    """Over all tokens: E_q[grad] = -E_q[A grad log q] with A = -1 where q < below, by finite differences in float64."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    q = logits.softmax(-1).detach()
    loss = (q * no_teacher(logits.log_softmax(-1), below=0.15)).sum()
    (found,) = torch.autograd.grad(loss, logits)
    unlikely = q < 0.15
    assert 0 < int(unlikely.sum()) < 7
    step, expected = 1e-6, torch.zeros(7, dtype=torch.float64)
    for i in range(7):
        moved = [(logits.detach() + sign * step * torch.eye(7, dtype=torch.float64)[i]).log_softmax(-1) for sign in (1, -1)]
        expected[i] = (q * unlikely * (moved[0] - moved[1])).sum() / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found, q * (unlikely.double() - q[unlikely].sum()))  # by hand


def test_no_teacher_counts_only_unlikely_tokens():
    log_q = torch.log(torch.tensor([0.09, 0.1, 0.5, 1.0]))
    torch.testing.assert_close(no_teacher(log_q, below=0.1), torch.tensor([math.log(0.09), 0.0, 0.0, 0.0]))
    assert no_teacher(log_q, below=1e-9).tolist() == [0, 0, 0, 0]
