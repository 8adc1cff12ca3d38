"""From a method to a step: the one place where objectives meet models.

A step maps a batch to named terms, each a SUM over tokens with the name of the count it is divided by. To add an objective:
one pure function in `tadistill.objectives`, one config class in `tadistill.config.method`, one line in `_STEPS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill.config.method import CrossEntropy, ForwardKL, Method, MiniLLM, ReverseKL
from tadistill.data.batch import Batch
from tadistill.models.forward import response_logits
from tadistill.objectives import (
    clipped_ratio,
    cross_entropy,
    forward_kl,
    policy_gradient,
    returns,
    reverse_kl,
    token_log_probs,
)

RESPONSE, CORPUS = "response", "corpus"


@dataclass(frozen=True)
class Term:
    """A weighted part of the loss: `total` is a scalar sum with a graph, to be divided by the global count `per`."""

    total: Tensor
    per: str = RESPONSE
    weight: float = 1.0


Step = Callable[[nn.Module, Batch], dict[str, Term]]


def make_step(method: Method, teacher: PreTrainedModel | None, vocab: int) -> Step:
    """The step of a method; `teacher` is None only for cross-entropy."""
    return _STEPS[type(method.objective)](method.objective, teacher, vocab)


def counts(batches: list[Batch]) -> dict[str, int]:
    """Tokens that count, over this rank's micro-batches."""
    corpora = [b.corpus for b in batches if b.corpus]
    return {RESPONSE: sum(int(b.mask_BT.sum()) for b in batches), CORPUS: sum(int(c.mask_BT.sum()) for c in corpora)}


def _cross_entropy(_: CrossEntropy, __: PreTrainedModel | None, vocab: int) -> Step:
    def step(student: nn.Module, batch: Batch) -> dict[str, Term]:
        logits = response_logits(student, batch, vocab)
        return {"cross_entropy": Term(cross_entropy(logits, batch.targets_BT[batch.mask_BT]).sum())}

    return step


def _divergence(objective: ForwardKL | ReverseKL, teacher: PreTrainedModel | None, vocab: int) -> Step:
    assert teacher is not None
    function = {ForwardKL: forward_kl, ReverseKL: reverse_kl}[type(objective)]
    ratio = objective.kd_ratio

    def step(student: nn.Module, batch: Batch) -> dict[str, Term]:
        with torch.no_grad():
            target = response_logits(teacher, batch, vocab)
        logits = response_logits(student, batch, vocab)
        terms = {objective.type: Term(function(logits, target, temperature=objective.temperature).sum(), weight=ratio)}
        if ratio < 1:
            terms["cross_entropy"] = Term(cross_entropy(logits, batch.targets_BT[batch.mask_BT]).sum(), weight=1 - ratio)
        return terms

    return step


def _minillm(objective: MiniLLM, teacher: PreTrainedModel | None, vocab: int) -> Step:
    assert teacher is not None

    def step(student: nn.Module, batch: Batch) -> dict[str, Term]:
        mask = batch.mask_BT
        logits = response_logits(student, batch, vocab)
        log_q = token_log_probs(logits, batch.targets_BT[mask])
        behaviour = batch.values["behaviour"][mask]
        rewards_BT = batch.values["teacher"] - batch.values["student"]
        advantage = returns(rewards_BT, mask, length_normalisation=objective.length_normalisation)[mask]
        terms = {"policy": Term(policy_gradient(log_q, behaviour, advantage, clip=objective.clip).sum())}
        if objective.single_step:
            with torch.no_grad():
                target = response_logits(teacher, batch, vocab)
            exact = reverse_kl(logits, target)
            if objective.single_step_weight:
                exact = exact * clipped_ratio(log_q, behaviour, clip=objective.clip).detach()
            terms["single_step"] = Term(exact.sum())
        if batch.corpus:
            plain = response_logits(student, batch.corpus, vocab)
            loss = cross_entropy(plain, batch.corpus.targets_BT[batch.corpus.mask_BT])
            terms["corpus"] = Term(loss.sum(), per=CORPUS, weight=objective.pt_weight)
        return terms

    return step


_STEPS: dict[type, Callable[[Any, PreTrainedModel | None, int], Step]] = {
    CrossEntropy: _cross_entropy,
    ForwardKL: _divergence,
    ReverseKL: _divergence,
    MiniLLM: _minillm,
}
