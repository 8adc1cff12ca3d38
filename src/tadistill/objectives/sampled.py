"""Losses of the text's tokens: cross-entropy, and estimators of the KL from sampled tokens.

All functions take at least float32 and return one value per token, without mask or reduction. MiniLLM's loss is in `minillm`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tadistill.objectives.divergence import LOG_ZERO, log_probs


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log q(token) in nats, (...), for logits (..., V) and token ids (...)."""
    return log_probs(logits).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return -log q(token) in nats, (...), for logits (..., V) and token ids (...)."""
    return -token_log_probs(logits, tokens)


def k1(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return log q - log p at a token drawn from q: unbiased for KL(q || p), of high variance; its own gradient has mean zero.

    Args:
        student_log_probs, teacher_log_probs: log-probabilities of the same tokens, any shape.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return student_log_probs - teacher_log_probs


def k2(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return (log p - log q)^2 / 2 at a token drawn from q: biased, of low variance; its gradient is unbiased for that of KL(q || p).

    Args and source as in `k1`.
    """
    return (teacher_log_probs - student_log_probs).square() / 2


def k3(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return p/q - 1 - log(p/q) at a token drawn from q: unbiased for KL(q || p), never negative, of low variance.

    Its gradient is unbiased for that of KL(p || q). Args and source as in `k1`.
    """
    gap = teacher_log_probs - student_log_probs
    return torch.expm1(gap) - gap


def token_loss_with_slope(student_logits: Tensor, tokens: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return a loss of the tokens' log-probabilities, (...), and its slope (..., V), the gradient in the logits, both without a graph.

    Autograd finds the derivative by the log-probability. The slope is that times (1 at the token - q).
    """
    log_q, at = log_probs(student_logits), tokens.unsqueeze(-1)
    leaf = log_q.gather(-1, at).requires_grad_()
    with torch.enable_grad():
        value = loss(leaf.squeeze(-1))
    (outer,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    moves = student_logits.gather(-1, at) >= LOG_ZERO
    return value.detach(), log_q.exp_().mul_(-outer).scatter_add_(-1, at, outer * moves)


@dataclass(frozen=True)
class TokenTerm:
    """An addend of a batch's loss that is a function of the log-probabilities of its tokens, for `fused_terms`."""

    name: str
    loss: Callable[..., Tensor]
    """(log q (n,), **per_token, **settings) to values (n,)."""
    tokens: Tensor
    """(N,) ids."""
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """Arguments with one number per token, (N,)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    def values(self, logits: Tensor, teachers: Sequence[Any], rows: slice) -> Tensor:
        """Return the values (n,) of the tokens in `rows`, whose logits are (n, V)."""
        return self._loss(token_log_probs(logits, self.tokens[rows]), rows)

    def has_slope(self, teachers: Sequence[Any]) -> bool:
        """Return whether `with_slope` can be called, which is always so."""
        return True

    def with_slope(self, logits: Tensor, teachers: Sequence[Any], rows: slice) -> tuple[Tensor, Tensor]:
        """Return the values (n,) and their slope (n, V)."""
        return token_loss_with_slope(logits, self.tokens[rows], lambda log_q: self._loss(log_q, rows))

    def _loss(self, log_q: Tensor, rows: slice) -> Tensor:
        return self.loss(log_q, **{name: values[rows] for name, values in self.per_token.items()}, **self.settings)
