"""Read all rows of a split once, and store what later checks need: the number of rows, and a sample of them.

    survey(recipe.data.train, "train", recipe.data).rows

The result for a large file is stored in the cache folder, in a file named by a digest of the data. The next command does not read the rows
again.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tadistill import __version__
from tadistill.config import Data, DataRef, Recipe
from tadistill.config.data import World
from tadistill.config.recipe import methods
from tadistill.data import datasets, rows
from tadistill.data.rows import Example, beyond_ascii
from tadistill.disk import cache_root, digest, write_json
from tadistill.errors import StoreError
from tadistill.store import key_of

LARGE = 5_000
"""A training set with more rows is large. The tokens of a large set and the survey of its rows are stored on the disk (`token_cache`)."""
SAMPLE = 512
"""Largest number of rows in a sample."""


@dataclass(frozen=True)
class Survey:
    """Facts about a split that are known after all its rows were read."""

    rows: int
    sample: tuple[Example, ...]
    """At most SAMPLE examples, evenly spaced over the split, without their right answers (`Example.answers`)."""
    conversations: bool
    """True if at least one row is a conversation (messages)."""
    instructions: bool
    """True if at least one row has an instruction, around which a template is put."""
    choices: bool
    """True if at least one row has answer choices."""
    beyond_ascii: float
    """Share (0 to 1) of non-ASCII characters among the letters, digits and symbols of the references. It is the mean over the rows."""

    @property
    def places(self) -> list[int]:
        """The index in the split of each example of `sample`, from 0."""
        return [i * self.rows // len(self.sample) for i in range(len(self.sample))]

    @property
    def large(self) -> bool:
        """True if the data set is large (`LARGE`), so that its rows stay on the disk."""
        return self.rows > LARGE

    def plain(self, data: Data) -> bool:
        """Return True if tokenisation cannot fail because of a row: no row has choices, no chat template writes a prompt, and no long row
        is refused."""
        refuses = "refuse" in (data.long_prompts, data.long_responses)
        return not (refuses or self.choices or self.conversations or (self.instructions and data.template == "chat"))


def survey(ref: DataRef, role: str, data: Data) -> Survey:
    """Read and check all rows of a split that a recipe uses. Return the number of rows, a sample, and other facts.

    Raises:
        DataError: the data set is missing or empty, or a row is wrong. The message names the row.
    """
    limit, content = getattr(data.limit, role), datasets.content(ref, role, world=data.world, root=data.root)
    if content is None:
        return _read(ref, role, data.world, data.root, limit)
    return _known(ref.model_dump_json(), ref._folder, role, data.world.model_dump_json(), data.root, limit, content)


def check(recipe: Recipe) -> None:
    """Read all data sets of a recipe. Mistakes in them are thus found before any training.

    Raises:
        DataError: a file or a column is missing.
        ConfigError: settings of a method do not fit together.
    """
    data = recipe.data
    for role, ref in data.splits():
        survey(ref, role, data)
    if data.corpus and any(method.objective.needs_corpus for method in methods(recipe)):
        datasets.check_corpus(data.corpus, data)


def key_of_rows(ref: DataRef, limit: int | None, content: str, *code: Any) -> str:
    """Return the cache key under which facts about the first `limit` rows are stored. It depends on the rows, on the settings, and on the
    code that reads the rows."""
    settings = {"columns": ref.columns, "choices": ref.choices, "instruction": ref.instruction, "extra": ref.extra}
    return key_of([__version__, content, settings, limit, *_digests(*(module.__file__ for module in (rows, *code)))])


@lru_cache
def _digests(*files: str) -> tuple[str, ...]:
    return tuple(digest(Path(file)) for file in files)


@lru_cache(maxsize=32)
def _known(ref_json: str, beside: Path | None, role: str, world_json: str, root: str | None, limit: int | None, content: str) -> Survey:
    ref, world = DataRef.model_validate_json(ref_json), World.model_validate_json(world_json)
    ref._folder = beside  # the recipe's folder, from which relative paths start
    file = cache_root() / "rows" / f"{key_of_rows(ref, limit, content)}.json"
    with suppress(OSError, ValueError):  # there is no such file, or it is damaged: the rows are read
        return TypeAdapter(Survey).validate_json(file.read_bytes())
    found = _read(ref, role, world, root, limit)
    if found.large:
        with suppress(StoreError):  # without the file, the next command reads the rows again
            write_json(file, asdict(found))
    return found


def _read(ref: DataRef, role: str, world: World, root: str | None, limit: int | None) -> Survey:
    where: Any = {"world": world, "root": root, "limit": limit}
    total = datasets.count(ref, role, **where)
    if not total:
        raise datasets.empty(ref, role)
    places = min(SAMPLE, total)
    wanted = {i * total // places for i in range(places)}
    sample: list[Example] = []
    conversations, instructions, choices, beyond = False, False, False, 0.0
    for i, found in enumerate(datasets.stream(ref, role, **where)):
        conversations |= bool(found.messages)
        instructions |= not found.verbatim and not found.messages
        choices |= bool(found.choices)
        beyond += beyond_ascii("".join(found.references))
        if i in wanted:
            sample.append(replace(found, answers={}))  # a rule's answer may be an object that JSON lacks
    return Survey(total, tuple(sample), conversations, instructions, choices, beyond / total)
