"""Choose how a model processes a text token by token: which memory of earlier tokens it uses, and whether prompts are padded.

Most models keep keys and values of every token. Others keep a recurrent state (Mamba, RWKV), join tokens into blocks (DeepSeek-V4), or keep
nothing (the first GPT). In some models, padding on the left changes the logits. `way_of` needs no list of model families. It tries several
ways on the loaded model, from fast to slow. It returns the first way whose logits equal those of one forward pass over the whole text.

Axes: B sequences, T positions, V vocabulary size.
"""

import inspect
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from tadistill.models.architectures import is_full
from tadistill.models.forward import apart, evaluating, rounded, taken, trying

# lengths of the prompts on which ways are tried: with padding, with more tokens than a small block or window, and with equal lengths, of
# which two are left after one has ended
_LENGTHS = (14, 10, 10, 10, 7)
_TIMES = 3  # rounding errors of a right way are at most this many times those of other right ways
_STEPS = 4  # number of predictions that are compared after each of these prompts


@dataclass(frozen=True)
class Way:
    """One way in which a model computes the logits of the next token."""

    memory: Literal["ours", "own", "none"]
    """The memory of earlier tokens. `ours` is transformers' cache with memory that is allocated once (`in_place_cache`). `own` is the
    memory that the model itself returns. With `none`, every new token needs a forward pass over the whole text."""
    padded: bool = True
    """True if rows of different lengths can share a call, with padding on the left."""
    masked: Literal["always", "first"] = "always"
    """The calls that get the padding mask: `always` means every call, and `first` the first call only. Some models with a recurrent state
    must not get the mask in later calls."""
    drops: bool = True
    """True if a finished row can be removed from the memory while other rows continue."""
    slower: str = ""
    """The reason why this way takes more time than the usual one, or an empty text."""


_GROUPS = "padding changes their logits, so only prompts of equal length are answered together"
_GROUPS_TO_THE_END = f"{_GROUPS}, and finished answers stay in the batch, because single rows cannot be removed from their cache"
_WHOLE = "no cache gives the same logits as a forward pass over the whole text, so each new token needs a pass over the whole text"
WAYS = (
    Way("ours"),
    Way("ours", masked="first"),
    Way("own"),
    Way("ours", padded=False, slower=_GROUPS),
    Way("own", padded=False, slower=_GROUPS),
    Way("ours", padded=False, drops=False, slower=_GROUPS_TO_THE_END),
    Way("own", padded=False, drops=False, slower=_GROUPS_TO_THE_END),
    Way("none", slower=_WHOLE),
    Way("none", padded=False, slower=f"{_WHOLE}; {_GROUPS}"),
)
_FOUND: WeakKeyDictionary[PreTrainedModel, Way] = WeakKeyDictionary()


def way_of(model: PreTrainedModel) -> Way:
    """Return the fastest way to process text that gives correct logits for this model. The ways are tried once per loaded model."""
    if model not in _FOUND:
        with evaluating(model):
            _FOUND[model] = _first_right(model)
    return _FOUND[model]


def slower(model: PreTrainedModel) -> str | None:
    """Return a sentence that says why sampling from this model takes longer than usual. Return None if it takes the usual time."""
    reason = way_of(model).slower
    return f"models of type {model.config.model_type} are sampled more slowly: {reason}" if reason else None


def groups(prompts: list[tuple[int, ...]], padded: bool) -> list[np.ndarray]:
    """Divide prompts into batches, and return the indices of each batch. Without padding, all prompts of a batch have the same length."""
    lengths = np.array([len(prompt) for prompt in prompts])
    return [np.arange(len(prompts))] if padded else [(lengths == n).nonzero()[0] for n in np.unique(lengths)]


def left_padded(prompts: Sequence[tuple[int, ...]], columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, attention mask and positions (B, `columns`) of prompts with padding on the left. All prompts end at the same column. The
    columns after it are for new tokens: their ids are 0, and the mask is 1 there."""
    width = max(map(len, prompts))
    ids, attention = np.zeros((len(prompts), columns), np.int64), np.zeros((len(prompts), columns), np.int64)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) : width] = prompt
        attention[b, width - len(prompt) :] = 1
    return ids, attention, np.maximum(attention.cumsum(1) - 1, 0)


class Decoder:
    """A model with its memory (usually a KV cache) of the tokens that it has processed, for one batch."""

    def __init__(self, model: PreTrainedModel, vocab: int, capacity: int, way: Way):
        self.model, self.vocab, self.way = model, vocab, way
        self.takes = inspect.signature(model.forward).parameters
        self.name = cache_name(model)
        self.memory: Any = in_place_cache(model.config, capacity) if way.memory == "ours" else None

    def logits(self, ids_BT: Tensor, attention_BT: Tensor | None, positions_BT: Tensor, start: int) -> Tensor:
        """Return the logits (B, V) of the next token after `ids_BT`. Earlier calls have processed the columns before `start`."""
        remembers = self.way.memory != "none"
        if remembers and start > 0 and self.way.masked == "first":
            attention_BT = None
        unread = slice(start if remembers else 0, None)
        inputs = {"attention_mask": attention_BT, "position_ids": positions_BT[:, unread], "use_cache": remembers, "logits_to_keep": 1}
        inputs = taken(self.takes, inputs)
        if remembers:
            inputs[self.name] = self.memory
        out = self.model(input_ids=ids_BT[:, unread], **inputs)
        if self.way.memory == "own":
            self.memory = out[self.name]
        return out.logits[:, -1, : self.vocab].float()

    def keep(self, index: Tensor) -> None:
        """Keep only the rows `index` in the memory."""
        self.memory = _rows(self.memory, index)


def _rows(memory: Any, index: Tensor) -> Any:
    if isinstance(memory, Cache):
        # `reorder_cache` works for every layer class of transformers, `batch_select_indices` only for some. A model family with its own
        # cache class overrides `batch_select_indices`, which is then the right one.
        own = type(memory).batch_select_indices is not Cache.batch_select_indices
        (memory.batch_select_indices if own else memory.reorder_cache)(index)  # type: ignore[arg-type]
    elif isinstance(memory, Tensor):
        return memory[index]
    elif isinstance(memory, dict):
        return {key: _rows(value, index) for key, value in memory.items()}
    elif isinstance(memory, (list, tuple)):
        return type(memory)(_rows(value, index) for value in memory)
    elif memory is not None:
        raise TypeError(f"the model keeps earlier tokens in a {type(memory).__name__}, from which single rows cannot be selected")
    return memory


# --- KV caches -----------------------------------------------------------------------------------------------------------


def aligned(columns: int) -> int:
    """Round a number of columns of a cache up: attention kernels copy a mask whose width is not a multiple of 8, in every layer."""
    return columns + -columns % 8


class InPlaceLayer(DynamicLayer):
    """The KV cache of one layer, with memory for `capacity` tokens. The first `length` positions are in use.

    Keys and values have the shape (rows, heads, capacity, head size).
    """

    # DynamicLayer grows by concatenation, which copies all keys and values at every token: on a CPU a quarter of a small model's decoding
    # time. StaticCache allocates once too, but it attends to the whole capacity at every token, and it cannot drop rows.
    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], self.capacity, states.shape[-1])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
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
        return self.length


def cache_name(model: PreTrainedModel) -> str:
    """Return the name of the argument by which a model's forward function takes its memory of earlier tokens, such as `past_key_values`. It
    depends on the family, and on the version of transformers."""
    return next((name for name in ALL_CACHE_NAMES if name in inspect.signature(model.forward).parameters), ALL_CACHE_NAMES[0])


def tokens_in(memory: object) -> int:
    """Return the number of tokens in a model's KV cache. Other memories of earlier tokens, such as recurrent states, have 0."""
    try:
        return memory.get_seq_length() if isinstance(memory, Cache) else 0
    except ValueError:  # a cache of recurrent states only
        return 0


def keeps_all(config: PreTrainedConfig, capacity: int) -> bool:
    """Return True if a model has a KV cache whose layers all keep `capacity` tokens. A layer with a smaller sliding window does not."""
    layers = DynamicCache(config=config).layers
    return len(layers) > 0 and all(_keeps(layer, capacity) for layer in layers)


def _keeps(layer: object, capacity: int) -> bool:
    return type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= capacity)


def in_place_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """Return an empty KV cache for `capacity` tokens. Layers that attend to all of these tokens use `InPlaceLayer`."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if _keeps(layer, capacity):
            cache.layers[i] = InPlaceLayer(capacity)
    return cache


# --- trying --------------------------------------------------------------------------------------------------------------


class Trial:
    """Test texts for a model, with the correct logits at the last few positions of each text.

    The correct logits come from a forward pass over the whole text.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.texts, last = model, _texts(model), taken(inspect.signature(model.forward).parameters, {"logits_to_keep": _STEPS})
        with trying(model), rounded(model) as self.rounding:
            self.expected = [model(input_ids=text.unsqueeze(0), use_cache=False, **last).logits[0, -_STEPS:].float() for text in self.texts]

    def agrees(self, read: "_Reads", way: Way) -> bool:
        """Return True if `read`, another way to process the texts, gives the same logits. Return False if it raises an exception.

        `way` is the way that `read` uses.
        """
        (error, worst), rounding = self.errors(read), self.rounding
        if rounding.precise or error > rounding.largest or (error <= rounding.eps and worst <= rounding.largest):
            return error <= rounding.largest
        # In half precision, errors of this size can be rounding, or come from padding or from other texts in the call. If they are
        # rounding, the same texts one by one, or together without a memory, have such errors, too. A model may refuse one of these two.
        usual = self.errors(partial(_read, self.model, way, alone=True)), self.errors(partial(_together, self.model))
        of_all, of_one = (_TIMES * sum(filter(math.isfinite, errors)) for errors in zip(*usual, strict=True))
        return error <= of_all + rounding.eps and worst <= max(of_one, rounding.largest)

    def errors(self, read: "_Reads") -> tuple[float, float]:
        """Return how far the logits of `read`, another way to process the texts, are from the correct ones: over all texts, and for the
        worst text. Both are infinite if `read` raises an exception. Only the exception of full memory is not caught (`is_full`).

        In float32, this is the largest error. In half precision, it is the median, because rounding can make a router choose another
        expert, which changes one or two positions. A wrong memory changes most.

        Args:
            read: a function of the texts and the number of steps. Step 0 processes the beginning of a text, and each later step one more
                token, up to the end of the text. For each text and step, the function yields the text's index, the step, and the logits
                (V,) of the next token.
        """
        errors: list[list[float]] = [[] for _ in self.texts]
        try:
            for row, step, z in read(self.texts, _STEPS):
                errors[row].append(apart(z, self.expected[row][step]))
        except Exception as error:
            if is_full(error):
                raise
            return math.inf, math.inf  # the model does not accept this memory
        if self.rounding.precise:
            return (largest := max(map(max, errors))), largest
        worst = max(statistics.median_low(of_text) for of_text in errors if len(of_text) == _STEPS)
        return statistics.median(e for of_text in errors for e in of_text), worst


_Reads = Callable[[list[Tensor], int], Iterator[tuple[int, int, Tensor]]]


@torch.inference_mode()
def _first_right(model: PreTrainedModel) -> Way:
    trial = Trial(model)
    return next((way for way in WAYS[:-1] if trial.agrees(partial(_read, model, way), way)), WAYS[-1])


def _texts(model: PreTrainedModel) -> list[Tensor]:
    words = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 10**9
    most = max(1, min(positions - _STEPS + 1, max(_LENGTHS)))
    shorter = max(_LENGTHS) - most
    counts = [max(1, n - shorter) + _STEPS - 1 for n in _LENGTHS]
    return [(words // 2 + 5 * row + 7 * torch.arange(n, device=model.device) ** 2) % words for row, n in enumerate(counts)]


def _read(model: PreTrainedModel, way: Way, texts: list[Tensor], steps: int, *, alone: bool = False) -> Iterator[tuple[int, int, Tensor]]:
    together = groups([tuple(text.tolist()) for text in texts], way.padded)
    for rows in np.arange(len(texts))[:, None] if alone else together:
        width = max(len(texts[row]) for row in rows)
        padded = left_padded([tuple(texts[row].tolist()) for row in rows], width)
        ids, attention, positions = (torch.from_numpy(a).to(model.device) for a in padded)
        decoder, start = Decoder(model, 10**9, width, way), 0
        for step in range(steps):
            end = width - steps + 1 + step
            mask = attention[:, :end] if way.padded else None
            logits = decoder.logits(ids[:, :end], mask, positions[:, :end], start)
            yield from ((row, step, z) for row, z in zip(rows, logits, strict=True))
            start = end
            if step == 0 and len(rows) > 1 and way.drops:
                decoder.keep(torch.arange(1, len(rows), device=model.device))
                ids, attention, positions, rows = ids[1:], attention[1:], positions[1:], rows[1:]


def _together(model: PreTrainedModel, texts: list[Tensor], steps: int) -> Iterator[tuple[int, int, Tensor]]:
    # with padding on the right, which no token of a text sees
    ids, attention = (pad_sequence(rows, batch_first=True) for rows in (texts, [torch.ones_like(text) for text in texts]))
    inputs = taken(inspect.signature(model.forward).parameters, {"attention_mask": attention})
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    yield from ((row, step, logits[row, len(text) - steps + step].float()) for row, text in enumerate(texts) for step in range(steps))
