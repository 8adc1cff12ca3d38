"""Compare two models with different vocabularies by the cell of the next token.

A cell is a set of tokens of both vocabularies. All tokens of a cell begin with the same symbols (bytes), which are the root of the cell.
For example, the cell with the root `the` has the student's tokens `the` and `then`, and the teacher's token `the`. A model's probability
of a cell is the sum of the model's probabilities of the cell's tokens. In the example, this is P(the) + P(then) for the student, and P(the)
for the teacher. `tadistill.objectives.spelling` has another example.

Axes: X places where both models predict a token, n places of a tile, V and W vocabulary sizes of student and teacher, C cells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tadistill.objectives.divergence import at_least_float32, dot, through_softmax
from tadistill.objectives.next_symbol import LEAST
from tadistill.objectives.targets import WITH_SLOPE
from tadistill.tuning import LOG_ZERO


@dataclass(frozen=True)
class Cells:
    """The cells (sets of tokens with the same beginning) of two vocabularies, and the cells that are excluded at each place of a text."""

    student: Tensor
    """The cell (V,) of each of the student's tokens."""
    teacher: Tensor
    """The cell (W,) of each of the teacher's tokens."""
    count: int
    """The number C of cells."""
    which: Tensor
    """The row (X,) of `excluded` for each place, or -1 for a place at which no cell is excluded."""
    excluded: Tensor
    """(..., width) bool. A row is a place with excluded cells, and a column is a symbol (byte or event). True excludes all cells that begin
    with the symbol, because the symbol could continue the token before the place (`SpelledPair.longer`). `symbol_divergence` compares the
    models on such symbols."""
    first: Tensor
    """The first symbol (C,) of each cell's root, with which all tokens of the cell begin."""

    def divergence(self, divergence: Callable[..., Tensor], student: Tensor, teacher: Tensor, rows: slice, **settings: Any) -> Tensor:
        """Return the divergence (n,) between distributions over cells at the places `rows`, from logits (n, V) and (n, W) over tokens."""
        temperature = settings.pop("temperature", 1.0)
        sides = (_sums(z / temperature, own, self.count)[1] for z, own in ((student, self.student), (teacher, self.teacher)))
        return divergence(*(self._logits(mass, rows) for mass in sides), **settings)

    def with_slope(
        self, divergence: Callable[..., Tensor], student: Tensor, teacher: Tensor, rows: slice, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what `divergence` returns, (n,), and its gradient with respect to the student's logits, (n, V)."""
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
    """Return the probabilities of the tokens (n, V), and of the cells (n, C)."""
    probs = at_least_float32(logits).softmax(-1)
    return probs, torch.zeros(len(probs), count, dtype=probs.dtype, device=probs.device).index_add(1, cells, probs)
