"""Divergences between a teacher p and a student q over the vocabulary, one value per token, in nats.

Convention: logits (..., V) in, (...) out, float32 inside (float64 stays float64), no mask, no reduction. The gradient
flows to the student only if the caller detaches the teacher.
"""

import torch
from torch import Tensor


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) in at least float32, the same shape."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim=-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q): mass-covering, zero iff p = q.

    Args:
        student_logits, teacher_logits: (..., V).
        temperature: divides both logits; the value is not rescaled by its square.

    Returns:
        (...) nats. Gradient in the student's logits: (q - p) / temperature.

    Source: Hinton et al. 2015; the token-level KD of Kim & Rush 2016.
    """
    return _kl(log_probs(teacher_logits, temperature), log_probs(student_logits, temperature))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(q || p) = sum_v q (log q - log p): mode-seeking, zero iff p = q.

    Args and returns as in `forward_kl`. Gradient in the student's logits: q (log q - log p - KL) / temperature.

    Source: Gu et al. 2024 (MiniLLM), section 2.2.
    """
    return _kl(log_probs(student_logits, temperature), log_probs(teacher_logits, temperature))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p (log p - log q), with 0 log 0 = 0 where a logit is -inf on the first side."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)
