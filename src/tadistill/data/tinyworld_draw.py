"""Random draws of tinyworld: each purpose has a generator of its own, and only `random()` is called.

That method's stream is the one that Python promises to keep, so the same seed gives the same rows everywhere.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def rng(*address: int | str) -> Random:
    """The generator of one purpose."""
    return Random("|".join(map(str, address)))


def pick(items: Sequence[T], rng: Random, weights: Sequence[int] | None = None) -> T:
    """One item, with equal chances or by weight (of more weights than items the first count)."""
    if weights is None:
        return items[int(rng.random() * len(items))]
    weights = weights[: len(items)]
    left = rng.random() * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        left -= weight
        if left < 0:
            return item
    return items[-1]


def shuffled(items: Iterable[T], rng: Random) -> list[T]:
    """The items in random order."""
    draw = rng.random  # looked up once: the embedded world draws a hundred thousand times
    return sorted(items, key=lambda _: draw())
