"""MiniLLM's loss from a batch of rollouts: policy gradient, single-step term and language modelling, each part a field of the config.

Axes: B sequences, T positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from tadistill import objectives
from tadistill.config.objective import MiniLLM
from tadistill.data.batch import Batch
from tadistill.train.meter import phase
from tadistill.train.terms import CORPUS, RESPONSE, Loss, Models, Step, likelihood, of_divergence, of_tokens


def minillm(config: MiniLLM, models: Models, max_new_tokens: int) -> Step:
    """The step of MiniLLM on rollouts of at most `max_new_tokens`."""
    return Step(models, partial(_loss, config, models), prepare=partial(_advantages, config, max_new_tokens), clip=config.clip)


def _advantages(config: MiniLLM, max_new_tokens: int, batches: list[Batch], _: int, total: Callable[[Tensor], Tensor]) -> list[Batch]:
    """The batches with `values["advantage"]`: returns of scaled rewards, whitened over the update if asked for."""
    found = [_returns(config, batch) for batch in batches]
    if config.whitening != "none":
        rows, tokens = sum(len(b.ids_BT) for b in batches), sum(int(b.mask_BT.sum()) for b in batches)
        here = sum(objectives.moments(a, b.mask_BT) for a, b in zip(found, batches, strict=True))
        places = rows * max_new_tokens if config.whitening == "padded" else tokens
        *sums, count = total(torch.cat([torch.as_tensor(here), torch.tensor([float(places)]).double()])).unbind()
        found = [objectives.whiten(a, torch.stack(sums), float(count)) for a in found]
    return [replace(b, values=b.values | {"advantage": a}) for a, b in zip(found, batches, strict=True)]


def _returns(config: MiniLLM, batch: Batch) -> Tensor:
    rewards = (batch.values["teacher"] - batch.values["student"]) / config.reward_scale
    if config.reward_clip is not None:
        rewards = rewards.clamp(-config.reward_clip, config.reward_clip)
    return objectives.returns(
        rewards,
        batch.mask_BT,
        discount=config.discount,
        include_current=config.include_current,
        length_normalisation=config.length_normalisation,
    )


def _loss(config: MiniLLM, models: Models, student: nn.Module, batch: Batch, per: Mapping[str, float]) -> Loss:
    mask = batch.mask_BT
    tokens, behaviour, advantage = batch.targets_BT[mask], batch.values["behaviour"][mask], batch.values["advantage"][mask]
    if not config.clip_weight:  # the weight q_old / p~ moves out of the ratio and into what the ratio multiplies
        old = batch.values["student"][mask]
        weight, behaviour = (old - behaviour).exp(), old
    else:
        weight = torch.ones_like(behaviour)

    def policy(log_q: Tensor, rows: slice) -> Tensor:
        surrogate = objectives.policy_gradient(log_q, behaviour[rows], advantage[rows], clip=config.clip, clipping=config.clipping)
        return weight[rows] * surrogate

    def importance(logits: Tensor, rows: slice) -> Tensor:
        log_q = objectives.token_log_probs(logits, tokens[rows])
        return weight[rows] * objectives.clipped_ratio(log_q, behaviour[rows], clip=config.clip)

    terms, teachers = [of_tokens("policy", tokens, policy)], ()
    if config.single_step:
        teachers, mixture = models.targets(batch)
        terms.append(of_divergence("single_step", objectives.reverse_kl, mixture, factor=importance if config.single_step_weight else None))
    found = models.loss(student, batch, terms, per[RESPONSE], teachers)
    if batch.corpus is None:
        return found
    with phase("corpus"):
        plain = _corpus_loss(config, models, student, batch.corpus, per[CORPUS])
    return Loss(found.total + plain.total, found.parts | plain.parts)


def _corpus_loss(config: MiniLLM, models: Models, student: nn.Module, corpus: Batch, per: float) -> Loss:
    """L_PT in a forward pass of its own: joined to the rollouts' it would pad the shorter of both, and hold both graphs at once."""
    share = config.pt_kd_ratio
    terms, teachers = [], ()
    if share < 1:
        terms.append(likelihood(corpus, config.pt_weight * (1 - share), "corpus"))
    if share > 0:
        teachers, mixture = models.targets(corpus)
        terms.append(of_divergence("corpus_kl", objectives.forward_kl, mixture, config.pt_weight * share))
    return models.loss(student, corpus, terms, per, teachers)
