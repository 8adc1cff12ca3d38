"""The distances of ULD and GOLD between two models with different vocabularies, at positions where both predict the same text.

`sorted_distance` (ULD) compares sorted probabilities, and needs no tokens in common. `hybrid_distance` (GOLD) compares the shared tokens
(`SharedVocabulary`) one by one, and all others as in ULD. Both compute in at least float32, and return one value per position, without
mask or reduction.

Axes: V and W vocabulary sizes of student and teacher, M shared tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import log_probs


@dataclass(frozen=True)
class SharedVocabulary:
    """The tokens that two vocabularies have in common. `tadistill.data.alignment.shared_tokens` finds them."""

    student_ids: Tensor
    """Ids (M,) of the shared tokens in the student's vocabulary."""
    teacher_ids: Tensor
    """Ids (M,) of the same tokens in the teacher's vocabulary."""
    sizes: tuple[int, int]
    """Numbers of tokens (V, W) of the two vocabularies. A head can have more logits, which are padding and are cut off."""

    def __post_init__(self) -> None:
        if self.student_ids.shape != self.teacher_ids.shape or self.student_ids.ndim != 1 or not len(self.student_ids):
            raise ConfigError(
                f"`student_ids` has shape {tuple(self.student_ids.shape)} and `teacher_ids` {tuple(self.teacher_ids.shape)}; give two "
                "lists of equal length, not empty, in which entry i is the id of the same token in both vocabularies"
            )
        for name, ids, size in (("student_ids", self.student_ids, self.sizes[0]), ("teacher_ids", self.teacher_ids, self.sizes[1])):
            if not 0 <= int(ids.min()) <= int(ids.max()) < size or len(ids.unique()) < len(ids):
                raise ConfigError(f"`{name}` must have different ids from 0 to {size - 1}")

    def to(self, device: torch.device) -> "SharedVocabulary":
        """Return a copy on another device."""
        return SharedVocabulary(self.student_ids.to(device), self.teacher_ids.to(device), self.sizes)

    @cached_property
    def same(self) -> bool:
        """True if both vocabularies have the same tokens with the same ids."""
        every = torch.arange(self.sizes[0], device=self.student_ids.device)
        return self.sizes[0] == self.sizes[1] and torch.equal(self.student_ids, every) and torch.equal(self.teacher_ids, every)

    @cached_property
    def alone(self) -> tuple[Tensor, Tensor]:
        """The ids of the tokens that are not shared: those of the student, and those of the teacher."""
        return _others(self.student_ids, self.sizes[0]), _others(self.teacher_ids, self.sizes[1])


def sorted_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    before: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the ULD distance: sum_k |q_(k) - p_(k)|, where q_(k) is the student's k-th largest probability and p_(k) the teacher's.

    The shorter list is filled up with zeros. The distance is between 0 and 2. Its authors derive it as a Wasserstein distance in which all
    tokens are equally far apart. It ignores which token has which probability: it is 0 for two models that differ only by a swap of the
    probabilities of two tokens.

    Args:
        student_logits: (..., V).
        teacher_logits: (..., W).
        before: two tensors (...), for student and teacher: the log-probability of the earlier tokens of a span (several tokens that spell
            the same text for both models). Each distribution is multiplied by this probability, as with GOLD's `bayesian` merging.

    Returns:
        (...), not in nats.

    Source: Boizard et al. 2024 (ULD, arXiv 2402.12030), Eq. 3; TRL 1.16 (GOLD) for `before`.
    """
    q, p = _merged(student_logits, teacher_logits, before, temperature)
    return checks.result(_sorted_gap(q, p), student_logits=student_logits, teacher_logits=teacher_logits)


def hybrid_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    shared: SharedVocabulary,
    beta: float = 0.5,
    term_weights: tuple[float, float] | None = None,
    before: Sequence[Tensor] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return GOLD's hybrid loss: w D_beta over the shared tokens, plus u times `sorted_distance` over all other tokens.

    D_beta is the formula of `jensen_shannon`, with beta = 0 for KL(p || q) and beta = 1 for KL(q || p). But q and p are not renormalised:
    they are the probabilities of the shared tokens in the whole softmax, times `before`, and at least 1e-8. So for beta = 0 and 1 the
    value can be negative, and it is not smallest where q = p. `fused_span_divergence` does not have this fault.

    Args:
        term_weights: (w, u). The default is GOLD's: w = M / W, the share of the teacher's tokens that are shared, and u = 1 - w.

    Other args and returns are as in `sorted_distance`. Source: GOLD in TRL 1.16 (`uld_use_hybrid_loss`).
    """
    checks.within("beta", beta, 0, 1)
    q, p = _merged(student_logits, teacher_logits, before, temperature)
    _check_width(q, shared.sizes[0])
    _check_width(p, shared.sizes[1])
    of_student, of_teacher = shared.alone
    a, b = (x.index_select(-1, ids).clamp(min=1e-8) for x, ids in ((q, shared.student_ids), (p, shared.teacher_ids)))
    both = _unnormalised(a, b, beta)
    if len(of_student) and len(of_teacher):
        other = _sorted_gap(q.index_select(-1, of_student), p.index_select(-1, of_teacher))
    else:
        other = torch.zeros_like(both)
    share = len(shared.student_ids) / shared.sizes[1]
    w, u = (share, 1 - share) if term_weights is None else term_weights
    return checks.result(w * both + u * other, student_logits=student_logits, teacher_logits=teacher_logits)


def _unnormalised(q: Tensor, p: Tensor, beta: float) -> Tensor:
    log_q, log_p = q.log(), p.log()
    if beta in (0, 1):
        return (p * (log_p - log_q)).sum(-1) if beta == 0 else (q * (log_q - log_p)).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def _merged(student: Tensor, teacher: Tensor, before: Sequence[Tensor] | None, temperature: float) -> tuple[Tensor, Tensor]:
    checks.tensor("student_logits", student)
    checks.tensor("teacher_logits", teacher)
    shapes = [tuple(logits.shape) for logits in (student, teacher)]
    if shapes[0][:-1] != shapes[1][:-1] or not all(shape and shape[-1] for shape in shapes):
        raise ConfigError(
            f"`student_logits` has shape {shapes[0]}, but `teacher_logits` has shape {shapes[1]}; only the last axis may differ, and "
            "its size must be at least 1"
        )
    checks.positive("temperature", temperature)
    log_q, log_p = log_probs(student, temperature), log_probs(teacher, temperature)
    if before is not None:
        log_q, log_p = log_q + before[0].unsqueeze(-1), log_p + before[1].unsqueeze(-1)
    return log_q.exp(), log_p.exp()


def _sorted_gap(q: Tensor, p: Tensor) -> Tensor:
    q, p = q.sort(-1, descending=True).values, p.sort(-1, descending=True).values
    short = min(q.shape[-1], p.shape[-1])
    tails = q[..., short:].sum(-1) + p[..., short:].sum(-1)  # one of the two is empty
    return (q[..., :short] - p[..., :short]).abs().sum(-1) + tails


def _others(ids: Tensor, size: int) -> Tensor:
    free = torch.ones(size, dtype=torch.bool, device=ids.device)
    free[ids] = False
    return free.nonzero().squeeze(-1)


def _check_width(logits: Tensor, size: int) -> None:
    if logits.shape[-1] != size:
        raise ConfigError(f"a model has {logits.shape[-1]} logits, but its vocabulary has {size} tokens; cut the logits to {size}")
