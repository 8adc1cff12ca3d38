"""Memory of sampling: the models' KV caches, and the record of tokens and log-probabilities on the host.

Axes: B sequences, T positions, H hidden, N of the tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class InPlaceLayer(DynamicLayer):
    """Keys and values (rows, heads, capacity, head size), of which the first `length` places are filled.

    transformers' own layer grows by concatenation, which copies everything at every token and layer: on a CPU a quarter of a small model's
    decoding time. The length of a rollout is bounded, so this layer takes its room once. transformers' StaticCache does too, but it attends
    to the whole room at every token, and it cannot drop rows.
    """

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
        """Write after the filled places, and return views of everything filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        start, new = self.length, key_states.shape[-2]
        self.length = start + new
        # `narrow` takes half the time of an index expression, which matters for two tensors per layer and token
        self.keys.narrow(2, start, new).copy_(key_states)
        self.values.narrow(2, start, new).copy_(value_states)
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.length


def keeps_all(layer: object, capacity: int) -> bool:
    """Return True if transformers' layer attends to all of `capacity` tokens, as it does with a sliding window at least that wide."""
    return type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= capacity)


def in_place_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """Return the model's dynamic cache with an in-place layer for every layer that attends to all of `capacity` tokens.

    Narrower windows and the states of recurrent layers stay transformers' own.
    """
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if keeps_all(layer, capacity):
            cache.layers[i] = InPlaceLayer(capacity)
    return cache


@dataclass(frozen=True)
class Rollout:
    """A sampled response (with EOS, when it was reached), and numbers for each of its tokens.

    `values` are log-probabilities in nats, float32: `student` and, with a guide, `teacher` are the models' own (temperature 1,
    whole shared vocabulary); `behaviour` belongs to the distribution that was sampled from, after warping and mixing.
    `hidden` (T, H) is the input of the guiding teacher's output head for each token, on the CPU in the teacher's dtype.
    """

    tokens: tuple[int, ...]
    values: dict[str, np.ndarray]
    hidden: Tensor | None = None


class Record:
    """The tokens and numbers of all rows, on the host, also of rows that have left the batch."""

    def __init__(self, rows: int, steps: int, eos: tuple[int, ...], models: Iterable[str]):
        self.tokens = np.zeros((rows, steps), np.int64)
        self.lengths = np.full(rows, steps)
        self.eos = np.array(eos, np.int64)
        self.values = {name: np.zeros((rows, steps), np.float32) for name in ("behaviour", *models)}
        self.hidden: Tensor | None = None  # made when its size is known

    def say(self, rows: np.ndarray, t: np.ndarray | int, tokens: np.ndarray) -> None:
        """Write the rows' tokens at their places `t`; the length of a row that has ended does not change."""
        self.tokens[rows, t] = tokens
        ended = (tokens[:, None] == self.eos).any(1) & (self.lengths[rows] > t)
        self.lengths[rows[ended]] = np.broadcast_to(t, rows.shape)[ended] + 1

    def score(self, rows: np.ndarray, t: np.ndarray | int, log_p: dict[str, Tensor], hidden_NH: Tensor | None) -> None:
        """Write the log-probabilities and hidden states of the rows' tokens at their places `t`."""
        for name, log_p_N in log_p.items():
            self.values[name][rows, t] = log_p_N.cpu().numpy()
        if hidden_NH is not None:
            if self.hidden is None:
                self.hidden = torch.zeros(*self.tokens.shape, hidden_NH.shape[1], dtype=hidden_NH.dtype)
            self.hidden[torch.from_numpy(rows), torch.as_tensor(t)] = hidden_NH.cpu()

    def rollouts(self) -> list[Rollout]:
        """Return the responses, each with its own memory."""
        found = []
        for b, n in enumerate(self.lengths.tolist()):
            values = {name: array[b, :n].copy() for name, array in self.values.items()}
            hidden = None if self.hidden is None else self.hidden[b, :n].clone()
            found.append(Rollout(tuple(self.tokens[b, :n].tolist()), values, hidden))
        return found
