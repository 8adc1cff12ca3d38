"""Divergences between a teacher p and a student q over the vocabulary, one value per token, in nats.

Convention: logits (..., V) in, (...) out, float32 inside (float64 stays float64), no mask, no reduction. A temperature divides
both logits, and the value is not rescaled by its square. The gradient reaches the student only if the caller detaches the
teacher. A logit of -inf is a probability of 0; inside a logarithm it counts as -1e15, so that values and gradients stay finite.
"""

import math

import torch
from torch import Tensor

from tadistill.objectives import checks

LOG_ZERO = -1e15
"""Stands for log 0: beyond every real logit, and its square still fits into float32."""


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) in at least float32, the same shape; -inf logits become `LOG_ZERO`."""
    finite = at_least_float32(logits).clamp(min=LOG_ZERO)
    return torch.log_softmax(finite / temperature if temperature != 1.0 else finite, dim=-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q): mass-covering, zero iff p = q.

    Args:
        student_logits, teacher_logits: (..., V).
        temperature: divides both logits.

    Returns:
        (...) nats. Gradient in the student's logits: (q - p) / temperature.

    Raises:
        ConfigError: the shapes differ, a logit is NaN or +inf, or temperature is not above 0.

    Source: Hinton et al. 2015; the token-level KD of Kim & Rush 2016.
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    return checks.result(kl(log_p, log_q), student_logits=student_logits, teacher_logits=teacher_logits)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p): mode-seeking, zero iff p = q.

    Args, returns and errors as in `forward_kl`. Gradient in the student's logits: q (log q - log p - KL) / temperature.

    Source: Gu et al. 2024 (MiniLLM), section 2.2.
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    return checks.result(kl(log_q, log_p), student_logits=student_logits, teacher_logits=teacher_logits)


def jeffreys(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) + KL(q || p) = sum_v (p - q)(log p - log q): symmetric, unbounded. Args as in `forward_kl`.

    Source: Jeffreys 1946 (the sum; some call half of it the symmetric KL).
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    value = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return checks.result(value, student_logits=student_logits, teacher_logits=teacher_logits)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: the generalised JSD, beta on the TEACHER.

    Bounded by the entropy of (beta, 1 - beta). Scale at the ends: the value vanishes like beta KL(p || q) for beta -> 0 and
    like (1 - beta) KL(q || p) for beta -> 1. At exactly 0 and 1 the limits of the value divided by that factor are returned, KL(p || q)
    and KL(q || p), as GKD and TRL do; so beta = 0 is about 1/beta times larger than a tiny beta.

    Args:
        beta: weight of the teacher, in [0, 1]. DistiLLM's `lam` and KDFlow's `jsd_beta` are 1 - beta.

    Other args, returns and errors as in `forward_kl`. Source: Agarwal et al. 2024 (GKD), Eq. 1.
    """
    checks.within("beta", beta, 0, 1)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    if beta == 0:
        value = kl(log_p, log_q)
    elif beta == 1:
        value = kl(log_q, log_p)
    else:
        log_m = mixture(log_p, log_q, beta)
        value = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return checks.result(value, student_logits=student_logits, teacher_logits=teacher_logits)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q): forward KL with a bounded gradient. alpha = 0 is `forward_kl`, alpha = 1 is zero.

    Args:
        alpha: the teacher's share of the mixture, in [0, 1]; the value is at most -log alpha.

    Other args, returns and errors as in `forward_kl`. Source: Ko et al. 2024 (DistiLLM), Eq. 4.
    """
    checks.within("alpha", alpha, 0, 1)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    return checks.result(kl(log_p, mixture(log_p, log_q, alpha)), student_logits=student_logits, teacher_logits=teacher_logits)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, detach_mixture: bool = False, temperature: float = 1.0
) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q): reverse KL with a bounded gradient. alpha = 0 is `reverse_kl`, alpha = 1 is zero.

    Args:
        alpha: the student's share of the mixture, in [0, 1]; the value is at most -log alpha.
        detach_mixture: no gradient through the student's part of the mixture (DistiLLM-2); DistiLLM lets it flow.

    Other args, returns and errors as in `forward_kl`. Source: Ko et al. 2024 (DistiLLM), Eq. 6; Ko et al. 2025 (DistiLLM-2).
    """
    checks.within("alpha", alpha, 0, 1)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    log_m = mixture(log_q.detach() if detach_mixture else log_q, log_p, alpha)
    return checks.result(kl(log_q, log_m), student_logits=student_logits, teacher_logits=teacher_logits)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """1/2 sum_v |p - q|: symmetric, in [0, 1], with a bounded gradient. Args as in `forward_kl`.

    Source: Wen et al. 2023 (f-distill), whose symmetric TVD is the mean of this on teacher-sampled and student-sampled text.
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    value = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    return checks.result(value, student_logits=student_logits, teacher_logits=teacher_logits)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision that objectives work in: float64 for float64, float32 for everything else."""
    return dtype if dtype == torch.float64 else torch.float32


def at_least_float32(values: Tensor) -> Tensor:
    """The same values in that precision."""
    return values.to(wide(values.dtype))


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum_v a (log a - log b) of log-probabilities (..., V). `log_probs` are finite, so 0 log 0 is 0 without a mask."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def both_log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log q, log p) after the checks that every divergence makes."""
    checks.pair(student_logits, teacher_logits)
    checks.positive("temperature", temperature)
    return log_probs(student_logits, temperature), log_probs(teacher_logits, temperature)


def mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    if weight in (0, 1):
        return log_a if weight == 1 else log_b
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))
