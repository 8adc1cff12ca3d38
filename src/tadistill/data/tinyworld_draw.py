"""Random draws of tinyworld: each purpose has its own generator, and only its `random()` is called.

Python guarantees the stream of that method only, so the same seed gives the same rows with every version.
"""

from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def rng(*address: int | str) -> Random:
    """Return the generator of one purpose."""
    return Random("|".join(map(str, address)))


def pick(items: Sequence[T], rng: Random, weights: Sequence[int] | None = None) -> T:
    """Draw one item, with equal chances or by weight. Surplus weights at the end are ignored."""
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
    """Return the items in random order."""
    draw = rng.random  # looked up once, because a world needs a hundred thousand draws
    return sorted(items, key=lambda _: draw())
