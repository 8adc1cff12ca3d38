"""Read examples from tinyworld, from JSONL files, and from data sets on the Hugging Face Hub.

A data set is looked for in four places, in this order: the built-in tinyworld, a local path, a folder in `data.root` (or TADISTILL_DATA),
and the Hub. `data.rows` describes the columns of a row.
"""

import difflib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tadistill.config import Data, DataRef
from tadistill.config.data import World
from tadistill.data import hub, jsonl, tinyworld
from tadistill.data.rows import OPTIONAL, Example, Form, example, form_of, no_column, text, where_of
from tadistill.disk import digest, no_file
from tadistill.errors import DataError, Gathering


@dataclass(frozen=True)
class _Named:
    folder: str
    hub: str
    files: dict[str, tuple[str, int | None, int | None]]
    """Maps a split to a triple: the file on the Hub, the first row, and the row after the last one. None means no limit."""


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


_SHOWN = 8
"""Largest number of files that a message names."""


def load(ref: DataRef, role: str, data: Data) -> list[Example]:
    """Return the examples of one split of a data set, at most as many as `data.limit` allows.

    Args:
        role: train, dev or test. It chooses the limit. It is also the name of the split, unless `ref.split` is set.

    Raises:
        DataError: the data set is missing or empty, or a row lacks a column.
    """
    return read(ref, role, world=data.world, root=data.root, limit=getattr(data.limit, role))


def read(ref: DataRef, role: str, *, world: World, root: str | None, limit: int | None) -> list[Example]:
    """Return the first `limit` examples of one split of a data set. If `limit` is None, return all examples.

    Raises:
        DataError: the data set is missing or empty, or a row lacks a column.
    """
    examples = list(stream(ref, role, world=world, root=root, limit=limit))
    if not examples:
        raise empty(ref, role)
    return examples


def stream(ref: DataRef, role: str, *, world: World, root: str | None, limit: int | None) -> Iterator[Example]:
    """Yield the examples of one split of a data set, as `read` returns them. Raises DataError if the data set is missing, or a row lacks a
    column."""
    examples = (example(row, ref, i) for i, row in enumerate(itertools.islice(_rows(ref, role, world, root), limit)))
    return examples if role == "train" else _scored(examples, ref)


def _scored(examples: Iterator[Example], ref: DataRef) -> Iterator[Example]:
    for i, found in enumerate(examples):
        if found.last and found.last.get("content") is None:
            raise DataError(
                f"{where_of(ref, i)}: the last message has no text with which an answer can be compared; give it a text, or delete the row"
            )
        yield found


def count(ref: DataRef, role: str, *, world: World, root: str | None, limit: int | None) -> int:
    """Return the number of rows that `stream` would yield. For a local file, only the lines are counted, which is fast."""
    path = None if ref.load in tinyworld.SPLITS else _local_file(ref, role, root)
    rows = jsonl.count(path) if path else _rows(ref, role, world, root)
    return sum(1 for _ in itertools.islice(rows, limit))


def empty(ref: DataRef, role: str) -> DataError:
    """Return the error for a split that has no rows."""
    return DataError(f"data set `{ref.load}` (split {ref.split or role}) is empty; give a file with at least one row")


def check_sources(data: Data) -> None:
    """Check that every data set exists on this disk. A name that may be a Hub id is accepted too. No data is read.

    Raises:
        DataError: some data sets do not exist. The message names all of them.
    """
    found = Gathering()
    for role, ref in data.splits():
        with found.about():
            on_hub(ref, role, data)
    found.finish()


def form(ref: DataRef, role: str, data: Data) -> Form:
    """Return the form of the first row: an instruction, a conversation or a whole prompt. For a data set on the Hub, no row is read, and
    the form follows from the keys in `ref.columns`."""
    first = _first(ref, role, data)
    if first is not None:
        return form_of(first, ref)
    return "messages" if "messages" in ref.columns else "prompt" if "prompt" in ref.columns else "instruction"


def has_unread_tools(ref: DataRef, role: str, data: Data) -> bool:
    """Return True if the first row is a conversation with a column `tools` that the recipe does not name. Return False for a data set on
    the Hub, whose rows are not read here."""
    first = _first(ref, role, data)
    return bool(first and first.get("tools")) and "tools" not in ref.columns and form(ref, role, data) == "messages"


def _first(ref: DataRef, role: str, data: Data) -> dict[str, Any] | None:
    path = None if ref.load in tinyworld.SPLITS else _local_file(ref, role, data.root)
    return next(jsonl.read(path), None) if path else None


def check_corpus(ref: DataRef, data: Data) -> None:
    """Check a plain-text corpus. A corpus on this disk is read completely. For a corpus on the Hub, only one document is read.

    Raises:
        DataError: a row has no text, or all documents are empty.
    """
    documents = texts(ref, world=data.world, root=data.root)
    if on_hub(ref, "train", data) is not None:
        documents = itertools.islice(documents, 1)
    if not sum(bool(document.strip()) for document in documents):
        raise DataError(f"data.corpus `{ref.load}` contains no text; give a file with at least one document in its column `text`")


def texts(ref: DataRef, *, world: World, root: str | None) -> Iterator[str]:
    """Yield the documents of a plain-text corpus. Each row is one document."""
    column = ref.columns.get("text", "text")
    own = ref.load == "tinyworld"
    rows = tinyworld.corpus(seed=world.seed, people=world.people) if own else _rows(ref, "train", world, root, stream=True)
    for i, row in enumerate(rows):
        if column not in row:
            raise DataError(no_column(ref, i, f"`{column}`", row))
        yield text(row[column], f"column `{column}` of the corpus", where_of(ref, i))


def fingerprint(ref: DataRef, role: str, data: Data) -> str:
    """Return a string that changes when the rows of a split change. It becomes a part of the keys of stored results.

    The string is a digest of the local file, the settings of tinyworld, or the Hub id with its revision.
    """
    found = content(ref, role, world=data.world, root=data.root)
    path = None if ref.load in tinyworld.SPLITS else _local_file(ref, role, data.root)
    return f"hub:{ref.load}@{ref.revision}:{ref.split or role}" if found is None else f"{found}{_ignored(path, ref) if path else ''}"


def content(ref: DataRef, role: str, *, world: World, root: str | None) -> str | None:
    """Return a digest of the rows of a split. Return None for a data set on the Hub, because its content can change."""
    if ref.load in tinyworld.SPLITS:
        return f"{tinyworld.fingerprint(seed=world.seed, people=world.people)}:{ref.load}:{ref.split or role}"
    path = _local_file(ref, role, root)
    return f"file:{_digest(path, path.stat().st_mtime_ns)}" if path else None


def _ignored(path: Path, ref: DataRef) -> str:
    try:
        row = next(jsonl.read(path), {})
    except DataError:  # the same error is raised when the rows are read
        return ""
    # earlier versions read these columns without `columns`; with the suffix, results of those versions are not used again
    read = {"choices": not ref.choices, "facts": "instruction" in row}
    names = [n for n in OPTIONAL if row.get(n) and read[n] and n not in ref.columns]
    return f":without {' and '.join(names)}" if names else ""


@lru_cache
def _digest(path: Path, mtime_ns: int) -> str:
    return digest(path)[:16]


def _rows(ref: DataRef, role: str, world: World, root: str | None, *, stream: bool = False) -> Iterator[dict[str, Any]]:
    split = ref.split or role
    if ref.load in tinyworld.SPLITS:
        if split in tinyworld.SPLITS[ref.load]:
            return iter(tinyworld.world_rows(ref.load, split, seed=world.seed, people=world.people))
        raise DataError(f"data set `{ref.load}` has no split `{split}`; its splits are {', '.join(tinyworld.SPLITS[ref.load])}")
    path = _local_file(ref, role, root)
    if path is not None:
        return jsonl.read(path)
    repository, file = _on_hub(ref, split)
    return _hub_dataset(ref, split, stream) if file is None else _hub_file(ref, split, repository, file)


def on_hub(ref: DataRef, role: str, data: Data) -> tuple[str, str | None] | None:
    """Return a pair: the repository and the file of a split on the Hub. Return None if the split is on this disk.

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
    if not _may_be_on_hub(ref):
        raise DataError(_missing(ref))
    return ref.load, None


def _may_be_on_hub(ref: DataRef) -> bool:
    return not ref.load.endswith((".jsonl", ".json")) and not ref.load.startswith((".", "/", "~")) and ref.load.count("/") == 1


def _check_folder(ref: DataRef, folder: Path, split: str) -> None:
    # refuses a folder without a file of the split, unless the name can be that of a data set on the Hub
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    readable = [name for name in names if name.endswith((".jsonl", ".json"))]
    if not readable and _may_be_on_hub(ref):
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    holds = f"it contains {', '.join(names[:_SHOWN])}{more}" if names else "it is empty"
    splits = [name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")]
    fix = f"set `split` of this data set to {' or '.join(splits[:_SHOWN])}, or rename a file" if splits else "write the rows to this file"
    raise DataError(f"data set `{ref.load}` is the folder {folder}, which has no file {split}.jsonl ({holds}); {fix}")


def _missing(ref: DataRef) -> str:
    load, path = ref.load, Path(ref.load).expanduser()
    if "://" in load:
        return f"data set `{load}` is a web address; download the file and write its path, or write the hub id (ORG/NAME)"
    if "/" in load or path.suffix:
        return f"data set `{load}` does not exist: {no_file(path, [p.parent for p in ref.paths], ('.jsonl', '.json'))}"
    known, folders = [*NAMED, *tinyworld.SPLITS], " or ".join(str(p.absolute().parent) for p in ref.paths)
    close = difflib.get_close_matches(load, known, n=1)
    hint = f" (did you mean `{close[0]}`?)" if close else ""
    return (
        f"data set `{load}` does not exist{hint}: it is not a local file (in {folders}), not a hub id, and not one of {', '.join(known)}; "
        "correct the name"
    )


def _local_file(ref: DataRef, role: str, root: str | None) -> Path | None:
    split = ref.split or role
    root = root or os.environ.get("TADISTILL_DATA")
    try:
        folders = list(ref.paths)
        if root and ref.load in NAMED:
            folders.append(Path(root).expanduser() / NAMED[ref.load].folder)
        elif root:
            folders.append(Path(root).expanduser() / ref.load)
        for folder in folders:
            if folder.is_file():
                return folder
            if (folder / f"{split}.jsonl").is_file():
                return folder / f"{split}.jsonl"
        if ref.load not in NAMED and (there := next((folder for folder in folders if folder.is_dir()), None)):
            _check_folder(ref, there, split)
    except (OSError, RuntimeError) as error:  # a name of more than 255 characters, or `~USER` of an unknown user
        why = getattr(error, "strerror", None) or error
        raise DataError(f"data set `{ref.load}` is not a valid path ({why}); correct the path, or `data.root`") from error
    return None


def _hub_file(ref: DataRef, split: str, repository: str, file: str) -> Iterator[dict[str, Any]]:
    named = NAMED[ref.load]
    _, first, last = named.files[split]
    try:
        path = hub.download(repository, ref.revision, file)
    except DataError as error:
        raise DataError(
            f"data set `{ref.load}` (split {split}) is not on this disk (as {named.folder}/{split}.jsonl in data.root or TADISTILL_DATA), "
            f"and it cannot be loaded from the Hub: {error}"
        ) from error
    return itertools.islice(jsonl.read(path), first, last)


def _hub_dataset(ref: DataRef, split: str, stream: bool) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # here: slow to import, and only needed for data sets on the Hub
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # offline, `datasets` would use any revision that it once prepared, so the snapshot of this revision is read instead
    path, revision = (str(hub.download(ref.load, ref.revision)), None) if constants.HF_HUB_OFFLINE else (ref.load, ref.revision)
    try:
        with hub.without_retries_shown():
            return (dict(row) for row in load_dataset(path, split=split, revision=revision, streaming=stream))
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: it needs a script
        reason = str(error).strip().splitlines()
        raise DataError(
            f"data set `{ref.load}` (split {split}, revision {ref.revision}) cannot be loaded: {reason[0] if reason else error!r}; "
            "check the name and the split, or give a local .jsonl file"
        ) from error
