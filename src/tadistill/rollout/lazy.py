"""Sampling from a mixture of student and teacher in which each model reads only when it has to, several tokens at a time.

The switch of the mixture lies in a token's own uniform, so it is known in advance which model chooses which token of a row
(`Mixture.switch`). A row goes on with the model whose turn it is, at a position of its own, and the other model reads those tokens
later: it needs to have read them only when its turn comes, or for the record. One model is called at a time, for all rows: the
student until half of the rows wait for the teacher. A call of the teacher then reads some tokens of every row, and costs little more
than a call for one: at such sizes the weights have to be moved, and each operation started, once per call.

A call is rectangular: every row is given the last w tokens that it can use, and what it has read before is written again into the same
places of the cache. Axes: B rows in the batch, R all rows, w columns of a call, L columns of the cache, N predictions, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill.rollout.cache import Places, plain_cache
from tadistill.rollout.draw import Mixture, draw, log_prob
from tadistill.rollout.record import Record

_BEHIND = 8  # columns that a model may have to read; bounds the memory of a call
_COMPACT_BELOW = 0.8  # share of unfinished rows under which copying the caches pays for itself


def possible(models: list[PreTrainedModel], capacity: int) -> bool:
    """Whether the models can be told for every row where it is: by a mask for each query, position ids, and a cache with places.

    Windows narrower than the text, recurrent states, ALiBi (whose distances come from a mask of two axes) and attention without
    masks cannot.
    """
    return all(
        model.config._attn_implementation in ("sdpa", "eager")
        and not getattr(model.config, "alibi", False)
        and "position_ids" in inspect.signature(model.forward).parameters
        and plain_cache(model.config, capacity, Places()) is not None
        for model in models
    )


class _Side:
    """A model, its cache, and how far it is."""

    def __init__(self, name: str, model: PreTrainedModel, rows: int, capacity: int):
        self.name, self.model = name, model
        self.places, self.capacity = Places(), capacity
        self.cache = plain_cache(model.config, capacity, self.places)
        self.done = np.zeros(rows, np.int64)  # (R,) the first column that has to be read for what is not yet predicted

    def logits(self, ids: np.ndarray, columns: np.ndarray, first: np.ndarray, wanted: tuple[np.ndarray, ...]) -> tuple[Tensor, Tensor]:
        """(N, V) logits at the `wanted` (row, place) of the (B, w) `ids`, and what the head is given there.

        Args:
            columns: of the ids; also where they are in the cache.
            first: (B,) column of a row's first token: what is before is padding.
        """
        device, dtype = self.model.device, self.model.dtype
        at, first_B1 = torch.from_numpy(columns).to(device), torch.from_numpy(first).to(device).unsqueeze(1)
        length = int(columns.max()) + 1
        self.places.set(at, length, self.capacity)
        keys = torch.arange(length, device=device)
        seen = (keys <= at.unsqueeze(2)) & (keys >= first_B1).unsqueeze(1)
        # added to the scores, which every implementation of attention understands; finite, because padding sees nothing
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
        with _head_at(self.model, *(torch.from_numpy(index).to(device) for index in wanted)) as hidden:
            out = self.model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=mask,
                position_ids=(at - first_B1).clamp_(min=0),
                past_key_values=self.cache,
                use_cache=True,
            )
        return out.logits[0], hidden[0]


class _Text:
    """All rows' tokens, every prompt ending at `width`, and which rows are still in the batch."""

    def __init__(self, prompts: list[tuple[int, ...]], uniforms_RT: np.ndarray, guide: Mixture, record: Record):
        rows, self.width = len(prompts), max(map(len, prompts))
        self.record = record
        self.ids = np.zeros((rows, self.width + uniforms_RT.shape[1]), np.int64)
        for b, prompt in enumerate(prompts):
            self.ids[b, self.width - len(prompt) : self.width] = prompt
        self.first = self.width - np.array([len(prompt) for prompt in prompts])
        self.end = np.full(rows, self.width)
        self.rows = np.arange(rows)
        self.teachers, self.uniforms = (a.numpy() for a in guide.switch(torch.from_numpy(uniforms_RT)))

    def turns(self, name: str) -> np.ndarray:
        """(B,) rows whose next token this model chooses."""
        t = self.end[self.rows] - self.width
        going = t < self.record.lengths[self.rows]
        teachers = self.teachers[self.rows, np.minimum(t, self.teachers.shape[1] - 1)]
        return going & (teachers if name == "teacher" else ~teachers)

    def unread(self, side: _Side) -> np.ndarray:
        """(B,) columns that the model has to read for all that it can predict."""
        return self.end[self.rows] + self.turns(side.name) - 1 - side.done[self.rows]


@torch.inference_mode()
def fill(
    record: Record, student: PreTrainedModel, prompts: list[tuple[int, ...]], uniforms_RT: np.ndarray, vocab: int, guide: Mixture
) -> None:
    """Sample a response to every prompt."""
    text = _Text(prompts, uniforms_RT, guide, record)
    rows, capacity = text.ids.shape
    sides = [_Side(name, model, rows, capacity) for name, model in (("student", student), ("teacher", guide.teacher))]
    while (side := _next(text, sides)) is not None:
        _read(text, side, vocab)
        _compact(text, sides)
    log_q, log_p = (record.values[side.name].astype(np.float64) for side in sides)
    with np.errstate(divide="ignore"):  # alpha of 0 or 1
        record.values["behaviour"][:] = np.logaddexp(np.log1p(-guide.alpha) + log_q, np.log(guide.alpha) + log_p)


def _next(text: _Text, sides: list[_Side]) -> _Side | None:
    """The model to be called; None when all is sampled and scored."""
    behind = [text.unread(side).max() for side in sides]
    for side, columns in zip(sides, behind, strict=True):
        if columns > _BEHIND:
            return side
    turns = [text.turns(side.name).sum() for side in sides]
    if any(turns):
        return sides[int(turns[1] >= turns[0])]
    return next((side for side, columns in zip(sides, behind, strict=True) if columns > 0), None)


def _read(text: _Text, side: _Side, vocab: int) -> None:
    """Let the model read all that it can: it scores the tokens that are there and chooses those whose turn is its own."""
    rows, mine = text.rows, text.turns(side.name)
    upto = text.end[rows] + mine - 1
    w = (upto - side.done[rows]).max()
    # a row with fewer than w tokens gets some behind its text as well: they are overwritten before anything sees them
    columns = np.maximum(upto - w, 0)[:, None] + np.arange(w)
    chooses = (columns == text.end[rows, None] - 1) & mine[:, None]
    scores = (columns >= np.maximum(side.done[rows], text.width - 1)[:, None]) & (columns < text.end[rows, None] - 1)
    wanted = tuple(np.concatenate(pair) for pair in zip(chooses.nonzero(), scores.nonzero(), strict=True))
    logits_NV, hidden_NH = side.logits(text.ids[rows[:, None], columns], columns, text.first[rows], wanted)
    b, t = rows[wanted[0]], columns[wanted] + 1 - text.width
    choices, log_p = mine.sum(), []
    for start in range(0, len(b), len(rows)):  # as many at a time as a call for one token of every row has
        part = slice(start, start + len(rows))
        z = logits_NV[part, :vocab].float()
        p = z.softmax(-1)
        chosen = slice(start, max(start, min(part.stop, choices)))
        if chosen.start < chosen.stop:
            uniforms = torch.from_numpy(text.uniforms[b[chosen], t[chosen]]).to(p.device)
            tokens = draw(p[: chosen.stop - start], uniforms).cpu().numpy()
            text.ids[b[chosen], t[chosen] + text.width] = tokens
            text.record.say(b[chosen], t[chosen], tokens)
        log_p.append(log_prob(z, p, torch.from_numpy(text.ids[b[part], t[part] + text.width]).to(p.device)))
    text.record.score(b, t, {side.name: torch.cat(log_p)}, hidden_NH if side.name == "teacher" else None)
    text.end[rows] += mine
    side.done[rows] = text.end[rows] - 1


def _compact(text: _Text, sides: list[_Side]) -> None:
    """Drop the rows that are finished and scored, when they are enough."""
    rows = text.rows
    going = text.end[rows] - text.width < text.record.lengths[rows]
    for side in sides:
        going |= side.done[rows] < text.end[rows] - 1
    if 0 < going.sum() < _COMPACT_BELOW * len(rows):
        text.rows = rows[going]
        for side in sides:
            side.cache.batch_select_indices(torch.from_numpy(going.nonzero()[0]).to(side.model.device))


@contextmanager
def _head_at(model: PreTrainedModel, rows_N: Tensor, places_N: Tensor) -> Iterator[list[Tensor]]:
    """Lets the output head work on the given positions alone, as one row of N; collects what it is given."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    seen: list[Tensor] = []

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0][rows_N, places_N])
        return (seen[0].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()
