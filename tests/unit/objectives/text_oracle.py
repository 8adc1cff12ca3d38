"""The divergence of two models with different tokenizers, place by place, with dictionaries and whole distributions.

Nothing of `tadistill.objectives` is used but the divergence itself. A token is a tuple of symbols.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LEAST = 1e-15
STOP, OTHER = -1, 10**6
Symbols = tuple[int, ...]


@cache
def _members(vocabulary, cells, prefix: Symbols, cell: int | None, stripped: bool) -> dict[int, list[int]]:
    """Return the tokens that begin with `prefix`, by their next symbol."""
    found = dict[int, list[int]]()
    for i, symbols in enumerate(vocabulary):
        written = symbols or (OTHER,)
        written = written[1:] if stripped and written[0] == 32 else written
        if cell in (None, cells[i][0]) and written[: len(prefix)] == prefix:
            found.setdefault(written[len(prefix)] if len(written) > len(prefix) else STOP, []).append(i)
    return found


@dataclass
class Side:
    """One model's tokens of a text. `probs` (n, V) are its distributions of each token."""

    vocabulary: Sequence[Symbols | None]
    cells: Sequence[tuple[int, int]]
    tokens: Sequence[int]
    spans: Sequence[int]
    probs: Tensor
    stripped: Sequence[bool] | None = None

    def written(self, k: int) -> Symbols:
        """Return the symbols of the k-th token of the text."""
        symbols = self.vocabulary[self.tokens[k]]
        assert symbols
        return symbols[1:] if self.stripped and self.stripped[k] else symbols

    def after(self, k: int, prefix: Symbols, by_cell: bool) -> tuple[dict[int, Tensor], Tensor | None]:
        """Return the probabilities of the next symbols of the k-th token after `prefix`, and of its end. None if no token ends there."""
        cell = self.cells[self.tokens[k]][0] if by_cell else None
        members = _members(tuple(self.vocabulary), tuple(self.cells), prefix, cell, bool(self.stripped and self.stripped[k]))
        masses = {symbol: self.probs[k, rows].sum() for symbol, rows in members.items()}
        total = torch.stack([*masses.values()]).sum()
        stop = masses.pop(STOP, None)
        return {s: p / total for s, p in masses.items()}, None if stop is None else stop / total

    def tokens_of(self, k: int, by_cell: bool) -> set[Symbols]:
        """Return the symbols of all tokens with which the k-th token is compared."""
        cell = self.cells[self.tokens[k]][0] if by_cell else None
        strip = bool(self.stripped and self.stripped[k])
        kept = [t for i, t in enumerate(self.vocabulary) if t and cell in (None, self.cells[i][0])]
        return {t[1:] if strip and t[0] == 32 else t for t in kept}

    def sure(self, k: int, joined: Sequence[bool], inside: Symbols, by_cell: Sequence[bool]) -> bool:
        """Return False if the text could be in another token, after the symbols `inside` of the k-th token."""
        own = self.tokens_of(k, by_cell[k])
        if inside and inside not in own and any(inside[:n] in own for n in range(1, len(inside))):
            return False
        after = inside
        while joined[k]:
            k -= 1
            after = self.written(k) + after
            if len(after) > len(self.written(k)) and any(t[: len(after)] == after for t in self.tokens_of(k, by_cell[k])):
                return False
        return True

    def at(self, span: int) -> list[int]:
        """Return the indices of the tokens of a span."""
        return [k for k, s in enumerate(self.spans) if s == span]


def text_divergence(
    divergence: Callable[..., Tensor], student: Side, teacher: Side, follows: Sequence[bool], compared: Sequence[bool]
) -> list[Tensor]:
    """Return the divergence of each span."""
    sides, values = (student, teacher), list[Tensor]()
    by_cell = [
        len({side.cells[side.tokens[side.at(k)[0]]][0] for side in sides}) == 1
        and not any(side.stripped and side.stripped[side.at(k)[0]] for side in sides)
        for k in range(len(follows))
    ]
    for span in range(len(follows)):
        total = student.probs.new_zeros(())
        if compared[span]:
            text = sum((student.written(k) for k in student.at(span)), ())
            root = student.cells[student.tokens[student.at(span)[0]]][1]
            for place in range(len(text)):
                if not (by_cell[span] and 0 < place < root):
                    total = total + _of_place(divergence, sides, span, place, text, follows, compared, by_cell)
        values.append(total)
    return values


def _of_place(divergence, sides, span: int, place: int, text: Symbols, follows, compared, by_cell) -> Tensor:
    known, longer, sure = [], dict[int, int](), True
    for side in sides:
        tokens = side.at(span)
        starts = [sum(len(side.written(i)) for i in tokens[:n]) for n in range(len(tokens))]
        start, k = max((start, k) for start, k in zip(starts, tokens, strict=True) if start <= place)
        cells = [by_cell[side.spans[i]] and i == side.at(side.spans[i])[0] for i in range(len(side.tokens))]
        joined = [
            i > 0 and compared[s] and compared[side.spans[i - 1]] and (side.spans[i - 1] == s or follows[s])
            for i, s in enumerate(side.spans)
        ]
        inside = text[start:place]
        sure = sure and side.sure(k, joined, inside, cells)
        own, stop = side.after(k, inside, cells[k] and place > 0)
        whole = side.tokens_of(k, cells[k])
        every = stop is None or place == start
        single = {s for s in own if every or (*inside, s) in whole}
        if place == start and joined[k]:
            more, ended = side.after(k - 1, side.written(k - 1), cells[k - 1])
            tokens_before = side.tokens_of(k - 1, cells[k - 1])
            for s in more:
                longer[s] = max(longer.get(s, 0), 1 if (*side.written(k - 1), s) in tokens_before else 2)
            own = {s: more.get(s, 0) + ended * own.get(s, 0) for s in {*own, *more}} if more else own
            single = set(own)
        known.append((own, every, single))
    if not sure:
        return sides[0].probs.new_zeros(())
    makes, found = {s for s, kind in longer.items() if kind == 1}, sides[0].probs.new_zeros(())
    if makes:
        found = found + _compare(divergence, known, lambda s: s in makes, lambda s: True)
    if text[place] in makes:
        return found
    if not (place == 0 and by_cell[span]):
        return found + _compare(divergence, known, lambda s: True, lambda s: s not in makes)
    if len(makes) < len(longer):
        found = found + _compare(divergence, known, lambda s: longer.get(s) == 2, lambda s: s not in makes)
    return found if text[place] in longer else found + _of_cells(divergence, sides, span, set(longer))


def _compare(divergence, known, separate: Callable[[int], bool], counts: Callable[[int], bool]) -> Tensor:
    """Compare the symbols that count. Those that are known on both sides and `separate` are outcomes, and all others together are one."""
    symbols = sorted({s for own, *_ in known for s in own if counts(s)})
    alone = [s for s in symbols if separate(s) and all(every or s in single for _, every, single in known)]
    logits = []
    for own, *_ in known:
        masses = {s: p for s, p in own.items() if counts(s)}
        excluded = sum(p for s, p in own.items() if not counts(s))
        outcomes = [torch.as_tensor(masses.get(s, 0.0)).double() for s in alone]
        probs = torch.stack([*outcomes, torch.as_tensor(1 - excluded - sum(outcomes)).double()])
        logits.append((probs / probs.sum()).clamp(min=LEAST).log())
    return divergence(*logits)


def _of_cells(divergence, sides, span: int, goes_on: set[int]) -> Tensor:
    first = {cell: side.vocabulary[i][0] for side in sides for i, (cell, _) in enumerate(side.cells) if side.vocabulary[i]}
    shared = {c for c, _ in sides[0].cells} & {c for c, _ in sides[1].cells}
    kept = [c for c in sorted({c for side in sides for c, _ in side.cells}) if c not in shared or first[c] not in goes_on]
    logits = []
    for side in sides:
        k = side.at(span)[0]
        rows = torch.tensor([cell for cell, _ in side.cells])
        masses = [side.probs[k, rows == cell].sum() for cell in kept]
        logits.append(torch.stack(masses).clamp(min=LEAST).log())
    return divergence(*logits)
