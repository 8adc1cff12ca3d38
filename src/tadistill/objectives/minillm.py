"""MiniLLM's loss (Gu et al. 2024, arXiv 2306.08543): a policy gradient on returns, and an exact single-step term.

The text y is sampled from p~. This policy is either q_old (the student at the time of sampling), or a mixture of q_old and the teacher
p. With ratio = q(y_t) / p~(y_t), the paper's loss at token t (Eq. 7, Algorithm 1) is

    -A_t min(ratio, clip(ratio))  +  min(ratio, clip(ratio)) KL(q || p)         `policy_gradient` + `single_step`

The advantage A_t is the length-normalised sum of the later rewards log p(y_s) - log q_old(y_s) (`returns`, Eq. 3 and 6). No gradient
goes through A_t, nor through the ratio in front of the KL. docs/concepts/minillm.md lists where the released code differs from the paper.
Parameters of the functions select the paper's form or the code's form. `tadistill.train.step` builds the loss of a batch from them.

Axes: B sequences, T positions.
"""

from typing import Literal

import torch
from torch import Tensor

from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import both_log_probs, log_probs, reverse_kl, reverse_kl_in_place
from tadistill.objectives.sampled import of_tokens


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
    checks.booleans("mask_BT", mask_BT)
    checks.choice("length_normalisation", length_normalisation, ("after", "remaining", "discounts", "none"))
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
    checks.booleans("mask_BT", mask_BT)
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
    _check_clip(clip)
    ratio = (log_q - log_behaviour).exp()
    return torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip))


def _check_clip(clip: float) -> None:
    checks.number("clip", clip)
    if not clip >= 0:
        raise ConfigError(f"`clip` is {clip}; it must be at least 0")


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
    checks.choice("clipping", clipping, ("ratio", "ppo"))
    _check_clip(clip)
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
    ratio = clipped_ratio(of_tokens(log_q, tokens), log_behaviour, clip=clip)
    return ratio if weight is None else weight * ratio
