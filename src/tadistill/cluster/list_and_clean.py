"""`tadistill list` and `tadistill clean`: the studies of a runs directory, and the stages in its store that no study needs.

A stage is needed in two cases: a JSON file in a study's folder contains its key, or another needed stage has used its output. plan.json
contains the keys of all stages of a study. `advise` and `search` also write files with keys.
"""

import datetime
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.markup import escape
from rich.table import Table

from tadistill.cluster import slurm
from tadistill.cluster.status import Queue, StatusRow, job_rows, local_rows, newest, read_plan, search_plan, study_state, unfinished
from tadistill.config.machine import Tracker
from tadistill.errors import ConfigError, StoreError, cause
from tadistill.runner.local import ADVICE, LOG, SEARCH, is_search, local_runs
from tadistill.store import MANIFEST, STAGE, Store, keys_in
from tadistill.terminal import Terminal
from tadistill.text import counted, size

_STORE = "store"
_FOLDERS = ("earlier", "judge", "local")  # a study's folders with JSON files
_TRACKERS = get_args(Tracker)  # folders of other programs, in studies or beside them
_Place = Literal["runs", "study", "beside", "link"]
"""The place of a folder. `runs`: where studies stand. `study`: in a study. `link`: behind a link in a study, or in a folder of a tracker.
`beside`: as `link`, but studies stand there too. Where studies stand, a link is read like a folder."""
_BEHIND = ("beside", "link")
_LEVELS = 2  # behind a link, studies are looked for in its folder and in the folders there
_KEY = re.compile("[0-9a-f]{16}")
_SHOWN = 20  # rows of the table before the question
_WIDEST = 1000  # characters in a line of the table of studies


@dataclass(frozen=True)
class StudyRow:
    """One study in the runs directory."""

    name: str
    created: str
    """Date and time of the first run. If plan.json is damaged, it is the time of the last change of the study's folder."""
    stages: int
    done: int
    bytes: int
    """Size of the study's folder and of all its stages. Studies may share stages."""
    state: str
    """As `study_state` returns it, after the word `search` if no run of the study has a plan. It can also say that the state is not known,
    or which file is damaged."""


@dataclass(frozen=True)
class Unneeded:
    """A stage in the store that no study needs."""

    key: str
    label: str
    bytes: int


def studies(runs: Path, store: Store) -> list[StudyRow]:
    """Return the studies of a runs directory. The oldest comes first."""
    asked: list[Mapping[str, slurm.Entry] | ConfigError] = []

    def queue(*, strict: bool) -> Mapping[str, slurm.Entry]:  # asks Slurm once for all studies
        if not asked:
            try:
                asked.append(slurm.queued())
            except ConfigError as error:
                asked.append(error)
        if not isinstance(asked[0], ConfigError):
            return asked[0]
        if strict:
            raise asked[0]
        return {}

    found = [_row(path, store, queue) for path in _folders(runs)]
    return sorted(filter(None, found), key=lambda row: row.created)


def _row(study: Path, store: Store, queue: Queue) -> StudyRow | None:
    try:
        os.scandir(study).close()
        search = not (study / "plan.json").is_file()
    except OSError as error:
        return StudyRow(study.name, _changed(study), 0, 0, 0, f"cannot be read ({cause(error)})")
    if search and not is_search(study):
        return None
    try:
        plan: dict[str, Any] = {**search_plan(study, store), "created": _began(study)} if search else read_plan(study)
        updates, created = {stage["key"]: stage.get("steps") for stage in plan["stages"]}, str(plan["created"])
    except (StoreError, KeyError, TypeError, AttributeError):
        return StudyRow(study.name, _changed(study), 0, 0, _size(study), f"{'search' if search else 'plan'}.json is damaged")
    left, runs = [key for key in updates if not store.finished(key)], local_runs(study)
    here, jobs, known = local_rows(runs), dict[str, StatusRow](), True
    try:
        jobs = job_rows(store, left, here, queue)
    except ConfigError:
        known = False
    states = [unfinished(store, key, updates[key], newest(here.get(key), jobs.get(key))).state for key in left]
    used = _size(study) + sum(_size(store.folder(key)) for key in updates)
    if search and not (study / SEARCH).is_file():
        states.append("waiting")  # a path is chosen only at the end
    state = study_state(states, runs)
    shown = state if known or state == "running" else "not known (squeue does not answer)"
    return StudyRow(study.name, created, len(updates), len(updates) - len(left), used, f"search {shown}" if search else shown)


def _began(study: Path) -> str:
    try:
        with (study / LOG).open(encoding="utf-8") as log:
            return datetime.datetime.strptime(log.read(19), "%Y-%m-%d %H:%M:%S").astimezone(datetime.UTC).isoformat(timespec="seconds")
    except (OSError, ValueError):  # all stages of the search were finished before
        return _changed(study)


def _changed(study: Path) -> str:
    return datetime.datetime.fromtimestamp(study.lstat().st_mtime, datetime.UTC).isoformat(timespec="seconds")


def unneeded(runs: Path, store: Store) -> list[Unneeded]:
    """Return the stages that no study needs and no process uses. The largest comes first.

    Raises:
        StoreError: a file or a folder of a study cannot be read, so it is not known which stages the study needs.
    """
    found = dict(_records(store))
    needed: set[str] = set()
    seen = set[tuple[str, _Place, int]]()
    todo = [key for study in _folders(runs) for key in _named_keys(study, seen) if key in found]
    while todo:
        key = todo.pop()
        if key not in needed:
            needed.add(key)
            todo += [parent for parent in found[key].get("parents", {}).values() if parent in found]
    left = {key: record for key, record in found.items() if key not in needed and not _busy(store, key)}
    rows = [Unneeded(key, str(record.get("label", "damaged")), _size(store.folder(key))) for key, record in left.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def delete(store: Store, keys: list[str], told: Callable[[str], None]) -> int:
    """Delete stages, and return the number of freed bytes. A stage that is in use is kept, and `told` is called with a note.

    Raises:
        StoreError: stages cannot be deleted. The others have been deleted.
    """
    freed, failed = 0, dict[Path, OSError]()
    for key in keys:
        lock = store.lock(key)
        try:
            lock.acquire(timeout=0)
            used, folder = _size(store.folder(key)), store.folder(key)
            (folder / MANIFEST).unlink(missing_ok=True)  # first, so that an interrupted deletion leaves no finished stage
            shutil.rmtree(folder)
            freed += used
        except TimeoutError:
            told(f"{store.label(key)} is not deleted, because a process has begun to work on it")
        except OSError as error:
            failed[store.folder(key)] = error
        finally:
            lock.release()
    if failed:
        folder, error = next(iter(failed.items()))
        more = f" and {counted(len(failed) - 1, 'more stage')}" if len(failed) > 1 else ""
        raise StoreError(f"cannot delete {folder}{more}: {cause(error)}; check permissions. {size(freed)} were freed") from error
    return freed


def _folders(runs: Path) -> list[Path]:
    # with links that lead nowhere: their studies may be on a disk that is not mounted
    if not os.path.lexists(runs):
        return []
    try:
        found = sorted(path for path in runs.iterdir() if path.name != _STORE)
    except OSError as error:
        raise StoreError(f"cannot read the runs directory {runs}: {cause(error)}; check its permissions and --runs") from error
    return [path for path in found if os.path.isdir(path) or (path.is_symlink() and not os.path.exists(path))]


def _named_keys(study: Path, seen: set[tuple[str, _Place, int]]) -> Iterator[str]:
    """Return the keys in the JSON files of a study's folder and of all folders below it, which may be studies too, such as old ones.

    Links are followed, and all of it must be readable, with two exceptions: the folders of trackers, such as W&B, and links in a study that
    tadistill has not made. Only studies are looked for there, some levels deep, because a link may lead to all data of a user. Links there
    may lead nowhere, and folders may be unreadable, but not beside a study: they may be studies too. `seen` has the places already read.
    """
    todo: list[tuple[Path, _Place, int]] = [(study, "runs", _LEVELS)]
    while todo:
        folder, place, levels = todo.pop()
        visit = os.path.realpath(folder), place, levels
        if visit in seen or (_KEY.fullmatch(folder.name) and folder.parent.name == folder.name[:2]):
            continue  # a stage of another store: its files name only its own
        seen.add(visit)
        in_study = _is_study(folder)
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name) if in_study or levels else []
        except OSError as error:
            if place != "link":
                raise _unknown(study, folder, error) from error
            continue
        holds = any(_is_study(folder / entry.name) for entry in entries if entry.is_symlink() or entry.is_dir())
        place = _place(folder, place, in_study=in_study, holds=holds)
        left = levels - 1 if place in _BEHIND else _LEVELS
        for entry in entries:
            path, below = folder / entry.name, _below(entry, place, in_study=in_study)
            try:
                if entry.is_dir():
                    todo.append((path, below, left))
                elif path.suffix == ".json" and place not in _BEHIND:
                    yield from keys_in(path)
                elif entry.is_symlink():
                    path.stat()  # it may lead to a study that is not there
            except OSError as error:
                if below != "link":
                    raise _unknown(study, path, error) from error


def _place(folder: Path, place: _Place, *, in_study: bool, holds: bool) -> _Place:
    # `holds`: studies stand in this folder
    if in_study or place not in _BEHIND:
        return "runs" if holds else "study" if in_study else "link" if folder.name in _TRACKERS else place
    return "beside" if holds else "link"


def _below(entry: os.DirEntry[str], place: _Place, *, in_study: bool) -> _Place:
    if in_study and (entry.name in _FOLDERS or entry.name.endswith(".json")):
        return "runs"
    if in_study and entry.name in _TRACKERS:
        return "link"
    return "link" if entry.is_symlink() and place == "study" else place


def _is_study(folder: Path) -> bool:
    # other programs also have files with these names
    files = [path for name in ("plan.json", SEARCH, ADVICE) if os.path.isfile(path := folder / name)]
    try:
        return any(b'"stages"' in path.read_bytes() for path in (*files, *folder.glob("local/*.json")))
    except OSError:
        return True  # its stages are not known


def _unknown(study: Path, path: Path, error: OSError) -> StoreError:
    fix = f"mount the disk of {path.readlink()}, or correct or delete the link" if path.is_symlink() else "check its permissions"
    return StoreError(f"cannot read {path} ({cause(error)}), so the stages that {study.name} needs are not known; {fix}")


def _records(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in sorted(store.root.glob("??/" + "[0-9a-f]" * 16)):
        if folder.is_dir():
            try:
                record = json.loads((folder / STAGE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                record = {}
            yield folder.name, record if isinstance(record, dict) else {}


def _busy(store: Store, key: str) -> bool:
    if not store.folder(key).with_suffix(".lock").exists():
        return False
    lock = store.lock(key)
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return True
    except OSError:  # the store cannot be written; the deletion says so
        return False
    lock.release()
    return False


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except OSError:  # a running stage has just renamed it
            continue
    return total


def print_studies(runs: Path, store: Store, console: Terminal) -> None:
    """Print a table of the studies in a runs directory, and the size of the stored results that no study needs."""
    rows = studies(runs, store)
    if not rows:
        console.say(f"there is no study in {runs.absolute()}; start one with `tadistill run RECIPE`, or give its directory with --runs")
    else:
        table = Table(box=None)
        for column in ("study", "started", "stages done", "size", "state"):
            table.add_column(column, justify="right" if column in ("stages done", "size") else "left", overflow="fold")
        for row in rows:
            when = row.created[:16].replace("T", " ")
            table.add_row(escape(row.name), when, f"{row.done}/{row.stages}", size(row.bytes), row.state)
        table.width = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum  # no name is broken
        console.print(table, crop=False)
    try:
        if loose := unneeded(runs, store):
            console.say(f"no study needs {_counted(loose)} in the store; free the space with `tadistill clean`")
    except StoreError as error:
        console.say(f"{error}; until then, `tadistill clean` deletes nothing")


def clean(runs: Path, store: Store, console: Terminal, *, dry_run: bool, confirm: Callable[[str], bool]) -> None:
    """Delete the stages that no study needs, after the user has agreed. With `dry_run`, only print them.

    Raises:
        StoreError: a file or a folder of a study cannot be read, or a stage cannot be deleted.
    """
    loose = unneeded(runs, store)
    if not loose:
        console.say("nothing to delete: every stage in the store belongs to a study or is in use")
        return
    shown = loose if dry_run else loose[:_SHOWN]
    table = Table(box=None)
    for column in ("key", "size", "stage"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for each in shown:
        table.add_row(each.key[:8], size(each.bytes), escape(each.label))
    console.print(table)
    if len(loose) > len(shown):
        console.say(f"and {len(loose) - len(shown)} smaller ones; --dry-run shows all")
    if dry_run:
        console.say(f"{_counted(loose)} would be deleted")
        return
    if not confirm(f"Delete {_counted(loose)}, which no study needs?"):
        console.say("nothing was deleted")
        return
    still = {each.key for each in unneeded(runs, store)}  # a study may have started during the question
    keys = [each.key for each in loose if each.key in still]
    freed = delete(store, keys, console.say)
    console.say(f"deleted {size(freed)}")


def _counted(loose: list[Unneeded]) -> str:
    return f"{counted(len(loose), 'stage')} ({size(sum(each.bytes for each in loose))})"
