"""The store is a folder of stages. A stage is one step of a study, such as a training. Its key is a hash of its settings and inputs.

`runs/store/ab/abcd…/` is the folder of the stage with the key abcd…. The stage is finished if its folder contains manifest.json and every
file that the manifest names. The manifest is written last. The folder of an unfinished stage may contain a saved state, from which the
next run resumes. A lock prevents two processes from running the same stage.
"""

import fnmatch
import hashlib
import json
import os
import pickletools
import re
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tadistill.disk import damaged, digest, from_home, read_json, sha256, sync, write_json
from tadistill.errors import ConfigError, StoreError, cause
from tadistill.text import counted

if TYPE_CHECKING:
    from filelock import FileLock

MANIFEST = "manifest.json"
RECORD = "job.json"  # the cluster job that runs the stage
FAILURE = "failure.txt"  # the last error of that job
ROLLOUTS = "rollouts.json"  # the newest text that a student sampled in training, for `tadistill watch`
_NOT_ARTIFACTS = (MANIFEST, RECORD, FAILURE, ROLLOUTS)
STATES = ("state.pt", "state-before.pt")  # the two newest saved states of a training that is not finished
_SECONDS = "seconds.json"  # the time that a stage has taken so far
INCOMPLETE = ".tmp*"  # safetensors writes to such a file and then renames it; a killed process leaves it, as large as the weights
_RESUME = (*STATES, "best-*.pt", "*.tmp", INCOMPLETE, _SECONDS)
_PARTS = "parts"
SIGNAL = "signal"  # sub-folder of a `signal` stage with the recorded outputs of the teacher
_FINISHED_PARTS = (f"{_PARTS}/*.json", f"{SIGNAL}/[0-9]*.safetensors")
STAGE = "stage.json"  # the settings of a stage


def key_of(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of a JSON value. A stage's key is computed in this way from its settings and inputs."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)  # equal values give equal texts
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def named_runs(given: str | Path | None) -> str | Path | None:
    """Return the runs directory that the user names: `given` (the option --runs), else the variable TADISTILL_RUNS, else None."""
    return given or os.environ.get("TADISTILL_RUNS") or None


def runs_directory(given: str | Path | None = None) -> Path:
    """Return the runs directory that the user names (`named_runs`), else ./runs."""
    return from_home(named_runs(given) or "runs", "the runs directory" if given else "TADISTILL_RUNS")


def store_of(runs: Path) -> "Store":
    """Return the store of a runs directory. All studies in the directory share it."""
    return Store(runs / "store")


def runs_of(study: Path) -> Path:
    """Return the runs directory in which a study's folder lies. The folder of an earlier report is RUNS/STUDY/earlier/KEY."""
    return study.absolute().parents[2] if _is_earlier(study) else study.parent


def _is_earlier(study: Path) -> bool:
    above = study.absolute().parents
    return above[0].name == "earlier" and (above[1] / "plan.json").is_file()


def plan_again(study: Path) -> str:
    """Return what a user must do about a damaged plan.json in a study's folder, or in that of an earlier report."""
    if _is_earlier(study):
        return f"no command writes an earlier plan again, so restore this file, or delete {study}"
    return "run `tadistill run RECIPE` to write it again"


def with_store(study: Path, runs: str | Path | None = None) -> tuple[Path, "Store"]:
    """Return a study's folder and the store of its stages: of several stores, the one that has the most of them, finished or not.

    Studies share stages, so also the store of another study may have some. The stores are that beside the folder, that beside the folder to
    which a link leads, and that of the runs directory. If `runs` is given, its store is the first. The first of equal stores is taken, and
    that beside a folder in which the study was last run, if it has any stage: the study may be running there again. If none has a stage of
    the study, the store of `runs` is returned, else the first one that exists.

    Raises:
        ConfigError: another store has more of the study's stages than the store of `runs`.
    """
    root, place = runs_directory(runs), study if study.name not in ("", "..") else study.resolve()
    homes = ((folder, runs_of(folder)) for folder in (place, place.resolve()))
    beside = [(folder, root if home.resolve() == root.resolve() else home) for folder, home in homes]
    at_root = next((pair for pair in beside if pair[1] == root), (place, root))
    keys = _named_keys(place) if any(home != root for _, home in beside) else set()
    pairs = [at_root, *beside] if runs else [*beside, at_root]
    # os.path.isdir returns False for a folder without permission, unlike Path.is_dir
    stages = [sum(os.path.isdir(store_of(home).folder(key)) for key in keys) for _, home in pairs]
    if stages[0] > 0 and not runs and not place.is_symlink() and last_run_in(place, beside[0][1]):  # it may be running there again
        folder, home = pairs[0]
    elif any(stages):
        folder, home = pairs[stages.index(max(stages))]
    else:
        exist = [] if runs or at_root in beside else [pair for pair in beside if os.path.isdir(store_of(pair[1]).root)]
        folder, home = [*exist, at_root][0]
    if runs and home != root:
        raise ConfigError(
            f"study {study} lies in the runs directory {home}, which has more of its stages than {root}; leave out --runs (in Python "
            "`runs`), or give only the name of a study"
        )
    return folder, store_of(home)


def _named_keys(study: Path) -> set[str]:
    plan = study / "plan.json"
    found = [plan] if plan.is_file() else [*study.glob("*.json"), *study.glob("*/*.json")]  # a search has no plan
    files = [path for path in found if os.path.isfile(path) and os.access(path, os.R_OK)]
    return {key for path in files for key in keys_in(path)}


def last_run_in(study: Path, home: Path) -> bool:
    """Return True if a study was last run in the runs directory `home`. Copies were not, and plans of earlier versions do not say it."""
    try:
        return json.loads((study / "plan.json").read_text(encoding="utf-8"))["runs"] == str(home.resolve())
    except FileNotFoundError:  # a search, which has no report that could be replaced
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def keys_in(file: Path) -> set[str]:
    """Return all keys of stages in a text file. Raises OSError if it cannot be read."""
    return {key.decode() for key in re.findall(rb"\b[0-9a-f]{16}\b", file.read_bytes())}


def command_for(verb: str, study: Path, *more: str, store: "Store | None" = None) -> str:
    """Return the command `tadistill VERB STUDY MORE…`. STUDY and --runs are such that the command finds this study and its store.

    Args:
        store: the store of the study's stages. None means that of the runs directory in which the study lies.
    """
    home, default = runs_of(study), runs_directory()
    runs = store.root.parent if store else home
    if runs.resolve() == home.resolve():
        name = str(study.absolute().relative_to(home.absolute()))
        found = home.resolve() == default.resolve() and not Path(name, "plan.json").is_file()  # a copy in the working directory
    else:  # a copy, or a link
        name = str(study.absolute() if (runs / study).exists() else study)
        found = with_store(study)[1].root.resolve() == (runs / "store").resolve()
    return shlex.join(["tadistill", verb, name, *more, *([] if found else ["--runs", str(runs)])])


class Store:
    """The folders of all stages under one directory."""

    def __init__(self, root: Path, command: str = ""):
        """Open a store. Messages about damaged files tell the user to run `command`, which runs the damaged stages again."""
        self.root = Path(root)
        self.command = command

    def folder(self, key: str) -> Path:
        return self.root / key[:2] / key

    def finished(self, key: str) -> bool:
        """Return True if manifest.json can be read and all files that it names exist. Raises StoreError if the store cannot be read."""
        folder = self.folder(key)
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            return all((folder / name).is_file() for name in files)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return False
        except OSError as error:
            raise StoreError(
                f"cannot read the store at {self.root}: {cause(error)}; check its permissions, or set --runs DIR to another folder"
            ) from error

    def label(self, key: str) -> str:
        """Return `LABEL (KEY)` of a stage, for messages. If the stage's folder has no label, return only the key."""
        try:
            return f"{json.loads((self.folder(key) / STAGE).read_text(encoding='utf-8'))['label']} ({key})"
        except (OSError, ValueError, KeyError, TypeError):
            return key

    def redo(self, *keys: str) -> str:
        """Return what a user must do about damaged stages: which folders to delete, and which command to run again."""
        command = f"`{self.command}`" if self.command else "the recipe"
        return f"delete {', '.join(str(self.folder(key)) for key in keys)} and run {command} again"

    def artifact(self, key: str, name: str) -> Path:
        """Return the path of a file of a finished stage. Raises StoreError if the file has changed since the stage wrote it."""
        self.check([key], [name])
        return self.folder(key) / name

    def check(self, keys: Iterable[str], names: Iterable[str]) -> None:
        """Check that files of finished stages have not changed since the stages wrote them.

        Size and modification time are compared with the manifest. If they differ, or if the manifest lacks them, the SHA-256 is compared. A
        file is skipped if the manifest has no SHA-256 of it.

        Raises:
            StoreError: files have changed, or one may not be read. The message names all that have changed, their stages, and how to run
                the stages again.
        """
        names, changed = tuple(names), dict[str, str]()
        for key in dict.fromkeys(keys):
            folder = self.folder(key)
            reasons = [f"{folder / name} {why}" for name in names if (why := _change(folder, name))]
            if reasons:
                changed[key] = f"{', '.join(reasons)} (stage {self.label(key)})"
        if changed:
            raise StoreError(f"{'; '.join(changed.values())}: {self.redo(*changed)}")

    def begin(self, key: str, record: dict[str, Any]) -> Path:
        """Prepare and return the folder of an unfinished stage. stage.json is written. An invalid manifest.json is deleted, and so are
        files that a killed process left incomplete."""
        folder = self.folder(key)
        write_json(folder / STAGE, record)
        # the manifest of an unfinished stage is damaged or names missing files; it must not describe the new files
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in folder.rglob(INCOMPLETE):
            if not path.is_dir():
                path.unlink(missing_ok=True)
        return folder

    def manifest(self, key: str) -> dict[str, Any]:
        """Return the content of manifest.json of a finished stage. Raises StoreError if the file is missing or damaged."""
        path = self.folder(key) / MANIFEST
        if not path.exists():
            raise StoreError(f"stage {key} is not in the store at {self.root}; run the recipe again to create it")
        return read_json(path)

    def saved_update(self, key: str) -> int | None:
        """Return the number of updates in the newest saved state of a training. Return None if there is no state that can be read."""
        steps = (_step_of(self.folder(key) / name) for name in STATES)
        return next((step for step in steps if step is not None), None)

    def continues(self, key: str, updates: int | None) -> str:
        """Return where an unfinished stage continues, such as "at update 52 of 100" or "after 3 finished parts".

        Args:
            updates: the number of updates of a training. It is None for other stages, which save finished parts.

        Returns:
            An empty string if nothing is saved, so the stage starts from its beginning.
        """
        if updates:
            step = self.saved_update(key)
            return f"at update {step} of {updates}" if step else ""
        parts = sum(1 for pattern in _FINISHED_PARTS for _ in self.folder(key).glob(pattern))
        return f"after {counted(parts, 'finished part')}" if parts else ""

    def seconds(self, key: str, updates: int | None) -> float:
        """Return the seconds that earlier attempts of an unfinished stage took, or 0 if it starts from its beginning (`continues`)."""
        if not self.continues(key, updates):
            return 0.0
        try:
            return float(json.loads((self.folder(key) / _SECONDS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # killed before the first save
            return 0.0

    def save_seconds(self, key: str, seconds: float) -> None:
        """Save the seconds that an unfinished stage has taken, with those of earlier attempts, for the next attempt."""
        write_json(self.folder(key) / _SECONDS, round(seconds, 2))

    def lock(self, key: str) -> "FileLock":
        """Return the lock of a stage without acquiring it. The system releases a lock when the process that acquired it ends."""
        from filelock import FileLock  # imported here because it loads asyncio, and most commands need no lock

        path = self.folder(key).with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return FileLock(path)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"cannot write to the store at {self.root}: {cause(error)}; set --runs DIR to a writable folder")

    def acquire(self, key: str, waiting: Callable[[], None]) -> "FileLock":
        """Acquire the lock of a stage. If another process has it, call `waiting` once a second. `waiting` may raise an error to give up."""
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
        """Write manifest.json with the digest of every file. Then delete the files that were needed only to resume."""
        folder = self.folder(key)
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in _NOT_ARTIFACTS and p.parent.name != _PARTS]
        resume = [p for p in files if any(fnmatch.fnmatch(p.name, pattern) for pattern in _RESUME)]
        kept = [p for p in files if p not in resume]
        for path in kept:  # the files must be on the disk before the manifest, also after a power failure
            sync(path)
        names = {str(p.relative_to(folder)): p for p in kept}
        files = {name: digest(path) for name, path in names.items()}
        write_json(folder / MANIFEST, manifest | {"files": files, "stat": {name: _stat(path) for name, path in names.items()}})
        for path in resume:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / _PARTS, ignore_errors=True)


def _step_of(state: Path) -> int | None:
    # torch.save writes a zip file with a pickled dict, whose first entry is the step. `tadistill status` must not import torch
    try:
        with zipfile.ZipFile(state) as file, file.open(next(name for name in file.namelist() if name.endswith("/data.pkl"))) as content:
            values = [value for _, value, _ in islice(pickletools.genops(content), 10) if value is not None]
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return None
    after = values[values.index("step") + 1 :] if "step" in values else []
    return after[1] if len(after) > 1 and isinstance(after[1], int) else None


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _change(folder: Path, name: str) -> str:
    path, manifest = folder / name, folder / MANIFEST
    try:
        content = _read(manifest, manifest.stat().st_mtime_ns)
        recorded, stat = content["files"].get(name), content.get("stat", {}).get(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # not finished
    if not recorded:
        return ""
    try:
        return "" if _stat(path) == stat or sha256(path) == recorded else "has changed since its stage wrote it"
    except PermissionError as error:
        raise damaged(path, error) from error
    except OSError as error:
        return f"cannot be read ({cause(error)})"


@lru_cache(maxsize=1024)
def _read(manifest: Path, modified: int) -> dict[str, Any]:
    return json.loads(manifest.read_text(encoding="utf-8"))
