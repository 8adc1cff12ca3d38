"""Token ids of a large training set, stored in a memory-mapped Arrow file in the cache folder.

A data set is tokenised only once. After that, all processes and studies read the rows that they need from the file. The file's name is a
digest of the rows, the tokenizer, the limits of lengths, and the code. A file that is damaged or incomplete is created again.

    kept = keep(SplitRows.of(ref, "train", data), tokenizer, rules, name="data set `mine`")
    kept.rows[7].prompt
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, astuple, dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from tadistill.data import chat, encoding, encoding_rules, prompts, turns
from tadistill.data.datasets import SplitRows
from tadistill.data.encoding import Encoded, encode_parts
from tadistill.data.encoding_rules import Counts, Rules
from tadistill.data.survey import key_of_rows
from tadistill.data.training_sets import Lazy
from tadistill.disk import cache_root, digest, replacing, write_json, writing
from tadistill.errors import DataError
from tadistill.store import key_of

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase


class EncodedRows(Lazy[Encoded]):
    """The rows of a memory-mapped table, as a sequence. A row is read from the disk when it is accessed. A slice returns a list of rows."""

    def __init__(self, table: "pa.Table"):
        self._row, *texts, choices, teacher, spans = (table.column(name) for name in _COLUMNS)

        def read(i: int) -> Encoded:
            prompt, response = (tuple(column[i].values.to_numpy().tolist()) for column in texts)
            parts = [tuple(map(tuple, column[i].as_py())) for column in (choices, spans)]
            own = teacher[i].as_py()
            return Encoded(self._row[i].as_py(), prompt, response, parts[0], None if own is None else tuple(own), parts[1])

        super().__init__(len(self._row), read)

    @property
    def numbers(self) -> np.ndarray:
        """The index of each row in its split."""
        return self._row.to_numpy()


def row_numbers(rows: Seq[Encoded]) -> np.ndarray:
    """Return the index of each row in its split."""
    if isinstance(rows, EncodedRows):
        return rows.numbers
    return np.array([row.row for row in rows], np.int64)


@dataclass(frozen=True)
class Longest:
    """The largest lengths in some tokenised rows, as numbers of tokens, and the largest token id."""

    prompt: int = 0
    """Number of tokens of the longest prompt."""
    whole: int = 0
    """Number of tokens of the longest row: its prompt together with its reference response."""
    context: int = 0
    """Number of tokens of the longest of the teacher's own prompts. It is 0 if the teacher has no prompts of its own."""
    context_whole: int = 0
    """Number of tokens of the longest row for the teacher: its own prompt together with the reference response. It is 0 if the teacher has
    no prompts of its own."""
    top: int = 0
    """The largest token id."""

    @classmethod
    def of(cls, rows: Seq[Encoded]) -> "Longest":
        """Measure tokenised rows."""
        own = [(len(e.teacher_prompt), len(e.response)) for e in rows if e.teacher_prompt]
        return cls(
            prompt=max([0, *(len(e.prompt) for e in rows)]),
            whole=max([0, *(len(e.prompt) + len(e.response) for e in rows)]),
            context=max([0, *(prompt for prompt, _ in own)]),
            context_whole=max([0, *map(sum, own)]),
            top=max([0, *(max(itertools.chain(e.prompt, e.response, *e.choices, e.teacher_prompt or ())) for e in rows)]),
        )

    def joined(self, other: "Longest") -> "Longest":
        """Return the larger one of each two numbers."""
        return Longest(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Kept:
    """A tokenised data set in the cache folder."""

    rows: EncodedRows
    counts: Counts
    longest: Longest


def glance(rows: SplitRows, tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, name: str) -> Kept | None:
    """Return the tokenised rows if their file is in the cache folder. If it is not, check that at least one row is short enough, and return
    None.

    Raises:
        DataError: no row is short enough.
    """
    key = _key(rows, rows.content(), tokenizer, rules)
    if key and (found := _open(_folder() / f"{key}.arrow")):
        return found
    next(part for part, _ in encode_parts(rows.stream(), tokenizer, rules, name=name) if part)
    return None


def keep(
    rows: SplitRows, tokenizer: "PreTrainedTokenizerBase", rules: Rules, *, name: str, tick: Callable[[int], None] = lambda rows: None
) -> Kept:
    """Return the tokenised rows. They are tokenised now, unless their file is already in the cache folder.

    If another process is tokenising the same rows, the call waits for it. A data set of the Hub is not stored in the cache, because its
    content can change.

    Args:
        name: the name of the data set in messages.
        tick: called with the number of finished rows. If it raises an error, no file is written.

    Raises:
        DataError, ModelError: as in `encode_parts`.
        StoreError: the file cannot be written.
    """
    from filelock import FileLock  # here: it loads asyncio

    def parts() -> Iterator[tuple[list[Encoded], Counts]]:
        yield from encode_parts(rows.stream(), tokenizer, rules, name=name)
        if rows.content() != content:  # the file's name contains this digest
            raise DataError(f"{name} has changed while it was read; run the same command again")

    def write(file: Path) -> Kept:
        return _write(file, parts(), tick)

    content = rows.content()
    key = _key(rows, content, tokenizer, rules)
    if key is None:
        with TemporaryDirectory() as folder:  # the mapped file stays readable after its folder is deleted
            return write(Path(folder) / "rows.arrow")
    file = _folder() / f"{key}.arrow"
    if found := _open(file):
        return found
    lock = FileLock(file.with_suffix(".lock"))
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        return _open(file) or write(file)
    finally:
        lock.release()


def _key(rows: SplitRows, content: str | None, tokenizer: "PreTrainedTokenizerBase", rules: Rules) -> str | None:
    tokens = tokenizer_digest(tokenizer)
    if content is None or tokens is None:
        return None
    settings = asdict(rules) | {"context": rules.context.model_dump() if rules.context else None}
    code = encoding, encoding_rules, turns, prompts, chat
    return key_of([key_of_rows(rows, content, *code), tokens, settings])


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return a digest of everything in a tokenizer that determines token ids. Return None for a tokenizer that is implemented in Python."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts: list[Any] = [tokenizers.__version__, transformers.__version__, type(tokenizer).__name__]
    parts += [_settings(backend.to_str()), tokenizer.special_tokens_map, tokenizer.chat_template]
    if "strftime_now" in str(tokenizer.chat_template):  # the prompts contain the date
        parts.append(date.today().isoformat())
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _settings(backend: str) -> dict[str, Any]:
    # a call with padding or truncation stores these settings in the tokenizer, but no later call depends on them
    return {name: part for name, part in json.loads(backend).items() if name not in ("padding", "truncation")}


_COLUMNS = ("row", "prompt", "response", "choices", "teacher_prompt", "spans")


def _folder() -> Path:
    return cache_root() / "encoded"


def _write(file: Path, parts: Any, tick: Callable[[int], None]) -> Kept:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    schema = pa.schema(list(zip(_COLUMNS, (pa.int64(), ids, ids, pa.list_(ids), ids, pa.list_(ids)), strict=True)))
    counts, longest = Counts(0), Longest()
    with replacing(file) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for part, counts in parts:
            columns = [pa.array([getattr(e, name) for e in part], field.type) for name, field in zip(_COLUMNS, schema, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            longest = longest.joined(Longest.of(part))
            tick(counts.rows)
    stat = file.stat()
    record = {"counts": asdict(counts)} | asdict(longest)
    write_json(_record(file), record | {"size": stat.st_size, "modified": stat.st_mtime_ns, "sha256": digest(file)})
    found = _open(file)
    assert found is not None
    return found


def _open(file: Path) -> Kept | None:
    import pyarrow as pa

    try:
        record = json.loads(_record(file).read_text(encoding="utf-8"))
        stat = file.stat()
        if (stat.st_size, stat.st_mtime_ns) != (record.pop("size"), record.pop("modified")) and digest(file) != record["sha256"]:
            return None
        del record["sha256"]
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        return Kept(EncodedRows(table), Counts(**record.pop("counts")), Longest(**record))
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's error of a damaged file is a ValueError
        return None


def _record(file: Path) -> Path:
    return file.with_suffix(".json")
