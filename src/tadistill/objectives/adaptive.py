"""Objectives whose weights or target change as the student learns: adaptive KL, TAID and DistiLLM-2's contrastive loss.

All functions take logits of shape (..., V) and return nats of shape (...). In formulas, p is the teacher and q is the student.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tadistill.constants import LOG_ZERO
from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import at_least_float32, both_log_probs, kl

_HEAD_GUESS = 256


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, *, mu: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Return the adaptive KL of teacher p and student q: w KL(p || q) + (1 - w) KL(q || p). No gradient flows through w.

    Let H be the smallest set of the teacher's most probable tokens whose total probability is at least `mu`. The weight w is the sum of
    |p - q| over H, divided by the sum of |p - q| over the whole vocabulary. The code of the paper's authors leaves one token out of H: the
    token with which the total probability reaches `mu`.

    Args:
        mu: least total probability of H, in [0, 1]. At 0 the result equals `reverse_kl`, and at 1 it equals `forward_kl`.

    Other args, returns and errors are as in `forward_kl`. Source: Wu et al. 2025 (AKL), section 4.
    """
    checks.within("mu", mu, 0, 1)
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    with torch.no_grad():
        weight = _head_weight(log_p.exp(), log_q.exp(), mu)
    value = weight * kl(log_p, log_q) + (1 - weight) * kl(log_q, log_p)
    return checks.result(value, student_logits=student_logits, teacher_logits=teacher_logits)


def _head_weight(p: Tensor, q: Tensor, mu: float) -> Tensor:
    # returns the share (...) of sum_v |p - q| that the tokens of the head H have; one half where p = q
    width = p.shape[-1]
    k = min(_HEAD_GUESS, width)
    top, ids = p.topk(k)  # most heads are short, and sorting a whole vocabulary is slow on a CPU
    while k < width and bool((top.sum(-1) < mu).any()):
        k = min(8 * k, width)
        top, ids = p.topk(k)
    head = top.cumsum(-1) - top < mu
    gap = (p - q).abs()
    total, inside = gap.sum(-1), (gap.gather(-1, ids) * head).sum(-1)
    return torch.where(total > 0, (inside / total).clamp(max=1), 0.5) if mu < 1 else torch.ones_like(total)


def taid_target(student_logits: Tensor, teacher_logits: Tensor, *, t: float) -> Tensor:
    """Return the logits (..., V) of TAID's target: (1 - t) * student_logits.detach() + t * teacher_logits.

    At t = 0 the target is the student itself, and at t = 1 it is the teacher. Source: Shing et al. 2025 (TAID), Eq. 3.
    """
    checks.within("t", t, 0, 1)
    checks.check_pair(student_logits, teacher_logits)
    if t in (0, 1):  # 0 * -inf is not a number
        return teacher_logits if t == 1 else student_logits.detach()
    return (1 - t) * at_least_float32(student_logits.detach()) + t * at_least_float32(teacher_logits)


def taid(student_logits: Tensor, teacher_logits: Tensor, *, t: float, temperature: float = 1.0) -> Tensor:
    """Return the cross-entropy of the student to the target of `taid_target`. It has the same gradient as the forward KL to this target.

    The value is the cross-entropy and not the KL, because `TaidSchedule` needs it. To get the KL, call `forward_kl` with the target as
    the teacher's logits.

    Args:
        t: interpolation weight, in [0, 1]. `TaidSchedule` changes it during training.

    Other args, returns and errors are as in `forward_kl`. Source: Shing et al. 2025 (TAID), Eq. 4.
    """
    log_q, log_t = both_log_probs(student_logits, taid_target(student_logits, teacher_logits, t=t), temperature)
    value = -(log_t.exp() * log_q).sum(-1)
    return checks.result(value, student_logits=student_logits, teacher_logits=teacher_logits)


class TaidSchedule:
    """The teacher's weight t in TAID's target during training. It rises at least linearly, and faster while the loss falls.

    Call `update` once after each optimizer update. The first call only stores the loss, so t is `start` in two updates. The line from
    `start` reaches `end` with the last call, whose t no update uses. Source: Shing et al. 2025 (TAID), Algorithm 1.
    """

    def __init__(self, *, start: float = 0.4, end: float = 1.0, rate: float = 5e-4, decay: float = 0.99):
        checks.within("start", start, 0, 1)
        checks.within("end", end, start, 1)
        self.start, self.end, self.rate, self.decay = start, end, rate, decay
        self.t, self.momentum, self.previous = start, 0.0, math.nan

    def update(self, loss: float, step: int, steps: int) -> None:
        """Update t. `loss` is the mean `taid` loss of the last optimizer update. `step` counts the updates from 1 to `steps`."""
        if not math.isnan(self.previous):
            delta = (self.previous - loss) / (self.previous + 1e-15)
            self.momentum = self.decay * self.momentum + (1 - self.decay) * delta
            linear = self.start + (self.end - self.start) * step / steps
            raised = self.t + self.rate * 0.5 * (1 + math.tanh(self.momentum / 2)) * (1 - self.t)  # a sigmoid that cannot overflow
            self.t = min(self.end, max(linear, raised))
        self.previous = loss

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint must store."""
        return {"t": self.t, "momentum": self.momentum, "previous": self.previous}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from values that `state` returned."""
        self.t, self.momentum, self.previous = state["t"], state["momentum"], state["previous"]


def contrastive(
    student_logits: Tensor, teacher_logits: Tensor, from_teacher: Tensor, *, alpha: float | Tensor = 0.1, temperature: float = 1.0
) -> Tensor:
    """Return DistiLLM-2's loss: `skew_forward_kl` on text of the teacher, and `skew_reverse_kl` on text of the student.

    Args:
        student_logits, teacher_logits: (..., V).
        from_teacher: bool, with a shape that broadcasts to (...), such as (B, 1) for logits (B, T, V). True where the teacher wrote the
            text.
        alpha: the `alpha` of both losses: a number in [0, 1], or a tensor of such numbers with a shape that broadcasts to (...), for
            example from `contrastive_alpha`.

    Returns and errors are as in `forward_kl`. Source: Ko et al. 2025 (DistiLLM-2), Eq. 5.
    """
    log_q, log_p = both_log_probs(student_logits, teacher_logits, temperature)
    checks.booleans("from_teacher", from_teacher)
    if not isinstance(alpha, Tensor):
        checks.number("alpha", alpha)
    skew = torch.as_tensor(alpha, dtype=log_q.dtype).to(log_q.device, non_blocking=True)
    if not checks.is_deferred() and not bool(((skew >= 0) & (skew <= 1)).all()):
        raise ConfigError(f"`alpha` has values from {float(skew.min())} to {float(skew.max())}; all values must be in [0, 1]")
    for name, value in (("from_teacher", from_teacher), ("alpha", skew)):
        checks.of_positions(name, value, log_q.shape[:-1])
    log_skew, log_rest = skew.log().clamp(min=LOG_ZERO).unsqueeze(-1), torch.log1p(-skew).clamp(min=LOG_ZERO).unsqueeze(-1)
    pulled = kl(log_p, torch.logaddexp(log_p + log_skew, log_q + log_rest))
    pushed = kl(log_q, torch.logaddexp(log_q.detach() + log_skew, log_p + log_rest))
    return checks.result(torch.where(from_teacher, pulled, pushed), student_logits=student_logits, teacher_logits=teacher_logits)


def contrastive_alpha(gap: Tensor, anchor: float | Tensor, *, base: float = 0.1) -> Tensor:
    """Return the `alpha` of `contrastive`, one value per response: clip(1 - (1 - base) anchor / (gap + 1e-5), 0.01, base).

    The value is `base` if teacher and student differ on the response at least as much as usual (gap >= anchor). It is smaller if they
    differ less. A negative gap also gives `base`.

    Args:
        gap: (B,) m - m'. m is the geometric mean of the tokens' probabilities under the model that wrote the response, and m' is the
            same mean under the other model.
        anchor: mean of all gaps so far in training.
        base: the largest value, in [0.01, 1].

    Source: Ko et al. 2025 (DistiLLM-2), section 3.3.
    """
    checks.within("base", base, 0.01, 1)
    return (1 - (1 - base) * anchor / (gap + 1e-5)).clamp(0.01, base)
