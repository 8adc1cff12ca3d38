"""Sampling of one token. Change the distribution (temperature, top-k, top-p), mix it with a teacher's distribution, and draw.

The file also contains the record of sampled tokens and log-probabilities. In formulas, q is the student's distribution
of the next token, p is the teacher's, and b is the distribution from which tokens are sampled.

Axes: B sequences, T tokens so far, V vocabulary size, H hidden size, N tokens of one call.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tadistill.config.common import Decoding
from tadistill.models.forward import tapped

ASK_EVERY = 8  # number of tokens between two copies of values from the models' device to the host, which wait for the device
_BLOCK = 64  # columns in one block of the two-level draw
_BELOW_ONE = 1 - 2**-53  # the largest float64 below 1


@dataclass(frozen=True)
class Mixture:
    """A mixture of student q and teacher p: every token is drawn from b = (1 - alpha) q + alpha p (MiniLLM, Gu et al. 2024, Eq. 4).

    The teacher draws a token with probability alpha, and otherwise the student draws it. The token's random number selects the model.
    `switch` then rescales this number to [0, 1), so that the selected model can draw the token with it.
    """

    teacher: PreTrainedModel
    alpha: float

    def probabilities(self, q_BV: Tensor, p_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """Return b. `teacher_BV` has the teacher's logits before the decoding settings, on which this guide does not depend."""
        return torch.lerp(q_BV, p_BV, self.alpha)  # exactly q at alpha 0, and exactly p at alpha 1

    def greedy(self, q_BV: Tensor, p_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """Return the most probable token (B,) of every row."""
        return self.probabilities(q_BV, p_BV, teacher_BV).argmax(-1)

    def switch(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Decide which model draws each token. Return a mask that is True for the teacher, and new random numbers in [0, 1) for the draws.

        Both have the shape of `uniforms`.
        """
        teachers = uniforms < self.alpha
        rest = torch.where(teachers, uniforms / self.alpha, (uniforms - self.alpha) / (1 - self.alpha)) if 0 < self.alpha < 1 else uniforms
        return teachers, rest.clamp(max=_BELOW_ONE)


@dataclass(frozen=True)
class Speculation:
    """Speculative sampling (SKD, Xu et al. 2024): the student proposes each token, and the teacher accepts or replaces it.

    The teacher accepts a proposed token if it is one of the teacher's `k` most probable tokens. Otherwise the teacher draws the token. Let
    Q be the sum of q over these k tokens. A token y then has the probability b(y) = q(y) + (1 - Q) p(y) if it is one of them, and
    b(y) = (1 - Q) p(y) if not. Decoding settings such as top-p change q and p, but not the k tokens: if they did, fewer than k tokens could
    have a probability above 0, and any tokens of probability 0 would be accepted with them.
    """

    teacher: PreTrainedModel
    k: int

    def probabilities(self, q_BV: Tensor, p_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """Return b. `teacher_BV` has the teacher's logits before the decoding settings."""
        top_BK = self._top(teacher_BV)
        accepted_BK = q_BV.gather(1, top_BK)
        refused_B1 = (1 - accepted_BK.sum(1, keepdim=True)).clamp_(min=0)
        return (p_BV * refused_B1).scatter_add_(1, top_BK, accepted_BK)

    def greedy(self, q_BV: Tensor, p_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        """Return the student's most probable token (B,) of every row if the teacher accepts it, and otherwise the teacher's."""
        proposed_B = q_BV.argmax(-1)
        accepted_B = (self._top(teacher_BV) == proposed_B.unsqueeze(1)).any(1)
        return torch.where(accepted_B, proposed_B, p_BV.argmax(-1))

    def _top(self, teacher_BV: Tensor) -> Tensor:
        return teacher_BV.topk(min(self.k, teacher_BV.shape[1]), sorted=False).indices


Guide = Mixture | Speculation
"""The way in which a teacher helps the student to sample."""


class _NoRepeatNGram(NoRepeatNGramLogitsProcessor):
    """Gives padding, whose id is the size of the vocabulary, a score of its own, which transformers 5.8 sets."""

    def __call__(self, input_ids: torch.LongTensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, nn.functional.pad(scores, (0, 1)))[:, :-1]


def processors(decoding: Decoding) -> LogitsProcessorList:
    """Return the decoding settings as logits processors of transformers. The list is empty if no setting changes the logits.

    Temperature 0 adds no processor. It means greedy decoding: `next_tokens` takes the most probable token that the other settings allow.
    """
    found = LogitsProcessorList()
    if decoding.no_repeat_ngram is not None:
        found.append(_NoRepeatNGram(decoding.no_repeat_ngram))
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
    logits: dict[str, Tensor], scores: dict[str, Tensor], uniforms_B: Tensor, guide: Guide | None, *, greedy: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sample the next token of every row. Return the tokens, and a dict of their log-probabilities.

    `student` and `teacher` are log-probabilities under each model alone, at temperature 1. `behaviour` is the log-probability under the
    distribution from which the token was sampled.

    Args:
        logits: (B, V) float32 for "student" and, if a teacher helps to sample (`guide`), for "teacher".
        scores: the logits after temperature, top-k and so on. If no such setting is used, this is the same dict as `logits`.
    """
    raw = {name: z.softmax(-1) for name, z in logits.items()}
    warped = raw if scores is logits else {name: z.softmax(-1) for name, z in scores.items()}
    guided = (warped["student"], warped["teacher"], logits["teacher"]) if guide else ()
    if greedy:
        # without a guide, the scores decide, because softmax can make two large scores equal
        tokens = guide.greedy(*guided) if guide else scores["student"].argmax(-1)
        behaviour = torch.zeros_like(uniforms_B, dtype=torch.float32)
    else:
        b_BV = weights_BV = guide.probabilities(*guided) if guide else warped["student"]
        if isinstance(guide, Mixture):
            teachers_B, uniforms_B = guide.switch(uniforms_B)
            weights_BV = torch.where(teachers_B.unsqueeze(1), warped["teacher"], warped["student"])
        tokens = draw(weights_BV, uniforms_B)
        behaviour = _at(b_BV, tokens).log()
    return tokens, {name: log_prob(z, raw[name], tokens) for name, z in logits.items()} | {"behaviour": behaviour}


def draw(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Draw one column (B,) from every row, with probabilities in proportion to its non-negative weights.

    Each row uses its random number in [0, 1) (inverse CDF). A column of weight 0 is never drawn.
    """
    # first a block of columns, then a column in it: a cumulative sum over the whole vocabulary takes longer than its softmax
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
    # float64, because over many columns the error of a float32 sum is larger than a rare token's probability
    cumulative = weights_BN.cumsum(-1, dtype=torch.float64)
    # u <= 1 - 2^-53 keeps the point below the total also after rounding, so a last column of weight 0 is never drawn. The clamp is for NaN
    # logits: without it they would raise an error here. Training reports them later with a better message.
    point = uniforms_B1 * cumulative[:, -1:]
    column = torch.searchsorted(cumulative, point, right=True).clamp_(max=weights_BN.shape[1] - 1)
    width = weights_BN.gather(1, column)
    below = cumulative.gather(1, column) - width
    return column, ((point - below) / width).clamp_(0, _BELOW_ONE)


def teacher_tap(guide: Guide | None) -> AbstractContextManager[list[Tensor]]:
    """Return a context manager that yields a list. In its `with` block, each forward pass of the teacher appends the inputs of its output
    head to the list. If no teacher helps to sample (`guide` is None), the list stays empty."""
    if guide is None:
        return nullcontext([])
    head = guide.teacher.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return tapped(head)


def _at(values_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return values_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)


def log_prob(logits_BV: Tensor, probabilities_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """Return the log-probabilities (B,) of the tokens, from the logits (B, V) and their softmax."""
    # log p(y) = z(y) - max z + log max p. If the other model chose a token whose probability underflows in this model, log(p(y)) would be
    # minus infinity.
    return _at(logits_BV, tokens_B) - logits_BV.amax(-1) + probabilities_BV.amax(-1).log()


def difference(sampled: Tensor, trained: Tensor) -> float:
    """Return the mean difference of the tokens' log-probabilities, as a share of their mean size if that is more than 1 nat."""
    return float((sampled - trained).abs().mean() / trained.abs().mean().clamp(min=1))


@dataclass(frozen=True)
class Rollout:
    """A sampled response and the log-probabilities of its tokens. The last token is EOS if EOS was sampled.

    `values` are float32 in nats. `student` and `teacher` are log-probabilities of each model alone, at temperature 1. `behaviour` is the
    log-probability under the distribution from which the tokens were sampled. `hidden` (T, H) contains the inputs of the teacher's output
    head, on the CPU. It is None if no teacher helped to sample.
    """

    tokens: tuple[int, ...]
    values: dict[str, np.ndarray]
    hidden: Tensor | None = None


class Record:
    """A store for the tokens, log-probabilities and hidden states of all rows of one sampling call, in the CPU's memory.

    Log-probabilities and hidden states of several calls are copied together, because the host waits for the device at each copy.
    """

    def __init__(self, rows: int, steps: int, eos: tuple[int, ...], models: Iterable[str]):
        self.tokens = np.zeros((rows, steps), np.int64)
        self.lengths = np.full(rows, steps)
        self.eos = np.array(eos, np.int64)
        self.values = {name: np.zeros((rows, steps), np.float32) for name in ("behaviour", *models)}
        self.hidden: Tensor | None = None  # allocated when its size is known
        self.waiting: list[tuple[np.ndarray, np.ndarray, dict[str, Tensor], Tensor | None]] = []  # on the models' device

    def say(self, rows: np.ndarray, t: np.ndarray | int, tokens: np.ndarray) -> None:
        """Store the tokens of `rows` at positions `t`. The first EOS of a row sets the row's length."""
        self.tokens[rows, t] = tokens
        ended = (tokens[:, None] == self.eos).any(1) & (self.lengths[rows] > t)
        if ended.any():
            self.lengths[rows[ended]] = np.broadcast_to(t, rows.shape)[ended] + 1

    def score(self, rows: np.ndarray, t: np.ndarray | int, log_p: dict[str, Tensor], hidden_NH: Tensor | None) -> None:
        """Store the log-probabilities and hidden states of the tokens of `rows` at positions `t`. Call `settle` after the last call."""
        self.waiting.append((rows, np.broadcast_to(t, rows.shape), log_p, hidden_NH))
        if len(self.waiting) == ASK_EVERY:
            self.settle()

    def settle(self) -> None:
        """Copy all values that are still on the models' device."""
        waiting, self.waiting = self.waiting, []
        found = [(name, rows, t, log_p_N) for rows, t, log_p, _ in waiting for name, log_p_N in log_p.items()]
        if found:
            numbers = torch.cat([log_p_N for *_, log_p_N in found]).cpu().split([len(rows) for _, rows, *_ in found])
            for (name, rows, t, _), part in zip(found, numbers, strict=True):
                self.values[name][rows, t] = part.numpy()
        states = [(rows, t, hidden_NH) for rows, t, _, hidden_NH in waiting if hidden_NH is not None]
        if states:
            hidden = torch.cat([hidden_NH for *_, hidden_NH in states]).cpu()
            if self.hidden is None:
                self.hidden = torch.zeros(*self.tokens.shape, hidden.shape[1], dtype=hidden.dtype)
            rows_N, t_N = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*((rows, t) for rows, t, _ in states), strict=True))
            self.hidden[rows_N, t_N] = hidden

    def take(self, tokens_BT: Tensor, values: dict[str, Tensor], hidden_BTH: Tensor | None) -> None:
        """Store the tokens, log-probabilities and hidden states of all rows and positions. Tokens after the first EOS of a row are
        ignored."""
        self.tokens[:] = tokens_BT.cpu().numpy()
        ended = np.isin(self.tokens, self.eos)
        self.lengths = np.where(ended.any(1), ended.argmax(1) + 1, self.tokens.shape[1])
        for name, numbers in zip(values, torch.stack([*values.values()]).cpu().numpy(), strict=True):
            self.values[name][:] = numbers
        self.hidden = None if hidden_BTH is None else hidden_BTH.cpu()

    def rollouts(self) -> list[Rollout]:
        """Return the response of every row, up to the row's length. All arrays are copies."""
        found = []
        for b, n in enumerate(self.lengths.tolist()):
            values = {name: array[b, :n].copy() for name, array in self.values.items()}
            hidden = None if self.hidden is None else self.hidden[b, :n].clone()
            found.append(Rollout(tuple(self.tokens[b, :n].tolist()), values, hidden))
        return found
