"""The fictional world of tinyworld: its people, places and facts, the wordings, and the random draws.

The wordings are loaded from tinyworld.json. All text is lower case, with one space between words. A punctuation mark is a word. In a
wording, `{x}` is replaced by the subject of a fact, and `{v}` by its value. The tests check three rules:
- A word is in only one set of values (`DOMAINS`, people, places, numbers), and does not occur in the wordings.
- A rewording uses only words that rows of the training set use too.
- The phrasings of an answer differ in their first two words. Therefore, a model that uses only one phrasing behaves differently from a
  model that uses all of them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar


@dataclass(frozen=True)
class Kind:
    """The wordings of questions and answers about one attribute of a person or place."""

    domain: str
    """The name of the set of possible values: a key of DOMAINS, or `place`, or `person`."""
    asks: tuple[str, ...]
    """Wordings of the question. For each fact, one of them is not used in training."""
    short_asks: tuple[str, ...]
    """Wordings of a question whose answer is only the value. For each fact, one of them is not used in training."""
    rewordings: tuple[str, ...]
    """Wordings of the question that are never used in training."""
    answers: tuple[str, ...]
    prose: tuple[str, ...]
    """Sentences for the plain-text corpus that state the fact."""


@dataclass(frozen=True)
class Skill:
    """The wordings of a task that needs an input, such as sorting a list. The module `tinyworld` generates the inputs."""

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
"""Maps each set of values to its words. People and places are not included, because each world has its own."""
NUMBERS = tuple(str(n) for n in range(1, 21))
ANSWER_WEIGHTS = (4, 3, 2, 1)
"""Relative frequencies, in training rows, of the four phrasings of an answer. They are unequal, as in real text."""

PERSON_KINDS, PLACE_KINDS = ({name: Kind(**_tuples(e)) for name, e in _TEXT[group].items()} for group in ("person_kinds", "place_kinds"))
KINDS = PERSON_KINDS | PLACE_KINDS
PERSON_STORY = ("home", "job", "pet", "colour")
PLACE_STORY = ("product", "river", "mayor")
"""The attributes of a place that the answer to an open question states, in this order. `PERSON_STORY` has those of a person."""
OPEN_ASKS = tuple(_TEXT["open_asks"])
"""Five open questions, such as "tell me about {x}". For each subject, three of them are used in training, the fourth in tinyworld_open, and
the fifth in tinyworld_lengths."""
SKILLS = {name: Skill(**_tuples(entry)) for name, entry in _TEXT["skills"].items()}
SALES = tuple(_TEXT["sales"])
"""Sentences about a sale, in different word orders. They are the inputs of the tasks `who`, `what` and `where`."""
STORY_OPENINGS = tuple(_TEXT["story_openings"])
RESIDENTS = _TEXT["residents"]
"""A sentence for the plain-text corpus about three people who live in one place."""


# --- random draws: each purpose has its own generator ------------------------------------------------------------------------

T = TypeVar("T")


def rng(*address: int | str) -> Random:
    """Return a new random generator. Its seed is `address`: the seed of the world, and the purpose of the draws, as in (0, "names").

    Call only its method `random`. Python guarantees only for this method that the numbers are the same on every machine.
    """
    return Random("|".join(map(str, address)))


def pick(items: Sequence[T], rng: Random, weights: Sequence[int] | None = None) -> T:
    """Draw one item, with equal probabilities or in proportion to `weights`. If there are more weights than items, the last weights are
    ignored."""
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


# --- people, places and facts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """A fact of the world: the attribute `kind` of `subject` has this `value`. `rivals` are the other possible values of the attribute."""

    kind: str
    subject: str
    value: str
    rivals: tuple[str, ...]

    def say(self, phrase: str) -> str:
        """Return `phrase` with the fact's subject and value filled in."""
        return phrase.format(x=self.subject, v=self.value)


@dataclass(frozen=True)
class FictionalWorld:
    """The people, places and facts of a fictional world, drawn with one seed."""

    seed: int
    people: int
    names: tuple[str, ...]
    places: tuple[str, ...]
    facts: tuple[Fact, ...]

    @cached_property
    def by_subject(self) -> dict[str, dict[str, Fact]]:
        """Maps each subject to its facts, and each kind of these facts to the fact."""
        told: dict[str, dict[str, Fact]] = {}
        for fact in self.facts:
            told.setdefault(fact.subject, {})[fact.kind] = fact
        return told


@lru_cache
def world(seed: int = 0, people: int = 120) -> FictionalWorld:
    """Return the people, places and facts that a seed draws. `people` is at most the number of names (640)."""
    pool = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    names = tuple(shuffled(pool, rng(seed, "names"))[:people])
    pool = [start + end for start in PLACE_STARTS for end in PLACE_ENDS]
    places = tuple(shuffled(pool, rng(seed, "places"))[:PLACES])
    facts = [f for kind in PERSON_KINDS for f in _facts(seed, kind, names, names, places)]
    facts += [f for kind in PLACE_KINDS for f in _facts(seed, kind, places, names, places)]
    return FictionalWorld(seed, people, names, places, tuple(facts))


def _facts(seed: int, kind: str, subjects: tuple[str, ...], names: tuple[str, ...], places: tuple[str, ...]) -> list[Fact]:
    domain = {"place": places, "person": names}.get(KINDS[kind].domain) or DOMAINS[KINDS[kind].domain]
    draws = rng(seed, "facts", kind)
    if kind == "friend":  # one circle through all people, so that nobody is their own friend
        circle = shuffled(names, draws)
        friends = dict(zip(circle, circle[1:] + circle[:1], strict=True))
        return [Fact(kind, x, friends[x], tuple(n for n in names if n not in (x, friends[x]))) for x in subjects]
    # the values are equally frequent, so that guessing the most frequent one gains nothing
    rivals = rivals_in(domain)
    values = shuffled((domain * (len(subjects) // len(domain) + 1))[: len(subjects)], draws)
    return [Fact(kind, x, v, rivals[v]) for x, v in zip(subjects, values, strict=True)]


def rivals_in(domain: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Map each value of a domain to its rivals: all other values."""
    return {value: tuple(v for v in domain if v != value) for value in domain}
