"""Read the rows of data sets: from tinyworld, from JSON Lines files, and from data sets on the Hugging Face Hub.

    examples = SplitRows.of(recipe.data.train, "train", recipe.data).read()

A data set is looked for in four places, in this order: the built-in tinyworld, a local path, a folder in `data.root` (or TADISTILL_DATA),
and the Hub. `data.rows` describes the columns of a row.
"""

import difflib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tadistill.config import Data, DataRef
from tadistill.config.data import World
from tadistill.data import hub, tinyworld
from tadistill.data.hub import NAMED
from tadistill.data.rows import OPTIONAL, Example, example, where_of
from tadistill.disk import sha256
from tadistill.errors import DataError, cause, no_file

_SHOWN = 8
"""Largest number of files that a message names."""


class Known(NamedTuple):
    """The digest of a local file's rows, and the file's size and modification time (in nanoseconds) before it was read."""

    content: str
    size: int
    modified: int


@dataclass(frozen=True)
class SplitRows:
    """The first `limit` rows of one split of a data set."""

    ref: DataRef
    role: str
    """train, dev or test. It is also the name of the split, unless `ref.split` is set."""
    world: World = field(default_factory=World)
    root: str | None = None
    limit: int | None = None
    """None means all rows."""
    known: Known | None = None
    """An earlier digest of the file. It is used while the file has the same size and time, because a large file takes seconds to read."""

    @classmethod
    def of(cls, ref: DataRef, role: str, data: Data) -> "SplitRows":
        """Return the rows that a recipe uses. `role` also chooses the limit."""
        return cls(ref, role, data.world, data.root, getattr(data.limit, role))

    @property
    def split(self) -> str:
        """The name of the split."""
        return self.ref.split or self.role

    @property
    def file(self) -> Path | None:
        """The local file with the rows. None for tinyworld, and for a data set on the Hub. Raises DataError if a path is not valid."""
        return None if self.ref.load in tinyworld.SPLITS else _local_file(self.ref, self.split, self.root)

    def read(self) -> list[Example]:
        """Return the examples.

        Raises:
            DataError: the data set is missing or empty, or a row lacks a column.
        """
        examples = list(self.stream())
        if not examples:
            raise empty(self.ref, self.role)
        return examples

    def stream(self) -> Iterator[Example]:
        """Yield the examples. Raises DataError if the data set is missing, or a row is wrong."""
        return map(right, self.tries())

    def tries(self) -> Iterator[Example | DataError]:
        """Yield the example of each row, or the error if a row is wrong. Raises DataError if the data set is missing."""
        for i, (line, row) in enumerate(itertools.islice(self.raw(), self.limit)):
            try:
                yield self._example(right(row), i, line)
            except DataError as error:
                yield error

    def _example(self, row: dict[str, Any], index: int, line: int | None) -> Example:
        found = example(row, self.ref, index, line)
        if self.role != "train" and found.last and found.last.get("content") is None:
            raise DataError(
                f"{where_of(self.ref, index, line)}: the last message has no text with which an answer can be compared; give it a text, or "
                "delete the row"
            )
        return found

    def count(self) -> int:
        """Return the number of rows. For a local file, only the lines are counted, which is fast."""
        file = self.file
        rows = _lines(file) if file else self.raw()
        return sum(1 for _ in itertools.islice(rows, self.limit))

    def content(self) -> str | None:
        """Return a digest of all rows of the split. Return None for a data set on the Hub, because its content can change."""
        if self.ref.load in tinyworld.SPLITS:
            return f"{tinyworld.fingerprint(seed=self.world.seed, people=self.world.people)}:{self.ref.load}:{self.split}"
        now = self.now()
        return now.content if now else None

    def now(self) -> Known | None:
        """Return the digest, size and time of the local file. None for tinyworld, and for a data set on the Hub."""
        if (file := self.file) is None:
            return None
        stat = file.stat()
        if self.known and self.known[1:] == (stat.st_size, stat.st_mtime_ns):
            return self.known
        return Known(f"file:{sha256(file)[:16]}", stat.st_size, stat.st_mtime_ns)

    def fingerprint(self) -> str:
        """Return a string that changes when the rows change. It becomes a part of the keys of stored results.

        The string is a digest of the local file, the settings of tinyworld, or the Hub id with its revision. Raises DataError if the data
        set does not exist.
        """
        content = self.content()
        if content is None:
            _on_hub(self.ref, self.split)
            return f"hub:{self.ref.load}@{self.ref.revision}:{self.split}"
        return f"{content}{_ignored(self)}"

    def raw(self, *, stream: bool = False) -> Iterator[tuple[int | None, dict[str, Any] | DataError]]:
        """Yield all rows of the split as they are, each with its line in a local file. With `stream`, a data set on the Hub is not
        downloaded first."""
        ref, split = self.ref, self.split
        if file := self.file:
            return json_rows(file)
        if split in tinyworld.SPLITS.get(ref.load, ()):
            found = iter(tinyworld.world_rows(ref.load, split, seed=self.world.seed, people=self.world.people))
        else:
            repository, name = _on_hub(ref, split)
            found = hub.rows(repository, split, ref.revision, stream=stream) if name is None else _hub_file(ref, split, repository, name)
        return ((None, row) for row in found)


def load(ref: DataRef, role: str, data: Data) -> list[Example]:
    """Return the examples of one split of a data set, at most as many as `data.limit` allows. Arguments and errors are those of
    `SplitRows`."""
    return SplitRows.of(ref, role, data).read()


def empty(ref: DataRef, role: str) -> DataError:
    """Return the error for a split that has no rows."""
    return DataError(f"data set `{ref.load}` (split {ref.split or role}) is empty; give a file with at least one row")


def _ignored(rows: SplitRows) -> str:
    ref, file = rows.ref, rows.file
    try:
        row = next((right(row) for _, row in json_rows(file)), {}) if file else {}
    except DataError:  # the same error is raised when the rows are read
        return ""
    # earlier versions read these columns without `columns`; with the suffix, results of those versions are not used again
    read = {"choices": not ref.choices, "facts": "instruction" in row}
    names = [n for n in OPTIONAL if row.get(n) and read[n] and n not in ref.columns]
    return f":without {' and '.join(names)}" if names else ""


def on_hub(ref: DataRef, role: str, data: Data) -> tuple[str, str | None] | None:
    """Return a pair: the repository and the file of a split on the Hub. Return None if the split is on this disk.

    The file is None if the split is not a single file.

    Raises:
        DataError: the data set or the split does not exist.
    """
    rows = SplitRows.of(ref, role, data)
    return None if ref.load in tinyworld.SPLITS or rows.file else _on_hub(ref, rows.split)


def _on_hub(ref: DataRef, split: str) -> tuple[str, str | None]:
    named = NAMED.get(ref.load)
    splits = named.files if named else tinyworld.SPLITS.get(ref.load)
    if splits and split not in splits:
        raise DataError(f"data set `{ref.load}` has no split `{split}`; its splits are {', '.join(splits)}")
    if named:
        return named.hub, named.files[split][0]
    if not _may_be_on_hub(ref):
        raise DataError(_missing(ref))
    return ref.load, None


def _may_be_on_hub(ref: DataRef) -> bool:
    return not ref.load.endswith((".jsonl", ".json")) and not ref.load.startswith((".", "/", "~")) and ref.load.count("/") == 1


def _check_folder(ref: DataRef, folder: Path, split: str) -> None:
    # refuses a folder without a file of the split, unless it has no data and the name can be that of a data set on the Hub
    if _may_be_on_hub(ref) and not hub.has_data(folder):
        return
    names = sorted(f"{path.name}{'/' * path.is_dir()}" for path in folder.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    holds = f"it contains {', '.join(names[:_SHOWN])}{more}" if names else "it is empty"
    of_split = lambda path: (not path.name.startswith(split), str(path))  # noqa: E731
    fix = "write the rows to this file"
    if named := next((name for name, of in NAMED.items() if (folder / of.folder / f"{split}.jsonl").is_file()), None):
        fix = f"to use the data sets in it, set data.root: {ref.load}, and write their names, such as {named}"
    elif splits := [name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl")]:
        fix = f"set `split` of this data set to {' or '.join(splits[:_SHOWN])}, or rename a file"
    elif (saved := folder.joinpath("state.json").is_file()) or folder.joinpath("dataset_dict.json").is_file():
        part = "" if saved else f"[{split!r}]"
        fix = f"write this file, for instance in Python: datasets.load_from_disk({folder.name!r}){part}.to_json('{split}.jsonl')"
    elif table := min((path for path in folder.rglob("*") if path.suffix in _READERS), key=of_split, default=None):
        fix = f"write this file, for instance in Python: {_conversion(str(table.relative_to(folder)), split)}"
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


def _local_file(ref: DataRef, split: str, root: str | None) -> Path | None:
    root = root or os.environ.get("TADISTILL_DATA")
    try:
        folders = list(ref.paths)
        if root:
            folders.append(Path(root).expanduser() / (NAMED[ref.load].folder if ref.load in NAMED else ref.load))
        for folder in folders:
            if folder.is_file():
                return folder
            if (folder / f"{split}.jsonl").is_file():
                return folder / f"{split}.jsonl"
        if ref.load not in NAMED and (there := next((folder for folder in folders if folder.is_dir()), None)):
            _check_folder(ref, there, split)
    except (OSError, RuntimeError) as error:  # a name of more than 255 characters, or `~USER` of an unknown user
        raise DataError(f"data set `{ref.load}` is not a valid path ({cause(error)}); correct the path, or `data.root`") from error
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
    return (right(row) for _, row in itertools.islice(json_rows(path), first, last))


# --- JSON Lines files -------------------------------------------------------------------------------------------------------

_READERS = {".csv": "read_csv", ".tsv": "read_table", ".parquet": "read_parquet", ".xlsx": "read_excel", ".arrow": "read_feather"}
_ONE_A_LINE = "`jq -c '.[]' FILE` writes each of its objects on a line of its own"


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Yield the JSON object of each line of a JSON Lines file, with its line number from 1. If a line is wrong, yield its error in place
    of the object. Empty lines are skipped.

    Raises:
        DataError: the file as a whole is not a JSON Lines file.
    """
    for number, line in _lines(path):
        try:
            yield number, _json_row(line, path, number)
        except _OtherFile:
            raise
        except DataError as error:
            yield number, error


class _OtherFile(DataError):
    """A file is not a JSON Lines file."""


def right(row: Any) -> Any:
    """Return a row. If it is an error, raise it."""
    if isinstance(row, DataError):
        raise row
    return row


def _conversion(file: str, name: str) -> str:
    return f"pandas.{_READERS[Path(file).suffix]}({file!r}).to_json('{name}.jsonl', orient='records', lines=True)"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:  # Excel and PowerShell write a byte order mark
        for number, line in enumerate(lines, 1):
            line = line.removeprefix("\ufeff")  # joined files have a mark at the start of each
            if line and not line.isspace():
                yield number, line


def _json_row(line: str, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}, line {number}"
    if line.startswith("\x1f\udc8b"):
        raise _OtherFile(f"{path} is compressed with gzip; unpack it: `gunzip {path.name}`")
    if path.suffix in _READERS and not line.lstrip().startswith("{"):
        raise _OtherFile(f"{path} is not a JSON Lines file; convert it, for instance in Python: {_conversion(path.name, path.stem)}")
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:  # `surrogateescape` turns a byte that is not UTF-8 into a surrogate
        byte = ord(line[error.start]) & 0xFF
        raise DataError(f"{where}: byte 0x{byte:02x} at character {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _not_json(line, where, error) from error
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits, or thousands of nested lists
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a number in it has too many digits"
        raise DataError(f"{where} cannot be read ({reason}); correct or delete the row") from error
    if isinstance(row, list):
        raise _OtherFile(f"{where} is a JSON array ({_ONE_A_LINE}); every line must be one JSON object")
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}; every line must be one JSON object")
    return row


def _not_json(line: str, where: str, error: json.JSONDecodeError) -> DataError:
    start, kind = line.strip(), DataError
    if start.startswith("version https://git-lfs"):
        kind, what = _OtherFile, "part of a pointer of Git LFS (run `git lfs pull` in its folder to get the file)"
    elif start[0] == "[":
        kind, what = _OtherFile, f"the start of a JSON array ({_ONE_A_LINE})"
    elif start[0] == "{" and error.pos >= len(line.rstrip()):
        kind = _OtherFile if start == "{" else DataError  # as `json.dump` with an indent writes it
        what = "a JSON object that does not end on this line (`jq -c . FILE` writes each object on one line)"
    elif start[0] != "{":
        what = 'not JSON (write a row as {"instruction": "…", "output": "…"}, for instance, and a document of a corpus as {"text": "…"})'
    else:
        what = f"not JSON ({error.msg} at character {error.pos + 1})"
    return kind(f"{where} is {what}; every line must be one JSON object")
