"""The parts of a tinyworld: its text, read from tinyworld.json, and random draws.

All text is lower case with one space between tokens, and sentence marks are tokens. `{x}` is replaced by the subject of a fact, and `{v}`
by its value. The data follows three rules, which the tests check. No word belongs to two value domains, or to a domain and a phrase. A
rewording uses only words that training rows use too. Answers to one question differ in their first words, so that a model that covers all
phrasings and a model that uses one phrasing behave differently.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar


@dataclass(frozen=True)
class Kind:
    """The wordings of questions and answers about one attribute."""

    domain: str
    """A key of DOMAINS, `place` or `person`."""
    asks: tuple[str, ...]
    """Wordings of the question; one of them is held out for each fact."""
    short_asks: tuple[str, ...]
    """Wordings that ask for the bare value; one of them is held out for each fact."""
    rewordings: tuple[str, ...]
    """Wordings of the question that training never uses."""
    answers: tuple[str, ...]
    prose: tuple[str, ...]
    """Sentences of the plain-text corpus."""


@dataclass(frozen=True)
class Skill:
    """The wordings of a task that uses a given input; `tinyworld` makes the inputs."""

    asks: tuple[str, ...]
    rewordings: tuple[str, ...]
    answers: tuple[str, ...]


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


_TEXT = json.loads(Path(__file__).with_name("tinyworld.json").read_text(encoding="utf-8"))

# a world draws its names among 32 x 20 possible people and 15 x 6 possible places
NAME_STARTS, NAME_ENDS = (tuple(_TEXT["names"][part].split()) for part in ("starts", "ends"))
PLACE_STARTS, PLACE_ENDS = (tuple(_TEXT["places"][part].split()) for part in ("starts", "ends"))
PLACES = 24

DOMAINS = {name: tuple(words.split()) for name, words in _TEXT["domains"].items()}
"""The values of each attribute. Places and people are domains too, but they are drawn for each world."""
NUMBERS = tuple(str(n) for n in range(1, 21))
ANSWER_WEIGHTS = (4, 3, 2, 1)
"""Relative frequency of the first, second, … phrasing in training rows: uneven as in real text, so that there is a mode to seek."""

PERSON_KINDS, PLACE_KINDS = ({name: Kind(**_tuples(e)) for name, e in _TEXT[group].items()} for group in ("person_kinds", "place_kinds"))
KINDS = PERSON_KINDS | PLACE_KINDS
PERSON_STORY = ("home", "job", "pet", "colour")
PLACE_STORY = ("product", "river", "mayor")
"""The facts that answer an open question, in this order."""
OPEN_ASKS = tuple(_TEXT["open_asks"])
"""For each subject, training uses three of these questions, `open` uses a fourth one, and `lengths` uses the fifth one."""
SKILLS = {name: Skill(**_tuples(entry)) for name, entry in _TEXT["skills"].items()}
SALES = tuple(_TEXT["sales"])
"""Inputs of the tasks who, what and where. The roles have two orders, so that no role has a fixed position."""
STORY_OPENINGS = tuple(_TEXT["story_openings"])
RESIDENTS = _TEXT["residents"]
"""A sentence of the plain-text corpus about three people of one place."""


# --- random draws: each purpose has its own generator ------------------------------------------------------------------------

T = TypeVar("T")


def rng(*address: int | str) -> Random:
    """Return the generator of one purpose.

    Only its `random()` may be called: Python guarantees the stream of that method only, so the same seed gives the same rows everywhere.
    """
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
