"""Drawn tokens: the estimate of the forward KL and its gradient are unbiased, which those of the top k tokens are not."""

import pytest
import torch

from tadistill import rng
from tadistill.errors import ConfigError
from tadistill.objectives import Head, Sampled, forward_kl, fused_divergence, reverse_kl, sampled_target, top_k_forward_kl

ROWS, DRAWS = 20_000, 5


@pytest.fixture(scope="module")
def sides() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.expand(ROWS, -1), teacher.expand(ROWS, -1)


def value_and_slope(loss, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.clone().requires_grad_()
    values = loss(leaf)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def draws(teacher: torch.Tensor) -> Sampled:
    return sampled_target(teacher, torch.from_numpy(rng.generator(1, "test").random((len(teacher), DRAWS))))


def test_the_mean_over_many_draws_is_the_exact_loss_and_gradient(sides):
    """Each mean is within five standard errors; the bias of the top 3 tokens, with or without tail, is far outside."""
    student, teacher = sides
    exact, exact_slope = value_and_slope(lambda z: forward_kl(z, teacher[:1]), student[:1])
    values, slopes = value_and_slope(draws(teacher).forward_kl, student)
    for found, expected in ((values[:, None], exact[:, None]), (slopes, exact_slope)):
        error = found.std(0) / ROWS**0.5
        assert ((found.mean(0) - expected[0]).abs() < 5 * error + 1e-12).all()
    for tail in ("lump", "drop"):
        _, biased = value_and_slope(lambda z, tail=tail: top_k_forward_kl(z, teacher[:1], k=3, tail=tail), student[:1])
        assert (biased - exact_slope).abs().max() > 20 * (slopes.std(0) / ROWS**0.5).max()


def test_shares_are_counts_and_rows_are_filled_up():
    found = sampled_target(torch.tensor([[0.0, 50.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.5, 0.9], [0.1, 0.5, 0.9]]).double())
    assert found.ids.tolist() == [[1, 0, 0], [0, 1, 2]]
    torch.testing.assert_close(found.shares, torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))
    torch.testing.assert_close(found.entropy, torch.tensor([0.0, 1.0986123]))


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    uniforms = torch.tensor([[0.0, 1e-300, 0.5 - 2**-54, 0.5, 1 - 2**-53]], dtype=torch.float64)
    assert set(sampled_target(logits, uniforms).ids[0].tolist()) == {1, 3}


def test_the_fused_head_takes_drawn_tokens(sides):
    student, teacher = (side[:30].float() for side in sides)
    target = draws(teacher)
    hidden = student.clone().requires_grad_()
    total, values = fused_divergence(forward_kl, hidden, Head(torch.eye(9)), target)
    expected, slope = value_and_slope(target.forward_kl, student)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], slope)


def test_what_drawn_tokens_cannot_give_is_refused(sides):
    student, teacher = (side[:4].float() for side in sides)
    target, head = draws(teacher), Head(torch.eye(9))
    with pytest.raises(ConfigError, match="only for `forward_kl` with one teacher, not for reverse_kl"):
        fused_divergence(reverse_kl, student, head, target)
    with pytest.raises(ConfigError, match="drawn at temperature 1"):
        fused_divergence(forward_kl, student, head, target, temperature=2.0)
    with pytest.raises(ConfigError, match=r"token ids of a sampled target are from . to 8; they must be in \[0, 4\]"):
        target.forward_kl(student[:, :5])
