"""Losses that see the sampled tokens: cross-entropy, estimators of the reverse KL, MiniLLM's policy gradient and returns.

All functions take at least float32 and return one value per token without mask or reduction, except `returns` and `moments`, which
need the mask because they sum along the sequence. Axes: B sequences, T positions.
"""

from typing import Literal

import torch
from torch import Tensor

from tadistill.objectives.divergence import log_probs


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log q(token): logits (..., V) and token ids (...) to (...), in nats."""
    return log_probs(logits).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log q(token): logits (..., V) and token ids (...) to (...), in nats."""
    return -token_log_probs(logits, tokens)


def k1(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """log q - log p at a token drawn from q: unbiased for KL(q || p), of high variance, and its own gradient has mean zero.

    Args:
        student_log_probs, teacher_log_probs: log-probabilities of the same tokens, any shape.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return student_log_probs - teacher_log_probs


def k2(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2 at a token drawn from q: biased, of low variance; its gradient is unbiased for that of KL(q || p).

    Args and source as in `k1`.
    """
    return (teacher_log_probs - student_log_probs).square() / 2


def k3(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """p/q - 1 - log(p/q) at a token drawn from q: unbiased for KL(q || p), never negative, of low variance.

    Its gradient is unbiased for that of KL(p || q). Args and source as in `k1`.
    """
    gap = teacher_log_probs - student_log_probs
    return torch.expm1(gap) - gap


def returns(
    rewards_BT: Tensor,
    mask_BT: Tensor,
    *,
    discount: float = 1.0,
    include_current: bool = False,
    length_normalisation: Literal["after", "remaining", "discounts", "none"] = "after",
) -> Tensor:
    """The return of each token: the discounted sum of the rewards after it, or from it on (MiniLLM, Eq. 3 and 6).

    With d rewards left to sum and n tokens from the current one to the end, itself included, the sum is divided by

        after        T - t - 1 = n - 2 (Eq. 6), which vanishes at the last token but one, so at least by 1
        remaining    n (the released code)
        discounts    sum_{k < d} discount^k, so that equal rewards r have the return r
        none         1

    Args:
        rewards_BT: log p(y_t) - log q(y_t) at the positions that predict y_t.
        mask_BT: True at response positions, one contiguous run per row.
        include_current: sum from the token's own reward on (the released code). The paper leaves it to the single-step term.

    Returns:
        (B, T), zero outside the mask.
    """
    rewards = torch.where(mask_BT, rewards_BT, torch.zeros_like(rewards_BT))
    places = torch.arange(rewards.shape[1], device=rewards.device)
    ahead = places.unsqueeze(0) - places.unsqueeze(1) - (0 if include_current else 1)
    weights = torch.where(ahead >= 0, discount ** ahead.clamp(min=0).to(rewards.dtype), 0)  # (t, t')
    total = rewards @ weights.t()
    left = mask_BT.flip(1).cumsum(1).flip(1).to(rewards.dtype)
    divisor = {
        "after": left - 2,
        "remaining": left,
        "discounts": mask_BT.to(rewards.dtype) @ weights.t(),
        "none": torch.ones_like(left),
    }[length_normalisation]
    return torch.where(mask_BT, total / divisor.clamp(min=1), torch.zeros_like(total))


def moments(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(sum, sum of squares) of the values where the mask is True, in float64: what `whiten` needs, to be added up over batches."""
    values = torch.where(mask_BT, values_BT, torch.zeros_like(values_BT)).double()
    return torch.stack([values.sum(), values.square().sum()])


def whiten(values: Tensor, sums: Tensor, places: float) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8), mean and (biased) variance being those of `places` numbers with these `moments`.

    `places` is the number of tokens, or a larger one where padding is to count as zeros, as in MiniLLM's released code.
    """
    mean, square = (sums / places).unbind()
    variance = (square - mean.square()).clamp(min=0)
    return ((values.double() - mean) * (variance + 1e-8).rsqrt()).to(values.dtype)


def clipped_ratio(log_q: Tensor, log_behaviour: Tensor, *, clip: float) -> Tensor:
    """min(ratio, clip(ratio, 1 - clip, 1 + clip)) with ratio = q / p~ (MiniLLM, Algorithm 1); same shape as its inputs.

    The ratio is both the importance weight of sampling from p~ (the teacher-mixed policy) and the policy's drift over
    inner epochs. `clip=inf` leaves it whole.
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
) -> Tensor:
    """Minus the surrogate whose gradient is A ratio grad log q where the clip is idle, ratio = q / p~.

    `ratio` is -A min(ratio, clip(ratio)) (MiniLLM, Eq. 7 and Algorithm 1), `ppo` is max(-A ratio, -A clip(ratio)) (the released code;
    Schulman et al. 2017).

    Args:
        log_q: log-probabilities of the sampled tokens under the student, with a graph.
        log_behaviour: the same under the policy that sampled them.
        advantage: `returns(...)`; no gradient flows through it.
    """
    advantage = advantage.detach()
    if clipping == "ratio":
        return -advantage * clipped_ratio(log_q, log_behaviour, clip=clip)
    ratio = (log_q - log_behaviour).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
