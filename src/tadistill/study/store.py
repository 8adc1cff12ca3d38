"""The store: finished stages, addressed by content.

`runs/store/ab/abcd…/` belongs to one stage. It is finished iff it holds manifest.json, which is renamed into place last; all
else in an unfinished folder is what a killed run left to resume from. A lock keeps two processes off the same stage.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadistill.errors import StoreError

if TYPE_CHECKING:
    from filelock import FileLock

MANIFEST = "manifest.json"
_RESUME = ("state.pt", "best.pt", "state.tmp", "best.tmp")
_PARTS = "parts"


def canonical(value: Any) -> str:
    """The one JSON text of a value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def key_of(value: Any) -> str:
    """16 hex digits that identify a stage's content."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file and rename it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; check the disk and its permissions, or set --runs DIR"
        ) from error


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line."""
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
        """Whether the stage's artifact is whole."""
        return (self.folder(key) / MANIFEST).is_file()

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
        kept = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (MANIFEST, *_RESUME) and p.parent.name != _PARTS]
        write_json(folder / MANIFEST, manifest | {"files": {str(p.relative_to(folder)): _sha256(p) for p in kept}})
        for name in _RESUME:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / _PARTS, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
