"""One call of a stock transformers model for some tokens of some rows, as many and wherever each row has them.

The tokens go in as a single row of N with position ids. All parts of a model but attention see tokens one by one, so they neither know
nor care; and no work is spent on padding. In attention the new keys and values are written at their rows' own places of the cache, the
queries are spread over (B, w) for transformers' own `sdpa` with a mask, and its result is packed again.
Axes: N tokens, M of them that predict, B rows in the batch, w most tokens of a row, L columns of the cache, V vocabulary, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tadistill.rollout.cache import keeps_all
from tadistill.tuning import PACKED_FAMILIES

_NAME = "tadistill_packed"


class _Places:
    """Where the tokens of the current call belong."""

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
        """(B, 1, w, L) to be added to the scores: a token sees its row up to itself."""
        columns = self.spread(self.columns_N)
        hidden = torch.arange(self.length, device=columns.device) > columns.unsqueeze(-1)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)

    def spread(self, values_N: Tensor) -> Tensor:
        """(N, …) as (B, w, …), zero where there is no token."""
        shape = (*self.shape, *values_N.shape[1:])
        if self.full:
            return values_N.reshape(shape)
        return values_N.new_zeros(shape).flatten(0, 1).index_copy_(0, self.in_rectangle_N, values_N).view(shape)

    def pack(self, values_Bw: Tensor) -> Tensor:
        """The inverse."""
        flat = values_Bw.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.in_rectangle_N)


_current: ContextVar[_Places] = ContextVar("places of the tokens in the current call")


class _Layer(DynamicLayer):
    """Keys and values (rows, capacity, heads, head size): columns before heads, so that places are the same for any number of heads."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the room when the shapes are known; zeros, because what nobody may see is still multiplied, by a weight of 0."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = _current.get().shape[0]
        self.keys, self.values = (
            states.new_zeros((rows, self.capacity, states.shape[1], states.shape[3])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write (1, heads, N, head size) at the tokens' places; views (B, heads, L, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places, found = _current.get(), []
        self.length = places.length
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            assert room is not None
            room.flatten(0, 1).index_copy_(0, places.in_cache_N, states[0].transpose(0, 1))
            found.append(room.narrow(1, 0, places.length).transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Columns that the last call saw."""
        return self.length


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Of packed queries (1, heads, N, head size) on the cache of all rows."""
    places = _current.get()
    query_BhwD = places.spread(query[0].transpose(0, 1)).transpose(1, 2)
    out_BwhD, _ = sdpa_attention_forward(module, query_BhwD, key, value, attention_mask, **kwargs)
    return places.pack(out_BwhD).unsqueeze(0), None


AttentionInterface.register(_NAME, _attention)


def possible(model: PreTrainedModel, capacity: int) -> bool:
    """Whether the model can be called like this: a family that is tested, `sdpa` attention, no window narrower than the text.

    Others may bring what packing breaks: ALiBi, whose distances come from a mask of two axes, recurrent states, no position ids, a bias
    of their own in attention. A family joins the list with its name in `tests/unit/rollout/test_lazy.py`.
    """
    layers = DynamicCache(config=model.config).layers
    known = model.config.model_type in PACKED_FAMILIES and model.config._attn_implementation == "sdpa"
    return known and len(layers) > 0 and all(keeps_all(layer, capacity) for layer in layers)


class Packed:
    """A model with a cache of `rows` x `capacity` tokens."""

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int):
        self.model, self.rows, self.capacity = model, rows, capacity
        self.cache = DynamicCache(config=model.config)
        self.cache.layers[:] = [_Layer(capacity) for _ in self.cache.layers]

    def __call__(self, ids_N: np.ndarray, rows_N: np.ndarray, columns_N: np.ndarray, predict_M: np.ndarray) -> tuple[Tensor, Tensor]:
        """(M, V) logits of the tokens after some of the N, and (M, H) what the output head is given there.

        Args:
            rows_N: in ascending order, and the columns too within a row.
            predict_M: which of the tokens predict.
        """
        device, config = self.model.device, self.model.config
        places = _Places(rows_N, columns_N, self.rows, self.capacity, device)
        token, implementation = _current.set(places), config._attn_implementation
        config._attn_implementation = _NAME
        try:
            with _head_at(self.model, torch.from_numpy(predict_M).to(device)) as hidden:
                out = self.model(
                    input_ids=torch.from_numpy(ids_N).to(device).unsqueeze(0),
                    attention_mask=places.mask(self.model.dtype),
                    position_ids=places.columns_N.unsqueeze(0),
                    past_key_values=self.cache,
                    use_cache=True,
                )
        finally:
            config._attn_implementation = implementation
            _current.reset(token)
        return out.logits[0], hidden[0]

    def keep(self, rows: np.ndarray) -> None:
        """Drop all other rows."""
        self.rows = len(rows)
        self.cache.batch_select_indices(torch.from_numpy(rows).to(self.model.device))


@contextmanager
def _head_at(model: PreTrainedModel, tokens_M: Tensor) -> Iterator[list[Tensor]]:
    """Lets the output head work on some of the tokens only; collects what it is given."""
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
