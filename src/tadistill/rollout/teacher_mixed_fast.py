"""Faster sampling from a mixture of student and teacher. Each model is called less often, and processes several tokens per call.

A token's random number selects the model that draws it (`Mixture.switch`). So it is known in advance which model draws which token. The
selected model continues a row alone. The other model processes the row's new tokens later: when it must draw the row's next token, or when
it computes the log-probabilities of these tokens. A call runs one model for many rows. The student is called until half of the rows wait
for the teacher. Then the teacher processes several tokens of every row in one call. Such a call takes little longer than a call with one
token per row, because every call loads the weights once.

Tokens and probabilities equal those of the usual loop of `sample`, in which both models process every token in turn
(tests/unit/rollout/test_teacher_mixed_fast.py). On a CPU, `fill` takes 79 to 93 % of the time of that loop
(docs/benchmarks/mixture-cpu.md).

Axes: N tokens of a call, M tokens of a call whose logits are needed, R all rows, B rows in the batch, w the largest number of tokens
that a row has in a call, L columns of the cache, V vocabulary size, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tadistill.constants import COMPACT_BELOW, PACKED_FAMILIES
from tadistill.models.forward import ROWS, tapped
from tadistill.rollout.decoder import aligned, cache_name, keeps_all
from tadistill.rollout.draw import Mixture, Record, draw, log_prob

_BEHIND = 8  # if a row has more tokens than this that a model has not processed, it is called next; this limits the memory of a call
_WAITING = 0.5  # the teacher is called when this share of the unfinished rows waits for it
_ATTENTION = "tadistill_packed"
_ALIGNS = {"cuda"}  # not on a CPU, where hidden columns cost time, and change the order in which numbers are added


def possible(model: PreTrainedModel, capacity: int) -> bool:
    """Return True if `fill` supports the model.

    Its family must be one of the tested ones, it must use `sdpa` attention, and no sliding window may be shorter than `capacity` tokens.
    """
    # Packing does not work with ALiBi (which computes distances from a two-axis mask), recurrent states, missing position ids, or a model's
    # own attention bias. Add a family to the set only when tests/unit/rollout/test_teacher_mixed_fast.py covers it.
    known = model.config.model_type in PACKED_FAMILIES and model.config._attn_implementation in ("sdpa", ROWS)
    return known and keeps_all(model.config, capacity)


class _Text:
    def __init__(self, prompts: list[tuple[int, ...]], uniforms_RT: np.ndarray, guide: Mixture, record: Record):
        self.record, self.rows = record, np.arange(len(prompts))
        self.start = np.array([len(prompt) for prompt in prompts])  # (R,) column of the first token of the response
        self.end = self.start.copy()
        self.ids = np.zeros((len(prompts), self.start.max() + uniforms_RT.shape[1]), np.int64)
        for b, prompt in enumerate(prompts):
            self.ids[b, : len(prompt)] = prompt
        self.teachers, self.uniforms = (a.numpy() for a in guide.switch(torch.from_numpy(uniforms_RT)))

    def going(self) -> np.ndarray:
        return self.end[self.rows] - self.start[self.rows] < self.record.lengths[self.rows]

    def turns(self) -> tuple[np.ndarray, np.ndarray]:
        # (B,) the rows whose next token the student draws, and those whose next token the teacher draws
        going, t = self.going(), np.minimum(self.end - self.start, self.uniforms.shape[1] - 1)[self.rows]
        teachers = going & self.teachers[self.rows, t]
        return going & ~teachers, teachers

    def unread(self, side: "_Packed", draws: np.ndarray) -> np.ndarray:
        return self.end[self.rows] + draws - 1 - side.done[self.rows]


@torch.inference_mode()
def fill(
    record: Record, student: PreTrainedModel, prompts: list[tuple[int, ...]], uniforms_RT: np.ndarray, vocab: int, guide: Mixture
) -> None:
    """Sample a response to every prompt from the mixture `guide`, and write the responses into `record`."""
    text = _Text(prompts, uniforms_RT, guide, record)
    models = {"student": student, "teacher": guide.teacher}
    sides = [_Packed(name, model, *text.ids.shape) for name, model in models.items()]
    with _packed_attention(*models.values()):
        while (call := _next(text, sides)) is not None:
            _read(text, *call, vocab)
            _compact(text, sides)
    record.settle()
    log_q, log_p = (record.values[side.name].astype(np.float64) for side in sides)
    with np.errstate(divide="ignore"):  # the logarithm of 0 if alpha is 0 or 1
        record.values["behaviour"][:] = np.logaddexp(np.log1p(-guide.alpha) + log_q, np.log(guide.alpha) + log_p)


def _next(text: _Text, sides: "list[_Packed]") -> "tuple[_Packed, np.ndarray] | None":
    # the model that is called next, and how many tokens of each row it reads; None at the end
    turns = text.turns()
    calls = [(side, text.unread(side, draws)) for side, draws in zip(sides, turns, strict=True)]
    for call in calls:
        if call[1].max() > _BEHIND:
            return call
    drawing = [draws.sum() for draws in turns]
    if going := sum(drawing):
        return calls[int(drawing[1] >= _WAITING * going)]
    return next((call for call in calls if call[1].max() > 0), None)


def _read(text: _Text, side: "_Packed", counts: np.ndarray, vocab: int) -> None:
    rows = text.rows
    b_N = np.repeat(np.arange(len(rows)), counts)
    row_N = rows[b_N]
    columns_N = np.arange(len(b_N)) - np.repeat(counts.cumsum() - counts - side.done[rows], counts)
    chooses_N = columns_N == text.end[row_N] - 1  # a model reads the last token of a row only if it draws the next one
    scores_N = ~chooses_N & (columns_N >= text.start[row_N] - 1)
    chosen = chooses_N.nonzero()[0]
    predict_M = np.concatenate([chosen, scores_N.nonzero()[0]])
    row_M, column_M = row_N[predict_M], columns_N[predict_M] + 1
    numbers = text.uniforms[row_M[: len(chosen)], column_M[: len(chosen)] - text.start[row_M[: len(chosen)]]]
    call = _Call(text.ids[row_N, columns_N], b_N, columns_N, predict_M, text.ids[row_M, column_M], numbers)
    logits_MV, hidden_MH, next_M, uniforms = side(call)
    log_p = []
    for start in range(0, len(predict_M), len(rows)):  # at most as many logits at a time as in a call for one token of every row
        part = slice(start, start + len(rows))
        z = logits_MV[part, :vocab].float()
        p = z.softmax(-1)
        if start == 0 and len(chosen):
            drawn = draw(p[: len(chosen)], uniforms)
            next_M = torch.cat([drawn, next_M[len(chosen) :]])
            _say(text, row_M[: len(chosen)], drawn.cpu().numpy())
        log_p.append(log_prob(z, p, next_M[part]))
    hidden = hidden_MH if side.name == "teacher" else None
    if log_p:  # a call that only reads prompts predicts nothing
        text.record.score(row_M, column_M - text.start[row_M], {side.name: torch.cat(log_p)}, hidden)
    side.done[rows] += counts


def _say(text: _Text, rows: np.ndarray, tokens: np.ndarray) -> None:
    text.record.say(rows, text.end[rows] - text.start[rows], tokens)
    text.ids[rows, text.end[rows]] = tokens
    text.end[rows] += 1


def _compact(text: _Text, sides: "list[_Packed]") -> None:
    going = text.going()
    if going.all():
        return
    for side, draws in zip(sides, text.turns(), strict=True):
        going |= text.unread(side, draws) > 0
    if 0 < going.sum() < COMPACT_BELOW * len(going):
        text.rows = text.rows[going]
        for side in sides:
            side.keep(going.nonzero()[0])


# --- one call for some tokens of some rows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """The tokens that a model processes in one call. They are sorted by row (`rows_N`), and within a row by column (`columns_N`)."""

    ids_N: np.ndarray
    rows_N: np.ndarray
    """The cache row of each token."""
    columns_N: np.ndarray
    """The position of each token in its row."""
    predict_M: np.ndarray
    """Indices of the tokens whose logits are needed."""
    next_M: np.ndarray
    """The token that follows each token of `predict_M`, or any number if it has not been drawn yet."""
    uniforms: np.ndarray
    """The random numbers (float64) for the tokens that are drawn after this call. Number i draws the token after `predict_M[i]`."""


def columns_of(count: int, device: torch.device) -> int:
    """Return the number of columns that a call or a cache has on this device."""
    return aligned(count) if device.type in _ALIGNS else count


class _Places:
    def __init__(self, call: _Call, rows: int, capacity: int, device: torch.device):
        rows_N, columns_N = call.rows_N, call.columns_N
        counts = np.bincount(rows_N, minlength=rows)
        slots = np.arange(len(rows_N)) - np.repeat(counts.cumsum() - counts, counts)
        self.shape = rows, int(counts.max())
        self.length = columns_of(int(columns_N.max()) + 1, device)
        self.full = len(rows_N) == rows * self.shape[1]
        in_cache, in_rectangle = rows_N * capacity + columns_N, rows_N * self.shape[1] + slots
        token = np.zeros(rows * self.shape[1], np.int64)  # a place without a token has any token, and `pack` leaves it out
        token[in_rectangle] = np.arange(len(rows_N))
        # one copy to the device instead of seven; the bits of a float64 number fit into an int64
        parts = [token, call.ids_N, in_cache, in_rectangle, columns_N, call.predict_M, call.next_M, call.uniforms.view(np.int64)]
        upload = torch.from_numpy(np.concatenate(parts)).to(device).split([len(part) for part in parts])
        self.token, self.ids_N, self.in_cache_N, self.in_rectangle_N, self.columns_N, self.predict_M, self.next_M = upload[:-1]
        self.uniforms = upload[-1].view(torch.float64)

    def mask(self, dtype: torch.dtype) -> Tensor:
        columns = self.spread(self.columns_N)
        hidden = torch.arange(self.length, device=columns.device) > columns.unsqueeze(-1)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)

    def spread(self, values_N: Tensor) -> Tensor:
        found = values_N if self.full else values_N.index_select(0, self.token)
        return found.reshape(*self.shape, *values_N.shape[1:])

    def pack(self, values_Bw: Tensor) -> Tensor:
        flat = values_Bw.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.in_rectangle_N)


class _Layer(DynamicLayer):
    # keys and values (rows, capacity, heads, head size): columns precede heads, so positions do not depend on the number of heads
    def __init__(self, packed: "_Packed"):
        super().__init__()
        self.packed, self.length = packed, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, columns = self.packed.rows, self.packed.capacity
        # zeros, because masked positions are still multiplied by a weight of 0, and NaN times 0 is NaN
        self.keys, self.values = (
            states.new_zeros((rows, columns, states.shape[1], states.shape[3])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
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
        return self.length


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, places: _Places, **kwargs: Any
) -> tuple[Tensor, None]:
    query_BhwD = places.spread(query[0].transpose(0, 1)).transpose(1, 2)
    out_BwhD, _ = sdpa_attention_forward(module, query_BhwD, key, value, attention_mask, **kwargs)
    return places.pack(out_BwhD).unsqueeze(0), None


# Registered for the whole process, because transformers finds an attention function only by its name.
AttentionInterface.register(_ATTENTION, _attention)


@contextmanager
def _packed_attention(*models: PreTrainedModel) -> Iterator[None]:
    # not for each call, because transformers looks through the whole configuration when the attention changes
    usual = [(model.config, model.config._attn_implementation) for model in models]
    try:
        for config, _ in usual:
            config._attn_implementation = _ATTENTION
        yield
    finally:
        for config, implementation in usual:
            config._attn_implementation = implementation


class _Packed:
    """A model with a KV cache of `rows` x `capacity` tokens. A call may contain a different number of tokens for each row.

    The model gets all N tokens of a call as a single row without padding. Only attention must know which token belongs to which row: it
    arranges the queries as (B, w), runs transformers' `sdpa` with a mask, and turns the result back into a single row.
    """

    def __init__(self, name: str, model: PreTrainedModel, rows: int, capacity: int):
        self.name, self.model, self.rows, self.capacity = name, model, rows, columns_of(capacity, model.device)
        self.done = np.zeros(rows, np.int64)  # (R,) the next column that the model has to read
        self.device, self.dtype = model.device, model.dtype  # once, because transformers looks through all parameters for them
        self.cache, self.cache_name = DynamicCache(config=model.config), cache_name(model)
        self.places: _Places | None = None
        self.cache.layers[:] = [_Layer(self) for _ in self.cache.layers]

    def __call__(self, call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the model on the tokens of `call`. Return four tensors on the model's device: the logits at the tokens `predict_M`, the
        inputs of the output head at these tokens, `next_M`, and `uniforms`."""
        self.places = places = _Places(call, self.rows, self.capacity, self.device)
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        with tapped(head, at_M=places.predict_M) as seen:
            out = self.model(
                input_ids=places.ids_N.unsqueeze(0),
                attention_mask=places.mask(self.dtype),
                position_ids=places.columns_N.unsqueeze(0),
                use_cache=True,
                places=places,  # models pass unknown arguments on to the attention function
                **{self.cache_name: self.cache},
            )
        return out.logits[0], seen[0][0], places.next_M, places.uniforms

    def keep(self, rows: np.ndarray) -> None:
        self.rows = len(rows)
        self.cache.batch_select_indices(torch.from_numpy(rows).to(self.device))
