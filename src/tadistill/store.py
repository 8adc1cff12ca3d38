"""The store: finished stages, addressed by content.

`runs/store/ab/abcd…/` belongs to one stage. It is finished iff it holds manifest.json, which is renamed into place last, and the files
that this names; all else in an unfinished folder is what a killed run left to resume from. A lock keeps two processes off the same stage.
"""

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadistill.disk import sync, writing
from tadistill.errors import StoreError

if TYPE_CHECKING:
    from filelock import FileLock

MANIFEST = "manifest.json"
RECORD = "job.json"  # which job of a cluster a stage was given
FAILURE = "failure.txt"  # why a job failed last
_NOT_ARTIFACTS = (MANIFEST, RECORD, FAILURE)
_RESUME = ("state.pt", "state-before.pt", "best-*.pt", "*.tmp")
_PARTS = "parts"
_STAGE = "stage.json"


def canonical(value: Any) -> str:
    """The one JSON text of a value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def key_of(value: Any) -> str:
    """16 hex digits that identify a stage's content."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file, bring it to the disk and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; check the disk and its permissions, or set --runs DIR"
        ) from error


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    with writing(path):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def runs_directory(given: str | Path | None = None) -> Path:
    """`--runs DIR`, else TADISTILL_RUNS, else ./runs."""
    return Path(given or os.environ.get("TADISTILL_RUNS") or "runs")


class Store:
    """Read and write stage folders under one directory."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def folder(self, key: str) -> Path:
        """Where a stage lives, finished or not."""
        return self.root / key[:2] / key

    def finished(self, key: str) -> bool:
        """Whether the stage's manifest can be read and its files are there; what they hold is not looked at."""
        folder = self.folder(key)
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            return all((folder / name).is_file() for name in files)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return False
        except OSError as error:
            raise StoreError(f"cannot read the store at {self.root}: {error.strerror}; check its permissions, or set --runs DIR") from error

    def label(self, key: str) -> str:
        """What a stage calls itself, where its folder still says so, and its key."""
        try:
            return f"{json.loads((self.folder(key) / _STAGE).read_text(encoding='utf-8'))['label']} ({key})"
        except (OSError, ValueError, KeyError, TypeError):
            return key

    def begin(self, key: str, record: dict[str, Any]) -> Path:
        """The folder of a stage that is not finished, with the record of what will be done in it.

        A manifest that is there is damaged, or names files that are gone; it must not vouch for what is written from now on.
        """
        folder = self.folder(key)
        write_json(folder / _STAGE, record)
        (folder / MANIFEST).unlink(missing_ok=True)
        return folder

    def manifest(self, key: str) -> dict[str, Any]:
        """The record of a finished stage."""
        path = self.folder(key) / MANIFEST
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StoreError(f"stage {key} is not in the store at {self.root}; run the recipe again to make it") from error
        except json.JSONDecodeError as error:
            raise StoreError(f"{path} is damaged; delete its folder and run the recipe again to redo the stage") from error

    def lock(self, key: str) -> "FileLock":
        """A lock that dies with its process."""
        from filelock import FileLock  # here: it brings asyncio, and most commands only look

        path = self.folder(key).with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return FileLock(path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"cannot write to the store at {self.root}: {error.strerror}; set --runs DIR to a writable folder")

    def acquire(self, key: str, waiting: Callable[[], None]) -> "FileLock":
        """Take the lock of a stage; while another process runs it, call `waiting` once a second, which may raise to give up."""
        from filelock import Timeout

        lock = self.lock(key)
        while True:
            try:
                lock.acquire(timeout=1)
                return lock
            except Timeout:
                waiting()
            except OSError as error:
                raise self._unwritable(error) from error

    def finish(self, key: str, manifest: dict[str, Any]) -> None:
        """Put the manifest in place, with the digest of every file; then drop what only a resume needed."""
        folder = self.folder(key)
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in _NOT_ARTIFACTS and p.parent.name != _PARTS]
        resume = [p for p in files if any(fnmatch.fnmatch(p.name, pattern) for pattern in _RESUME)]
        kept = [p for p in files if p not in resume]
        write_json(folder / MANIFEST, manifest | {"files": {str(p.relative_to(folder)): _sha256(p) for p in kept}})
        for path in resume:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / _PARTS, ignore_errors=True)


def _sha256(path: Path) -> str:
    """The digest of a file, which is on the disk when it returns: a power failure must not leave a manifest without it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
