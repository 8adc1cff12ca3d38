"""Files: digests, atomic writing, and reading JSON that may be damaged.

A reader never sees half a file. Three ways to write one:

    write_text, write_json, write_rows      small files that any process may write
    with replacing(path) as temporary:      a large file that one process owns (a training state)
    with publishing(target) as temporary:   a file or folder that several processes may make at the same time (a cache); the first one wins
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tadistill.errors import StoreError

_SAMPLES, _SAMPLE_BYTES = 16, 128 << 10


def cache_root() -> Path:
    """Return the folder of converted models: TADISTILL_CACHE, else tadistill in the user's cache folder."""
    if given := os.environ.get("TADISTILL_CACHE"):
        return Path(given).expanduser()
    return user_cache() / "tadistill"


def user_cache() -> Path:
    """Return the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


# --- digests ------------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """Return the hex sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """Return `digest(path)`, computed again only when the file's size or modification time changed in this process."""
    stat = path.stat()
    return _remembered(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _remembered(path: Path, size: int, modified: int) -> str:
    return digest(path)


def sampled_digest(path: Path) -> str:
    """Return the hex sha256 of a weight file's size and of 2 MiB of it: 16 evenly spaced blocks, the first and last bytes included."""
    # Blocks in the middle matter: two fine-tunings of one model may share their embeddings and their final layers.
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
            found.update(file.read(_SAMPLE_BYTES))
    return found.hexdigest()


# --- writing ------------------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the block, which writes `path`, into one sentence. Raises StoreError if `path` cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot write {path}: {reason}; free some space or check permissions, then run the same command again") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write to, which becomes `path` when the block ends without an error.

    It is on the disk before it is renamed, so after a power failure `path` is the old file or the new one, whole. Its name is fixed: the
    one process that owns `path` overwrites what a kill has left of it. Raises StoreError if it cannot be written.
    """
    with _renamed(path.with_suffix(".tmp"), path) as temporary:
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Write a file (and its missing folder) atomically; other processes may write it too. Raises StoreError if it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _renamed(path.with_name(f".{path.name}.{os.getpid()}.tmp"), path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write a value as indented JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, as `write_text` does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def _renamed(temporary: Path, path: Path) -> Iterator[Path]:
    with writing(path):
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Yield a path to write a file or a folder at, which becomes `target` when the block ends without an error.

    Two processes may publish the same target: the first one wins, and both find it whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work / target.name
        try:
            os.replace(work / target.name, target)
        except OSError:
            # A folder cannot replace one that is not empty: another process was first, with the same content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


# --- reading ------------------------------------------------------------------------------------------------------------


def read_json(path: Path, *, fix: str = "delete its directory and run the recipe again") -> Any:
    """Parse a file. Raises StoreError if it is missing or damaged; the sentence names it and says how to mend it."""
    try:
        return json.loads(_text(path, fix))
    except ValueError as error:
        raise damaged(path, str(error), fix) from error


def read_jsonl(path: Path, *, fix: str = "delete its directory and run the recipe again") -> list[dict[str, Any]]:
    """Parse a file of JSON objects, one a line; empty lines do not count. Raises StoreError, with file and line, if missing or damaged."""
    rows: list[dict[str, Any]] = []
    # not splitlines(): a text may hold U+2028 and its like, which JSON leaves as they are
    for number, line in enumerate(_text(path, fix).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise damaged(path, f"line {number}: {error}", fix) from error
        if not isinstance(row, dict):
            raise damaged(path, f"line {number} is not a JSON object", fix)
        rows.append(row)
    return rows


def damaged(path: Path, reason: str, fix: str = "delete its directory and run the recipe again") -> StoreError:
    """Return the error for a file whose content is not what it should be."""
    return StoreError(f"{path} cannot be read ({reason}): {fix}")


def _text(path: Path, fix: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, getattr(error, "strerror", None) or str(error), fix) from error
