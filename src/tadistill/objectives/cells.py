"""A divergence between the next tokens of two models with different vocabularies, about the cell of the next token.

`tadistill.objectives.spelling` explains cells. The probability of a cell is the sum over its tokens.

Axes: n tokens of a tile, V student's vocabulary, W teacher's vocabulary, C cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tadistill.objectives.divergence import at_least_float32, dot, through_softmax
from tadistill.objectives.targets import WITH_SLOPE
from tadistill.tuning import LOG_ZERO

LEAST = 1e-15
"""A smaller probability counts as this one. So text that one model cannot write has a finite loss."""


@dataclass(frozen=True)
class Cells:
    """The cells of two vocabularies, for some places at which both models predict a token."""

    student: Tensor
    """The cell (V,) of each token."""
    teacher: Tensor
    """(W,)"""
    count: int
    which: Tensor
    """For each place, a row of `excluded`, or -1 for a place at which no cell is excluded."""
    excluded: Tensor
    """(..., width) bool. True for a symbol with which no cell can begin there, because another token would have been written before."""
    first: Tensor
    """The first symbol (C,) of each cell's root."""

    def divergence(self, divergence: Callable[..., Tensor], student: Tensor, teacher: Tensor, rows: slice, **settings: Any) -> Tensor:
        """Return the divergence (n,) at the places `rows`. `student` (n, V) and `teacher` (n, W) are logits."""
        temperature = settings.pop("temperature", 1.0)
        sides = (_sums(z / temperature, own, self.count)[1] for z, own in ((student, self.student), (teacher, self.teacher)))
        return divergence(*(self._logits(mass, rows) for mass in sides), **settings)

    def with_slope(
        self, divergence: Callable[..., Tensor], student: Tensor, teacher: Tensor, rows: slice, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the values (n,) and their gradients with respect to the student's logits (n, V)."""
        temperature = settings.pop("temperature", 1.0)
        probs, mass = _sums(student / temperature, self.student, self.count)
        others = _sums(teacher / temperature, self.teacher, self.count)[1]
        values, slope = WITH_SLOPE[divergence](self._logits(mass, rows), self._logits(others, rows), **settings)
        each = torch.where(mass < LEAST, 0.0, slope / mass.clamp(min=LEAST)).index_select(1, self.student)
        return values, through_softmax(probs, each, dot(each, probs), temperature)

    def _logits(self, mass: Tensor, rows: slice) -> Tensor:
        logits, which = mass.clamp(min=LEAST).log(), self.which[rows]
        if not len(self.excluded):
            return logits
        return logits.masked_fill((self.excluded[which] & (which >= 0).unsqueeze(1)).index_select(1, self.first), LOG_ZERO)


def _sums(logits: Tensor, cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the probabilities (n, V) of the tokens, and (n, C) of the cells."""
    probs = at_least_float32(logits).softmax(-1)
    return probs, torch.zeros(len(probs), count, dtype=probs.dtype, device=probs.device).index_add(1, cells, probs)
