"""Student, teacher and the addends of a loss, as every step sees them: the one place where objectives meet models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill.data.batch import Batch
from tadistill.models.forward import Reader
from tadistill.objectives import TaidSchedule, fused_head, slopes, token_log_probs
from tadistill.objectives.fused import Slopes
from tadistill.objectives.targets import Target, TargetMixture, aligned

RESPONSE, CORPUS = "response", "corpus"


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of the update's loss: `total` has a graph, `parts` are its detached addends by name."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One addend: its values (n,) on a small tile, from (student logits, teachers, rows)."""

    name: str
    values: Callable[[Tensor, tuple[Any, ...], slice], Tensor]
    weight: float = 1.0
    slope: Callable[[Tensor, tuple[Any, ...], slice], tuple[Tensor, Tensor]] | None = None
    """The same values with their gradient in the logits (n, V), where that is written out."""


class Models:
    """Student and teacher as a step sees them."""

    def __init__(self, student: PreTrainedModel, teachers: tuple[PreTrainedModel, ...], vocab: int):
        self.student_model, self.teachers, self.vocab = student, teachers, vocab
        self.student = Reader(student)
        self.readers = [Reader(teacher) for teacher in teachers]

    def targets(self, batch: Batch) -> tuple[tuple[Target, ...], TargetMixture | None]:
        """The teachers at the batch's response tokens, as the batch brings them or live, and what several of them make together.

        Those that the batch's mixture leaves out are not run.
        """
        kept, mixture = batch.mixture.kept() if batch.mixture else ([0], None)
        if batch.targets:
            return tuple(batch.targets[k] for k in kept), mixture
        return tuple(self.readers[k].target(self.teachers[k], batch) for k in kept), mixture

    def loss(self, model: nn.Module, batch: Batch, terms: list[Term], per: float, teachers: tuple[Target, ...] = ()) -> Loss:
        """The terms over the batch's response tokens, each sum divided by `per`."""
        hidden = self.student.hidden(model, batch)
        weights = torch.tensor([[t.weight / per] for t in terms], dtype=torch.float32, device=hidden.device)

        def values(student: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
            return torch.stack([t.values(student, targets, rows) for t in terms])

        total, found = fused_head(hidden, self.student.head, values, weights, slopes=_graded(terms), teachers=teachers, vocab=self.vocab)
        sums = (found * weights.to(found.dtype)).sum(1)
        return Loss(total, dict(zip((t.name for t in terms), sums, strict=True)))


def _graded(terms: list[Term]) -> Slopes | None:
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


def of_tokens(name: str, tokens: Tensor, loss: Callable[[Tensor, slice], Tensor], weight: float = 1.0) -> Term:
    """A loss of the tokens' log-probabilities under the student."""

    def values(logits: Tensor, _: tuple[Any, ...], rows: slice) -> Tensor:
        return loss(token_log_probs(logits, tokens[rows]), rows)

    def slope(logits: Tensor, _: tuple[Any, ...], rows: slice) -> tuple[Tensor, Tensor]:
        return slopes.of_tokens(logits, tokens[rows], lambda log_q: loss(log_q, rows))

    return Term(name, values, weight, slope)


def of_divergence(
    name: str,
    function: Callable[..., Tensor],
    mixture: TargetMixture | None,
    weight: float = 1.0,
    factor: Callable[[Tensor, slice], Tensor] | None = None,
) -> Term:
    """A divergence to the teacher or the mixture of teachers, one whose gradient is written out, times a factor per token that no gradient
    goes through."""
    graded = slopes.written_out(function)
    assert graded is not None

    def values(logits: Tensor, teachers: tuple[Any, ...], rows: slice) -> Tensor:
        student, teacher, _ = aligned(logits, teachers, mixture, 1.0)
        found = function(student, teacher)
        return found if factor is None else found * factor(logits.detach(), rows)

    def slope(logits: Tensor, teachers: tuple[Any, ...], rows: slice) -> tuple[Tensor, Tensor]:
        by = None if factor is None else factor(logits, rows)
        student, teacher, _ = aligned(logits, teachers, mixture, 1.0)
        found, gradient = graded(student, teacher)
        return (found, gradient) if by is None else (found * by, gradient.mul_(by.unsqueeze(-1)))

    return Term(name, values, weight, slope)


def likelihood(batch: Batch, weight: float = 1.0, name: str = "cross_entropy") -> Term:
    """Cross-entropy on the batch's own tokens."""
    return of_tokens(name, batch.targets_BT[batch.mask_BT], lambda log_q, _: -log_q, weight)


Prepare = Callable[[list[Batch], int, Callable[[Tensor], Tensor]], list[Batch]]


@dataclass(frozen=True)
class Step:
    """What the loop calls: `loss(student, batch, per)`, where `per` holds the number that sums over tokens are divided by."""

    models: Models
    loss: Callable[[nn.Module, Batch, Mapping[str, float]], Loss]
    schedule: TaidSchedule | None = None
    """State that moves once per update and is saved with the training state."""
    prepare: Prepare = lambda batches, done, total: batches
    """Called once per update with all of this rank's micro-batches, the number of updates before it, and a function that adds a tensor up
    over all ranks."""
    clip: float | None = None
    """Half width of the clip around a probability ratio of 1, where the objective has one."""
