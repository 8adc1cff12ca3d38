"""From a method to a step: the one place where objectives meet models.

A step maps a batch to the micro-batch's share of the loss, computed by the fused head. To add an objective: one pure function in
`tadistill.objectives`, one config class in `tadistill.config.objective`, one line in `DIVERGENCES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill import objectives
from tadistill.config import objective as config
from tadistill.config.method import Method
from tadistill.data.batch import Batch
from tadistill.models.forward import Reader
from tadistill.objectives import TaidSchedule, fused_head, slopes
from tadistill.objectives.fused import Slopes
from tadistill.objectives.targets import Target, TopK, aligned

RESPONSE, CORPUS = "response", "corpus"

DIVERGENCES: dict[type[config.Divergence], Callable[..., Tensor]] = {
    config.ForwardKL: objectives.forward_kl,
    config.ReverseKL: objectives.reverse_kl,
    config.Jeffreys: objectives.jeffreys,
    config.JensenShannon: objectives.jensen_shannon,
    config.SkewForwardKL: objectives.skew_forward_kl,
    config.SkewReverseKL: objectives.skew_reverse_kl,
    config.TotalVariation: objectives.total_variation,
    config.AdaptiveKL: objectives.adaptive_kl,
    config.AlphaBeta: objectives.alpha_beta,
    config.AlphaMixture: objectives.alpha_mixture,
    config.TopKForwardKL: objectives.top_k_forward_kl,
    config.TopKReverseKL: objectives.top_k_reverse_kl,
}
"""A variant's fields, but for `type` and `kd_ratio`, are its function's keyword arguments."""


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of the update's loss: `total` has a graph, `parts` are its detached addends by name."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What the loop calls: `loss(student, batch, per)`, where `per` holds the number that sums over tokens are divided by."""

    loss: Callable[[nn.Module, Batch, Mapping[str, float]], Loss]
    schedule: TaidSchedule | None = None
    """State that moves once per update and is saved with the training state."""


@dataclass(frozen=True)
class _Term:
    """One addend: its values (n,) on a small tile, from (student logits, teachers, rows)."""

    name: str
    values: Callable[[Tensor, tuple[Any, ...], slice], Tensor]
    weight: float = 1.0
    slope: Callable[[Tensor, tuple[Any, ...], slice], tuple[Tensor, Tensor]] | None = None
    """The same values with their gradient in the logits (n, V), where that is written out."""


class _Models:
    """Student and teacher as a step sees them."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, vocab: int):
        self.student, self.teacher, self.vocab = Reader(student), teacher, vocab
        self.teacher_reader = Reader(teacher) if teacher is not None else None

    def target(self, batch: Batch) -> Target:
        """The teacher at the batch's response tokens: as the batch brings it, or live."""
        if batch.signal is not None:
            return batch.signal
        assert self.teacher is not None
        assert self.teacher_reader is not None
        return self.teacher_reader.target(self.teacher, batch)

    def loss(self, model: nn.Module, batch: Batch, terms: list[_Term], per: float, teachers: tuple[Target, ...] = ()) -> Loss:
        """The terms over the batch's response tokens, each sum divided by `per`."""
        hidden = self.student.hidden(model, batch)
        weights = torch.tensor([[t.weight / per] for t in terms], dtype=torch.float32, device=hidden.device)

        def values(student: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
            return torch.stack([t.values(student, targets, rows) for t in terms])

        total, found = fused_head(hidden, self.student.head, values, weights, slopes=_graded(terms), teachers=teachers, vocab=self.vocab)
        sums = (found * weights.to(found.dtype)).sum(1)
        return Loss(total, dict(zip((t.name for t in terms), sums, strict=True)))


def _graded(terms: list[_Term]) -> Slopes | None:
    """All terms at once, where each has its gradient written out."""
    graded = [t.slope for t in terms if t.slope is not None]
    if len(graded) < len(terms):
        return None

    def of(student: Tensor, targets: tuple[Any, ...], rows: slice, weights: Tensor) -> tuple[Tensor, Tensor]:
        values, total = [], None
        for slope_of, weight in zip(graded, weights.unsqueeze(-1), strict=True):
            value, slope = slope_of(student, targets, rows)
            values.append(value)
            total = slope.mul_(weight) if total is None else total.addcmul_(slope, weight)
        assert total is not None
        return torch.stack(values), total

    return of


def make_step(method: Method, student: PreTrainedModel, teacher: PreTrainedModel | None, vocab: int) -> Step:
    """The step of a method; `teacher` is None for cross-entropy, for scores from rollouts, and where batches bring the teacher's signal."""
    models = _Models(student, teacher, vocab)
    return _STEPS.get(type(method.objective), _divergence)(method.objective, models)


def counts(batches: list[Batch]) -> dict[str, int]:
    """Tokens that count, over this rank's micro-batches."""
    corpora = [b.corpus for b in batches if b.corpus]
    return {RESPONSE: sum(int(b.mask_BT.sum()) for b in batches), CORPUS: sum(int(c.mask_BT.sum()) for c in corpora)}


def _likelihood(batch: Batch, weight: float = 1.0, name: str = "cross_entropy") -> _Term:
    """Cross-entropy on the batch's own tokens."""
    return _of_tokens(name, batch.targets_BT[batch.mask_BT], lambda log_q, _: -log_q, weight)


def _of_tokens(name: str, tokens: Tensor, loss: Callable[[Tensor, slice], Tensor], weight: float = 1.0) -> _Term:
    """A loss of the tokens' log-probabilities under the student."""

    def values(logits: Tensor, _: tuple[Any, ...], rows: slice) -> Tensor:
        return loss(objectives.token_log_probs(logits, tokens[rows]), rows)

    def slope(logits: Tensor, _: tuple[Any, ...], rows: slice) -> tuple[Tensor, Tensor]:
        return slopes.of_tokens(logits, tokens[rows], lambda log_q: loss(log_q, rows))

    return _Term(name, values, weight, slope)


def _cross_entropy(_: config.CrossEntropy, models: _Models) -> Step:
    return Step(lambda student, batch, per: models.loss(student, batch, [_likelihood(batch)], per[RESPONSE]))


_Rowwise = Callable[[slice], Callable[..., Tensor]]
"""The divergence for a tile of a batch's tokens."""


def _divergence(objective: config.Divergence, models: _Models) -> Step:
    function = partial(DIVERGENCES[type(objective)], **objective.model_dump(exclude={"type", "kd_ratio", "temperature"}))
    return Step(partial(_towards_teacher, models, objective, lambda _: lambda rows: function))


def _taid(objective: config.Taid, models: _Models) -> Step:
    schedule = TaidSchedule(start=objective.start, end=objective.end, rate=objective.rate, decay=objective.decay)
    return Step(partial(_towards_teacher, models, objective, lambda _: lambda rows: partial(objectives.taid, t=schedule.t)), schedule)


def _contrastive(objective: config.Contrastive, models: _Models) -> Step:
    def of(batch: Batch) -> _Rowwise:
        from_teacher = batch.values["from_teacher"][batch.mask_BT] > 0
        return lambda rows: partial(objectives.contrastive, from_teacher=from_teacher[rows], alpha=objective.alpha)

    return Step(partial(_towards_teacher, models, objective, of))


def _towards_teacher(
    models: _Models,
    objective: config.Divergence,
    divergence_of: Callable[[Batch], _Rowwise],
    student: nn.Module,
    batch: Batch,
    per: Mapping[str, float],
) -> Loss:
    """kd_ratio x divergence + (1 - kd_ratio) x cross-entropy."""
    divergence, target = divergence_of(batch), models.target(batch)

    def values(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        *sides, left = aligned(logits, targets, None, objective.temperature)
        return divergence(rows)(*sides, temperature=left)

    def slope(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> tuple[Tensor, Tensor]:
        graded = slopes.written_out(divergence(rows))
        assert graded is not None
        *sides, left = aligned(logits, targets, None, objective.temperature)
        return graded(*sides, temperature=left)

    graded = not isinstance(target, TopK) and slopes.written_out(divergence(slice(0))) is not None
    terms = [_Term(objective.type, values, objective.kd_ratio, slope if graded else None)]  # type: ignore[attr-defined]
    if objective.kd_ratio < 1:
        terms.append(_likelihood(batch, 1 - objective.kd_ratio))
    return models.loss(student, batch, terms, per[RESPONSE], (target,))


def _sampled(objective: config.SampledKL, models: _Models) -> Step:
    estimate = {"k2": objectives.k2, "k3": objectives.k3}[objective.estimator]

    def loss(student: nn.Module, batch: Batch, per: Mapping[str, float]) -> Loss:
        tokens, scores = batch.targets_BT[batch.mask_BT], batch.values["teacher"][batch.mask_BT]
        term = _of_tokens(objective.type, tokens, lambda log_q, rows: estimate(log_q, scores[rows]))
        return models.loss(student, batch, [term], per[RESPONSE])

    return Step(loss)


def _minillm(objective: config.MiniLLM, models: _Models) -> Step:
    clip = objective.clip

    def loss(student: nn.Module, batch: Batch, per: Mapping[str, float]) -> Loss:
        mask = batch.mask_BT
        tokens, behaviour = batch.targets_BT[mask], batch.values["behaviour"][mask]
        rewards_BT = batch.values["teacher"] - batch.values["student"]
        advantage = objectives.returns(rewards_BT, mask, length_normalisation=objective.length_normalisation)[mask]

        def policy(log_q: Tensor, rows: slice) -> Tensor:
            return objectives.policy_gradient(log_q, behaviour[rows], advantage[rows], clip=clip)

        def importance(logits: Tensor, rows: slice) -> Tensor | float:
            if not objective.single_step_weight:
                return 1.0
            log_q = objectives.token_log_probs(logits.detach(), tokens[rows])
            return objectives.clipped_ratio(log_q, behaviour[rows], clip=clip)

        def single_step(logits: Tensor, teachers: tuple[Any, ...], rows: slice) -> Tensor:
            return objectives.reverse_kl(logits, teachers[0]) * importance(logits, rows)

        def single_step_slope(logits: Tensor, teachers: tuple[Any, ...], rows: slice) -> tuple[Tensor, Tensor]:
            weight = torch.as_tensor(importance(logits, rows), dtype=logits.dtype)
            exact, slope = slopes.reverse_kl(logits, teachers[0])
            return exact * weight, slope.mul_(weight.unsqueeze(-1))

        terms, teachers = [_of_tokens("policy", tokens, policy)], ()
        if objective.single_step:
            terms.append(_Term("single_step", single_step, slope=single_step_slope))
            teachers = (models.target(batch),)
        found = models.loss(student, batch, terms, per[RESPONSE], teachers)
        if batch.corpus is None:
            return found
        plain = models.loss(student, batch.corpus, [_likelihood(batch.corpus, objective.pt_weight, "corpus")], per[CORPUS])
        return Loss(found.total + plain.total, found.parts | plain.parts)

    return Step(loss)


_STEPS: dict[type, Callable[[Any, _Models], Step]] = {
    config.CrossEntropy: _cross_entropy,
    config.Taid: _taid,
    config.Contrastive: _contrastive,
    config.SampledKL: _sampled,
    config.MiniLLM: _minillm,
}
"""Objectives that need more than two logits; every other is a divergence."""
