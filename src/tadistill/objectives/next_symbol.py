"""Compare two models with different tokenizers by the next symbol of a text: a byte, or an event such as the end of the text.

A model's probabilities of the next symbol follow from those of the next token. If the tokens are `the`, `then` and `at`, the first symbol
is t with the probability P(the) + P(then). After `the`, the next symbol is n with the probability P(then) / (P(the) + P(then)). A place is
a position before a symbol of a text. `SpelledPair` finds the places at which two models can be compared, and `symbol_divergence` compares
the models there. `objectives.spans` has the whole loss. The page "Different tokenizers" of the documentation derives this loss.

Axes: N student's tokens, M teacher's tokens, S spans, X places, width: number of symbols, U different tokens, K groups of tokens
(`spelling.Around`), R nodes. A node is a position in a token: before, between or after its symbols.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tadistill.errors import ConfigError
from tadistill.objectives import checks
from tadistill.objectives.divergence import at_least_float32, through_softmax, wide
from tadistill.objectives.fused_loss import Part, fused_parts
from tadistill.objectives.spelling import SpelledText
from tadistill.objectives.targets import Head, Hidden

LEAST = 1e-15
"""Smallest probability of a cell or a symbol. Smaller ones are raised to it, so that text that a model cannot write has a finite loss."""
_AT_ONCE = {"cpu": 256, "cuda": 4096}  # places whose distributions are in memory at the same time


@dataclass(frozen=True)
class SpelledPair:
    """Texts in the tokens of both models, cut into spans at the token boundaries that student and teacher have in common."""

    student: SpelledText
    teacher: SpelledText
    follows: np.ndarray
    """(S,) bool. True if no token of either model is between a span and the previous span of the same text."""
    compared: np.ndarray
    """(S,) bool. True for a span whose tokens spell the same symbols on both sides. Other spans have the loss 0."""

    @classmethod
    def of(cls, student: SpelledText, teacher: SpelledText, follows: np.ndarray, compared: np.ndarray) -> "SpelledPair":
        """Return the pair. In both of its texts, `by_cell` is True for the first token of a span if the first tokens of both models are
        in the same cell. At these tokens the models are compared by cells.

        Raises:
            ConfigError: the tokens of a span that is compared spell different texts.
        """
        starts = [np.searchsorted(side.spans, np.arange(len(follows))) for side in (student, teacher)]
        cells = [side.vocabulary.cells[side.tokens[at]] for side, at in zip((student, teacher), starts, strict=True)]
        stripped = student.stripped[starts[0]] | teacher.stripped[starts[1]]
        by_cell = compared & (cells[0] == cells[1]) & ~stripped
        student, teacher = (
            replace(side, by_cell=np.isin(np.arange(len(side.tokens)), at[by_cell]))
            for side, at in zip((student, teacher), starts, strict=True)
        )
        pair = cls(student, teacher, follows, compared)
        if not np.array_equal(pair.places[0].symbol, pair.places[1].symbol):
            raise ConfigError("the tokens of student and teacher spell different texts in a span; set `compared` to False for this span")
        return pair

    @cached_property
    def places(self) -> "tuple[Places, Places]":
        """All places of the spans that are compared, in two forms: in the student's tokens, and in the teacher's tokens."""
        return Places.of(self.student, self), Places.of(self.teacher, self)

    @cached_property
    def longer(self) -> np.ndarray:
        """Codes (X, width): how each symbol could continue the token that ends at a place. A model's code is 1 if token and symbol together
        are a longer token, 2 if they are only the beginning of one, and 0 otherwise. The larger of the two models' codes counts."""
        mine, theirs = self.places
        found = np.zeros((len(mine.token), self.student.vocabulary.inside.width), np.int8)
        for each in (mine, theirs):
            for x in np.flatnonzero(each.before):
                symbols, is_token = each.text.longer[each.token[x] - 1]
                found[x, symbols] = np.maximum(found[x, symbols], np.where(is_token, 1, 2))
        return found

    @cached_property
    def sure(self) -> np.ndarray:
        """(X,) bool. False for a place that losses leave out: a model may be inside a token there that is not one of the text's tokens."""
        return self.places[0].sure & self.places[1].sure


def tensor_of(values: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without waiting for the device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)


def symbol_divergence(
    divergence: Callable[..., Tensor], pair: SpelledPair, sides: tuple[Hidden, Hidden], weights: Tensor, temperature: float
) -> tuple[Tensor, list[Part]]:
    """Compute divergences between the models' next symbols at all places of the spans.

    If a span's beginning is compared by cells, only symbols that could continue the token before the span are compared here.

    Args:
        divergence: a function of the logits of two models.
        sides: the states and heads of student and teacher.
        weights: one weight per span, (S,).

    Returns:
        The sum (S,) of each span's divergences, without a graph; and parts of a loss that add only the gradient of the weighted sum.
    """
    chosen = np.flatnonzero(pair.sure & (~pair.places[0].by_cell | pair.longer.any(1)))
    places, device = [each.chosen(chosen) for each in pair.places], weights.device
    walks = [_Walk(each.text, device, temperature) for each in places]
    states = [side.states[tensor_of(each.kept, device)] for side, each in zip(sides, places, strict=True)]
    sums = [walk.sums(own, side.head) for walk, own, side in zip(walks, states, sides, strict=True)]
    values, slopes = torch.zeros(len(pair.follows), dtype=sums[0].dtype, device=device), torch.zeros_like(sums[0])
    spans = places[0].text.spans[places[0].token]
    for chunk in _chunks(spans, _AT_ONCE.get(device.type, 4096)):
        own, other = (each.part(chunk) for each in places)
        longer = tensor_of(pair.longer[chosen[chunk]], device)
        leaf = sums[0][own.tokens].detach().requires_grad_()
        with torch.enable_grad(), checks.deferred():
            q = own.distributions(walks[0], leaf)
            with torch.no_grad():
                p = other.distributions(walks[1], sums[1][other.tokens])
            found = _of_places(divergence, q, p, longer, own)
            where = tensor_of(spans[chunk], device)
            if found.requires_grad:  # False if the divergence does not depend on the student, as with a skew of 1
                slopes[own.tokens] += torch.autograd.grad((found * weights[where]).sum(), leaf)[0]
        values.index_add_(0, where, found.detach())
    return values, walks[0].parts(states[0], slopes)


class _Next(NamedTuple):
    """One model's probabilities of the next symbol at each place. If `probs` lacks a case of a symbol, the symbol is not `known`."""

    probs: Tensor  # (X, width); the last column has the probability that a token has ended and the symbol after it is not known
    known: Tensor  # (X, width) bool; False if this case is missing: a shorter token ends at the place, the next begins with the symbol


def _of_places(divergence: Callable[..., Tensor], student: _Next, teacher: _Next, longer: Tensor, places: "Places") -> Tensor:
    """Return the sum (X,) of two divergences at each place.

    A tokenizer with the token `then` does not write `the` before an `n`: the `n` completes a longer token (code 1 in `longer`). The first
    divergence has one outcome for each symbol of code 1, and one outcome for all other symbols. The second divergence is 0 if the text
    continues with a symbol of code 1. Otherwise it leaves out the symbols of code 1, and has one outcome for each other symbol. At a place
    `by_cell`, it has one outcome for each symbol of code 2 (the symbol continues a longer token), and one outcome for the rest.
    """
    known, each = student.known & teacher.known, (student.probs, teacher.probs.to(student.probs.dtype))
    makes, begins = longer == 1, longer == 2
    ended = ~makes.gather(1, tensor_of(places.symbol, known.device).unsqueeze(1)).squeeze(1)
    named = known & (begins | ~tensor_of(places.by_cell, known.device).unsqueeze(1))
    first = divergence(*(_logits(probs, known & makes) for probs in each)) * makes.any(1)
    return first + divergence(*(_logits(torch.where(makes, 0.0, probs), named) for probs in each)) * ended


def _logits(probs: Tensor, separate: Tensor) -> Tensor:
    """Return log-probabilities (X, width) of the symbols with `separate` = True. The last column has that of all other symbols together."""
    alone = torch.where(separate, probs, 0.0)
    rest = torch.where(separate, 0.0, probs).sum(-1, keepdim=True)
    found = torch.cat([alone[..., :-1], rest], -1)
    return (found / found.sum(-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)).clamp(min=LEAST).log()


def _chunks(spans: np.ndarray, most: int) -> list[slice]:
    """Divide places into slices of whole spans, with about `most` places each. `spans` has the span of each place."""
    edges = np.flatnonzero(np.diff(spans, prepend=-1))  # the first place of each span
    found, start = list[slice](), 0
    for edge, after in zip(edges, [*edges[1:], len(spans)], strict=False):
        if after - start > most and edge > start:
            found.append(slice(start, int(edge)))
            start = int(edge)
    return [*found, slice(start, len(spans))] if len(spans) else []


@dataclass(frozen=True)
class Places:
    """Places in the texts of one model. A place is the position before a symbol (a byte or a special token), and belongs to the token
    that contains the symbol."""

    text: SpelledText
    token: np.ndarray
    """(X,) the index of the token in `text`."""
    depth: np.ndarray
    """(X,) the number of symbols of this token before the place."""
    symbol: np.ndarray
    """(X,) the symbol of the text after the place."""
    by_cell: np.ndarray
    """(X,) bool. True at the beginning of a span, if the models are compared there by cells (`objectives.spans`)."""
    before: np.ndarray
    """(X,) bool. True for the first place of a token, if the token directly before it could have been longer."""
    sure: np.ndarray
    """(X,) bool. False if the model may be inside a token that is not one of the text's tokens (`SpelledText.sure`)."""
    kept: np.ndarray
    """The index of each token of `text` in the whole text. `chosen` leaves out of `text` the tokens that its places do not need."""
    tokens: slice
    """The tokens of `text` whose predictions these places need."""

    @classmethod
    def of(cls, text: SpelledText, pair: SpelledPair) -> "Places":
        """Return the places of a text that are in the compared spans (`SpelledPair.compared`)."""
        tokens = np.flatnonzero(pair.compared[text.spans])
        count = text.count[tokens]
        token = np.repeat(tokens, count)
        depth = np.arange(len(token)) - np.repeat(np.cumsum(count) - count, count)
        inside = np.concatenate([[False], text.spans[1:] == text.spans[:-1]])[: len(text.spans)]
        earlier = pair.follows[text.spans] & np.concatenate([[False], pair.compared])[text.spans]
        joined = (inside | earlier) & pair.compared[text.spans]
        longer = np.array([False, *(len(symbols) > 0 for symbols, _ in text.longer)], bool)
        return cls(
            text,
            token,
            depth,
            text.symbols(token, depth),
            by_cell=text.by_cell[token] & (depth == 0),
            before=(joined & longer[:-1])[token] & (depth == 0),
            sure=text.sure(token, depth, joined),
            kept=np.arange(len(text.tokens)),
            tokens=slice(0, len(text.tokens)),
        )

    def chosen(self, places: np.ndarray) -> "Places":
        """Return the places with the indices `places`. Their `text` has only the tokens that they need."""
        needed = np.zeros(len(self.text.tokens), bool)
        needed[self.token[places]] = True
        needed[self.token[places[self.before[places]]] - 1] = True
        kept, index = np.flatnonzero(needed), needed.cumsum() - 1
        return replace(
            self._at(places), text=self.text.only(needed), token=index[self.token[places]], kept=kept, tokens=slice(0, len(kept))
        )

    def part(self, places: slice) -> "Places":
        """Return the places in the slice `places`, with the same `text`. Their `tokens` are only those that these places need."""
        found = self._at(places)
        return replace(found, tokens=slice(int(found.token[0]) - int(found.before[0]), int(found.token[-1]) + 1))

    def _at(self, places: np.ndarray | slice) -> "Places":
        return replace(self, **{n: getattr(self, n)[places] for n in ("token", "depth", "symbol", "by_cell", "before", "sure")})

    def distributions(self, walk: "_Walk", sums: Tensor) -> _Next:
        """Return the probabilities of the next symbol at the places. `sums` (n, K) are the probabilities of the groups around `tokens`.

        If a shorter token can end at a place inside a token, a symbol is `known` only if it and the token's symbols before it are a token.
        """
        nodes, closed = walk.nodes(sums, self.tokens)
        start = self.text.first[self.tokens.start]
        first, place = self.text.first - start, self.text.first[self.token] + self.depth
        here = tensor_of(place - start, sums.device)
        ended = tensor_of(self.text.ends[place] & (self.depth > 0), sums.device).unsqueeze(1)
        probs, known = nodes[here], closed[here] | ~ended
        known[:, -1] = False
        where = np.flatnonzero(self.before)
        if len(where):
            ends, at = tensor_of(first[self.token[where]] - 1, sums.device), tensor_of(where, sums.device)
            longer = nodes[ends]
            mixed = longer[:, :-1] + longer[:, -1:] * probs[at][:, :-1]
            probs = probs.index_copy(0, at, torch.nn.functional.pad(mixed, (0, 1)))
        return _Next(probs, known)


class _Walk:
    """The groups (`spelling.Around`) around each token of one model's text, as tensors. The methods sum probabilities over the groups."""

    def __init__(self, text: SpelledText, device: torch.device, temperature: float):
        self.text, self.temperature, self.device = text, temperature, device
        self.kinds = [_Kind(text, by_cell, device) for by_cell in (True, False) if (text.by_cell == by_cell).any()]
        self.width = max((kind.sizes.shape[1] for kind in self.kinds), default=1)
        shape = len(text.tokens), self.width
        self.slots = torch.zeros(shape, dtype=torch.int32, device=device)
        self.closed = torch.full(shape, -1, dtype=torch.int32, device=device)
        for kind in self.kinds:
            self.slots[kind.rows, : kind.slots.shape[1]] = kind.slots[kind.which]
            self.closed[kind.rows, : kind.slots.shape[1]] = kind.closed[kind.which]

    @torch.no_grad()
    def sums(self, states: Tensor, head: Head) -> Tensor:
        """Return the probability (N, K) of each group (`spelling.Around`) around each token of the text, without a graph."""
        found = torch.zeros(len(states), self.width, dtype=wide(states.dtype), device=self.device)
        for kind in self.kinds:

            def values(logits: Tensor, targets: tuple[Any, ...], rows: slice, kind: _Kind = kind) -> Tensor:
                return kind.sums(self._probs(logits), rows).t()

            none = torch.zeros(kind.sizes.shape[1], 1, device=self.device)
            _, (own,) = fused_parts([Part(states[kind.rows], values, none)], head, vocab=len(kind.order))
            found[kind.rows, : len(own)] = own.t()
        return found

    def _probs(self, logits: Tensor) -> Tensor:
        return (at_least_float32(logits) / self.temperature).softmax(-1)

    def parts(self, states: Tensor, slopes: Tensor) -> list[Part]:
        """Return parts of a loss that add only a gradient: that of sum_nk slopes_nk p_nk, where p_nk is the probability of group k around
        token n."""
        one = torch.ones(1, 1, device=self.device)
        return [
            Part(states[kind.rows], partial(self._value, kind, slopes), one, partial(self._slope, kind, slopes), counts=False)
            for kind in self.kinds
        ]

    def _value(self, kind: "_Kind", slopes: Tensor, logits: Tensor, targets: tuple[Any, ...], rows: slice) -> Tensor:
        found = kind.sums(self._probs(logits), rows)
        return (slopes[kind.rows[rows], : found.shape[1]] * found).sum(1).unsqueeze(0)

    def _slope(
        self, kind: "_Kind", slopes: Tensor, logits: Tensor, targets: tuple[Any, ...], rows: slice, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        probs, sizes = self._probs(logits), kind.sizes[kind.which[rows]]
        each = slopes[kind.rows[rows], : sizes.shape[1]].flatten().repeat_interleave(sizes.flatten(), output_size=logits.numel())
        each = each.view(logits.shape).index_select(1, kind.back)
        mean, slope = through_softmax(probs, each, self.temperature)
        return mean.unsqueeze(0), slope

    def nodes(self, sums: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return two tensors (R, width): the probabilities of the next symbol at each node, and True for each symbol that completes a token
        there. A node is a position in one of `tokens`: before, between or after its symbols. `sums` (n, K) are the probabilities of the
        groups (`spelling.Around`) around `tokens`."""
        text, width, device = self.text, self.text.vocabulary.inside.width, self.device
        first, count = text.first[tokens.start : tokens.stop + 1] - text.first[tokens.start], text.count[tokens]
        token = np.repeat(np.arange(len(count)), count + 1)
        depth = np.arange(first[-1]) - first[token]
        start = (tensor_of(first[:-1], device) * width).unsqueeze(1)
        slots, closed = start + self.slots[tokens], self.closed[tokens]
        flat = torch.zeros(len(token) * width, dtype=sums.dtype, device=device).index_add(0, slots.flatten(), sums.flatten())
        longest = int(count.max(initial=0)) + 1
        place = tensor_of(token * longest + depth, device)
        padded = torch.zeros(len(count) * longest, dtype=sums.dtype, device=device).index_copy(0, place, flat.view(-1, width).sum(1))
        later = padded.view(len(count), -1).flip(1).cumsum(1).flip(1).flatten()[place]
        inner = np.flatnonzero(depth < count[token])  # at these nodes, the probability of the text's own symbol is that of all later nodes
        own_slots = inner * width + text.symbols(token[inner] + tokens.start, depth[inner])
        flat = flat.index_add(0, tensor_of(own_slots, device), later[tensor_of(inner + 1, device)])
        # groups that are not closed mark one more entry, which is cut off: a mask as an index would wait for the GPU
        marks = torch.where(closed < 0, len(flat), start + closed).flatten()
        path = tensor_of(np.where(text.ends[text.first[tokens.start] + inner + 1], own_slots, len(token) * width), device)
        last = torch.zeros(len(flat) + 1, dtype=torch.bool, device=device).index_fill_(0, torch.cat([path, marks]), True)[:-1]
        return flat.view(-1, width) / later.clamp(min=torch.finfo(later.dtype).tiny).unsqueeze(1), last.view(-1, width)


class _Kind:
    """The tokens of a text with the same value of `by_cell`, and the groups (`spelling.Around`) around each of them, as tensors."""

    def __init__(self, text: SpelledText, by_cell: bool, device: torch.device):
        rows = np.flatnonzero(text.by_cell == by_cell)
        spelling = text.vocabulary.starts if by_cell else text.vocabulary.inside
        parts = (rows, *text.groups(rows, by_cell=by_cell), spelling.order, spelling.rank)
        self.rows, self.sizes, self.slots, self.closed, self.which, self.order, self.back = (tensor_of(part, device) for part in parts)

    def sums(self, probs: Tensor, rows: slice) -> Tensor:
        """Return sums (n, K) of `probs` (n, V) over the K groups of vocabulary around each token in `rows` (`spelling.Around`)."""
        sizes = self.sizes[self.which[rows]]
        probs = probs.index_select(1, self.order)
        return torch.segment_reduce(probs.flatten(), "sum", lengths=sizes.flatten(), axis=0, unsafe=True).view(sizes.shape)
