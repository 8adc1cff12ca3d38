"""Sampling from a mixture of student and teacher in which each model reads only when it has to, several tokens at a time.

The switch of the mixture lies in a token's own uniform, so it is known in advance which model chooses which token of a row
(`Mixture.switch`). A row goes on with the model whose turn it is, at a position of its own, and the other model reads those tokens
later: it needs to have read them only when its turn comes, or for the record. One model is called at a time, for all rows that can go
on with it: the student until half of the rows wait for the teacher. The teacher then reads some tokens of every row at once, which costs
little more than one of each: the weights have to be moved, and each operation started, once per call.
Axes: B rows in the batch, R all rows, N tokens of a call, M of them that predict, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tadistill.rollout.draw import Mixture, draw, log_prob
from tadistill.rollout.packed import Packed
from tadistill.rollout.record import Record
from tadistill.tuning import COMPACT_BELOW

_BEHIND = 8  # tokens of a row that a model may have to read; bounds the memory of a call
_WAITING = 0.5  # share of the rows


class _Side:
    """A model, and how far it is."""

    def __init__(self, name: str, model: PreTrainedModel, rows: int, capacity: int):
        self.name, self.packed = name, Packed(model, rows, capacity)
        self.done = np.zeros(rows, np.int64)  # (R,) the first column that has to be read for what is not yet predicted


class _Text:
    """All rows' tokens, and which rows are still in the batch."""

    def __init__(self, prompts: list[tuple[int, ...]], uniforms_RT: np.ndarray, guide: Mixture, record: Record):
        self.record, self.rows = record, np.arange(len(prompts))
        self.start = np.array([len(prompt) for prompt in prompts])  # (R,) column of the first token of the response
        self.end = self.start.copy()
        self.ids = np.zeros((len(prompts), self.start.max() + uniforms_RT.shape[1]), np.int64)
        for b, prompt in enumerate(prompts):
            self.ids[b, : len(prompt)] = prompt
        self.teachers, self.uniforms = (a.numpy() for a in guide.switch(torch.from_numpy(uniforms_RT)))

    def going(self) -> np.ndarray:
        """(B,) rows that have not ended."""
        return self.end[self.rows] - self.start[self.rows] < self.record.lengths[self.rows]

    def turns(self, side: _Side) -> np.ndarray:
        """(B,) rows whose next token this model chooses."""
        t = np.minimum(self.end - self.start, self.uniforms.shape[1] - 1)[self.rows]
        return self.going() & (self.teachers[self.rows, t] == (side.name == "teacher"))

    def unread(self, side: _Side) -> np.ndarray:
        """(B,) tokens that the model has to read for all that it can predict: tokens that are there, and one more if it is its turn."""
        return self.end[self.rows] + self.turns(side) - 1 - side.done[self.rows]


@torch.inference_mode()
def fill(
    record: Record, student: PreTrainedModel, prompts: list[tuple[int, ...]], uniforms_RT: np.ndarray, vocab: int, guide: Mixture
) -> None:
    """Sample a response to every prompt."""
    text = _Text(prompts, uniforms_RT, guide, record)
    sides = [_Side(name, model, *text.ids.shape) for name, model in (("student", student), ("teacher", guide.teacher))]
    while (side := _next(text, sides)) is not None:
        _read(text, side, vocab)
        _compact(text, sides)
    log_q, log_p = (record.values[side.name].astype(np.float64) for side in sides)
    with np.errstate(divide="ignore"):  # alpha of 0 or 1
        record.values["behaviour"][:] = np.logaddexp(np.log1p(-guide.alpha) + log_q, np.log(guide.alpha) + log_p)


def _next(text: _Text, sides: list[_Side]) -> _Side | None:
    """The model to be called; None when all is sampled and scored."""
    behind = [text.unread(side).max() for side in sides]
    for side, tokens in zip(sides, behind, strict=True):
        if tokens > _BEHIND:
            return side
    going, waiting = text.going().sum(), text.turns(sides[1]).sum()
    if going:
        return sides[int(waiting >= _WAITING * going)]
    return next((side for side, tokens in zip(sides, behind, strict=True) if tokens > 0), None)


def _read(text: _Text, side: _Side, vocab: int) -> None:
    """Let the model read all that it can: it scores the tokens that are there and chooses those whose turn is its own."""
    rows, counts = text.rows, text.unread(side)
    b_N = np.repeat(np.arange(len(rows)), counts)
    row_N = rows[b_N]
    columns_N = np.arange(len(b_N)) - np.repeat(counts.cumsum() - counts - side.done[rows], counts)
    chooses_N = columns_N == text.end[row_N] - 1  # read only where it is the model's turn
    scores_N = ~chooses_N & (columns_N >= text.start[row_N] - 1)
    chosen = chooses_N.nonzero()[0]
    predict_M = np.concatenate([chosen, scores_N.nonzero()[0]])
    logits_MV, hidden_MH = side.packed(text.ids[row_N, columns_N], b_N, columns_N, predict_M)
    row_M, column_M = row_N[predict_M], columns_N[predict_M] + 1
    log_p = []
    for start in range(0, len(predict_M), len(rows)):  # as many at a time as a call for one token of every row has
        part = slice(start, start + len(rows))
        z = logits_MV[part, :vocab].float()
        p = z.softmax(-1)
        if start == 0 and len(chosen):
            _choose(text, row_M[: len(chosen)], p[: len(chosen)])
        log_p.append(log_prob(z, p, torch.from_numpy(text.ids[row_M[part], column_M[part]]).to(p.device)))
    hidden = hidden_MH if side.name == "teacher" else None
    text.record.score(row_M, column_M - text.start[row_M], {side.name: torch.cat(log_p)}, hidden)
    side.done[rows] += counts


def _choose(text: _Text, rows: np.ndarray, weights_MV: Tensor) -> None:
    """Draw the rows' next tokens."""
    t = text.end[rows] - text.start[rows]
    tokens = draw(weights_MV, torch.from_numpy(text.uniforms[rows, t]).to(weights_MV.device)).cpu().numpy()
    text.record.say(rows, t, tokens)
    text.ids[rows, text.end[rows]] = tokens
    text.end[rows] += 1


def _compact(text: _Text, sides: list[_Side]) -> None:
    """Drop the rows that have ended and are scored, when they are enough."""
    going = text.going()
    for side in sides:
        going |= text.unread(side) > 0
    if 0 < going.sum() < COMPACT_BELOW * len(going):
        text.rows = text.rows[going]
        for side in sides:
            side.packed.keep(going.nonzero()[0])
