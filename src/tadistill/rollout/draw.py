"""One position of sampling: the distribution of the next token, a draw from it, and the memory that the next position needs.

Warping, mixing with a teacher and the inverse CDF come first, then the models' KV caches and the record of tokens and log-probabilities.
Axes: B sequences, T tokens so far, V vocabulary, H hidden, N of the tokens. q is the student's distribution, p the teacher's, b the one
sampled from.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tadistill.config.common import Decoding

_BLOCK = 64  # columns that the first level of a draw takes as one
_BELOW_ONE = 1 - 2**-53  # the largest float64 below 1


@dataclass(frozen=True)
class Mixture:
    """b = (1 - alpha) q + alpha p, mixed per token as distributions (MiniLLM, Gu et al. 2024, Eq. 4).

    A draw from b is a draw from p with probability alpha, else a draw from q. The token's uniform decides which, and the rest of it is
    again uniform. So it is known which model draws a token before either model has read the text.
    """

    teacher: PreTrainedModel
    alpha: float

    def probabilities(self, q_BV: Tensor, p_BV: Tensor) -> Tensor:
        """Return b; exactly q at alpha 0 and exactly p at alpha 1."""
        return torch.lerp(q_BV, p_BV, self.alpha)

    def switch(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Return for uniforms of any shape where the teacher draws, and the uniforms of these draws."""
        teachers = uniforms < self.alpha
        rest = torch.where(teachers, uniforms / self.alpha, (uniforms - self.alpha) / (1 - self.alpha)) if 0 < self.alpha < 1 else uniforms
        return teachers, rest.clamp(max=_BELOW_ONE)


@dataclass(frozen=True)
class Speculation:
    """The student proposes a token; if it is not among the teacher's k most probable, the teacher draws it (SKD, Xu et al. 2024).

    The result has the distribution b = q 1[top k] + (1 - q(top k)) p, so it is one draw from b, with an exact probability.
    """

    teacher: PreTrainedModel
    k: int

    def probabilities(self, q_BV: Tensor, p_BV: Tensor) -> Tensor:
        """Return b."""
        top_BK = p_BV.topk(min(self.k, p_BV.shape[1]), sorted=False).indices
        accepted_BK = q_BV.gather(1, top_BK)
        refused_B1 = (1 - accepted_BK.sum(1, keepdim=True)).clamp_(min=0)
        return (p_BV * refused_B1).scatter_add_(1, top_BK, accepted_BK)


def processors(decoding: Decoding) -> LogitsProcessorList:
    """Return the settings as transformers' own processors, in the order of the fields; none for the model's own distribution.

    Temperature 0 has no processor: greedy decoding takes the most probable of the tokens that the other processors leave.
    """
    found = LogitsProcessorList()
    if decoding.no_repeat_ngram is not None:
        found.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram))
    if decoding.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k is not None:
        found.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        found.append(TopPLogitsWarper(decoding.top_p))
    if decoding.min_p > 0:
        found.append(MinPLogitsWarper(decoding.min_p))
    return found


def next_tokens(
    logits: dict[str, Tensor], scores: dict[str, Tensor], uniforms_B: Tensor, guide: Mixture | Speculation | None, *, greedy: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the next token of every row and its log-probabilities: raw under each model, and `behaviour` under what was drawn from.

    Args:
        logits: (B, V) float32 of "student" and, with a guide, of "teacher".
        scores: the same after warping; `logits` itself if there is no warping.
    """
    raw = {name: z.softmax(-1) for name, z in logits.items()}
    warped = raw if scores is logits else {name: z.softmax(-1) for name, z in scores.items()}
    b_BV = guide.probabilities(warped["student"], warped["teacher"]) if guide else warped["student"]
    if greedy:
        # the largest score if possible, because softmax can make neighbours equal
        tokens = (b_BV if guide else scores["student"]).argmax(-1)
        behaviour = torch.zeros_like(b_BV[:, 0])
    else:
        weights_BV = b_BV
        if isinstance(guide, Mixture):
            teachers_B, uniforms_B = guide.switch(uniforms_B)
            weights_BV = torch.where(teachers_B.unsqueeze(1), warped["teacher"], warped["student"])
        tokens = draw(weights_BV, uniforms_B)
        behaviour = _at(b_BV, tokens).log()
    return tokens, {name: log_prob(z, raw[name], tokens) for name, z in logits.items()} | {"behaviour": behaviour}


def draw(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return the inverse CDF of every row of non-negative weights at its uniform in [0, 1): columns (B,), never one of weight 0.

    It has two levels, a block of columns and a column of the block, because a running sum over the whole vocabulary takes longer than its
    softmax.
    """
    vocab = weights_BV.shape[1]
    whole = vocab - vocab % _BLOCK
    blocks = weights_BV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < vocab:
        blocks = torch.cat([blocks, weights_BV[:, whole:].sum(-1, keepdim=True)], 1)
    block_B1, inside_B1 = _inverse_cdf(blocks, uniforms_B.unsqueeze(1))
    columns = block_B1 * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    block_weights = weights_BV.gather(1, columns.clamp(max=vocab - 1))
    if whole < vocab:
        block_weights = block_weights.masked_fill(columns >= vocab, 0)
    column_B1, _ = _inverse_cdf(block_weights, inside_B1)
    return (block_B1 * _BLOCK + column_B1).squeeze(1)


def _inverse_cdf(weights_BN: Tensor, uniforms_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column whose part of the running sum holds the uniform, and the uniform's place in that part, again in [0, 1)."""
    # float64, because over many columns a float32 running sum drifts by more than a rare token's mass
    cumulative = weights_BN.cumsum(-1, dtype=torch.float64)
    # u <= 1 - 2^-53 keeps the point below the total also after rounding, so a last column of weight 0 is never taken. The clamp is for NaN
    # logits: without it they would fail here, and not where training reports them.
    point = uniforms_B1 * cumulative[:, -1:]
    column = torch.searchsorted(cumulative, point, right=True).clamp_(max=weights_BN.shape[1] - 1)
    width = weights_BN.gather(1, column)
    below = cumulative.gather(1, column) - width
    return column, ((point - below) / width).clamp_(0, _BELOW_ONE)


def _at(values_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return values_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)


def log_prob(logits_BV: Tensor, probabilities_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """Return log softmax at the tokens from a softmax that is known already: log p(y) = z(y) - max z + log max p."""
    # the logarithm of p(y) itself would be minus infinity where the other model chose a token that underflows here
    return _at(logits_BV, tokens_B) - logits_BV.amax(-1) + probabilities_BV.amax(-1).log()


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
