"""Combine several training sets: decide which rows an update draws from which set, and which teacher each row has.

Rows are numbered from 0 through all sets, one set after the other. The rows of an update depend only on the seed and the number of the
update.
"""

from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Generic, TypeVar, overload

import numpy as np

from tadistill import rng

T = TypeVar("T")


class Lazy(Seq[T], Generic[T]):
    """A sequence of `count` values. Every access computes the value with `read`. A slice is a list."""

    def __init__(self, count: int, read: Callable[[int], T]):
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        places = range(self._count)[i]  # an IndexError beyond the end
        return [self._read(k) for k in places] if isinstance(places, range) else self._read(places)


def joined(parts: Seq[Seq[T]]) -> Seq[T]:
    """Return several sequences as one, without a copy. A single sequence is returned unchanged."""
    if len(parts) == 1:
        return parts[0]
    starts = [0, *accumulate(map(len, parts))]

    def read(i: int) -> T:
        number = bisect_right(starts, i) - 1
        return parts[number][i - starts[number]]

    return Lazy(starts[-1], read)


@dataclass(frozen=True)
class TrainingSets:
    """The training sets of one training: their sizes, their weights and their teachers."""

    sizes: tuple[int, ...]
    """Number of rows of each set."""
    weights: tuple[float, ...] = ()
    """The share of each set in the drawn rows; they add up to 1. Empty if there is one set."""
    route: tuple[int, ...] = ()
    """The index of each set's teacher. Empty if every teacher teaches on all rows."""

    def rows(self, batch: int, number: int, address: tuple[int | str, ...]) -> np.ndarray:
        """Return the row indices (batch,) of batch `number`. Each epoch of a set has all its rows in a new order, drawn with the seed
        `address`."""
        if len(self.sizes) == 1:
            return shuffled(self.sizes[0], batch, number, address)
        before, sets = self._draws.of(batch, number)
        order, found = np.zeros(batch, np.int64), [*before]
        for place, chosen in enumerate(sets):
            epoch, at = divmod(found[chosen], self.sizes[chosen])
            order[place] = self.starts[chosen] + self._order(self.sizes[chosen], *address, "set", chosen, epoch)[at]
            found[chosen] += 1
        # processes and micro-batches get rows at fixed distances in the batch, so the sets must not repeat at such a distance
        return order[rng.generator(*address, "sets of a batch", number).permutation(batch)]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of the first row of each set."""
        return (0, *accumulate(self.sizes))[:-1]

    def set_of(self, row: int) -> int:
        """Return the index of the set that contains a row."""
        return bisect_right(self.starts, row) - 1

    def teacher(self, row: int) -> int | None:
        """Return the index of the teacher of a row. Return None if every teacher teaches on all rows."""
        return self.route[self.set_of(row)] if self.route else None

    def sets_of(self, teacher: int) -> list[int]:
        """Return the indices of the sets on which a teacher teaches, in ascending order."""
        return [number for number, other in enumerate(self.route) if other == teacher]

    def place(self, row: int) -> int:
        """Return the index of a row among all rows of its teacher. Without a `route`, this is the row itself."""
        if not self.route:
            return row
        own = self.set_of(row)
        before = sum(self.sizes[number] for number in self.sets_of(self.route[own]) if number < own)
        return before + row - self.starts[own]

    @cached_property
    def _draws(self) -> "_Draws":
        return _Draws(self.weights)

    @cached_property
    def _order(self) -> Callable[..., np.ndarray]:
        # the order of a set's rows in an epoch; prompts and fixed texts each need two epochs of each set
        return lru_cache(4 * len(self.sizes))(_permuted)


def shuffled(rows: int, batch: int, step: int, address: tuple) -> np.ndarray:
    """Return the row indices (batch,) of batch number `step`. Each epoch has all rows in a new order, drawn with the seed `address`."""
    places = (divmod(position, rows) for position in range(step * batch, (step + 1) * batch))
    return np.array([_order(rows, *address, epoch)[place] for epoch, place in places])


def _permuted(rows: int, *address: int | str) -> np.ndarray:
    return rng.generator(*address).permutation(rows)


_order = lru_cache(maxsize=4)(_permuted)  # prompts and corpus, each in two epochs


@dataclass
class _Draws:
    """The choice of the training set from which each row of a training is drawn.

    After n rows, the number of rows of a set differs from n times its weight by less than 1. This is the algorithm of
    R. Tijdeman (1980), The chairman assignment problem. For row n, the debt of a set is n times its weight, minus the number of its rows so
    far. With k sets, the candidates are the sets with a debt of at least s = 1 / (2k - 2). If no more rows of a candidate were drawn, its
    debt would grow by its weight with every row. The row is drawn from the candidate whose debt would reach 1 - s first.
    """

    weights: tuple[float, ...]
    starts: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    """Maps a batch size to a list: for each batch, the numbers of rows that were drawn from each set before it."""

    def of(self, batch: int, number: int) -> tuple[tuple[int, ...], list[int]]:
        """Return two things: how many rows of each set were drawn before batch `number`, and the index of a set for each row of this
        batch."""
        starts = self.starts.setdefault(batch, [(0,) * len(self.weights)])
        while True:
            last = min(number, len(starts) - 1)
            sets = self._sets(starts[last], last * batch, batch)
            if last + 1 == len(starts):
                starts.append(tuple(count + sets.count(i) for i, count in enumerate(starts[last])))
            if last == number:
                return starts[number], sets

    def _sets(self, before: tuple[int, ...], drawn: int, batch: int) -> list[int]:
        counts, found = [*before], list[int]()
        slack = 1 / (2 * len(self.weights) - 2)
        for total in range(drawn + 1, drawn + batch + 1):
            due = [weight * total - count for weight, count in zip(self.weights, counts, strict=True)]
            able = [i for i, owed in enumerate(due) if owed >= slack - _ROUNDING]
            chosen = min(able, key=lambda i: (1 - slack - due[i]) / self.weights[i])
            counts[chosen] += 1
            found.append(chosen)
        return found


_ROUNDING = 1e-6
