"""Spell the tokens of a vocabulary as symbols, and find the tokens that begin with the same symbols.

Two models with different tokenizers have only the text in common. Losses between them compare the symbols that tokens write:

    symbol    a byte (0 to 255), or an event such as the end of the text
    cell      a set of tokens of both vocabularies that all begin with the same symbols, the root of the cell. If two models write the same
              text, their next tokens are nearly always in the same cell. `tadistill.data.alignment.cells` computes the cells
    group     a set of tokens of one vocabulary. All of them have the same number of first symbols (`depth`) in common with a given token,
              and the same next symbol after these, or no next symbol

For example, these two vocabularies have two cells. Around the token `then`, the student's vocabulary has three groups: {at} differs from
`then` at depth 0, {the} ends at depth 3, and {then} ends at depth 4.

    root      student's tokens      teacher's tokens
    the       the  then             the
    at        at                    at  att

Axes: N tokens of a text, V vocabulary size, U different tokens, K groups, C cells, X places (positions before a symbol of the text).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

_NOTHING = -1  # fills a token's row of the table after its last symbol
_KEPT = 20_000  # size of each cache, in tokens: about 3 KB for the groups around a token of a vocabulary of 50,000


@dataclass(frozen=True)
class Around:
    """The groups around one given token. Each token of the vocabulary is in one group. All tokens of a group have the same number of first
    symbols in common with the given token, and the same symbol after these. They are neighbours in `Spelling.order`."""

    starts: np.ndarray
    """Index (K,) in `Spelling.order` of the first token of each group, ascending."""
    slots: np.ndarray
    """Numbers (K,), one per group: depth * width + symbol. The group's tokens begin with the first `depth` symbols of the given token.
    Their next symbol is `symbol`, which is `Spelling.stop` if they end there."""
    closed: np.ndarray
    """(K,) bool. True if a token of the group has no further symbol after `symbol` (see `slots`)."""


class Spelling:
    """The tokens of a vocabulary as sequences of symbols, sorted so that tokens with the same beginning are neighbours.

    A symbol is a number: 0 to 255 are bytes, and the next numbers are events. The two numbers after the events are `other`, which stands
    for all tokens without symbols, and `stop`, which stands for the end of a token.
    """

    def __init__(self, tokens: Sequence[Sequence[int] | None], symbols: int, roots: Sequence[tuple[int, int]] | None = None):
        """Spell the tokens, and sort them.

        Args:
            tokens: the symbols of each token. None for a token without symbols, such as padding.
            symbols: the number of different bytes and events.
            roots: the cell of each token, and the length of the cell's root. With `roots`, the whole root counts as one symbol: a token is
                spelled as the first symbol of its root and the symbols after the root. Tokens of different cells always differ at depth 0.
        """
        self.other, self.stop, self.width = symbols, symbols + 1, symbols + 2
        spelled = [(self.other,) if token is None or not len(token) else tuple(token) for token in tokens]
        keys = [(s,) for s in spelled] if roots is None else [(s[:n], cell, s[n:]) for s, (cell, n) in zip(spelled, roots, strict=True)]
        own = spelled if roots is None else [(*s[:1], *s[n:]) for s, (_, n) in zip(spelled, roots, strict=True)]
        self.order = np.array(sorted(range(len(spelled)), key=keys.__getitem__), np.int64)
        """The ids (V,) of all tokens, sorted by their symbols."""
        self.lengths = np.array([len(token) for token in own], np.int64)
        self.table = np.full((len(own), int(self.lengths.max(initial=0)) + 1), _NOTHING, np.int16)
        """The symbols of each token, a row per token. Rows are filled up with -1."""
        for token, written in enumerate(own):
            self.table[token, : len(written)] = written
        self._sorted = self.table[self.order]
        self._of_cell = None if roots is None else np.array([cell for cell, _ in roots])[self.order]
        self.rank = np.argsort(self.order)
        """The index (V,) of each token in `order`."""
        self.around = lru_cache(_KEPT)(self._around)
        """`around(token, stripped)` returns the groups of tokens around a token (`Around`). If `stripped` is True, all tokens are compared
        without a space at their beginning, because the first word of a text may be written without it."""
        self.longer = lru_cache(_KEPT)(self._longer)
        """`longer(token, stripped)` returns the symbols (n,) that follow the given token's symbols in longer tokens, and (n,) bool: True if
        the given token's symbols and the one symbol together are a whole token."""
        self.ends = lru_cache(_KEPT)(self._find_ends)
        """`ends(token, stripped)` returns (L + 1,) bool for a token with L symbols. Entry n is True if the first n symbols are a token."""
        self._branches = lru_cache(_KEPT)(self._find_branches)

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def _space(self) -> tuple[int, int]:
        low, high = np.searchsorted(self._sorted[:, 0], [32, 33])
        return int(low), int(high)

    def _ranges(self, token: int, stripped: bool) -> list[tuple[int, int, int, int]]:
        """Return the ranges of `order` to search around a token: (low, high, column, depth). Symbol `depth` is in `column` of the table."""
        if stripped:
            low, high = self._space
            return [(low, high, 1, 0), (0, low, 0, 0), (high, len(self), 0, 0)]
        if self._of_cell is None:
            return [(0, len(self), 0, 0)]
        cell, low, high = self._of_cell[self.rank[token]], int(self.rank[token]), int(self.rank[token]) + 1
        while low > 0 and self._of_cell[low - 1] == cell:
            low -= 1
        while high < len(self) and self._of_cell[high] == cell:
            high += 1
        return [(low, high, 1, 1)]

    def _around(self, token: int, stripped: bool) -> Around:
        ranges = self._ranges(token, stripped)
        walks = [self._walk(token, stripped, part) for part in ranges]
        if self._of_cell is not None:
            # the groups at depth 0 have all tokens of other cells, also of cells with the same first symbol
            low, high, _, _ = ranges[0]
            starts, symbols = self._branches(0, len(self), 0)
            after = int(np.searchsorted(starts, high, side="right"))
            before = starts < low
            walks += [self._groups(starts[before], symbols[before], 0, 0), self._groups(starts[after:], symbols[after:], 0, 0)]
            if high < len(self) and (after == len(starts) or starts[after] > high):
                walks.append(self._groups(np.array([high]), symbols[after - 1 : after], 0, 0))
        starts, slots, closed = (np.concatenate(part) for part in zip(*walks, strict=True))
        order = starts.argsort(kind="stable")
        return Around(starts[order].astype(np.int32), slots[order].astype(np.int32), closed[order])

    def _find_ends(self, token: int, stripped: bool) -> np.ndarray:
        found = np.zeros(self.lengths[token] - int(stripped) + 1, bool)
        for part in self._ranges(token, stripped):
            for depth, low, high, column in self._nodes(token, stripped, part):
                found[depth] |= low < high and self._sorted[low, column] == _NOTHING
        return found

    def _longer(self, token: int, stripped: bool) -> tuple[np.ndarray, np.ndarray]:
        found = dict[int, bool]()
        for part in self._ranges(token, stripped):
            *_, (_, low, high, column) = self._nodes(token, stripped, part)
            starts, symbols = self._branches(low, high, column)
            for symbol, closed in zip(symbols.tolist(), self._closed(starts, column).tolist(), strict=True):
                found[symbol] = found.get(symbol, False) or closed
        found.pop(_NOTHING, None)
        return np.array([*found], np.int64), np.array([*found.values()], bool)

    def extent(self, token: int, stripped: bool, following: Sequence[int]) -> int:
        """Return the largest n for which a longer token begins with the symbols of `token` and then the first n symbols of `following`.
        In the text, the symbols `following` come after the token."""
        most = 0
        for part in self._ranges(token, stripped):
            *_, (_, low, high, column) = self._nodes(token, stripped, part)
            for count, symbol in enumerate(following):
                low, high = self._narrow(low, high, min(column + count, self._sorted.shape[1] - 1), symbol)
                if low == high:
                    break
                most = max(most, count + 1)
        return most

    def _nodes(self, token: int, stripped: bool, part: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int]]:
        """Yield (depth, low, high, column) for each depth of a given token. `order[low:high]` are the tokens in the range `part` that begin
        with the first `depth` symbols of the given token. Their next symbol is in `column` of the table."""
        path, (low, high, column, first) = self._path(token, stripped), part
        for depth in range(first, len(path) + 1):
            yield depth, low, high, column + depth - first
            if depth < len(path):
                low, high = self._narrow(low, high, column + depth - first, path[depth])

    def _narrow(self, low: int, high: int, column: int, symbol: int) -> tuple[int, int]:
        here = self._sorted[:, column]
        return bisect_left(here, symbol, low, high), bisect_right(here, symbol, low, high)

    def _path(self, token: int, stripped: bool) -> np.ndarray:
        return self.table[token, int(stripped) : self.lengths[token]]

    def _find_branches(self, low: int, high: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Split the tokens from `low` to `high` by their symbol in `column`. Return the first index of each part, and its symbol."""
        here = self._sorted[low:high, column]
        edges = np.flatnonzero(np.diff(here, prepend=-2))
        return low + edges, here[edges]

    def _walk(self, token: int, stripped: bool, part: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return `starts`, `slots` and `closed` (`Around`) of the groups around a token among the tokens in the range `part`."""
        path, found = self._path(token, stripped), list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
        for depth, low, high, column in self._nodes(token, stripped, part):
            edges, symbols = self._branches(low, high, column)
            away = symbols != path[depth] if depth < len(path) else np.ones(len(symbols), bool)
            found.append(self._groups(edges[away], symbols[away], depth, column))
            if depth < len(path) and away.all():
                break
        starts, slots, closed = (np.concatenate(part) for part in zip(*found, strict=True))
        return starts, slots, closed

    def _groups(self, starts: np.ndarray, symbols: np.ndarray, depth: int, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        slots = depth * self.width + np.where(symbols == _NOTHING, self.stop, symbols).astype(np.int64)
        return starts, slots, self._closed(starts, column)

    def _closed(self, starts: np.ndarray, column: int) -> np.ndarray:
        """Return (K,) bool: True for a group whose first token has no symbol after `column`."""
        return self._sorted[starts, min(column + 1, self._sorted.shape[1] - 1)] == _NOTHING


@dataclass(frozen=True, eq=False)
class SpelledVocabulary:
    """Two spellings of a vocabulary's tokens as symbols (bytes and events). The spelling `starts` is for the first token of a span (a text
    between token boundaries that student and teacher have in common), if models are compared by cells there (`objectives.spans`). The
    spelling `inside` is for all other tokens."""

    cells: np.ndarray
    """The number (V,) of each token's cell."""
    starts: Spelling
    """The spelling of a span's first token, if the models are compared by cells there: the root of the cell counts as one symbol."""
    inside: Spelling
    """The spelling of all other tokens, symbol by symbol."""

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int] | None], symbols: int, roots: Sequence[tuple[int, int]]) -> "SpelledVocabulary":
        """Return the vocabulary. The arguments are those of `Spelling`."""
        return cls(np.array([cell for cell, _ in roots], np.int64), Spelling(tokens, symbols, roots), Spelling(tokens, symbols))


@lru_cache(4)
def first_symbols(student: SpelledVocabulary, teacher: SpelledVocabulary) -> np.ndarray:
    """Return the first symbol (C,) of each cell's root. It is `other` for a cell that has tokens of only one model."""
    found = np.full(1 + max(int(each.cells.max(initial=0)) for each in (student, teacher)), student.inside.other)
    both = np.isin(student.cells, teacher.cells)
    found[student.cells[both]] = student.starts.table[both, 0]
    return found


@dataclass(frozen=True)
class SpelledText:
    """Texts in the tokens of one model, with the spelling of these tokens. The arrays are on the CPU."""

    vocabulary: SpelledVocabulary
    tokens: np.ndarray
    """Ids (N,)."""
    spans: np.ndarray
    """(N,) For each token, the index of its span. Spans are numbered from 0 in the order of the text."""
    stripped: np.ndarray
    """(N,) bool. True for a token whose first space is not written, because the token begins a text."""
    by_cell: np.ndarray
    """(N,) bool. True for the first token of a span, if the models are compared there by cells (`objectives.spans`)."""

    def only(self, kept: np.ndarray) -> "SpelledText":
        """Return the text without the tokens for which `kept`, (N,) bool, is False."""
        return SpelledText(self.vocabulary, *(part[kept] for part in (self.tokens, self.spans, self.stripped, self.by_cell)))

    @cached_property
    def count(self) -> np.ndarray:
        """The number (N,) of symbols of each token, in the spelling that is used for it (`starts` or `inside`)."""
        starts, inside = self.vocabulary.starts.lengths[self.tokens], self.vocabulary.inside.lengths[self.tokens]
        return np.where(self.by_cell, starts, inside - self.stripped)

    @cached_property
    def first(self) -> np.ndarray:
        """The index (N + 1,) of the first node of each token, and at the end the number R of all nodes. A node is a position in a token:
        before, between or after its symbols. So a token with n symbols has n + 1 nodes."""
        return np.concatenate([[0], np.cumsum(self.count + 1)])

    def symbols(self, token: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Return symbol number `depth` (X,) of token number `token` (X,) of the text."""
        found, ids = np.zeros(len(token), np.int64), self.tokens[token]
        for spelling, rows in ((self.vocabulary.starts, self.by_cell[token]), (self.vocabulary.inside, ~self.by_cell[token])):
            found[rows] = spelling.table[ids[rows], (depth + self.stripped[token])[rows]]
        return found

    @cached_property
    def longer(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each token, the symbols (n,) that follow it in longer tokens, and (n,) bool: True if token plus symbol are a token."""
        return [self._spelling(by_cell).longer(int(t), bool(s)) for t, s, by_cell in self._each]

    @property
    def _each(self) -> "zip[tuple[Any, Any, Any]]":
        return zip(self.tokens, self.stripped, self.by_cell, strict=True)

    @cached_property
    def ends(self) -> np.ndarray:
        """(R,) bool. True for a node whose written symbols are a whole token of the vocabulary."""
        each = [self._spelling(by_cell).ends(int(t), bool(s)) for t, s, by_cell in self._each]
        return np.concatenate([np.zeros(0, bool), *each])

    @cached_property
    def offsets(self) -> np.ndarray:
        """The number (N + 1,) of the texts' symbols before each token, and at the end the number of all symbols."""
        return np.concatenate([[0], np.cumsum(self.vocabulary.inside.lengths[self.tokens] - self.stripped)])

    def sure(self, token: np.ndarray, depth: np.ndarray, joined: np.ndarray) -> np.ndarray:
        """Return (X,) bool: False for a place at which the model may be inside a token that is not one of the text's tokens.

        Example: a model has the tokens a, b and aba. The result for the place after `ab` is False in two cases:

        - The text has the token `aba`. But the model may have written `a` and then `b`. If `ab` were also a token, the result would be
          True: a tokenizer writes the longest token, so it would not write `a` before `b`.
        - The text has the tokens `a` and `b`. But the model may be inside the longer token `aba` (`unsure`).

        Args:
            token: the index (X,) of the token at each place.
            depth: the number (X,) of this token's symbols before the place.
            joined: as in `unsure`.
        """
        node, total = self.first[token] + depth, np.concatenate([[0], np.cumsum(self.ends)])
        shorter = total[node] - total[np.minimum(self.first[token] + 1, node)] > 0
        root = (self.vocabulary.inside.lengths - self.vocabulary.starts.lengths + 1)[self.tokens[token]]
        within = np.where(self.by_cell[token] & (depth > 0), root + depth - 1, depth)
        return (self.ends[node] | ~shorter) & ~self.unsure(joined)[self.offsets[token] + within]

    def unsure(self, joined: np.ndarray) -> np.ndarray:
        """Return one bool for the place before each symbol of the texts, and one for their end. True if the model may be inside a longer
        token there, which begins with an earlier token of the text and all symbols between that token and the place (at least one).

        Args:
            joined: (N,) bool. True for a token that comes directly after the token before it.
        """
        table, lengths = self.vocabulary.inside.table, self.vocabulary.inside.lengths
        symbols = [table[t, int(s) : lengths[t]] for t, s in zip(self.tokens, self.stripped, strict=True)]
        found = np.zeros(self.offsets[-1] + 1, bool)
        for k in np.flatnonzero(joined[1:]):
            if symbols[k + 1][0] not in self.longer[k][0]:
                continue
            last = k + 1
            while last < len(joined) and joined[last] and self.offsets[last] - self.offsets[k + 1] < table.shape[1]:
                last += 1
            following = np.concatenate(symbols[k + 1 : last]).tolist()[:-1]  # no place is behind the last symbol of a text
            count = self._spelling(bool(self.by_cell[k])).extent(int(self.tokens[k]), bool(self.stripped[k]), following)
            found[self.offsets[k + 1] + 1 : self.offsets[k + 1] + count + 1] = True
        return found

    def _spelling(self, by_cell: bool) -> Spelling:
        return self.vocabulary.starts if by_cell else self.vocabulary.inside

    def groups(self, rows: np.ndarray, *, by_cell: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the groups (`Around`) around the tokens with the indices `rows` (n,). `SpelledText.by_cell` is `by_cell` for all of them.

        Returns:
            Three arrays (U, K) with one row per different token: the number of tokens in each group; `Around.slots`; and the slots of the
            groups that are `closed`, with -1 for all others. If a row has fewer than K groups, these arrays are filled up with 0, 0 and -1.
            The fourth array (n,) has the row of each of the n tokens in these arrays.
        """
        keys, which = np.unique(2 * self.tokens[rows] + self.stripped[rows], return_inverse=True)
        spelling = self._spelling(by_cell)
        found = [spelling.around(int(key) // 2, bool(key % 2)) for key in keys]
        shape = len(found), max((len(a.starts) for a in found), default=1)
        sizes, slots, closed = np.zeros(shape, np.int64), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        for row, around in enumerate(found):
            count = len(around.starts)
            sizes[row, :count] = np.diff(around.starts, append=len(spelling))
            slots[row, :count] = around.slots
            closed[row, :count] = np.where(around.closed, around.slots, -1)
        return sizes, slots, closed, which
