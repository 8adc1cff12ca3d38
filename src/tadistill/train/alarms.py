"""Measure the text that the student samples during training. If the text gets worse, return alarms that say what to change.

The loss does not show that sampled text becomes short or repeats itself. The reverse KL may even fall at the same time, as in MiniLLM's
ablation without length normalisation.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tadistill import objectives
from tadistill.data.batch import Batch
from tadistill.models.teachers import HiddenTeacher
from tadistill.train import spans
from tadistill.train.step import Step, mixture_of
from tadistill.tuning import WATCHED_ROWS

_TOP = 10
_GRAM = 4


def watch(step: Step, batches: list[Batch]) -> dict[str, float]:
    """Return metrics of an update's sampled sequences. Return an empty dict if the text was not sampled in this run.

    p is a token's probability under the teacher, q under the student, q_old under the student at the time of sampling, and behaviour under
    the distribution from which the text was sampled.

    Over all sequences:

    length              tokens per response
    repetition          share of 4-grams that occurred earlier in the same response

    Over the first 8 sequences:

    reverse_kl          mean of the k3 estimator of KL(q || p) over tokens, weighted by q / behaviour (nats)
    reward              mean of log p - log q_old over tokens (nats)
    entropy             entropy of the student's next token (nats)
    teacher_top_mass    probability that the student gives to the teacher's 10 most probable tokens
    weight_min          smallest q_old / behaviour
    weight_max          largest q_old / behaviour
    clip_fraction       share of tokens with q / behaviour outside the objective's interval [1 - clip, 1 + clip]

    If the teacher has another tokenizer, reverse_kl and reward are means over spans (texts between token boundaries that both models have),
    and there is no teacher_top_mass. There is one more metric, over all sequences:

    left_out            share of the student's tokens that are in no span, so no loss compares them with the teacher
    """
    if "student" not in batches[0].values:
        return {}
    rows = sum(len(b.ids_BT) for b in batches)
    found = {"length": sum(float(b.mask_BT.sum()) for b in batches) / rows, "repetition": _repetition(batches)}
    part = batches[0].first(WATCHED_ROWS)
    old, behaviour = part.counted(part.values["student"]), part.counted(part.values["behaviour"])
    weight = (old - behaviour).exp()
    found |= {"weight_min": float(weight.min()), "weight_max": float(weight.max())}
    entropy, top_mass, log_q, log_p = _scored(step, part)
    ratio = (log_q - behaviour).exp()
    found["entropy"] = float(entropy.mean())
    if step.clip is not None:
        found["clip_fraction"] = float(((ratio - 1).abs() > step.clip).float().mean())
    if part.aligned is not None:
        count = spans.counts([b.aligned for b in batches if b.aligned is not None])
        found["left_out"] = count["left_out"] / max(count["tokens"], 1)
        log_q, old, behaviour = (spans.summed(part.aligned, values) for values in (log_q, old, behaviour))
        ratio = (log_q - behaviour).exp()
    if log_p is not None:
        found["reverse_kl"] = float((ratio * objectives.k3(log_q, log_p)).sum() / ratio.sum())
        found["reward"] = float((log_p - old).mean())
    if top_mass is not None:
        found["teacher_top_mass"] = float(top_mass.mean())
    return {f"rollout/{name}": value for name, value in found.items()}


def _scored(step: Step, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    if not batch.shares:
        return _of_teachers(step, batch)
    parts = [_of_teachers(step, batch.of_share(i)) for i in range(len(batch.shares))]
    order = torch.cat([share.loss for share in batch.shares]).argsort()  # back to the order of the whole batch
    entropy, mass, log_q, log_p = (
        None if any(v is None for v in each) else torch.cat([v for v in each if v is not None])[order] for each in zip(*parts, strict=True)
    )
    assert entropy is not None
    assert log_q is not None
    return entropy, mass, log_q, log_p


@torch.no_grad()
def _of_teachers(step: Step, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    models, tokens = step.models, batch.counted(batch.targets_BT)
    exact = all(isinstance(teacher, HiddenTeacher) for teacher in models.teachers)
    known = batch.aligned is not None and "teacher" in batch.values
    teachers = models.targets(batch) if not known and (batch.targets or (models.teachers and exact)) else ()
    beside = teachers if batch.aligned is None else ()  # the teachers' outputs at the student's own tokens
    mixture = mixture_of(batch)

    def values(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        q = objectives.log_probs(logits)
        found = [-(q.exp() * q).sum(-1), objectives.token_log_probs(logits, tokens[rows])]
        if targets:
            target = targets[0] if mixture is None else mixture.logits(targets)
            top = target.topk(min(_TOP, target.shape[-1]), dim=-1).indices
            found += [q.gather(-1, top).exp().sum(-1), objectives.token_log_probs(target, tokens[rows])]
        return torch.stack(found)

    hidden = models.student.hidden(models.student_model, batch)
    weights = torch.ones(4 if beside else 2, 1, device=hidden.device)
    _, found = objectives.fused_head(hidden, models.student.head, values, weights, teachers=beside, vocab=models.vocab)
    if batch.aligned is not None:
        return found[0], None, found[1], spans.teacher_log_probs(models.again, batch, teachers)
    if beside:
        entropy, log_q, top_mass, log_p = found.unbind()
        return entropy, top_mass, log_q, log_p
    if (known := batch.values.get("teacher")) is not None:
        return found[0], None, found[1], batch.counted(known)
    teacher = models.teachers[batch.route[0] if batch.route else 0] if models.teachers else None
    return found[0], None, found[1], None if exact or teacher is None else teacher.scored(batch.of_teacher, models.vocab)[1]


def _repetition(batches: list[Batch]) -> float:
    total = again = 0
    for batch in batches:
        for row, mask in zip(batch.targets_BT.tolist(), batch.mask_BT.tolist(), strict=True):
            tokens = [t for t, m in zip(row, mask, strict=True) if m]
            grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
            total, again = total + len(grams), again + len(grams) - len(set(grams))
    return again / total if total else 0.0


class Alarms:
    """Alarms about sampled text. If a metric becomes much worse than at the start, an alarm is given once. It is given again only if the
    metric has recovered in between."""

    def __init__(self, *, minillm: bool) -> None:
        self.first: dict[str, float] = {}
        self.active: list[str] = []
        self.given: list[str] = []
        more = "raise sampler.alpha, keep objective.length_normalisation on, " if minillm else ""
        self.advice = f"{more}lower optim.lr, or stop earlier; the loss does not show this problem"

    def check(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Return the alarms that are new at this update, one line each."""
        if "rollout/length" not in metrics:
            return []
        self.first = self.first or dict(metrics)
        now, then = ({name.removeprefix("rollout/"): value for name, value in m.items()} for m in (metrics, self.first))
        found: dict[str, str] = {}
        if now["repetition"] > max(0.3, 2 * then["repetition"]):
            found["collapse"] = f"{now['repetition']:.0%} of 4-grams repeat within a response (at first {then['repetition']:.0%})"
        if not 0.5 * then["length"] <= now["length"] <= 2 * then["length"]:
            found["length drift"] = f"responses have {now['length']:.0f} tokens (at first {then['length']:.0f})"
        if now["entropy"] < 0.3 * then["entropy"]:
            found["entropy drop"] = f"the entropy is {now['entropy']:.2f} nats per token (at first {then['entropy']:.2f})"
        if now.get("left_out", 0) > max(0.1, 2 * then.get("left_out", 0)):
            share = f"{now['left_out']:.0%} of the sampled tokens have no loss (at first {then.get('left_out', 0):.0%})"
            found["text that the teacher cannot read"] = f"{share}, because the teacher's tokenizer cannot write their text"
        new = [f"update {step}: {name}: {text}; {self.advice}" for name, text in found.items() if name not in self.active]
        self.active, self.given = list(found), self.given + new
        return new

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "active": self.active, "given": self.given}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.first, self.active, self.given = dict(state["first"]), list(state["active"]), list(state["given"])
