"""Read examples from tinyworld, from JSONL files, and from data sets on the Hugging Face Hub.

A data set is looked for in this order: the built-in tinyworld, a local path, a folder under `data.root` (or TADISTILL_DATA), the Hub.
Every row has the columns of one of these four forms:

    instruction, output (or outputs), and optionally input
    prompt, completion
    messages: a conversation that ends with an assistant message
    text: a document of a plain-text corpus

A row may also have the column choices: the possible answers of a classification task.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tadistill.config import Data, DataRef, Recipe
from tadistill.config.recipe import World, methods
from tadistill.data import hub, tinyworld
from tadistill.errors import DataError

Facts = tuple[tuple[str, tuple[str, ...]], ...]
"""The facts that an answer must state, as (value, rivals) pairs. The answer must contain the value, and none of the rivals."""


@dataclass(frozen=True)
class Example:
    """One prompt with its reference answers."""

    instruction: str
    input: str
    references: tuple[str, ...]
    messages: tuple[dict[str, str], ...] = ()
    """The messages before the answer, if the row is a conversation. `instruction` and `input` are then empty."""
    verbatim: bool = False
    """True if `instruction` is the whole prompt, so that no template is added."""
    facts: Facts = ()
    choices: tuple[str, ...] = ()
    """All possible answers of a classification task, including the references. Empty for other tasks."""


@dataclass(frozen=True)
class _Named:
    folder: str
    hub: str
    files: dict[str, tuple[str, int | None, int | None]]
    """Maps a split to (file on the Hub, first row, row after the last one). None means no limit."""


def _bucket(name: str, lengths: str, last: int | None = None) -> _Named:
    # MiniLLM splits these sets by the number of tokens of the first reference; its tables use the part with the longest ones
    return _Named(f"minillm_{name}_{lengths.rstrip('_')}", f"MiniLLM/{name}", {"test": (f"{lengths}/valid.jsonl", None, last)})


_TEST_ONLY: dict[str, tuple[str, int | None, int | None]] = {"test": ("valid.jsonl", None, None)}
NAMED = {
    # MiniLLM calls its test rows "valid"; its dev rows are the first 1,000 of the raw training file
    "dolly": _Named(
        "minillm_dolly",
        "MiniLLM/dolly",
        {"train": ("raw.jsonl", 1000, None), "dev": ("raw.jsonl", None, 1000), "test": ("valid.jsonl", None, None)},
    ),
    "self_inst": _Named("minillm_self_inst", "MiniLLM/self-inst", _TEST_ONLY),
    "vicuna": _Named("minillm_vicuna", "MiniLLM/Vicuna", _TEST_ONLY),
    "sinst": _bucket("sinst", "11_"),
    "sinst/0_2": _bucket("sinst", "0_2"),
    "sinst/3_5": _bucket("sinst", "3_5"),
    "sinst/6_10": _bucket("sinst", "6_10"),
    "uinst": _bucket("uinst", "11_", 10_000),
    "uinst/0_2": _bucket("uinst", "0_2"),
    "uinst/3_5": _bucket("uinst", "3_5"),
    "uinst/6_10": _bucket("uinst", "6_10"),
}


def load(ref: DataRef, role: str, data: Data) -> list[Example]:
    """Read the examples of one split of a data set, at most as many as `data.limit` allows.

    Args:
        role: train, dev or test. It selects the limit. It is also the split, unless `ref.split` names another split.

    Raises:
        DataError: the data set is missing or empty, or a row lacks a column.
    """
    return read(ref, role, world=data.world, root=data.root, limit=getattr(data.limit, role))


def read(ref: DataRef, role: str, *, world: World, root: str | None, limit: int | None) -> list[Example]:
    """Read the first `limit` examples of one split of a data set, or all examples if `limit` is None.

    Raises:
        DataError: the data set is missing or empty, or a row lacks a column.
    """
    examples = [_example(row, ref, i) for i, row in enumerate(itertools.islice(_rows(ref, role, world, root), limit))]
    if not examples:
        raise DataError(f"data set `{ref.load}` (split {ref.split or role}) is empty; give a file with at least one row")
    return examples


def check(recipe: Recipe) -> None:
    """Read all data sets of a recipe, so that mistakes are found before any training.

    Raises:
        DataError: a file or a column is missing, or two test sets have the same name.
        ConfigError: settings of a method do not fit together.
    """
    data = recipe.data
    for ref, role in [(data.train, "train"), (data.dev, "dev"), *((r, "test") for r in data.test)]:
        load(ref, role, data)
    if data.corpus and any(method.objective.needs_corpus for method in methods(recipe)):
        next(texts(data.corpus, world=data.world, root=data.root), None)
    names = [r.name for r in data.test]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data.test has two sets called `{name}`; rename one of the files")


def texts(ref: DataRef, *, world: World, root: str | None) -> Iterator[str]:
    """Yield the documents of a plain-text corpus, one per row."""
    column = ref.columns.get("text", "text")
    own = ref.load == "tinyworld"
    rows = tinyworld.corpus(seed=world.seed, people=world.people) if own else _rows(ref, "train", world, root, stream=True)
    for i, row in enumerate(rows):
        if column not in row:
            raise DataError(_no_column(ref, i, f"`{column}`", row))
        yield row[column]


def fingerprint(ref: DataRef, role: str, data: Data) -> str:
    """Return a string that changes when the data of a split changes. It becomes part of the stage keys.

    It is a digest of a local file, the settings of tinyworld, or the Hub id with its revision.
    """
    if ref.load in tinyworld.SPLITS:
        return f"{tinyworld.fingerprint(seed=data.world.seed, people=data.world.people)}:{ref.load}:{ref.split or role}"
    path = _local_file(ref, role, data.root)
    if path is None:
        return f"hub:{ref.load}@{ref.revision}:{ref.split or role}"
    return f"file:{_digest(path, path.stat().st_mtime_ns)}"


@lru_cache
def _digest(path: Path, mtime_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _rows(ref: DataRef, role: str, world: World, root: str | None, *, stream: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split. With `stream`, rows of a Hub data set are downloaded only when they are used."""
    split = ref.split or role
    if ref.load in tinyworld.SPLITS:
        if split in tinyworld.SPLITS[ref.load]:
            return iter(tinyworld.world_rows(ref.load, split, seed=world.seed, people=world.people))
        raise DataError(f"data set `{ref.load}` has no split `{split}`; its splits are {', '.join(tinyworld.SPLITS[ref.load])}")
    path = _local_file(ref, role, root)
    if path is not None:
        return _read_jsonl(path)
    repository, file = _on_hub(ref, split)
    return _hub_dataset(ref, split, stream) if file is None else _hub_file(ref, split, repository, file)


def on_hub(ref: DataRef, role: str, data: Data) -> tuple[str, str | None] | None:
    """Return (repository, file) of a split on the Hub, or None if the split is on this disk.

    The file is None if the split is not a single file.

    Raises:
        DataError: the data set or the split does not exist.
    """
    if ref.load in tinyworld.SPLITS or _local_file(ref, role, data.root) is not None:
        return None
    return _on_hub(ref, ref.split or role)


def _on_hub(ref: DataRef, split: str) -> tuple[str, str | None]:
    if named := NAMED.get(ref.load):
        if split not in named.files:
            raise DataError(f"data set `{ref.load}` has no split `{split}`; its splits are {', '.join(named.files)}")
        return named.hub, named.files[split][0]
    if ref.load.endswith((".jsonl", ".json")) or ref.load.startswith((".", "/")) or ref.load.count("/") != 1:
        known = ", ".join([*NAMED, *tinyworld.SPLITS])
        raise DataError(f"data set `{ref.load}` does not exist: it is neither a local file, nor a hub id, nor one of {known}")
    return ref.load, None


def _local_file(ref: DataRef, role: str, root: str | None) -> Path | None:
    split = ref.split or role
    root = root or os.environ.get("TADISTILL_DATA")
    folders = [Path(ref.load)]
    if root and ref.load in NAMED:
        folders.append(Path(root) / NAMED[ref.load].folder)
    elif root:
        folders.append(Path(root) / ref.load)
    for folder in folders:
        if folder.is_file():
            return folder
        if (folder / f"{split}.jsonl").is_file():
            return folder / f"{split}.jsonl"
    return None


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON ({error.msg}); every line must be one JSON object") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is a {type(row).__name__}, not an object; every line must be one JSON object")
            yield row


def _hub_file(ref: DataRef, split: str, repository: str, file: str) -> Iterator[dict[str, Any]]:
    named = NAMED[ref.load]
    _, first, last = named.files[split]
    try:
        path = hub.download(repository, ref.revision, file)
    except DataError as error:
        raise DataError(
            f"data set `{ref.load}` (split {split}) is not on this disk (as {named.folder}/{split}.jsonl in data.root or TADISTILL_DATA), "
            f"and loading it from the hub failed: {error}"
        ) from error
    return itertools.islice(_read_jsonl(path), first, last)


def _hub_dataset(ref: DataRef, split: str, stream: bool) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # here: slow to import, and only needed for data sets on the Hub
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # offline, `datasets` would use any revision that it once prepared, so the snapshot of this revision is read instead
    path, revision = (str(hub.download(ref.load, ref.revision)), None) if constants.HF_HUB_OFFLINE else (ref.load, ref.revision)
    try:
        return (dict(row) for row in load_dataset(path, split=split, revision=revision, streaming=stream))
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loading script
        reason = str(error).strip().splitlines()
        raise DataError(
            f"data set `{ref.load}` (split {split}, revision {ref.revision}) cannot be loaded: {reason[0] if reason else error!r}; "
            "check the name and the split, or give a local .jsonl file"
        ) from error


def _no_column(ref: DataRef, index: int, wanted: str, row: dict) -> str:
    return f"data set `{ref.load}`, row {index + 1} has no column {wanted}; it has {', '.join(map(str, row))}. Name the column in `columns`"


def _example(row: dict[str, Any], ref: DataRef, index: int) -> Example:
    where = f"data set `{ref.load}`, row {index + 1}"

    def get(name: str) -> Any:
        return row.get(ref.columns.get(name, name))  # type: ignore[call-overload]

    instruction, prompt, messages = ref.instruction or get("instruction"), get("prompt"), get("messages")
    if (named := ref.columns.get("choices")) and named not in row:
        raise DataError(_no_column(ref, index, f"`{named}` (the choices)", row))
    choices = _choices(ref.choices or get("choices"), where)
    if messages is not None:
        answer = _last_turn(messages, ref, where)
        return Example("", "", _references(answer, choices, where), messages=tuple(messages[:-1]), choices=choices)
    if instruction is None and prompt is None:
        raise DataError(_no_column(ref, index, "`instruction`, `prompt` or `messages`", row))
    for text in (instruction, prompt, get("input")):
        if not isinstance(text, str | None):
            raise DataError(f"{where}: instruction, input and prompt must be strings, but one of them is {text!r}")
    verbatim = instruction is None
    wanted = "completion" if verbatim else "output"
    column = ref.columns.get(wanted, wanted)  # type: ignore[call-overload]
    if not verbatim and row.get(column) is None and "outputs" in row:
        column = "outputs"
    if column not in row:
        raise DataError(_no_column(ref, index, f"`{wanted}` (the response)", row))
    references = _references(row[column], choices, where)
    if verbatim:
        return Example(prompt, "", references, verbatim=True, choices=choices)
    facts = tuple((value, tuple(rivals)) for value, rivals in row.get("facts", ()))
    return Example(instruction, get("input") or "", references, facts=facts, choices=choices)


def _last_turn(messages: Any, ref: DataRef, where: str) -> Any:
    if ref.instruction is not None:
        raise DataError(f"{where} has messages, which have their own instructions; remove the setting `instruction` of this data set")
    turns = isinstance(messages, list) and len(messages) >= 2 and all(isinstance(turn, dict) for turn in messages)
    if not turns or messages[-1].get("role") != "assistant":
        raise DataError(f"{where}: `messages` must be a prompt followed by an assistant message (a list of at least two messages)")
    return messages[-1].get("content")


def _choices(given: Any, where: str) -> tuple[str, ...]:
    if given is None or given == ():
        return ()
    if not isinstance(given, list | tuple) or not all(isinstance(c, str) and c for c in given):
        raise DataError(f"{where}: choices are {given!r}; write a list of strings, none of them empty")
    if len(set(given)) < max(2, len(given)):
        raise DataError(f"{where}: choices are {', '.join(given) or 'an empty list'}; give at least two choices that are all different")
    return tuple(given)


def _references(answer: Any, choices: tuple[str, ...], where: str) -> tuple[str, ...]:
    if answer is None or (isinstance(answer, list | tuple) and not answer):
        what = "null" if answer is None else "an empty list"
        raise DataError(f"{where}: the response is {what}; give a string (it may be empty), or delete this row from the data")
    answers = answer if isinstance(answer, list | tuple) else (answer,)
    known = f"the choices are {', '.join(choices)}"
    if choices:
        wrong = [a for a in answers if isinstance(a, int) and not 0 <= a < len(choices)]
        if wrong:
            raise DataError(f"{where}: label {wrong[0]} is not from 0 to {len(choices) - 1}; {known}. Use a split with labels in all rows")
        # an integer or a boolean is an index into the choices
        answers = [choices[a] if isinstance(a, int) else a for a in answers]
    for answer in answers:
        if not isinstance(answer, str):
            fix = known if choices else "if it is a label, list the labels in `choices` of this data set"
            raise DataError(f"{where}: the response is {answer!r}; it must be a string or a list of strings ({fix})")
        if choices and answer not in choices:
            raise DataError(f"{where}: the reference `{answer}` is not one of the choices; {known}")
    return tuple(answers)
