"""Losses over spans, for a student and a teacher with different tokenizers.

    pair = SpelledPair.of(SpelledText(...), SpelledText(...), follows, compared)
    total, values = fused_span_divergence(reverse_kl, student, teacher, pair, weights=weights)

A span is the text between two neighbouring token boundaries that both models have. It is one or more whole tokens of each:

    student's tokens    | th | e |  his  | tory |
    teacher's tokens    |  the   |   |his| tory |
    span                    0        1      2

At the beginning of a span, the models are compared by the cell of their next token. Inside the span, they are compared by the next symbol
(a byte, `objectives.next_symbol`).

A cell is a set of tokens of both vocabularies. All tokens of a cell begin with the same symbols (bytes), which are the root of the cell.
For example, the cell with the root `the` has the student's tokens `the` and `then`, and the teacher's token `the`. A model's probability
of a cell is the sum of the model's probabilities of the cell's tokens. In the example, this is P(the) + P(then) for the student, and P(the)
for the teacher. `tadistill.objectives.spelling` has another example.

The log-probability of a span under a model, given the text before it, is the sum of the log-probabilities of its tokens. The probability of
other tokens with the same bytes is not included. The page "Different tokenizers" of the documentation says when this makes a difference.

Axes: N student's tokens, M teacher's tokens, S spans; B sequences, T student's positions, U teacher's positions; X places where both
models predict a token, n places of a tile, V and W vocabulary sizes of student and teacher, C cells.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadistill.constants import LOG_ZERO
from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import at_least_float32, through_softmax
from tadistill.objectives.fused_loss import Part, fused_log_probs, fused_parts, part_of
from tadistill.objectives.next_symbol import LEAST, SpelledPair, symbol_divergence, tensor_of
from tadistill.objectives.sampled import TokenTerm
from tadistill.objectives.spelling import first_symbols
from tadistill.objectives.targets import WITH_SLOPE, Hidden


@dataclass(frozen=True)
class SpanTokens:
    """Texts in the tokens of one model. Each token has the hidden state that predicts it, and the number of its span."""

    hidden: Hidden
    """States (N, H) and the head."""
    tokens: Tensor
    """Ids (N,)."""
    spans: Tensor
    """Number (N,) of the span of each token, in ascending order. Each number from 0 to S - 1 occurs. Tokens without a span are left out."""

    def check(self, name: str) -> int:
        """Return the number of spans.

        Raises:
            ConfigError: the shapes differ, or the spans are not 0, 1, 2 and so on in ascending order.
        """
        shapes = [tuple(x.shape) for x in (self.hidden.states[..., 0], self.tokens, self.spans)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ConfigError(f"`{name}` has states, tokens and spans of shapes {shapes}; give one state and one span for each token")
        if not len(self.spans):
            return 0
        steps = self.spans.diff()
        if int(self.spans[0]) != 0 or not bool(((steps == 0) | (steps == 1)).all()):
            raise ConfigError(f"the numbers of the spans of `{name}` must count up from 0 without gaps, such as 0, 0, 1, 2")
        return int(self.spans[-1]) + 1


def span_sums(values: Tensor, spans: Tensor, count: int) -> Tensor:
    """Return the sum (count,) of the values (N,) in each span of a text. `spans` (N,) has the number of each value's span."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, spans, values)


def span_rewards(log_q_BT: Tensor, spans_BT: Tensor, log_p_BU: Tensor, spans_BU: Tensor, *, delay: int | None = None) -> Tensor:
    """Return MiniLLM's rewards log p - log q of spans, at the student's positions (B, T), for `minillm.returns`.

    A span is the text between two neighbouring token boundaries that student q and teacher p have in common. Its reward is placed at one
    position, and all other positions have 0. With `include_current=True` in `returns`, the return of a token then contains all rewards at
    its position or later.

    A tokenizer can merge the end of a span with later text. So a token of the student after the span can change the teacher's tokens in the
    span, and thus the span's reward. The return of this later token must then contain the reward. `delay` selects the reward's position:

        None    the last token of the sequence. The policy gradient is unbiased for any pair of tokenizers
        n       n tokens after the span's last token. The gradient is unbiased if later tokens of the student cannot change the span
        0       the span's last token. The gradient has the least variance. With equal tokenizers, the reward is that of MiniLLM

    Args:
        log_q_BT, log_p_BU: log-probabilities of the text's tokens, under the student and under the teacher.
        spans_BT, spans_BU: the number of each token's span in its sequence, from 0. -1 is a position without a span, such as the prompt.
    """
    if delay is not None and delay < 0:
        raise ConfigError(f"`delay` is {delay}; it must be at least 0, or None")
    count = int(max(spans_BT.max(), spans_BU.max())) + 1 if spans_BT.numel() and spans_BU.numel() else 0
    rewards = torch.zeros_like(log_q_BT)
    if not count:
        return rewards
    sides = [torch.zeros(len(v), count + 1, dtype=v.dtype, device=v.device) for v in (log_q_BT, log_p_BU)]
    for total, values, spans in zip(sides, (log_q_BT, log_p_BU), (spans_BT, spans_BU), strict=True):
        # column 0 collects the positions without a span
        total.scatter_add_(1, spans + 1, torch.where(spans >= 0, values, torch.zeros_like(values)))
    of_spans = (sides[1] - sides[0])[:, 1:]
    places = torch.arange(spans_BT.shape[1], device=spans_BT.device).expand_as(spans_BT)
    last = torch.full((len(spans_BT), count + 1), -1, device=spans_BT.device).scatter_reduce(1, spans_BT + 1, places, "amax")[:, 1:]
    final = last.amax(1, keepdim=True)
    paid = final.expand_as(last) if delay is None else torch.minimum(last + delay, final)
    exists = last >= 0
    return rewards.scatter_add(1, paid.clamp(min=0), torch.where(exists, of_spans, torch.zeros_like(of_spans)))


def fused_span_divergence(
    divergence: Callable[..., Tensor],
    student: Hidden,
    teacher: Hidden,
    pair: SpelledPair,
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    **parameters: Any,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of a divergence over spans (texts between common token boundaries of student and teacher). No tensor of shape
    [tokens, vocabulary] is built for either model.

    Args:
        divergence: any function of `tadistill.objectives` that takes the logits of two models and no other tensor.
        student: states (N, H) that predict the student's tokens, and the head. They have an autograd graph.
        teacher: states (M, H) that predict the teacher's tokens, and the teacher's head.
        pair: the tokens of both models and their spans.
        weights: one weight per span, (S,). The default is 1. Include the factor 1 / count.

    Returns:
        Two tensors. The first is the weighted sum, a scalar with gradients to the student's states and head. The second has one value per
        span, of shape (S,), without a graph.

    Raises:
        ConfigError: shapes do not fit, a parameter is out of range, or a result is NaN.
    """
    checks.positive("temperature", temperature)
    for name, side, text in (("student", student, pair.student), ("teacher", teacher, pair.teacher)):
        size = len(text.vocabulary.cells)
        if side.states.shape[:-1] != text.tokens.shape or size > len(side.head.weight):
            raise ConfigError(
                f"`{name}` has states of shape {tuple(side.states.shape)} and a head with {len(side.head.weight)} logits, but its text has "
                f"{len(text.tokens)} tokens of a vocabulary of {size}; give one state per token, and a head for the whole vocabulary"
            )
    device = student.states.device
    weights = torch.ones(len(pair.follows), device=device) if weights is None else weights
    bound = partial(divergence, **parameters)
    by_cell, spans = _first_cells(divergence, parameters, pair, student, teacher, weights, temperature)
    values, parts = symbol_divergence(bound, pair, (student, teacher), weights, temperature)
    total, found = fused_parts([by_cell, *parts], student.head, vocab=len(pair.student.vocabulary.cells))
    inner = (weights.to(values.dtype) * values).sum()
    values = values.index_add(0, spans, found[0][0].to(values.dtype))
    checks.result(values, student_hidden=student.states, student_head=student.head.weight, teacher=teacher.states)
    return total + inner, values


def fused_span_distance(
    distance: Callable[..., Tensor],
    student: SpanTokens,
    teacher: SpanTokens,
    sizes: tuple[int, int],
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    **parameters: Any,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of `sorted_distance` or `hybrid_distance` over spans, as ULD and GOLD (`bayesian` merging) compute it.

    The models are compared by their predictions of the last token of each span. Each distribution is multiplied by the probability of the
    span's earlier tokens. The gradient flows through both factors.

    Args:
        sizes: the sizes of the two vocabularies, (student, teacher).

    Other args, returns and errors are as in `fused_span_divergence`.
    """
    count = _check(student, teacher, sizes)
    weights = torch.ones(count, device=student.tokens.device) if weights is None else weights
    earlier, of_teacher = (_earlier(side) for side in (student, teacher))
    sums = [_span_sums(side, size, temperature, count) for side, size in ((earlier, sizes[0]), (of_teacher, sizes[1]))]

    def values(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        leaf = sums[0][rows].detach().requires_grad_(logits.requires_grad)
        found = distance(logits, targets[0], before=(leaf, sums[1][rows]), temperature=temperature, **parameters)
        slope = torch.autograd.grad(found.sum(), leaf, retain_graph=True)[0] if logits.requires_grad else torch.zeros_like(found)
        return torch.stack([found, slope])

    last, others = _last(student), _last(teacher)
    of_last = Part(
        student.hidden.states[last],
        values,
        torch.stack([weights, torch.zeros_like(weights)]),
        teachers=[Hidden(teacher.hidden.states[others], teacher.hidden.head, sizes[1])],
    )
    # adds only the gradient through the probabilities of the earlier tokens
    term = TokenTerm("", torch.positive, earlier.tokens, temperature=temperature)
    slopes = part_of([term], earlier.hidden.states, lambda found: (weights * found[1])[earlier.spans].unsqueeze(0))
    total, (found, _) = fused_parts([of_last, replace(slopes, counts=False)], student.hidden.head, vocab=sizes[0])
    checks.result(found, student_hidden=student.hidden.states, student_head=student.hidden.head.weight, teacher=teacher.hidden.states)
    return total, found[0]


def _first_cells(
    divergence: Callable[..., Tensor],
    parameters: dict[str, Any],
    pair: SpelledPair,
    student: Hidden,
    teacher: Hidden,
    weights: Tensor,
    temperature: float,
) -> tuple[Part, Tensor]:
    """Return two things: the part of the loss that compares the beginnings of spans by cells; and, for each row of this part, the number of
    the row's span.

    At a place, all cells are excluded that begin with a symbol that could continue the token before the place (`SpelledPair.longer`).
    `symbol_divergence` compares the models on such symbols.
    """
    mine, theirs = pair.places
    device, vocabularies = weights.device, (pair.student.vocabulary, pair.teacher.vocabulary)
    longer = pair.longer > 0
    kept = np.flatnonzero(mine.by_cell & pair.sure & ~longer[np.arange(len(mine.symbol)), mine.symbol])
    excluded = tensor_of(longer[kept], device) if longer[kept].any() else None  # a symbol per column
    own, other = (tensor_of(v.cells, device) for v in vocabularies)
    first = tensor_of(first_symbols(*vocabularies), device)

    def cell_logits(mass: Tensor, rows: slice) -> Tensor:
        logits = mass.clamp(min=LEAST).log()
        return logits if excluded is None else logits.masked_fill(excluded[rows].index_select(1, first), LOG_ZERO)

    def values(logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        sides = (_cell_sums(z / temperature, cells, len(first))[1] for z, cells in ((logits, own), (targets[0], other)))
        return divergence(*(cell_logits(mass, rows) for mass in sides), **parameters).unsqueeze(0)

    def slopes(logits: Tensor, targets: tuple[Any, ...], rows: slice, weights: Tensor) -> tuple[Tensor, Tensor]:
        probs, mass = _cell_sums(logits / temperature, own, len(first))
        others = _cell_sums(targets[0] / temperature, other, len(first))[1]
        found, slope = WITH_SLOPE[divergence](cell_logits(mass, rows), cell_logits(others, rows), **parameters)
        each = torch.where(mass < LEAST, 0.0, slope / mass.clamp(min=LEAST)).index_select(1, own)
        return found.unsqueeze(0), through_softmax(probs, each, temperature)[1] * weights.t()

    spans = tensor_of(pair.student.spans[mine.token[kept]], device)
    target = Hidden(teacher.states[tensor_of(theirs.token[kept], device)], teacher.head, len(vocabularies[1].cells))
    states = student.states[tensor_of(mine.token[kept], device)]
    return Part(states, values, weights[spans].unsqueeze(0), slopes if divergence in WITH_SLOPE else None, [target]), spans


def _cell_sums(logits: Tensor, cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the tokens (n, V), and of the cells (n, C). `cells` (V,) has the cell of each token."""
    probs = at_least_float32(logits).softmax(-1)
    return probs, torch.zeros(len(probs), count, dtype=probs.dtype, device=probs.device).index_add(1, cells, probs)


def span_log_probs(side: SpanTokens, vocab: int) -> Tensor:
    """Return the log-probability (S,) of each span, without a graph. `vocab` is the size of the model's vocabulary."""
    return _span_sums(side, vocab, 1.0, int(side.spans[-1]) + 1 if len(side.spans) else 0)


def _span_sums(side: SpanTokens, vocab: int, temperature: float, count: int) -> Tensor:
    log_q = fused_log_probs(side.hidden.states, side.hidden.head, side.tokens, vocab=vocab, temperature=temperature)
    return span_sums(log_q, side.spans, count)


def _last(side: SpanTokens) -> Tensor:
    return torch.cat([side.spans[1:] != side.spans[:-1], torch.ones_like(side.spans[:1], dtype=torch.bool)])


def _earlier(side: SpanTokens) -> SpanTokens:
    rows = ~_last(side)
    return SpanTokens(Hidden(side.hidden.states[rows], side.hidden.head), side.tokens[rows], side.spans[rows])


def _check(student: SpanTokens, teacher: SpanTokens, sizes: tuple[int, int]) -> int:
    """Return the number of spans. Raise a ConfigError if it differs between the models, or if tokens or heads do not fit the
    vocabularies."""
    count, others = student.check("student"), teacher.check("teacher")
    if others != count:
        raise ConfigError(f"`student` has {count} spans, but `teacher` has {others}; give both for the same spans")
    for name, side, size in (("student", student, sizes[0]), ("teacher", teacher, sizes[1])):
        rows = side.hidden.head.weight.shape[0]
        if size > rows:
            raise ConfigError(
                f"`sizes` has {size} tokens for the {name}, but the {name}'s head has only {rows} logits; write at most {rows}"
            )
        if len(side.tokens) and not 0 <= int(side.tokens.min()) <= int(side.tokens.max()) < size:
            raise ConfigError(f"the tokens of `{name}` must be ids from 0 to {size - 1}")
    return count
