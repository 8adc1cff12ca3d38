"""Faster sampling from a mixture of student and teacher: each model reads only when it has to, several tokens at a time.

A token's own uniform decides which model draws it (`Mixture.switch`), so it is known in advance which model chooses which token of a row.
The model whose turn it is continues a row alone. The other model reads these tokens later: at its own turn, or for the record. One model is
called at a time, for all rows that it can continue: the student until half of the rows wait for the teacher. The teacher then reads several
tokens of every row in one call. This costs little more than one token of each row, because a call moves all weights and starts all
operations once. Tokens and probabilities are those of the loop in `generate`, which reads every token with both models
(`tests/unit/rollout/test_lazy.py`). It takes 79 to 93 % of that loop's time on a CPU (docs/benchmarks/mixture-cpu.md), and pads nothing.

Axes: N tokens of a call, M of them that predict, B rows in the batch, R all rows, w most tokens of a row in a call, L columns of the cache,
V vocabulary, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tadistill.rollout.draw import Mixture, Record, draw, keeps_all, log_prob
from tadistill.tuning import COMPACT_BELOW, PACKED_FAMILIES

_BEHIND = 8  # most tokens of a row that a model may have left to read; bounds the memory of a call
_WAITING = 0.5  # share of the rows that wait for the teacher when it is called
_ATTENTION = "tadistill_packed"


def possible(model: PreTrainedModel, capacity: int) -> bool:
    """Return True if the model can be called as here: a tested family, `sdpa` attention, and no window narrower than the text."""
    # Other families may have what packing breaks: ALiBi (distances from a mask of two axes), recurrent states, no position ids, or a bias
    # of their own in attention. A family joins the set when tests/unit/rollout/test_lazy.py covers it.
    layers = DynamicCache(config=model.config).layers
    known = model.config.model_type in PACKED_FAMILIES and model.config._attn_implementation == "sdpa"
    return known and len(layers) > 0 and all(keeps_all(layer, capacity) for layer in layers)


class _Side:
    """A model, and how far it has read."""

    def __init__(self, name: str, model: PreTrainedModel, rows: int, capacity: int):
        self.name, self.packed = name, _Packed(model, rows, capacity)
        self.done = np.zeros(rows, np.int64)  # (R,) the next column to read


class _Text:
    """The tokens of all rows, and the rows that are still in the batch."""

    def __init__(self, prompts: list[tuple[int, ...]], uniforms_RT: np.ndarray, guide: Mixture, record: Record):
        self.record, self.rows = record, np.arange(len(prompts))
        self.start = np.array([len(prompt) for prompt in prompts])  # (R,) column of the first token of the response
        self.end = self.start.copy()
        self.ids = np.zeros((len(prompts), self.start.max() + uniforms_RT.shape[1]), np.int64)
        for b, prompt in enumerate(prompts):
            self.ids[b, : len(prompt)] = prompt
        self.teachers, self.uniforms = (a.numpy() for a in guide.switch(torch.from_numpy(uniforms_RT)))

    def going(self) -> np.ndarray:
        """Return which rows (B,) have not ended."""
        return self.end[self.rows] - self.start[self.rows] < self.record.lengths[self.rows]

    def turns(self, side: _Side) -> np.ndarray:
        """Return the rows (B,) whose next token this model draws."""
        t = np.minimum(self.end - self.start, self.uniforms.shape[1] - 1)[self.rows]
        return self.going() & (self.teachers[self.rows, t] == (side.name == "teacher"))

    def unread(self, side: _Side) -> np.ndarray:
        """Return the number of tokens (B,) that the model has to read to score the tokens that are there, and to draw one on its turn."""
        return self.end[self.rows] + self.turns(side) - 1 - side.done[self.rows]


@torch.inference_mode()
def fill(
    record: Record, student: PreTrainedModel, prompts: list[tuple[int, ...]], uniforms_RT: np.ndarray, vocab: int, guide: Mixture
) -> None:
    """Sample a response to every prompt, into `record`."""
    text = _Text(prompts, uniforms_RT, guide, record)
    sides = [_Side(name, model, *text.ids.shape) for name, model in (("student", student), ("teacher", guide.teacher))]
    while (side := _next(text, sides)) is not None:
        _read(text, side, vocab)
        _compact(text, sides)
    log_q, log_p = (record.values[side.name].astype(np.float64) for side in sides)
    with np.errstate(divide="ignore"):  # alpha of 0 or 1
        record.values["behaviour"][:] = np.logaddexp(np.log1p(-guide.alpha) + log_q, np.log(guide.alpha) + log_p)


def _next(text: _Text, sides: list[_Side]) -> _Side | None:
    """Return the model to call next, or None when everything is sampled and scored."""
    behind = [text.unread(side).max() for side in sides]
    for side, tokens in zip(sides, behind, strict=True):
        if tokens > _BEHIND:
            return side
    going, waiting = text.going().sum(), text.turns(sides[1]).sum()
    if going:
        return sides[int(waiting >= _WAITING * going)]
    return next((side for side, tokens in zip(sides, behind, strict=True) if tokens > 0), None)


def _read(text: _Text, side: _Side, vocab: int) -> None:
    """Let the model read all that it can: it scores the tokens that are there, and draws the next token of the rows whose turn it has."""
    rows, counts = text.rows, text.unread(side)
    b_N = np.repeat(np.arange(len(rows)), counts)
    row_N = rows[b_N]
    columns_N = np.arange(len(b_N)) - np.repeat(counts.cumsum() - counts - side.done[rows], counts)
    chooses_N = columns_N == text.end[row_N] - 1  # the last token of a row is read only on the model's turn
    scores_N = ~chooses_N & (columns_N >= text.start[row_N] - 1)
    chosen = chooses_N.nonzero()[0]
    predict_M = np.concatenate([chosen, scores_N.nonzero()[0]])
    logits_MV, hidden_MH = side.packed(text.ids[row_N, columns_N], b_N, columns_N, predict_M)
    row_M, column_M = row_N[predict_M], columns_N[predict_M] + 1
    log_p = []
    for start in range(0, len(predict_M), len(rows)):  # in parts no larger than a call for one token of every row
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
    """Drop the rows that have ended and are scored, once they are enough to pay for the copy."""
    going = text.going()
    for side in sides:
        going |= text.unread(side) > 0
    if 0 < going.sum() < COMPACT_BELOW * len(going):
        text.rows = text.rows[going]
        for side in sides:
            side.packed.keep(going.nonzero()[0])


# --- one call for some tokens of some rows ------------------------------------------------------------------------------


class _Places:
    """The places in the cache of the tokens of one call."""

    def __init__(self, rows_N: np.ndarray, columns_N: np.ndarray, rows: int, capacity: int, device: torch.device):
        counts = np.bincount(rows_N, minlength=rows)
        slots = np.arange(len(rows_N)) - np.repeat(counts.cumsum() - counts, counts)
        self.shape = rows, int(counts.max())
        self.length = int(columns_N.max()) + 1
        inside = rows_N * self.shape[1] + slots
        upload = torch.from_numpy(np.stack([rows_N * capacity + columns_N, inside, columns_N])).to(device)
        self.in_cache_N, self.in_rectangle_N, self.columns_N = upload
        self.full = len(rows_N) == rows * self.shape[1]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores, (B, 1, w, L): a token sees its row up to itself."""
        columns = self.spread(self.columns_N)
        hidden = torch.arange(self.length, device=columns.device) > columns.unsqueeze(-1)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)

    def spread(self, values_N: Tensor) -> Tensor:
        """Return (N, ...) as (B, w, ...), zero where there is no token."""
        shape = (*self.shape, *values_N.shape[1:])
        if self.full:
            return values_N.reshape(shape)
        return values_N.new_zeros(shape).flatten(0, 1).index_copy_(0, self.in_rectangle_N, values_N).view(shape)

    def pack(self, values_Bw: Tensor) -> Tensor:
        """Return (B, w, ...) as (N, ...), the inverse of `spread`."""
        flat = values_Bw.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.in_rectangle_N)


class _Layer(DynamicLayer):
    """Keys and values (rows, capacity, heads, head size): columns before heads, so that places are the same for any number of heads."""

    def __init__(self, packed: "_Packed"):
        super().__init__()
        self.packed, self.length = packed, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the room when the shapes are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, columns = self.packed.rows, self.packed.capacity
        # zeros, because places that nobody may see are still multiplied, by a weight of 0
        self.keys, self.values = (
            states.new_zeros((rows, columns, states.shape[1], states.shape[3])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write (1, heads, N, head size) at the tokens' places, and return views (B, heads, L, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places, found = self.packed.places, []
        assert places is not None
        self.length = places.length
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            assert room is not None
            room.flatten(0, 1).index_copy_(0, places.in_cache_N, states[0].transpose(0, 1))
            found.append(room.narrow(1, 0, places.length).transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Return the columns that the last call saw."""
        return self.length


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, places: _Places, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend from packed queries (1, heads, N, head size) to the cache of all rows."""
    query_BhwD = places.spread(query[0].transpose(0, 1)).transpose(1, 2)
    out_BwhD, _ = sdpa_attention_forward(module, query_BhwD, key, value, attention_mask, **kwargs)
    return places.pack(out_BwhD).unsqueeze(0), None


# Registered for the whole process, because transformers finds an attention by its name only.
AttentionInterface.register(_ATTENTION, _attention)


class _Packed:
    """A model with a cache of `rows` x `capacity` tokens, which is called for some tokens of some rows.

    The tokens go in as a single row of N with position ids. All parts of a model except attention see tokens one by one, so the packing
    does not concern them, and no work is spent on padding. In attention the new keys and values are written at their rows' own places of
    the cache, the queries are spread over (B, w) for transformers' own `sdpa` with a mask, and its result is packed again.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int):
        self.model, self.rows, self.capacity = model, rows, capacity
        self.cache = DynamicCache(config=model.config)
        self.places: _Places | None = None
        self.cache.layers[:] = [_Layer(self) for _ in self.cache.layers]

    def __call__(self, ids_N: np.ndarray, rows_N: np.ndarray, columns_N: np.ndarray, predict_M: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the logits (M, V) of the tokens after some of the N, and the inputs (M, H) of the output head there.

        Args:
            rows_N: in ascending order.
            columns_N: in ascending order within a row.
            predict_M: indices of the tokens that predict.
        """
        device, config = self.model.device, self.model.config
        self.places = places = _Places(rows_N, columns_N, self.rows, self.capacity, device)
        implementation = config._attn_implementation
        config._attn_implementation = _ATTENTION  # only for this call: training uses the model's own
        try:
            with _head_at(self.model, torch.from_numpy(predict_M).to(device)) as hidden:
                out = self.model(
                    input_ids=torch.from_numpy(ids_N).to(device).unsqueeze(0),
                    attention_mask=places.mask(self.model.dtype),
                    position_ids=places.columns_N.unsqueeze(0),
                    past_key_values=self.cache,
                    use_cache=True,
                    places=places,  # models hand unknown arguments on to the attention
                )
        finally:
            config._attn_implementation = implementation
        return out.logits[0], hidden[0]

    def keep(self, rows: np.ndarray) -> None:
        """Drop all other rows."""
        self.rows = len(rows)
        self.cache.batch_select_indices(torch.from_numpy(rows).to(self.model.device))


@contextmanager
def _head_at(model: PreTrainedModel, tokens_M: Tensor) -> Iterator[list[Tensor]]:
    """Let the output head work on some of the tokens only, and collect its input."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    seen: list[Tensor] = []

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0][0, tokens_M])
        return (seen[0].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()
