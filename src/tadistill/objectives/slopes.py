"""Values and gradients, written out, of the divergences that most runs minimise: half the time of autograd on a CPU.

    find = written_out(partial(jensen_shannon, beta=0.5))     # None for a divergence that has no entry in `SLOPES`
    values, slope = find(student_logits, teacher_logits, temperature=2.0)

The plain function is the definition; an entry takes the same arguments and returns its value (...) and that value's gradient in the
student's logits (..., V), without a graph. With g = dD/dq at constant p, the gradient through the softmax is q (g - sum_v q g); terms of g
that do not depend on v cancel. The tests hold every entry to autograd.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tadistill.objectives import checks, divergence
from tadistill.objectives.divergence import LOG_ZERO, both_log_probs, log_probs, mixture

Graded = Callable[..., tuple[Tensor, Tensor]]
"""(student logits, teacher logits, temperature=…) to values (...) and slopes (..., V)."""


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """q - p, and 0 at impossible tokens, whose logits do not move."""
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    p = log_p.exp()
    value = _dot(p, log_p.sub_(log_q))
    slope = log_q.exp_().sub_(p).masked_fill_(student_logits < LOG_ZERO, 0)
    return value, _over(slope, temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """g = log q - log p."""
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    gap = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    value = _dot(q, gap)
    return value, _through_softmax(q, gap, value, temperature)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """g = (1 - beta) (log q - log m): what reaches q through m cancels."""
    checks.within("beta", beta, 0, 1)
    if beta in (0, 1):
        return (forward_kl if beta == 0 else reverse_kl)(student_logits, teacher_logits, temperature=temperature)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    p, q = log_p.exp(), log_q.exp()
    # not by logaddexp, which takes as long as all the rest: where the sum underflows, p and q are 0 and weigh nothing
    log_m = torch.lerp(q, p, beta).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    of_teacher = _dot(p, log_p.sub_(log_m))
    gap = log_q.sub_(log_m)
    of_student = _dot(q, gap)
    slope = _through_softmax(q, gap, of_student, temperature)
    return beta * of_teacher + (1 - beta) * of_student, slope.mul_(1 - beta)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """g = -(1 - alpha) p / m."""
    checks.within("alpha", alpha, 0, 1)
    if alpha == 0:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    gap = torch.sub(log_p, mixture(log_p, log_q, alpha))
    value = _dot(log_p.exp_(), gap)
    g, q = gap.exp_().mul_(alpha - 1), log_q.exp_()
    return value, _through_softmax(q, g, _dot(q, g), temperature)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, detach_mixture: bool = False, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """g = log q - log m - alpha q / m, the last addend only where the gradient flows through the mixture."""
    checks.within("alpha", alpha, 0, 1)
    if alpha == 0:
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    gap = torch.sub(log_q, mixture(log_q, log_p, alpha), out=log_p)
    q = log_q.exp_()
    value = _dot(q, gap)
    g = gap if detach_mixture else gap.sub_(gap.exp(), alpha=alpha)
    return value, _through_softmax(q, g, _dot(q, g), temperature)


def of_tokens(student_logits: Tensor, tokens: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss of the tokens' log-probabilities, (...) to (...): its derivative there, by autograd, times (1 at the token - q)."""
    log_q, at = log_probs(student_logits), tokens.unsqueeze(-1)
    leaf = log_q.gather(-1, at).requires_grad_()
    with torch.enable_grad():
        value = loss(leaf.squeeze(-1))
    (outer,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    moves = student_logits.gather(-1, at) >= LOG_ZERO
    return value.detach(), log_q.exp_().mul_(-outer).scatter_add_(-1, at, outer * moves)


SLOPES: dict[Callable[..., Tensor], Graded] = {
    divergence.forward_kl: forward_kl,
    divergence.reverse_kl: reverse_kl,
    divergence.jensen_shannon: jensen_shannon,
    divergence.skew_forward_kl: skew_forward_kl,
    divergence.skew_reverse_kl: skew_reverse_kl,
}


def written_out(function: Callable[..., Tensor], **parameters: Any) -> Graded | None:
    """The entry for a divergence, or for a `partial` of one."""
    while isinstance(function, partial):
        function, parameters = function.func, function.keywords | parameters
    return partial(SLOPES[function], **parameters) if function in SLOPES else None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """sum_v a b, without a tensor for the products."""
    return torch.linalg.vecdot(a, b)


def _through_softmax(q: Tensor, g: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """q (g - mean) / temperature in the memory of g, with mean = sum_v q g."""
    return _over(g.sub_(mean.unsqueeze(-1)).mul_(q), temperature)


def _over(slope: Tensor, temperature: float) -> Tensor:
    return slope if temperature == 1.0 else slope.div_(temperature)
