"""A KV cache for decoding: transformers' own DynamicCache, whose layers write in place instead of growing by concatenation.

The length of a rollout is bounded, so the room for it can be taken once. Concatenation copies everything that is there at every
token and layer, which on a CPU is a fourth of a small model's decoding time.
"""

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


def keeps_all(layer: object, capacity: int) -> bool:
    """Whether transformers' layer attends to all of `capacity` tokens. A sliding window at least that wide is no window."""
    return type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= capacity)


def in_place_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """The model's dynamic cache with in-place layers for every layer that attends to all of `capacity` tokens.

    Narrower windows, and the states of recurrent layers, stay transformers' own.
    """
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if keeps_all(layer, capacity):
            cache.layers[i] = InPlaceLayer(capacity)
    return cache
