"""Read all rows of a split once, and store what later checks need: the number of rows, and a sample of them.

    survey(recipe.data.train, "train", recipe.data).rows

The result for a large file is stored in the cache folder, in a file named by a digest of the data. The next command does not read the rows
again.
"""

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from tadistill import __version__
from tadistill.config import Data, DataRef, Recipe
from tadistill.config.data import World
from tadistill.config.recipe import methods
from tadistill.data import answers, chat_jinja, datasets, fictional_world, prompts, tinyworld
from tadistill.data import rows as reading
from tadistill.data.datasets import SplitRows, json_rows, right
from tadistill.data.rows import Example, Form, beyond_ascii, form_of, no_column, place, text, where_of
from tadistill.disk import cache_root, sha256, write_json
from tadistill.errors import DataError, Gathering, StoreError, about
from tadistill.store import key_of
from tadistill.text import counted, listed
from tadistill.text import form as form_of_noun

T = TypeVar("T")
LARGE = 5_000
"""A training set with more rows is large. The tokens of a large set and the survey of its rows are stored on the disk (`token_cache`)."""
SAMPLE = 512
"""Largest number of rows in a sample."""
DIGITS = 12
"""Number of characters of a prompt's digest. With a million training rows, a new prompt counts as seen with a probability below 1e-8."""
_NAMED = 20
"""Largest number of wrong rows that a message names."""
_known: dict[str, "Survey"] = {}


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
    prompts: str
    """A digest of each row's prompt, one after the other (`DIGITS` each). Equal prompts have equal digests, also in rows of other forms."""

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
        DataError: the data set is missing or empty, or rows are wrong. The message names the key of the data set, and the rows.
    """
    with about(f"data.{role}"):
        return _survey(SplitRows.of(ref, role, data))


def _survey(rows: SplitRows) -> Survey:
    content = rows.content()
    if content is None:
        return _read(rows)
    key = key_of_rows(rows, content, prompts, sys.modules[__name__])
    if key not in _known:
        _known[key] = _stored(rows, cache_root() / "rows" / f"{key}.json")
    return _known[key]


_OTHER = {
    "train": ("the training data", "a training set"),
    "dev": ("the dev data, which choose checkpoints", "a dev set, which chooses checkpoints"),
}
"""Words for the data sets of a role, and for one of them."""


def seen_prompts(data: Data, role: str) -> dict[str, str]:
    """Return words about each test set with prompts that are also in the sets of a role (train or dev), such as `shares 2 of 4 prompts with
    the training data, so its scores are not only about new prompts`.

    Only exact copies count, in rows of whatever form. Rows on the Hub are not compared, but a test set that is itself one of these sets is
    named. Raises DataError if a data set is missing, or a row is wrong.
    """
    known, sources, (sets, one) = set[str](), set[str](), _OTHER[role]
    for ref in (data.sets if role == "train" else data.dev_sets()).values():
        if (rows := SplitRows.of(ref, role, data)).content() is None:
            sources.add(rows.fingerprint())
        else:
            known |= {*_each(survey(ref, role, data))}
    found: dict[str, str] = {}
    for ref in data.test:
        if (rows := SplitRows.of(ref, "test", data)).content() is None:
            found |= {ref.name: f"is {one}, {_KNOWN}"} if rows.fingerprint() in sources else {}
            continue
        asked = _each(survey(ref, "test", data))
        if count := sum(prompt in known for prompt in asked):
            part = "all" if count == len(asked) else f"{count:,} of {len(asked):,}"
            meaning = _KNOWN if count == len(asked) else "so its scores are not only about new prompts"
            found[ref.name] = f"shares {part} prompts with {sets}, {meaning}"
    return found


_KNOWN = "so its scores do not show how the models answer new prompts"


def _each(found: Survey) -> list[str]:
    return [found.prompts[i : i + DIGITS] for i in range(0, len(found.prompts), DIGITS)]


def check_sources(data: Data) -> None:
    """Check that every data set exists on this disk. A name that may be a Hub id is accepted too. No data is read.

    Raises:
        DataError: some data sets do not exist. The message names all of them.
    """
    found = Gathering()
    for role, ref in data.splits():
        with found.about():
            datasets.on_hub(ref, role, data)
    found.finish()


def form(ref: DataRef, role: str, data: Data) -> Form:
    """Return the form of the first row: an instruction, a conversation or a whole prompt. For a data set on the Hub, no row is read, and
    the form follows from the keys in `ref.columns`."""
    if (row := _first(ref, role, data)) is not None:
        return form_of(row, ref)
    return "messages" if "messages" in ref.columns else "prompt" if "prompt" in ref.columns else "instruction"


def has_unread_tools(ref: DataRef, role: str, data: Data) -> bool:
    """Return True if the first row is a conversation with a column `tools` that the recipe does not name. Return False for a data set on
    the Hub, whose rows are not read here."""
    first = _first(ref, role, data)
    return bool(first and first.get("tools")) and "tools" not in ref.columns and form(ref, role, data) == "messages"


def _first(ref: DataRef, role: str, data: Data) -> dict[str, Any] | None:
    file = SplitRows.of(ref, role, data).file
    return next((right(row) for _, row in json_rows(file)), None) if file else None


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
        check_corpus(data.corpus, data)


def check_corpus(ref: DataRef, data: Data) -> None:
    """Check a plain-text corpus. A corpus on this disk is read completely. For a corpus on the Hub, only one document is read.

    Raises:
        DataError: rows have no text, or all documents are empty. The message names the key `data.corpus`.
    """
    with about("data.corpus"):
        documents = _documents(ref, data.world, data.root)
        if datasets.on_hub(ref, "train", data) is not None:
            documents = itertools.islice(documents, 1)
        if not sum([bool(document.strip()) for document in _all_right(documents, ref)]):
            raise DataError(f"data set `{ref.load}` contains no text; give a file with at least one document in its column `text`")


def texts(ref: DataRef, world: World, root: str | None) -> Iterator[str]:
    """Yield the documents of a plain-text corpus. Each row is one document."""
    return map(right, _documents(ref, world, root))


def _documents(ref: DataRef, world: World, root: str | None) -> Iterator[str | DataError]:
    # the text of each row, or the error if a row is wrong
    column, rows = ref.columns.get("text", "text"), SplitRows(ref, "train", world, root)
    own = ((None, row) for row in tinyworld.corpus(seed=world.seed, people=world.people)) if ref.load == "tinyworld" else None
    for i, (line, row) in enumerate(own or rows.raw(stream=True)):
        where = where_of(ref, i, line)
        try:
            if column not in right(row):
                raise DataError(no_column(right(row), f"`{column}` (the text of a document)", where, corpus=True))
            yield text(right(row)[column], f"column `{column}` of the corpus", where)
        except DataError as error:
            yield error


def key_of_rows(rows: SplitRows, content: str, *code: Any) -> str:
    """Return the cache key under which facts about the rows are stored. It depends on the rows, on the settings, and on the code that reads
    the rows. `content` is the digest of the rows."""
    ref, scored = rows.ref, rows.role != "train"  # a row with which answers are compared must have a text
    settings = {"columns": ref.columns, "choices": ref.choices, "instruction": ref.instruction, "extra": ref.extra, "scored": scored}
    own = datasets, reading, answers, chat_jinja, tinyworld, fictional_world
    return key_of([__version__, content, settings, rows.limit, *(sha256(Path(str(module.__file__))) for module in (*own, *code))])


def _stored(rows: SplitRows, file: Path) -> Survey:
    with suppress(OSError, ValueError):  # there is no such file, or it is damaged: the rows are read
        return TypeAdapter(Survey).validate_json(file.read_bytes())
    found = _read(rows)
    if found.large:
        with suppress(StoreError):  # without the file, the next command reads the rows again
            write_json(file, asdict(found))
    return found


def _read(rows: SplitRows) -> Survey:
    total = rows.count()
    if not total:
        raise datasets.empty(rows.ref, rows.role)
    places = min(SAMPLE, total)
    wanted = {i * total // places for i in range(places)}
    sample: list[Example] = []
    digests: list[str] = []
    conversations, instructions, choices, beyond = False, False, False, 0.0
    for i, found in enumerate(_all_right(rows.tries(), rows.ref)):
        conversations |= bool(found.messages)
        instructions |= not found.verbatim and not found.messages
        choices |= bool(found.choices)
        beyond += beyond_ascii("".join(found.references))
        digests.append(_digest(found))
        if i in wanted:
            sample.append(replace(found, answers={}))  # a rule's answer may be an object that JSON lacks
    return Survey(total, tuple(sample), conversations, instructions, choices, beyond / total, "".join(digests))


def _all_right(rows: Iterator[T | DataError], ref: DataRef) -> Iterator[T]:
    # yields the rows that are right; raises one error about all the others at the end
    total, wrong, named = 0, 0, dict[str, list[tuple[str, str]]]()
    for total, row in enumerate(rows, 1):
        if not isinstance(row, DataError):
            yield row
        elif (wrong := wrong + 1) <= _NAMED:
            found = _PLACE.search(str(row))
            at = found[0] if found else place(total - 1, None)
            named.setdefault(str(row).replace(at, "", 1), []).append((at, str(row)))
    sentences = [first + (f" (also {_places([at for at, _ in others])})" if others else "") for (_, first), *others in named.values()]
    if wrong > 1:
        what = f"the first {_NAMED} are" if wrong > _NAMED else "they are"
        sentences.insert(0, f"data set `{ref.load}` has {counted(wrong, 'wrong row')} among {total}; {what}:")
    if wrong:
        raise DataError(*sentences)


def _places(places: Seq[str]) -> str:
    noun = places[0].split()[0]
    return f"{form_of_noun(len(places), noun, f'{noun}s')} {listed([place.split()[1] for place in places])}"


_PLACE = re.compile(r"\b(line|row) \d+")


def _digest(row: Example) -> str:
    # of the conversation that a row has before its answer, in whatever form it is written
    messages = [{name: value for name, value in message.items() if value is not None} for message in prompts.before_answer(row)]
    prompt = json.dumps([messages, row.tools], default=str, sort_keys=True)
    return hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=DIGITS // 2).hexdigest()
