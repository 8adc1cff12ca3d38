"""Losses on sampled tokens: cross-entropy, estimators of the KL from the tokens' log-probabilities, and MiniLLM's loss.

All functions compute in at least float32 and return one value per token, without mask or reduction.

MiniLLM's loss (Gu et al. 2024, arXiv 2306.08543) is a policy gradient on returns, and an exact single-step term. The text y is sampled
from p~. This policy is either q_old (the student at the time of sampling), or a mixture of q_old and the teacher p. With
ratio = q(y_t) / p~(y_t), the paper's loss at token t (Eq. 7, Algorithm 1) is

    -A_t min(ratio, clip(ratio))  +  min(ratio, clip(ratio)) KL(q || p)         `policy_gradient` + `single_step`

The advantage A_t is the length-normalised sum of the later rewards log p(y_s) - log q_old(y_s) (`returns`, Eq. 3 and 6). No gradient
goes through A_t, nor through the ratio in front of the KL. docs/concepts/minillm.md lists where the released code differs from the paper.
Parameters of the functions select the paper's form or the code's form. `tadistill.train.step` builds the loss of a batch from them.

Axes: N tokens of a batch, n tokens of a tile, V vocabulary size, B sequences, T positions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tadistill.objectives.divergence import both_log_probs, log_probs, reverse_kl, reverse_kl_in_place
from tadistill.tuning import LOG_ZERO


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log q(token) in nats, of shape (...), for logits (..., V) and token ids (...). q is the model's softmax."""
    return log_probs(logits).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


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
    return student_log_probs - teacher_log_probs


def k2(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return (log p - log q)^2 / 2, a biased estimate of KL(q || p) with low variance.

    Its gradient is an unbiased estimate of the gradient of KL(q || p). Args and source are as in `k1`.
    """
    return (teacher_log_probs - student_log_probs).square() / 2


def k3(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Return p/q - 1 - log(p/q), an unbiased estimate of KL(q || p) with low variance. It is never negative.

    Its gradient is an unbiased estimate of the gradient of KL(p || q). Args and source are as in `k1`.
    """
    gap = teacher_log_probs - student_log_probs
    return torch.expm1(gap) - gap


def no_teacher(student_log_probs: Tensor, *, below: float) -> Tensor:
    """Return log q for tokens with a probability q below `below`, and 0 for all other tokens.

    This loss is a control for on-policy distillation. It needs no teacher, and makes unlikely tokens even less likely. On tokens drawn
    from q, its gradient is a policy gradient: the advantage is -1 for unlikely tokens, and 0 for all others.

    Args:
        student_log_probs: log-probabilities of the tokens, of any shape.
        below: a probability from 0 to 1.

    Source: arXiv 2608.31046. There, a fixed negative advantage replaces the teacher, for comparison.
    """
    return torch.where(student_log_probs.detach() < math.log(below), student_log_probs, torch.zeros_like(student_log_probs))


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
        """Return the values (n,) and their gradients with respect to the logits (n, V)."""
        value, slope = token_loss_with_slope(self._cooled(logits), self.tokens[rows], lambda log_q: self._loss(log_q, rows))
        return value, slope if self.temperature == 1.0 else slope.div_(self.temperature)

    def _cooled(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1.0 else logits / self.temperature

    def _loss(self, log_q: Tensor, rows: slice) -> Tensor:
        return self.loss(log_q, **{name: values[rows] for name, values in self.per_token.items()}, **self.settings)


# --- MiniLLM ------------------------------------------------------------------------------------------------------------


def returns(
    rewards_BT: Tensor,
    mask_BT: Tensor,
    *,
    discount: float = 1.0,
    include_current: bool = False,
    length_normalisation: Literal["after", "remaining", "discounts", "none"] = "after",
) -> Tensor:
    """Return the discounted sum of later rewards for each token (MiniLLM, Eq. 6).

    `length_normalisation` selects the divisor of the sum. Let n be the number of tokens from this token to the end of the response. A
    divisor below 1 is replaced by 1.

        after        n - 2 (Eq. 6)
        remaining    n (the released code)
        discounts    the same discounted sum with every reward set to 1. The return is then a weighted mean of the rewards
        none         1

    Args:
        rewards_BT: log p(y_t) - log q(y_t) at the positions that predict y_t.
        mask_BT: True at response positions. Each row has one contiguous run of them.
        include_current: add the token's own reward to the sum, as in Eq. 3 and in the released code. The paper's single-step term already
            contains this reward.

    Returns:
        One return per position, in the shape of `rewards_BT`; zero outside the mask.
    """
    rewards = torch.where(mask_BT, rewards_BT, torch.zeros_like(rewards_BT))
    places = torch.arange(rewards.shape[1], device=rewards.device)
    ahead = places.unsqueeze(0) - places.unsqueeze(1) - (0 if include_current else 1)
    weights = torch.where(ahead >= 0, discount ** ahead.clamp(min=0).to(rewards.dtype), 0)  # (t, t')
    total = rewards @ weights.t()
    left = mask_BT.flip(1).cumsum(1).flip(1).to(rewards.dtype)
    discounts, ones = mask_BT.to(rewards.dtype) @ weights.t(), torch.ones_like(left)
    divisor = {"after": left - 2, "remaining": left, "discounts": discounts, "none": ones}[length_normalisation]
    return torch.where(mask_BT, total / divisor.clamp(min=1), torch.zeros_like(total))


def moments(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the sum and the sum of squares of the values where the mask is True, as a float64 tensor (2,). `whiten` needs them."""
    values = torch.where(mask_BT, values_BT, torch.zeros_like(values_BT)).double()
    return torch.stack([values.sum(), values.square().sum()])


def whiten(values: Tensor, sums: Tensor, places: float) -> Tensor:
    """Normalise values: return (values - mean) / sqrt(variance + 1e-8).

    Args:
        sums: the sum and the sum of squares of all values, from `moments`. Mean and variance are computed from them.
        places: the number of values. In MiniLLM's released code, this number includes padding positions.
    """
    mean, square = (sums / places).unbind()
    variance = (square - mean.square()).clamp(min=0)
    return ((values.double() - mean) * (variance + 1e-8).rsqrt()).to(values.dtype)


def clipped_ratio(log_q: Tensor, log_behaviour: Tensor, *, clip: float) -> Tensor:
    """Return min(ratio, clip(ratio, 1 - clip, 1 + clip)) for each token (MiniLLM, Algorithm 1).

    The ratio is the token's probability under the student, divided by its probability under the policy that sampled it. With `clip=inf`,
    the ratio is not clipped. Inputs and result have the same shape.
    """
    ratio = (log_q - log_behaviour).exp()
    return torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))


def policy_gradient(
    log_q: Tensor,
    log_behaviour: Tensor,
    advantage: Tensor,
    *,
    clip: float,
    clipping: Literal["ratio", "ppo"] = "ratio",
    weight: Tensor | None = None,
) -> Tensor:
    """Return the policy-gradient loss, with ratio = q / p~. q is the student, and p~ is the policy that sampled the tokens.

    Let A be the advantage. `clipping="ratio"` gives -A min(ratio, clip(ratio)), as in MiniLLM, Eq. 7 and Algorithm 1. `clipping="ppo"`
    gives max(-A ratio, -A clip(ratio)), as in the released code and in Schulman et al. 2017.

    Args:
        log_q: log-probabilities of the sampled tokens under the student, with a graph.
        log_behaviour: log-probabilities of the same tokens under the policy that sampled them.
        advantage: `returns(...)`. No gradient flows through it.
        weight: one more factor of the loss, which is not clipped. With it, only one of two factors of the ratio is clipped. For example,
            q / p~ = (q / q_old) (q_old / p~), where q_old is the student at the time of sampling. To clip only q / q_old, give log q_old
            as `log_behaviour` and q_old / p~ as `weight`.

    Returns:
        One value per token, of the shape of the inputs.
    """
    advantage = advantage.detach()
    if clipping == "ratio":
        value = -advantage * clipped_ratio(log_q, log_behaviour, clip=clip)
    else:
        ratio = (log_q - log_behaviour).exp()
        value = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    return value if weight is None else weight * value


def single_step(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    tokens: Tensor,
    log_behaviour: Tensor,
    clip: float,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the single-step term: `reverse_kl`, multiplied by the `clipped_ratio` of the sampled token (MiniLLM, Eq. 3 and 7).

    The gradient flows through the KL only. The released code leaves the ratio out.

    Args:
        student_logits, teacher_logits: (..., V).
        tokens: (...) ids of the sampled tokens.
        log_behaviour, clip, weight: as in `policy_gradient`.

    Returns:
        (...) nats.
    """
    by = _importance(log_probs(student_logits.detach()), tokens, log_behaviour, clip, weight)
    return reverse_kl(student_logits, teacher_logits, temperature=temperature) * by


def single_step_with_slope(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    tokens: Tensor,
    log_behaviour: Tensor,
    clip: float,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return `single_step` and its slope: the gradient with respect to the student's logits."""
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    by = _importance(log_q if temperature == 1 else log_probs(student_logits), tokens, log_behaviour, clip, weight)
    value, slope = reverse_kl_in_place(log_q, log_p, temperature)
    return value * by, slope.mul_(by.unsqueeze(-1))


def _importance(log_q: Tensor, tokens: Tensor, log_behaviour: Tensor, clip: float, weight: Tensor | None) -> Tensor:
    ratio = clipped_ratio(log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), log_behaviour, clip=clip)
    return ratio if weight is None else weight * ratio
