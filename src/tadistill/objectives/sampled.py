"""Losses that use only the log-probabilities of the text's tokens: cross-entropy, and KL estimators on sampled tokens.

All functions compute in at least float32 and return one value per token, without mask or reduction. MiniLLM's loss is in `minillm`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tadistill.constants import LOG_ZERO
from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import at_least_float32, log_probs


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log q(token) in nats, of shape (...), for logits (..., V) and token ids (...). q is the model's softmax."""
    return of_tokens(log_probs(logits), tokens)


def of_tokens(log_q: Tensor, tokens: Tensor) -> Tensor:
    """Return the entries (...) of log-probabilities (..., V) at the token ids (...).

    Raises:
        ConfigError: `tokens` are no int64 tensor of this shape, or an id is outside the vocabulary (a GPU reports this later by itself).
    """
    checks.tensor("tokens", tokens)
    if tokens.shape != log_q.shape[:-1] or tokens.dtype != torch.int64:
        raise ConfigError(
            f"`tokens` has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, but the logits have shape {tuple(log_q.shape)}; give one "
            "int64 id per position"
        )
    try:
        return log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    except (IndexError, RuntimeError) as error:  # the ids are read only after the error, because reading them would delay a GPU
        if "out of bounds" not in str(error):
            raise
        raise ConfigError(
            f"the ids of `tokens` are from {int(tokens.min())} to {int(tokens.max())}, but they must be in [0, {log_q.shape[-1] - 1}]; "
            "replace ids such as -100, which mark padding, and give these positions no weight in the loss"
        ) from error


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return -log q(token) in nats, of shape (...), for logits (..., V) and token ids (...). q is the model's softmax."""
    return -token_log_probs(logits, tokens)


def k1(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return log q - log p, an unbiased estimate of KL(q || p) with high variance. Its gradient has mean zero.

    The tokens must be sampled from the student q. The teacher is p.

    Args:
        student_log_probs, teacher_log_probs: log-probabilities of the same tokens, of any shape.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return at_least_float32(student_log_probs) - at_least_float32(teacher_log_probs)


def k2(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return (log p - log q)^2 / 2, a biased estimate of KL(q || p) with low variance.

    Its gradient is an unbiased estimate of the gradient of KL(q || p). Args and source are as in `k1`.
    """
    return k1(student_log_probs, teacher_log_probs).square() / 2


def k3(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return p/q - 1 - log(p/q), an unbiased estimate of KL(q || p) with low variance. It is never negative.

    Its gradient is an unbiased estimate of the gradient of KL(p || q). Args and source are as in `k1`.
    """
    gap = k1(teacher_log_probs, student_log_probs)
    return torch.expm1(gap) - gap


def no_teacher(student_log_probs: Tensor, *, below: float) -> Tensor:
    """Return log q for tokens with a probability q below `below`, and 0 for all other tokens.

    This loss is a control for on-policy distillation. It needs no teacher, and makes unlikely tokens even less likely. On tokens drawn
    from q, its gradient is a policy gradient: the advantage is -1 for unlikely tokens, and 0 for all others.

    Args:
        student_log_probs: log-probabilities of the tokens, of any shape.
        below: a probability above 0, and at most 1.

    Source: arXiv 2608.31046. There, a fixed negative advantage replaces the teacher, for comparison.
    """
    checks.within("below", below, 0, 1)
    checks.positive("below", below)
    log_q = at_least_float32(student_log_probs)
    return torch.where(log_q.detach() < math.log(below), log_q, torch.zeros_like(log_q))


def token_loss_with_slope(student_logits: Tensor, tokens: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return two tensors without a graph: the values of a loss, and their gradient with respect to the logits.

    The values are of shape (...), and the gradient is of shape (..., V).

    Args:
        loss: a function of the tokens' log-probabilities, which are of shape (...).
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
    """One term of a batch's loss, for `fused_terms`. It is a function of the log-probabilities of the batch's tokens."""

    name: str
    loss: Callable[..., Tensor]
    """Function that takes log-probabilities (n,), `per_token` and `settings`, and returns values (n,)."""
    tokens: Tensor
    """Token ids (N,)."""
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """Arguments with one value per token, (N,)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    temperature: float = 1.0
    """Divides the logits."""

    def values(self, logits: Tensor, teachers: Sequence[Any], rows: slice) -> Tensor:
        """Return one value per token in `rows`, of shape (n,). `logits` are the student's at these tokens, of shape (n, V)."""
        return self._loss(token_log_probs(self._cooled(logits), self.tokens[rows]), rows)

    def has_slope(self, teachers: Sequence[Any]) -> bool:
        """Return True: `with_slope` always works, because the loss uses no teacher."""
        return True

    def with_slope(self, logits: Tensor, teachers: Sequence[Any], rows: slice) -> tuple[Tensor, Tensor]:
        """Return the loss of each of the n tokens, of shape (n,), and the gradients of these losses in the logits, of shape (n, V)."""
        value, slope = token_loss_with_slope(self._cooled(logits), self.tokens[rows], lambda log_q: self._loss(log_q, rows))
        return value, slope if self.temperature == 1.0 else slope.div_(self.temperature)

    def _cooled(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1.0 else logits / self.temperature

    def _loss(self, log_q: Tensor, rows: slice) -> Tensor:
        return self.loss(log_q, **{name: values[rows] for name, values in self.per_token.items()}, **self.settings)
