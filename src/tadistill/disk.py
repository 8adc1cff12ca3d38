"""Functions for files: digests, atomic writing, and reading of JSON that may be damaged.

A reader never sees an incomplete file. There are three ways to write a file or a folder. For a folder that the user
has named, see `report.export.filling`.

    write_text, write_json, write_rows      a small file, which several processes may write
    with replacing(path) as temporary:      a large file that only one process writes, such as a training state
    with publishing(target) as temporary:   a file or folder that several processes may create, such as a cache; the first one is kept
"""

import errno
import functools
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tadistill.errors import ConfigError, StoreError, TadistillError, cause

if TYPE_CHECKING:
    from filelock import FileLock

_SAMPLES, _SAMPLE_BYTES = 16, 128 << 10
_LOCK = ".tadistill.lock"  # in a folder that a process writes
_OF_A_GPU = ("OutOfMemoryError", "AcceleratorError")  # torch raises these while it copies tensors from a GPU; the file is not the cause


def cache_root() -> Path:
    """Return the folder for converted models and tokenised data: $TADISTILL_CACHE, or else `tadistill` in the user's cache folder."""
    if given := os.environ.get("TADISTILL_CACHE"):
        return from_home(given, "TADISTILL_CACHE")
    return user_cache() / "tadistill"


def user_cache() -> Path:
    """Return the user's cache folder: $XDG_CACHE_HOME, or else ~/.cache."""
    return from_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")


def from_home(path: str | Path, what: str) -> Path:
    """Return a path in which `~` and `~USER` are replaced by home folders. A shell does not replace them in `--runs=~/x`.

    Raises ConfigError if there is no such user. `what` is what names the path, for the message.
    """
    try:
        return Path(path).expanduser()
    except TypeError as error:
        raise ConfigError(f"{what} is {path!r}; give a path") from error
    except RuntimeError as error:
        raise ConfigError(f"{what} is `{path}`, but there is no home folder of this user; write the whole path") from error


# --- digests ------------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """Return the SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a whole file, in hex. The result is cached until the file's size or modification time changes."""
    stat = path.stat()
    return _remembered(path.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)  # the files of a large study
def _remembered(path: Path, size: int, modified: int) -> str:
    return digest(path)


def sampled_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's size and of 16 evenly spaced blocks of 128 KiB. For weight files it is faster than `digest`."""
    # Blocks in the middle are needed: two fine-tunings of one model may have equal embeddings and equal final layers.
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
            found.update(file.read(_SAMPLE_BYTES))
    return found.hexdigest()


# --- writing ------------------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Wait until the file's content is on the disk (fsync)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing in the `with` block into a StoreError. Its message names `path`, the reason and the fix."""
    try:
        yield
    except TadistillError:  # some of them are OSErrors or RuntimeErrors, but they already say what is wrong
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError if the disk is full
        if type(error).__name__ in _OF_A_GPU:
            raise
        fix = "free some space or check permissions, then run the same command again"
        if isinstance(error, NotADirectoryError | FileExistsError):
            fix = "one of the folders in this path is a file; choose another folder"
        with suppress(ConfigError):  # without a home folder, there may be no folder of the cache
            if path.is_relative_to(cache_root()):
                fix += " (the variable TADISTILL_CACHE sets the folder of the cache)"
        raise StoreError(f"cannot write {path}: {cause(error)}; {fix}") from error


def ordinary_permissions(path: Path) -> None:
    """Give a file, or all files of a folder, the permissions of a new file (umask). Only their owner can read those of safetensors."""
    mask = os.umask(0)
    os.umask(mask)
    for file in path.iterdir() if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It is renamed to `path` when the block ends without an error.

    After a power failure, `path` is either the complete old file or the complete new file. Only one process may write to `path` at a time,
    because the temporary name is always the same. Raises StoreError if the file cannot be written.
    """
    with _renamed(path.with_suffix(".tmp"), path) as temporary:
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, and create missing folders. Several processes may write the same file. Raises StoreError on failure."""
    with _own_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # arguments in another encoding have lone surrogates


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write a value to a file as indented JSON. The file is replaced atomically, as in `write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def finite(value: Any) -> Any:
    """Return a value for JSON in which None replaces infinite numbers and NaN, for example the infinite perplexity of a diverged model."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write values to a JSON Lines file, one value per line. The file is replaced atomically, as in `write_text`."""
    with _own_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def _own_file(path: Path) -> Iterator[Path]:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _renamed(path.with_name(f".{path.name}.{os.getpid()}.tmp"), path) as temporary:
        yield temporary


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
def publishing(target: Path, *, alone: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path for a file or folder. It is renamed to `target` when the block ends without an error.

    Several processes may create the same target at the same time. The first one is kept, and the others are deleted. With `alone`, the
    others raise a StoreError, which names this folder. What a killed process has left beside the target is deleted. Raises StoreError if
    the target cannot be written. Other errors of the block, such as a source that cannot be read, are raised as they are.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=delete_leftovers(target), dir=target.parent))
        lock = _locked(work)
    try:
        try:
            yield work / target.name
        except OSError as error:
            with writing(target) if _of_writing(error, work) else nullcontext():
                raise
        with writing(target):
            try:
                os.replace(work / target.name, target)
            except OSError:
                # A folder cannot replace a folder that is not empty: another process was first, with the same content.
                if not target.is_dir():
                    raise
                if alone:
                    raise filled(alone) from None
    finally:
        with suppress(OSError):  # the target is there, and a disk may lose its locks
            lock.release()
        shutil.rmtree(work, ignore_errors=True)


def _locked(work: Path) -> "FileLock":
    # while a process lives, it has the lock of its folder; the lock gets its name when it is acquired, so nobody can be faster
    from filelock import FileLock  # here: it loads asyncio

    lock = FileLock(work / "new.lock")
    with suppress(OSError, NotImplementedError):  # without locks on this disk, leftovers stay
        lock.acquire(timeout=0)
        os.rename(work / "new.lock", work / _LOCK)
    return lock


def filled(folder: Path, or_else: str = "") -> StoreError:
    """Return the StoreError for a folder that only one process may fill. `or_else` is another possible reason."""
    return StoreError(f"{folder} is filled by another process{or_else}, so nothing is written there; give the name of a new directory")


def delete_leftovers(target: Path) -> str:
    """Delete what killed processes have left beside a target. Returns how the names of temporary folders for it begin."""
    from filelock import FileLock

    prefix = f".{target.name}.{platform.node()}."  # on some disks, a lock counts only on its own machine
    for work in target.parent.glob(glob.escape(prefix) + "?" * 8):
        with suppress(OSError, NotImplementedError):  # a process writes there, or has just ended
            if _LOCK in (names := set(os.listdir(work))) and names <= {_LOCK, target.name}:
                with FileLock(work / _LOCK).acquire(timeout=0):
                    pass
                shutil.rmtree(work, ignore_errors=True)
    return prefix


def _of_writing(error: OSError, folder: Path) -> bool:
    # True if the error is one of writing files in the folder; the error of a full disk often names no file
    known = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
    return known and (error.filename is None or Path(str(error.filename)).is_relative_to(folder))


# --- reading ------------------------------------------------------------------------------------------------------------

_AGAIN = "delete its directory and run the recipe again"
PERMIT = "check its permissions: its owner lets others read it with `chmod a+r`"


def read_json(path: Path, *, fix: str = _AGAIN) -> Any:
    """Parse a JSON file. Raises StoreError if it is missing or damaged. The message ends with `fix`, which says what the user should do."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error, fix) from error


def read_jsonl(path: Path, *, fix: str = _AGAIN) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file. Empty lines are skipped. Raises StoreError if the file is missing or damaged."""
    return [row for _, row in stream_jsonl(path, fix=fix)]


def stream_jsonl(path: Path, *, fix: str = _AGAIN, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset, object) for each line of a JSON Lines file, from the offset `start` on. Offsets are in bytes.

    Empty lines are skipped. Raises StoreError if the file is missing or damaged.
    """
    try:
        with path.open("rb") as file:  # bytes, because a line of text would also end at U+2028, which JSON does not escape
            place = file.seek(start)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield place, _object(line, path, number, fix)
                place += len(line)
    except OSError as error:
        raise damaged(path, error, fix) from error


def _object(line: bytes, path: Path, number: int, fix: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise damaged(path, f"line {number}: {error}", fix) from error
    if not isinstance(row, dict):
        raise damaged(path, f"line {number} is not a JSON object", fix)
    return row


def damaged(path: Path, reason: str | Exception, fix: str = _AGAIN) -> StoreError:
    """Return the StoreError for a file that is missing or damaged. Its message gives the file, the reason and the fix. If this user has no
    permission to read the file, the fix is `PERMIT`."""
    fix = PERMIT if isinstance(reason, PermissionError) else fix
    return StoreError(f"{path} cannot be read ({cause(reason)}): {fix}")
