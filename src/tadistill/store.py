"""The store: finished stages, addressed by content.

`runs/store/ab/abcd…/` belongs to one stage. The stage is finished iff the folder holds manifest.json, which is renamed into place last, and
every file that the manifest names. Anything else in an unfinished folder was left by a killed run, which the next one resumes. A lock keeps
two processes from running the same stage.
"""

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadistill.disk import digest, read_json, sync, write_json
from tadistill.errors import StoreError

if TYPE_CHECKING:
    from filelock import FileLock

MANIFEST = "manifest.json"
RECORD = "job.json"  # the cluster job that runs the stage
FAILURE = "failure.txt"  # the last error of that job
_NOT_ARTIFACTS = (MANIFEST, RECORD, FAILURE)
_RESUME = ("state.pt", "state-before.pt", "best-*.pt", "*.tmp")
_PARTS = "parts"
_STAGE = "stage.json"


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def key_of(value: Any) -> str:
    """Return 16 hex digits that identify a stage's content."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def runs_directory(given: str | Path | None = None) -> Path:
    """Return `--runs DIR`, else TADISTILL_RUNS, else ./runs."""
    return Path(given or os.environ.get("TADISTILL_RUNS") or "runs")


def store_of(runs: Path) -> "Store":
    """Return the store of a runs directory, which its studies share."""
    return Store(runs / "store")


class Store:
    """Stage folders under one directory."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def folder(self, key: str) -> Path:
        """Return the folder of a stage, finished or not."""
        return self.root / key[:2] / key

    def finished(self, key: str) -> bool:
        """Return True if the manifest can be read and its files exist (with any content). Raises StoreError if the store cannot be read."""
        folder = self.folder(key)
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            return all((folder / name).is_file() for name in files)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return False
        except OSError as error:
            raise StoreError(f"cannot read the store at {self.root}: {error.strerror}; check its permissions, or set --runs DIR") from error

    def label(self, key: str) -> str:
        """Return a stage's label, if its folder has one, and its key."""
        try:
            return f"{json.loads((self.folder(key) / _STAGE).read_text(encoding='utf-8'))['label']} ({key})"
        except (OSError, ValueError, KeyError, TypeError):
            return key

    def begin(self, key: str, record: dict[str, Any]) -> Path:
        """Return the folder of a stage that is not finished, after writing the stage's record into it."""
        folder = self.folder(key)
        write_json(folder / _STAGE, record)
        # a manifest here is damaged, or names files that are gone; it must not vouch for what is written from now on
        (folder / MANIFEST).unlink(missing_ok=True)
        return folder

    def manifest(self, key: str) -> dict[str, Any]:
        """Return the manifest of a finished stage. Raises StoreError if it is missing or damaged."""
        path = self.folder(key) / MANIFEST
        if not path.exists():
            raise StoreError(f"stage {key} is not in the store at {self.root}; run the recipe again to make it")
        return read_json(path)

    def lock(self, key: str) -> "FileLock":
        """Return the lock of a stage, which ends with its process."""
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
        """Take the lock of a stage. While another process holds it, `waiting` is called once a second; it may raise to give up."""
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
        """Put the manifest in place, with the digest of every file; then delete the files that only a resume needed."""
        folder = self.folder(key)
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in _NOT_ARTIFACTS and p.parent.name != _PARTS]
        resume = [p for p in files if any(fnmatch.fnmatch(p.name, pattern) for pattern in _RESUME)]
        kept = [p for p in files if p not in resume]
        for path in kept:  # a power failure must not leave a manifest without its files
            sync(path)
        write_json(folder / MANIFEST, manifest | {"files": {str(p.relative_to(folder)): digest(p) for p in kept}})
        for path in resume:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / _PARTS, ignore_errors=True)
