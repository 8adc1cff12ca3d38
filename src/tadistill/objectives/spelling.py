"""The symbols that tokens write, and the cells of two vocabularies.

A symbol is a byte, or an event such as the end of the text. A cell is a set of tokens of both vocabularies. All of them begin with the
same symbols, the root of the cell. `tadistill.data.alignment.cells` finds the cells: if two models with different tokenizers write the
same text, their next tokens are in the same cell.

    vocabulary      tokens (a cell each)
    student         the  then  at
    teacher         the        at  att       cells: {the, then; the} with the root `the`, and {at; at, att} with the root `at`

Axes: N tokens of a text, V vocabulary, U different tokens, K groups.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

_NOTHING = -1  # after the last symbol of a token
_KEPT = 20_000  # tokens whose groups are kept: about 3 KB for a token of a vocabulary of 50,000


@dataclass(frozen=True)
class Around:
    """The groups of a vocabulary around one token. A group is a range of tokens in `Spelling.order`. The groups tile the vocabulary."""

    starts: np.ndarray
    """The first token (K,) of each group, ascending."""
    slots: np.ndarray
    """(K,) depth * width + symbol. The tokens of the group begin with the first `depth` symbols of the token, and then write `symbol`, or
    have ended if it is `stop`."""
    closed: np.ndarray
    """(K,) bool. True if the first `depth` symbols and `symbol` are a token."""


class Spelling:
    """The symbols of each token of a vocabulary, in an order in which tokens with the same beginning are neighbours.

    A symbol is a number: 0 to 255 is a byte, and the next numbers are events. Two more follow. `other` is the symbol of all tokens without
    symbols. `stop` says that a token has ended.
    """

    def __init__(self, tokens: Sequence[Sequence[int] | None], symbols: int, roots: Sequence[tuple[int, int]] | None = None):
        """Sort the tokens.

        Args:
            tokens: the symbols of each token. None for a token without symbols, such as padding.
            symbols: the number of symbols, bytes and events.
            roots: the cell of each token, and the length of the cell's root. If it is given, a token is spelled as the first symbol of its
                root, followed by the symbols after its root. The groups then compare it only with the tokens of its cell.
        """
        self.other, self.stop, self.width = symbols, symbols + 1, symbols + 2
        spelled = [(self.other,) if token is None or not len(token) else tuple(token) for token in tokens]
        keys = [(s,) for s in spelled] if roots is None else [(s[:n], cell, s[n:]) for s, (cell, n) in zip(spelled, roots, strict=True)]
        own = spelled if roots is None else [(*s[:1], *s[n:]) for s, (_, n) in zip(spelled, roots, strict=True)]
        self.order = np.array(sorted(range(len(spelled)), key=keys.__getitem__), np.int64)
        self.lengths = np.array([len(token) for token in own], np.int64)
        self.table = np.full((len(own), int(self.lengths.max(initial=0)) + 1), _NOTHING, np.int16)
        for token, written in enumerate(own):
            self.table[token, : len(written)] = written
        self._sorted = self.table[self.order]
        self._of_cell = None if roots is None else np.array([cell for cell, _ in roots])[self.order]
        self.rank = np.argsort(self.order)
        """The place (V,) of each token in `order`."""
        self.around = lru_cache(_KEPT)(self._around)
        """Return the groups around a token: `around(token, stripped)`. If `stripped`, all tokens of the vocabulary count without a space
        at their beginning, as in the first word of a text."""
        self.longer = lru_cache(_KEPT)(self._longer)
        """Return the symbols with which longer tokens go on after a token: `longer(token, stripped)`; and True for each symbol that makes
        a token with it."""
        self.ends = lru_cache(_KEPT)(self._find_ends)
        """Return (L + 1,) bool for a token with L symbols: `ends(token, stripped)`. True if its first symbols, as many as the index says,
        are a token."""
        self._branches = lru_cache(_KEPT)(self._find_branches)

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def _space(self) -> tuple[int, int]:
        low, high = np.searchsorted(self._sorted[:, 0], [32, 33])
        return int(low), int(high)

    def _ranges(self, token: int, stripped: bool) -> list[tuple[int, int, int, int]]:
        """Return the ranges of the tokens that are compared with a token: low, high, the first column that counts, and the depth there."""
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
        path, ranges = self._path(token, stripped), self._ranges(token, stripped)
        walks = [self._walk(path, *part) for part in ranges]
        if self._of_cell is not None:
            # other cells can have the same first symbol
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
        """Return the number of symbols that follow a token in a text for which a longer token would write the same."""
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
        """Yield each depth of a token in one of its `_ranges`, the range of the tokens that begin with so many of its symbols, and the
        column after them."""
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
        """Return the first token of each symbol in a column, among the tokens from `low` to `high`, and these symbols."""
        here = self._sorted[low:high, column]
        edges = np.flatnonzero(np.diff(here, prepend=-2))
        return low + edges, here[edges]

    def _walk(self, path: np.ndarray, low: int, high: int, column: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the groups among the tokens from `low` to `high`. The symbol at depth `first` of the token `path` is in `column`."""
        found = list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
        for depth in range(first, len(path) + 1):
            edges, symbols = self._branches(low, high, column + depth - first)
            own = np.flatnonzero(symbols == path[depth]) if depth < len(path) else np.zeros(0, np.int64)
            away = np.ones(len(edges), bool)
            away[own] = False
            found.append(self._groups(edges[away], symbols[away], depth, column + depth - first))
            if not len(own):
                break
            low, high = int(edges[own[0]]), int(edges[own[0] + 1]) if own[0] + 1 < len(edges) else high
        starts, slots, closed = (np.concatenate(part) for part in zip(*found, strict=True))
        return starts, slots, closed

    def _groups(self, starts: np.ndarray, symbols: np.ndarray, depth: int, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        slots = depth * self.width + np.where(symbols == _NOTHING, self.stop, symbols).astype(np.int64)
        return starts, slots, self._closed(starts, column)

    def _closed(self, starts: np.ndarray, column: int) -> np.ndarray:
        """Return True for each group that begins with a token that ends after `column`."""
        return self._sorted[starts, min(column + 1, self._sorted.shape[1] - 1)] == _NOTHING


@dataclass(frozen=True, eq=False)
class SpelledVocabulary:
    """The symbols of a vocabulary's tokens: at the beginning of a span, where both models predict the next token, and inside a span."""

    cells: np.ndarray
    """The cell (V,) of each token."""
    starts: Spelling
    inside: Spelling

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int] | None], symbols: int, roots: Sequence[tuple[int, int]]) -> "SpelledVocabulary":
        """Return the vocabulary of tokens, as in `Spelling`."""
        return cls(np.array([cell for cell, _ in roots], np.int64), Spelling(tokens, symbols, roots), Spelling(tokens, symbols))


@lru_cache(4)
def first_symbols(student: SpelledVocabulary, teacher: SpelledVocabulary) -> np.ndarray:
    """Return the first symbol (C,) of each cell's root. It is `other` for the cells of one model alone."""
    found = np.full(1 + max(int(each.cells.max(initial=0)) for each in (student, teacher)), student.inside.other)
    both = np.isin(student.cells, teacher.cells)
    found[student.cells[both]] = student.starts.table[both, 0]
    return found


@dataclass(frozen=True)
class SpelledText:
    """The tokens of some texts for one model, on the CPU."""

    vocabulary: SpelledVocabulary
    tokens: np.ndarray
    """Ids (N,)."""
    spans: np.ndarray
    """Span (N,) of each token, in ascending order from 0."""
    stripped: np.ndarray
    """(N,) bool. True for a token whose first space is not written, because it begins a text."""
    by_cell: np.ndarray
    """(N,) bool. True for the first token of a span that is compared by cells."""

    def only(self, kept: np.ndarray) -> "SpelledText":
        """Return the text with the tokens `kept` alone, (N,) bool."""
        return SpelledText(self.vocabulary, *(part[kept] for part in (self.tokens, self.spans, self.stripped, self.by_cell)))

    @cached_property
    def count(self) -> np.ndarray:
        """The number of symbols (N,) that each token writes in its spelling."""
        starts, inside = self.vocabulary.starts.lengths[self.tokens], self.vocabulary.inside.lengths[self.tokens]
        return np.where(self.by_cell, starts, inside - self.stripped)

    @cached_property
    def first(self) -> np.ndarray:
        """The first node (N + 1,) of each token. A token with n symbols has n + 1 nodes: the numbers of symbols that are written."""
        return np.concatenate([[0], np.cumsum(self.count + 1)])

    def symbols(self, token: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Return the symbol (X,) with the index `depth` of each of the tokens with the indices `token`."""
        found, ids = np.zeros(len(token), np.int64), self.tokens[token]
        for spelling, rows in ((self.vocabulary.starts, self.by_cell[token]), (self.vocabulary.inside, ~self.by_cell[token])):
            found[rows] = spelling.table[ids[rows], (depth + self.stripped[token])[rows]]
        return found

    @cached_property
    def longer(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """`Spelling.longer` of each token."""
        return [self._spelling(by_cell).longer(int(t), bool(s)) for t, s, by_cell in self._each]

    @property
    def _each(self) -> "zip[tuple[Any, Any, Any]]":
        return zip(self.tokens, self.stripped, self.by_cell, strict=True)

    @cached_property
    def ends(self) -> np.ndarray:
        """(R,) bool. True for a node whose symbols are a token."""
        each = [self._spelling(by_cell).ends(int(t), bool(s)) for t, s, by_cell in self._each]
        return np.concatenate([np.zeros(0, bool), *each])

    @cached_property
    def offsets(self) -> np.ndarray:
        """The number of symbols (N + 1,) of the texts before each token."""
        return np.concatenate([[0], np.cumsum(self.vocabulary.inside.lengths[self.tokens] - self.stripped)])

    def sure(self, token: np.ndarray, depth: np.ndarray, joined: np.ndarray) -> np.ndarray:
        """Return one bool per place, (X,). It is False if the text so far could also be in another token than the text's own.

        A shorter token may have ended inside this token, and others may have followed. If the symbols so far are a token, the tokenizer
        would have written this one. Or a token before this one could go on, if the symbols after it are those of a longer token.

        Args:
            token: the index (X,) of the token at each place.
            depth: the number (X,) of its symbols that are written.
            joined: as in `unsure`.
        """
        node, total = self.first[token] + depth, np.concatenate([[0], np.cumsum(self.ends)])
        shorter = total[node] - total[np.minimum(self.first[token] + 1, node)] > 0
        root = (self.vocabulary.inside.lengths - self.vocabulary.starts.lengths + 1)[self.tokens[token]]
        within = np.where(self.by_cell[token] & (depth > 0), root + depth - 1, depth)
        return (self.ends[node] | ~shorter) & ~self.unsure(joined)[self.offsets[token] + within]

    def unsure(self, joined: np.ndarray) -> np.ndarray:
        """Return one bool per symbol of the texts. It is True if, before this symbol, a token that has ended could still be the beginning
        of a longer one.

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
        """Return the groups around some tokens, which are all compared by cells, or all not. Empty groups fill the rows.

        Returns:
            The sizes (U, K) and the slots (U, K) of the groups around each different token; the slots again, but -1 for a group that is
            empty or not `closed`; and the row (n,) of each of the tokens `rows` in these arrays.
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
