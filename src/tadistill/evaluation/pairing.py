"""How two models fit together before one teaches the other: per-token measures on logits, and both models on the same texts.

Axes: N tokens, V vocabulary. q is the learner, p the bigger model. All are exact over the vocabulary, before each token.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tadistill.data.batch import Sequence
from tadistill.evaluation.scoring import PerToken, Subject, per_token
from tadistill.objectives import forward_kl, log_probs, reverse_kl

ON_OWN_TEXT = ("reverse_kl", "overlap", "mass", "entropy_gap")
"""Measured on prefixes that the learner sampled."""


def overlap(student_logits: Tensor, teacher_logits: Tensor, *, k: int) -> Tensor:
    """(N,) |top-k of q ∩ top-k of p| / k: 1 where both models have the same k likeliest tokens (Li et al. 2026, arXiv:2604.13016).

    k is at most V.
    """
    k = min(k, student_logits.shape[-1])
    mine, theirs = student_logits.topk(k).indices, teacher_logits.topk(k).indices
    return (mine.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)


def mass(student_logits: Tensor, teacher_logits: Tensor, *, k: int) -> Tensor:
    """(N,) the probability that q gives to the top-k tokens of p. A value far below 1: the teacher's advice is about tokens that the
    learner does not use.
    """
    theirs = teacher_logits.topk(min(k, teacher_logits.shape[-1])).indices
    return log_probs(student_logits).gather(-1, theirs).exp().sum(-1)


def entropy_gap(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(N,) H(p) - H(q) in nats: negative where the bigger model is the sharper one."""
    return _entropy(teacher_logits) - _entropy(student_logits)


def _entropy(logits: Tensor) -> Tensor:
    log_q = log_probs(logits)
    return -(log_q.exp() * log_q).sum(-1)


def beside(learner: Subject, teacher: PreTrainedModel, *, own: Seq[Sequence], references: Seq[Sequence], k: int, batch: int) -> PerToken:
    """Measures of one (teacher, learner) pair: `ON_OWN_TEXT` on the learner's own answers and forward_kl on the references."""

    def of_answers(logits: Tensor, teachers: tuple, tokens: Tensor) -> Tensor:
        (other,) = teachers
        found = (reverse_kl(logits, other), overlap(logits, other, k=k), mass(logits, other, k=k), entropy_gap(logits, other))
        return torch.stack(found)

    def of_references(logits: Tensor, teachers: tuple, tokens: Tensor) -> Tensor:
        return forward_kl(logits, teachers[0]).unsqueeze(0)

    found = per_token(learner, own, ON_OWN_TEXT, of_answers, batch=batch, others=[teacher])
    return found | per_token(learner, references, ("forward_kl",), of_references, batch=batch, others=[teacher])
