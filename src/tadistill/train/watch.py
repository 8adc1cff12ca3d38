"""Watching on-policy training: what the student writes now, and alarms that say what to change.

The loss alone does not tell: reverse KL falls even while text collapses into short or repeated strings (MiniLLM, ablation without
length normalisation).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tadistill import objectives
from tadistill.data.batch import Batch
from tadistill.train.terms import Step

_ROWS = 8  # sequences that are scored; lengths and repetition are of the whole batch
_TOP = 10
_GRAM = 4


def watch(step: Step, batch: Batch) -> dict[str, float]:
    """Metrics of a micro-batch of sampled sequences; none of them where the batch holds no text of the student.

    reverse_kl    per token, by the k3 estimator, weighted by q / behaviour (nats)
    reward        log p - log q at the time of sampling, per token (nats)
    entropy       of the student's next token (nats); teacher_top_mass: what it gives to the teacher's 10 most probable tokens
    length        tokens a response; repetition: share of its 4-grams that occurred in it before
    weight_min, weight_max    q_old / behaviour; clip_fraction: share of tokens whose q / behaviour is outside the objective's clip
    """
    if "student" not in batch.values:
        return {}
    found = {"length": float(batch.mask_BT.sum()) / len(batch.ids_BT), "repetition": _repetition(batch)}
    part = batch.first(_ROWS).to(step.models.student_model.device)
    mask = part.mask_BT
    old, behaviour = part.values["student"][mask], part.values["behaviour"][mask]
    weight = (old - behaviour).exp()
    found |= {"weight_min": float(weight.min()), "weight_max": float(weight.max())}
    entropy, top_mass, log_q, log_p = _scored(step, part)
    ratio = (log_q - behaviour).exp()
    found |= {"entropy": float(entropy.mean())}
    if log_p is not None:
        found |= {
            "reverse_kl": float((ratio * objectives.k3(log_q, log_p)).sum() / ratio.sum()),
            "reward": float((log_p - old).mean()),
        }
    if top_mass is not None:
        found["teacher_top_mass"] = float(top_mass.mean())
    if step.clip is not None:
        found["clip_fraction"] = float(((ratio - 1).abs() > step.clip).float().mean())
    return {f"rollout/{name}": value for name, value in found.items()}


@torch.no_grad()
def _scored(step: Step, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Per token: entropy, mass on the teacher's top tokens, log q and log p of the token; None for what needs a teacher and has none."""
    models, tokens = step.models, batch.targets_BT[batch.mask_BT]
    has_states = batch.signal is not None or models.teacher is not None
    teachers = (models.target(batch),) if has_states else ()

    def values(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        q = objectives.log_probs(logits)
        found = [-(q.exp() * q).sum(-1), objectives.token_log_probs(logits, tokens[rows])]
        for target in targets:
            top = target.topk(min(_TOP, target.shape[-1]), dim=-1).indices
            found += [q.gather(-1, top).exp().sum(-1), objectives.token_log_probs(target, tokens[rows])]
        return torch.stack(found)

    hidden = models.student.hidden(models.student_model, batch)
    weights = torch.ones(4 if teachers else 2, 1, device=hidden.device)
    _, found = objectives.fused_head(hidden, models.student.head, values, weights, teachers=teachers, vocab=models.vocab)
    if teachers:
        entropy, log_q, top_mass, log_p = found.unbind()
        return entropy, top_mass, log_q, log_p
    known = batch.values.get("teacher")
    return found[0], None, found[1], known[batch.mask_BT] if known is not None else None


def _repetition(batch: Batch) -> float:
    """The share of n-grams within a response that are not its first ones of their kind."""
    total = again = 0
    for row, mask in zip(batch.targets_BT.tolist(), batch.mask_BT.tolist(), strict=True):
        tokens = [t for t, m in zip(row, mask, strict=True) if m]
        grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
        total, again = total + len(grams), again + len(grams) - len(set(grams))
    return again / total if total else 0.0


class Alarms:
    """Compares watched metrics with the first ones of a run; each alarm is given once until its cause is gone."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.active: list[str] = []

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        """One line per alarm that is new."""
        if "rollout/length" not in metrics:
            return []
        first = self.first = self.first or dict(metrics)
        now, then = (lambda name: metrics[f"rollout/{name}"]), (lambda name: first[f"rollout/{name}"])
        causes = {
            "collapse": now("repetition") > max(0.3, 2 * then("repetition")),
            "length drift": not 0.5 * then("length") <= now("length") <= 2 * then("length"),
            "entropy drop": now("entropy") < 0.3 * then("entropy"),
        }
        lines = {
            "collapse": f"collapse: {now('repetition'):.0%} of 4-grams repeat within a response, at first {then('repetition'):.0%}; "
            "lower optim.lr, raise sampler.alpha, or stop earlier (reverse KL alone does not show this)",
            "length drift": f"length drift: responses have {now('length'):.0f} tokens, at first {then('length'):.0f}; keep "
            "objective.length_normalisation on, raise sampler.alpha, or lower optim.lr",
            "entropy drop": f"entropy drop: {now('entropy'):.2f} nats a token, at first {then('entropy'):.2f}; lower optim.lr, use fewer "
            "inner_epochs, or add objective.pt_weight",
        }
        new = [lines[name] for name, holds in causes.items() if holds and name not in self.active]
        self.active = [name for name, holds in causes.items() if holds]
        return new

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"first": self.first, "active": self.active}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.first, self.active = dict(state.get("first", {})), list(state.get("active", []))
