"""MiniLLM's pieces: returns against hand-computed values, and its gradient against autograd of the exact sequence KL."""

import itertools
import math

import pytest
import torch

from tadistill.objectives import clipped_ratio, policy_gradient, returns, reverse_kl, token_log_probs

V, EOS, LENGTH = 3, 0, 3


def test_returns_by_hand():
    rewards = torch.tensor([[9.0, 1.0, -2.0, 0.5, 3.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, True, False]])
    assert torch.allclose(returns(rewards, mask, length_normalisation=False), torch.tensor([[0, 1.5, 3.5, 3.0, 0, 0]]))
    # divisors T - t - 1 = 2, 1, (0 -> 1)
    assert torch.allclose(returns(rewards, mask), torch.tensor([[0, 0.75, 3.5, 3.0, 0, 0]]))


def test_returns_ignore_padding():
    rewards, mask = torch.randn(2, 5), torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3])
    wide = torch.nn.functional.pad(rewards, (2, 3), value=7.0)
    wide_mask = torch.nn.functional.pad(mask, (2, 3), value=False)
    assert torch.allclose(returns(wide, wide_mask)[:, 2:7], returns(rewards, mask))
    assert returns(wide, wide_mask)[~wide_mask].abs().max() == 0


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
        advantage = returns((log_p - log_q).detach().unsqueeze(0), mask, length_normalisation=False)[0]
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
