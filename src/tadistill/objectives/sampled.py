"""Losses that see the sampled tokens: cross-entropy, estimators of the reverse KL, MiniLLM's policy gradient and returns.

All functions take at least float32 and return one value per token without mask or reduction, except `returns`, which
needs the mask because it sums along the sequence. Axes: B sequences, T positions.
"""

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


def returns(rewards_BT: Tensor, mask_BT: Tensor, *, length_normalisation: bool = True) -> Tensor:
    """The undiscounted return after each token, R_{t+1} = sum_{t' > t} r_t' (MiniLLM, Eq. 3 and 6).

    The reward of the token itself is left to the single-step term. With `length_normalisation` the sum is divided by
    T - t - 1 (t from 1), at least by 1: the paper's divisor vanishes at the last token but one, whose single remaining
    reward is kept as it is.

    Args:
        rewards_BT: log p(y_t) - log q(y_t) at the positions that predict y_t.
        mask_BT: True at response positions, one contiguous run per row.

    Returns:
        (B, T), zero outside the mask and at the last token.
    """
    rewards = torch.where(mask_BT, rewards_BT, torch.zeros_like(rewards_BT))
    after = rewards.flip(1).cumsum(1).flip(1) - rewards
    if length_normalisation:
        remaining = mask_BT.flip(1).cumsum(1).flip(1) - 1  # T - t
        after = after / (remaining - 1).clamp(min=1)
    return torch.where(mask_BT, after, torch.zeros_like(after))


def clipped_ratio(log_q: Tensor, log_behaviour: Tensor, *, clip: float) -> Tensor:
    """min(ratio, clip(ratio, 1 - clip, 1 + clip)) with ratio = q / p~ (MiniLLM, Algorithm 1); same shape as its inputs.

    The ratio is both the importance weight of sampling from p~ (the teacher-mixed policy) and the policy's drift over
    inner epochs. `clip=inf` leaves it whole.
    """
    ratio = (log_q - log_behaviour).exp()
    return torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))


def policy_gradient(log_q: Tensor, log_behaviour: Tensor, advantage: Tensor, *, clip: float) -> Tensor:
    """-A min(ratio, clip(ratio)): its gradient is -A ratio grad log q where the clip is idle (MiniLLM, Eq. 7).

    Args:
        log_q: log-probabilities of the sampled tokens under the student, with a graph.
        log_behaviour: the same under the policy that sampled them.
        advantage: `returns(...)`; no gradient flows through it.
    """
    return -advantage.detach() * clipped_ratio(log_q, log_behaviour, clip=clip)
