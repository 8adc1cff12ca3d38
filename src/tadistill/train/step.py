"""From a method to a step, which maps a batch to the micro-batch's share of the loss, computed by the fused head.

To add an objective: one pure function in `tadistill.objectives`, one config class in `tadistill.config.objective`, one line in
`DIVERGENCES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill import objectives, rng
from tadistill.config import objective as config
from tadistill.config.method import Method
from tadistill.config.sampling import Rounds
from tadistill.data.batch import Batch
from tadistill.objectives import TaidSchedule, slopes
from tadistill.objectives.targets import TargetMixture, TopK, aligned
from tadistill.train.minillm import minillm
from tadistill.train.terms import CORPUS, RESPONSE, Loss, Models, Prepare, Step, Term, likelihood, of_tokens

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


def make_step(method: Method, student: PreTrainedModel, teachers: tuple[PreTrainedModel, ...], vocab: int, *, seed: int = 0) -> Step:
    """The step of a method.

    Args:
        teachers: none for cross-entropy, for scores from rollouts, and where batches bring the teacher's signal; several, the original
            one first, for dense guidance.
        seed: addresses the draws of teachers that are left out.
    """
    models, sampler = Models(student, teachers, vocab), method.sampler
    if isinstance(method.objective, config.MiniLLM):
        assert isinstance(sampler, Rounds)
        step = minillm(method.objective, models, sampler.max_new_tokens)
    else:
        step = _STEPS.get(type(method.objective), _divergence)(method.objective, models)
    if method.dense is None or len(teachers) < 2:
        return step
    mixture = TargetMixture(method.dense.kind, method.dense.weights or (1.0,) * len(teachers), method.dense.drop)
    return replace(step, prepare=partial(_mix, mixture, seed, step.prepare))


def _mix(
    mixture: TargetMixture, seed: int, then: Prepare, batches: list[Batch], done: int, total: Callable[[Tensor], Tensor]
) -> list[Batch]:
    """Give an update's batches their mixture of teachers, and the reward of sampled tokens under it."""
    if mixture.drop:
        mixture = mixture.drawn(rng.generator(seed, "teachers left out", done))

    def mixed(batch: Batch) -> Batch:
        scores = [batch.values[name] for k in range(len(mixture.weights)) if (name := f"teacher {k}") in batch.values]
        values = batch.values | ({"teacher": mixture.token_scores(scores)} if scores else {})
        return replace(batch, values=values, mixture=mixture, corpus=mixed(batch.corpus) if batch.corpus else None)

    return then([mixed(b) for b in batches], done, total)


def counts(batches: list[Batch]) -> dict[str, int]:
    """Tokens that count, over this rank's micro-batches."""
    corpora = [b.corpus for b in batches if b.corpus]
    return {RESPONSE: sum(int(b.mask_BT.sum()) for b in batches), CORPUS: sum(int(c.mask_BT.sum()) for c in corpora)}


def _cross_entropy(_: config.CrossEntropy, models: Models) -> Step:
    return Step(models, lambda student, batch, per: models.loss(student, batch, [likelihood(batch)], per[RESPONSE]))


_Rowwise = Callable[[slice], Callable[..., Tensor]]
"""The divergence for a tile of a batch's tokens."""


def _divergence(objective: config.Divergence, models: Models) -> Step:
    function = partial(DIVERGENCES[type(objective)], **objective.model_dump(exclude={"type", "kd_ratio", "temperature"}))
    return Step(models, partial(_towards_teacher, models, objective, lambda _: lambda rows: function))


def _taid(objective: config.Taid, models: Models) -> Step:
    schedule = TaidSchedule(start=objective.start, end=objective.end, rate=objective.rate, decay=objective.decay)
    return Step(
        models, partial(_towards_teacher, models, objective, lambda _: lambda rows: partial(objectives.taid, t=schedule.t)), schedule
    )


def _contrastive(objective: config.Contrastive, models: Models) -> Step:
    def of(batch: Batch) -> _Rowwise:
        from_teacher = batch.values["from_teacher"][batch.mask_BT] > 0
        return lambda rows: partial(objectives.contrastive, from_teacher=from_teacher[rows], alpha=objective.alpha)

    return Step(models, partial(_towards_teacher, models, objective, of))


def _towards_teacher(
    models: Models,
    objective: config.Divergence,
    divergence_of: Callable[[Batch], _Rowwise],
    student: nn.Module,
    batch: Batch,
    per: Mapping[str, float],
) -> Loss:
    """kd_ratio x divergence + (1 - kd_ratio) x cross-entropy."""
    divergence, (teachers, mixture) = divergence_of(batch), models.targets(batch)

    def values(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        *sides, left = aligned(logits, targets, mixture, objective.temperature)
        return divergence(rows)(*sides, temperature=left)

    def slope(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> tuple[Tensor, Tensor]:
        graded = slopes.written_out(divergence(rows))
        assert graded is not None
        *sides, left = aligned(logits, targets, mixture, objective.temperature)
        return graded(*sides, temperature=left)

    graded = not isinstance(teachers[0], TopK) and slopes.written_out(divergence(slice(0))) is not None
    terms = [Term(objective.type, values, objective.kd_ratio, slope if graded else None)]  # type: ignore[attr-defined]
    if objective.kd_ratio < 1:
        terms.append(likelihood(batch, 1 - objective.kd_ratio))
    return models.loss(student, batch, terms, per[RESPONSE], teachers)


def _sampled(objective: config.SampledKL, models: Models) -> Step:
    estimate = {"k2": objectives.k2, "k3": objectives.k3}[objective.estimator]

    def loss(student: nn.Module, batch: Batch, per: Mapping[str, float]) -> Loss:
        tokens, scores = batch.targets_BT[batch.mask_BT], batch.values["teacher"][batch.mask_BT]
        term = of_tokens(objective.type, tokens, lambda log_q, rows: estimate(log_q, scores[rows]))
        return models.loss(student, batch, [term], per[RESPONSE])

    return Step(models, loss)


_STEPS: dict[type, Callable[[Any, Models], Step]] = {
    config.CrossEntropy: _cross_entropy,
    config.Taid: _taid,
    config.Contrastive: _contrastive,
    config.SampledKL: _sampled,
}
"""Objectives that need more than two logits; every other is a divergence."""
