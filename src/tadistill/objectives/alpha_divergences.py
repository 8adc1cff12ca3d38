"""Families of divergences with two parameters: the alpha-beta divergence (ABKD) and the alpha-mixture (AMiD).

All functions take logits of shape (..., V) and return nats of shape (...). In formulas, p is the teacher and q is the student.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import both_log_probs


def alpha_beta(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.2, beta: float = 0.7, temperature: float = 1.0
) -> Tensor:
    """Return the alpha-beta divergence of teacher p and student q:

        -1/(alpha beta) sum_v [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta)]

    (alpha, beta) = (1, 0) gives the forward KL, and (0, 1) gives the reverse KL. A larger alpha gives more weight to tokens with a high
    teacher probability. A larger beta gives more weight to tokens with a high student probability. If alpha, beta or alpha + beta is
    exactly 0, the result is the limit of the formula. If one of them is closer to 0 than 1e-3, float32 loses digits.

    Args:
        alpha, beta: finite. The defaults are those of ABKD for GPT-2. For OpenLLaMA2, ABKD uses 0.5 and 0.5. If one of them is negative,
            the divergence is unbounded, and it is undefined where a probability is 0.

    Other args, returns and errors are as in `forward_kl`. Source: Wang et al. 2025 (ABKD), Eq. 5; Cichocki et al. 2011.
    """
    checks.finite("alpha", alpha)
    checks.finite("beta", beta)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    return checks.result(_ab(log_p, log_q, alpha, beta), student_logits=student_logits, teacher_logits=teacher_logits)


def _ab(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    total, gap = alpha + beta, log_p - log_q
    if alpha == 0 and beta == 0:
        terms = gap.square() / 2
    elif alpha == 0:
        terms = ((beta * log_p).exp() - (beta * log_q).exp()) / beta**2 - (beta * log_q).exp() * gap / beta
    elif beta == 0:
        terms = ((alpha * log_q).exp() - (alpha * log_p).exp()) / alpha**2 + (alpha * log_p).exp() * gap / alpha
    elif total == 0:
        terms = ((alpha * gap).exp() - 1 - alpha * gap) / alpha**2
    else:
        teacher, student = (total * log_p).exp() * alpha / total, (total * log_q).exp() * beta / total
        terms = (teacher + student - (alpha * log_p + beta * log_q).exp()) / (alpha * beta)
    value = terms.sum(-1)
    read = min(alpha, beta, total) < 0 and not torch.compiler.is_compiling()
    if read and bool((~value.isfinite() & ~gap.isnan().any(-1)).any()):
        raise ConfigError(
            f"`alpha` is {alpha} and `beta` is {beta}; with a negative value, the divergence is not defined for probabilities near 0; use "
            "values >= 0"
        )
    return value


def alpha_mixture(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = -5.0,
    lam: float = 0.5,
    pair: Literal["pr", "rp", "qr", "rq"] = "pr",
    ab_parameters: tuple[float, float] = (1.0, 0.0),
    temperature: float = 1.0,
) -> Tensor:
    """Return a divergence between two of three distributions: the teacher p, the student q, and their mixture r.

    r is proportional to [lam p^c + (1 - lam) q^c]^(1/c) with c = (1 - alpha)/2. alpha = -1 gives the arithmetic mixture, alpha = 1 gives
    the geometric mixture, and alpha = 3 gives the harmonic mixture. The gradient flows through r.

    Args:
        alpha: a finite number that selects the mean of p and q, as above.
        lam: the teacher's share of the mixture, in [0, 1].
        pair: which two distributions are compared. For example, `pr` is the divergence from p to r.
        ab_parameters: the arguments alpha and beta of `alpha_beta`, the function that compares the two distributions. (1, 0) gives the KL.
            AMiD also uses (0.2, 0.7).

    Other args, returns and errors are as in `forward_kl`. Source: Shin et al. 2025 (AMiD). The defaults are the settings of another
    paper, WASD.
    """
    checks.finite("alpha", alpha)
    checks.within("lam", lam, 0, 1)
    for parameter in ab_parameters:
        checks.finite("ab_parameters", parameter)
    if pair not in ("pr", "rp", "qr", "rq"):
        raise ConfigError(f"`pair` is {pair!r}; it must be one of pr, rp, qr, rq")
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    sides = {"p": log_p, "q": log_q, "r": _assistant(log_p, log_q, alpha, lam)}
    value = _ab(sides[pair[0]], sides[pair[1]], *ab_parameters)
    return checks.result(value, student_logits=student_logits, teacher_logits=teacher_logits)


def _assistant(log_p: Tensor, log_q: Tensor, alpha: float, lam: float) -> Tensor:
    if lam in (0, 1):
        return log_p if lam == 1 else log_q
    power = (1 - alpha) / 2
    if power == 0:
        log_r = lam * log_p + (1 - lam) * log_q
    else:
        log_r = torch.logaddexp(power * log_p + math.log(lam), power * log_q + math.log1p(-lam)) / power
    return torch.log_softmax(log_r, dim=-1)
