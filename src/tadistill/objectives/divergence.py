"""Divergences between a teacher p and a student q over the vocabulary, one value per token, in nats.

All functions take logits of shape (..., V) and return values of shape (...). They apply no mask and no reduction. They compute in
float32, or in float64 for float64 logits. The temperature divides both logits; the value is not multiplied by the temperature squared.
To stop the gradient to the teacher, the caller detaches the teacher's logits. A logit of -inf means a probability of 0.

The most used divergences have a second function, NAME_with_slope, with the same arguments. It returns the value (...) and the slope
(..., V), which is the gradient of the value in the student's logits. It uses no autograd, and takes half the time of autograd on a CPU.
"""

import math

import torch
from torch import Tensor

from tadistill.constants import LOG_ZERO
from tadistill.objectives import checks

_VECDOT = ("cpu",)  # `vecdot` allocates no tensor for the products. On a GPU it is a matrix product, which may round float32 to TF32.

# Slopes: with g = dD/dq of a divergence D at constant p, the gradient through the softmax is q (g - sum_v q g), where v is a token.
# Terms of g that do not depend on v cancel. The tests compare every slope with autograd through the plain function.


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) in at least float32. Log-probabilities of -inf become the finite value `LOG_ZERO`."""
    checks.tensor("logits", logits)
    checks.number("temperature", temperature)
    finite = at_least_float32(logits) if checks.are_finite() else at_least_float32(logits).clamp(min=LOG_ZERO)
    return torch.log_softmax(finite / temperature if temperature != 1.0 else finite, dim=-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the forward KL of teacher p and student q: sum_v p (log p - log q). It is mass-covering.

    Args:
        student_logits, teacher_logits: (..., V).
        temperature: divides both logits.

    Returns:
        (...) nats. The gradient with respect to the student's logits is (q - p) / temperature.

    Raises:
        ConfigError: the shapes differ, a logit is NaN or +inf, or temperature is not above 0.

    Source: Hinton et al. 2015; the token-level KD of Kim & Rush 2016.
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    return checks.result(kl(log_p, log_q), student_logits=student_logits, teacher_logits=teacher_logits)


def forward_kl_with_slope(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return `forward_kl` and its slope: the gradient with respect to the student's logits. The slope is 0 where a logit is -inf."""
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    p = log_p.exp()
    value = dot(p, log_p.sub_(log_q), keep=False)
    slope = log_q.exp_().sub_(p)  # q - p
    return value, _over(slope if checks.are_finite() else slope.masked_fill_(student_logits < LOG_ZERO, 0), temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the reverse KL of teacher p and student q: sum_v q (log q - log p). It is mode-seeking.

    Args, returns and errors are as in `forward_kl`. The gradient with respect to the student's logits is
    q (log q - log p - KL) / temperature.

    Source: Gu et al. 2024 (MiniLLM), section 2.2.
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    return checks.result(kl(log_q, log_p), student_logits=student_logits, teacher_logits=teacher_logits)


def reverse_kl_with_slope(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return `reverse_kl` and its slope: the gradient with respect to the student's logits."""
    return reverse_kl_in_place(*both_log_probs(student_logits, teacher_logits, temperature), temperature)


def reverse_kl_in_place(log_q: Tensor, log_p: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return what `reverse_kl_with_slope` returns, from the log-probabilities (..., V) of student and teacher. Both are overwritten."""
    gap = torch.sub(log_q, log_p, out=log_p)  # g
    return through_softmax(log_q.exp_(), gap, temperature)


def jeffreys(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the sum of `forward_kl` and `reverse_kl`. It is symmetric and unbounded. Args are as in `forward_kl`.

    Some authors call half of this sum the symmetric KL. Source: Jeffreys 1946.
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    value = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return checks.result(value, student_logits=student_logits, teacher_logits=teacher_logits)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Return the generalised JSD: beta KL(p || m) + (1 - beta) KL(q || m), where m = beta p + (1 - beta) q.

    p is the teacher and q is the student. There are two exceptions, as in GKD and TRL: beta = 0 gives KL(p || q), and beta = 1 gives
    KL(q || p). The formula would give 0 for both.

    Args:
        beta: weight of the teacher, in [0, 1]. The weights `lam` of DistiLLM and `jsd_beta` of KDFlow are equal to 1 - beta.

    Other args, returns and errors are as in `forward_kl`. Source: Agarwal et al. 2024 (GKD), Eq. 1.
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


def jensen_shannon_with_slope(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return `jensen_shannon` and its slope: the gradient with respect to the student's logits."""
    checks.within("beta", beta, 0, 1)
    if beta in (0, 1):
        limit = forward_kl_with_slope if beta == 0 else reverse_kl_with_slope
        return limit(student_logits, teacher_logits, temperature=temperature)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    p, q = log_p.exp(), log_q.exp()
    # logaddexp would take as long as all other operations here. Where the sum underflows, p and q are 0, so the clamp changes nothing.
    log_m = torch.lerp(q, p, beta).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    of_teacher = dot(p, log_p.sub_(log_m), keep=False)
    # g = (1 - beta) (log q - log m); the part of the gradient that goes through m cancels
    of_student, slope = through_softmax(q, log_q.sub_(log_m), temperature)
    return beta * of_teacher + (1 - beta) * of_student, slope.mul_(1 - beta)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0) -> Tensor:
    """Return KL(p || alpha p + (1 - alpha) q) of teacher p and student q. At alpha = 0 it equals `forward_kl`.

    Args:
        alpha: the teacher's share of the mixture, in [0, 1]. Above 0, the gradient is bounded and the value is at most -log alpha.

    Other args, returns and errors are as in `forward_kl`. Source: Ko et al. 2024 (DistiLLM), Eq. 4.
    """
    checks.within("alpha", alpha, 0, 1)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    return checks.result(kl(log_p, mixture(log_p, log_q, alpha)), student_logits=student_logits, teacher_logits=teacher_logits)


def skew_forward_kl_with_slope(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return `skew_forward_kl` and its slope: the gradient with respect to the student's logits."""
    checks.within("alpha", alpha, 0, 1)
    if alpha == 0:
        return forward_kl_with_slope(student_logits, teacher_logits, temperature=temperature)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    gap = torch.sub(log_p, mixture(log_p, log_q, alpha))
    value = dot(gap, log_p.exp_(), keep=False)
    g, q = gap.exp_().mul_(alpha - 1), log_q.exp_()  # g = -(1 - alpha) p / m
    return value, through_softmax(q, g, temperature)[1]


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, detach_mixture: bool = False, temperature: float = 1.0
) -> Tensor:
    """Return KL(q || (1 - alpha) p + alpha q) of teacher p and student q. At alpha = 0 it equals `reverse_kl`.

    Args:
        alpha: the student's share of the mixture, in [0, 1]. Above 0, the gradient is bounded and the value is at most -log alpha.
        detach_mixture: True stops the gradient through the mixture, as in DistiLLM-2. False lets it flow, as in DistiLLM.

    Other args, returns and errors are as in `forward_kl`. Source: Ko et al. 2024 (DistiLLM), Eq. 6; Ko et al. 2025 (DistiLLM-2).
    """
    checks.within("alpha", alpha, 0, 1)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    log_m = mixture(log_q.detach() if detach_mixture else log_q, log_p, alpha)
    return checks.result(kl(log_q, log_m), student_logits=student_logits, teacher_logits=teacher_logits)


def skew_reverse_kl_with_slope(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, detach_mixture: bool = False, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return `skew_reverse_kl` and its slope: the gradient with respect to the student's logits."""
    checks.within("alpha", alpha, 0, 1)
    if alpha == 0:
        return reverse_kl_with_slope(student_logits, teacher_logits, temperature=temperature)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    gap = torch.sub(log_q, mixture(log_q, log_p, alpha), out=log_p)
    q = log_q.exp_()
    value = dot(q, gap)
    # g = log q - log m - alpha q / m; a detached mixture adds no last term
    g = gap if detach_mixture else gap.sub_(gap.exp(), alpha=alpha)
    return value, through_softmax(q, g, temperature)[1]


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the total variation distance of teacher p and student q: 1/2 sum_v |p - q|. It is in [0, 1].

    Args are as in `forward_kl`. Source: Wen et al. 2023 (f-distill).
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    value = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    return checks.result(value, student_logits=student_logits, teacher_logits=teacher_logits)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which objectives compute: float64 for float64 inputs, and float32 for all other inputs."""
    return dtype if dtype == torch.float64 else torch.float32


def at_least_float32(values: Tensor) -> Tensor:
    """Convert float16 and bfloat16 values to float32. Values in float32 and float64 keep their dtype."""
    return values.to(wide(values.dtype))


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return the KL divergence of distributions a and b, sum_v a (log a - log b), from their log-probabilities (..., V)."""
    # `log_probs` are finite, so 0 log 0 is 0 without a mask
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def both_log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Check shapes and temperature, and return the log-probabilities of student and teacher (log q, log p), each (..., V)."""
    checks.check_pair(student_logits, teacher_logits)
    checks.positive("temperature", temperature)
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)  # logits of another dtype, such as recorded ones
    return log_probs(student_logits.to(dtype), temperature), log_probs(teacher_logits.to(dtype), temperature)


def mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Return the log-probabilities (..., V) of a mixture of the distributions a and b: log(weight a + (1 - weight) b)."""
    if weight in (0, 1):
        return log_a if weight == 1 else log_b
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def through_softmax(q: Tensor, g: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the mean sum_v q g (...), and the gradient q (g - mean) / temperature (..., V) with respect to the logits z, where
    q = softmax(z / temperature). `g` (..., V) is the gradient with respect to q, and is overwritten."""
    if g.device.type in _VECDOT:
        mean = torch.linalg.vecdot(q, g)
        return mean, _over(g.sub_(mean.unsqueeze(-1)).mul_(q), temperature)
    mean = g.mul_(q).sum(-1)  # the products q g are written once, and become the gradient
    return mean, _over(g.addcmul_(q, mean.unsqueeze(-1), value=-1), temperature)


def dot(a: Tensor, b: Tensor, *, keep: bool = True) -> Tensor:
    """Return the sum of a * b over the last axis. `keep=False` allows to overwrite b."""
    if a.device.type in _VECDOT:
        return torch.linalg.vecdot(a, b)
    return (a * b if keep else b.mul_(a)).sum(-1)


def _over(slope: Tensor, temperature: float) -> Tensor:
    return slope if temperature == 1.0 else slope.div_(temperature)
