"""A KV cache for decoding: transformers' own DynamicCache, whose layers write in place instead of growing by concatenation.

The length of a rollout is bounded, so the room for it can be taken once. Concatenation copies everything that is there at every
token and layer, which on a CPU is a fourth of a small model's decoding time.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class InPlaceLayer(DynamicLayer):
    """Keys and values (rows, heads, capacity, head size), of which the first `length` places are filled."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the room when the shapes are known."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], self.capacity, states.shape[-1])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write behind what is there; views of everything filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        start, new = self.length, key_states.shape[-2]
        self.length = start + new
        # `narrow` costs half of an index expression, which counts at two tensors a layer and token
        self.keys.narrow(2, start, new).copy_(key_states)
        self.values.narrow(2, start, new).copy_(value_states)
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length


class Places:
    """Where the rows of a call are in the cache, for all of its layers."""

    def __init__(self):
        self.index, self.length = torch.empty(0), 0

    def set(self, columns_Bw: Tensor, length: int, capacity: int) -> None:
        """The columns of the next call, and how many columns it sees, of `capacity` in each row."""
        rows = torch.arange(len(columns_Bw), device=columns_Bw.device)
        self.index, self.length = (columns_Bw + rows.unsqueeze(1) * capacity).flatten(), length


class OffsetLayer(DynamicLayer):
    """Keys and values (rows, capacity, heads, head size), written for each row at columns of its own.

    Columns come before heads, so that the places to write are the same ones for any number of heads.
    """

    def __init__(self, capacity: int, places: Places):
        super().__init__()
        self.capacity, self.places = capacity, places

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the room when the shapes are known; zeros, because what nobody may see is still multiplied (by a weight of 0)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros((states.shape[0], self.capacity, states.shape[1], states.shape[3])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write at the places of this call; views of all columns that it sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found = []
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            assert room is not None
            room.view(-1, *room.shape[2:]).index_copy_(0, self.places.index, states.transpose(1, 2).flatten(0, 1))
            found.append(room.narrow(1, 0, self.places.length).transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Columns seen."""
        return self.places.length


def _wide(layer: object, capacity: int) -> bool:
    """Whether the layer keeps all of `capacity` tokens. A sliding window at least that wide is no window."""
    return type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= capacity)


def plain_cache(config: PreTrainedConfig, capacity: int, places: Places) -> DynamicCache | None:
    """A cache of which every row is written at its own places; None for models that do not attend to all of `capacity` tokens."""
    cache = DynamicCache(config=config)
    if not cache.layers or not all(_wide(layer, capacity) for layer in cache.layers):
        return None
    cache.layers[:] = [OffsetLayer(capacity, places) for _ in cache.layers]
    return cache


def in_place_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """The model's dynamic cache with in-place layers for every layer that attends to all of `capacity` tokens.

    Narrower windows, and the states of recurrent layers, stay transformers' own.
    """
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if _wide(layer, capacity):
            cache.layers[i] = InPlaceLayer(capacity)
    return cache
