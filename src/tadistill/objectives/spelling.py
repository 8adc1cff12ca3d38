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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

_NOTHING = -1  # after the last symbol of a token
_KEPT = 20_000  # tokens whose groups are kept: about 4 KB for a token of a vocabulary of 50,000


@dataclass(frozen=True)
class Around:
    """The groups of a vocabulary around one token. A group is a range of tokens in `Spelling.order`. The groups tile the vocabulary."""

    starts: np.ndarray
    """The first token (K,) of each group, ascending."""
    cells: np.ndarray
    """(K,) depth * width + symbol. The tokens of the group begin with the first `depth` symbols of the token, and then write `symbol`, or
    have ended if it is `stop`."""


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
        self._rank = np.argsort(self.order)
        self.around = lru_cache(_KEPT)(self._around)
        """Return the groups around a token: `around(token, stripped)`. If `stripped`, all tokens of the vocabulary count without a space
        at their beginning, as in the first word of a text."""
        self.longer = lru_cache(_KEPT)(self._longer)
        """Return the symbols with which longer tokens go on after a token: `longer(token, stripped)`, in ascending order."""
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
        cell, low, high = self._of_cell[self._rank[token]], int(self._rank[token]), int(self._rank[token]) + 1
        while low > 0 and self._of_cell[low - 1] == cell:
            low -= 1
        while high < len(self) and self._of_cell[high] == cell:
            high += 1
        return [(low, high, 1, 1)]

    def _around(self, token: int, stripped: bool) -> Around:
        path = self._path(token, stripped)
        walks = [self._walk(path, *part) for part in self._ranges(token, stripped)]
        if self._of_cell is not None:
            # other cells can have the same first symbol
            low, high, _, _ = self._ranges(token, stripped)[0]
            starts, symbols = self._branches(0, len(self), 0)
            after = np.searchsorted(starts, high, side="right")
            before = starts < low
            walks.append((starts[before], symbols[before].astype(np.int64)))
            walks.append((starts[after:], symbols[after:].astype(np.int64)))
            if high < len(self) and (after == len(starts) or starts[after] > high):
                walks.append((np.array([high]), symbols[after - 1 : after].astype(np.int64)))
        starts, cells = (np.concatenate(part) for part in zip(*walks, strict=True))
        order = starts.argsort(kind="stable")
        return Around(starts[order], cells[order])

    def _longer(self, token: int, stripped: bool) -> np.ndarray:
        path, found = self._path(token, stripped), set[int]()
        for low, high, column, first in self._ranges(token, stripped):
            for depth in range(first, len(path)):
                here = self._sorted[:, column + depth - first]
                low, high = bisect_left(here, path[depth], low, high), bisect_right(here, path[depth], low, high)
            found.update(self._branches(low, high, column + len(path) - first)[1].tolist())
        return np.array(sorted(found - {_NOTHING}), np.int64)

    def _path(self, token: int, stripped: bool) -> np.ndarray:
        return self.table[token, int(stripped) : self.lengths[token]]

    def _find_branches(self, low: int, high: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first token of each symbol in a column, among the tokens from `low` to `high`, and these symbols."""
        here = self._sorted[low:high, column]
        edges = np.flatnonzero(np.diff(here, prepend=-2))
        return low + edges, here[edges]

    def _walk(self, path: np.ndarray, low: int, high: int, column: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the groups among the tokens from `low` to `high`. The symbol at depth `first` of the token `path` is in `column`."""
        starts, cells = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for depth in range(first, len(path) + 1):
            edges, symbols = self._branches(low, high, column + depth - first)
            own = np.flatnonzero(symbols == path[depth]) if depth < len(path) else np.zeros(0, np.int64)
            away = np.ones(len(edges), bool)
            away[own] = False
            starts.append(edges[away])
            cells.append(depth * self.width + np.where(symbols == _NOTHING, self.stop, symbols)[away].astype(np.int64))
            if not len(own):
                break
            low, high = int(edges[own[0]]), int(edges[own[0] + 1]) if own[0] + 1 < len(edges) else high
        return np.concatenate(starts), np.concatenate(cells)


@dataclass(frozen=True)
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
    begins: np.ndarray
    """(N,) bool. True for the first token of a span that is compared by cells."""

    def only(self, kept: np.ndarray) -> "SpelledText":
        """Return the text with the tokens `kept` alone, (N,) bool."""
        return SpelledText(self.vocabulary, *(part[kept] for part in (self.tokens, self.spans, self.stripped, self.begins)))

    @cached_property
    def count(self) -> np.ndarray:
        """The number of symbols (N,) that each token writes in its spelling."""
        starts, inside = self.vocabulary.starts.lengths[self.tokens], self.vocabulary.inside.lengths[self.tokens]
        return np.where(self.begins, starts, inside - self.stripped)

    @cached_property
    def first(self) -> np.ndarray:
        """The first node (N + 1,) of each token. A token with n symbols has n + 1 nodes: the numbers of symbols that are written."""
        return np.concatenate([[0], np.cumsum(self.count + 1)])

    def symbols(self, token: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Return the symbol (X,) with the index `depth` of each of the tokens with the indices `token`."""
        found, ids = np.zeros(len(token), np.int64), self.tokens[token]
        for spelling, rows in ((self.vocabulary.starts, self.begins[token]), (self.vocabulary.inside, ~self.begins[token])):
            found[rows] = spelling.table[ids[rows], (depth + self.stripped[token])[rows]]
        return found

    @cached_property
    def longer(self) -> list[np.ndarray]:
        """For each token, the symbols with which longer tokens go on after it."""
        return [
            self._spelling(begins).longer(int(t), bool(s)) for t, s, begins in zip(self.tokens, self.stripped, self.begins, strict=True)
        ]

    def _spelling(self, begins: bool) -> Spelling:
        return self.vocabulary.starts if begins else self.vocabulary.inside

    def groups(self, rows: np.ndarray, *, begins: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the sizes (U, K) and the cells (U, K) of the groups around each different token, and the place (n,) of each token in them.

        `rows` are the indices of n tokens that are all at the beginning of a span, or all not.
        """
        keys, which = np.unique(2 * self.tokens[rows] + self.stripped[rows], return_inverse=True)
        spelling = self._spelling(begins)
        found = [spelling.around(int(key) // 2, bool(key % 2)) for key in keys]
        sizes, cells = (np.zeros((len(found), max((len(a.starts) for a in found), default=1)), np.int64) for _ in range(2))
        for row, around in enumerate(found):
            sizes[row, : len(around.starts)] = np.diff(around.starts, append=len(spelling))
            cells[row, : len(around.cells)] = around.cells
        return sizes, cells, which
