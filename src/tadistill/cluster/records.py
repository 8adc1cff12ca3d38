"""Which job a stage was given: job.json in the stage's folder, so that studies with one store know each other's jobs. Imports no torch."""

import contextlib
import json
from pathlib import Path
from typing import Any

from tadistill.cluster.jobs import Place
from tadistill.cluster.queue import Entry
from tadistill.study.store import Store, write_json

_FILE = "job.json"


def write(store: Store, key: str, place: Place, name: str, cluster: str, study: str) -> None:
    """Note where a stage's job is."""
    record = {"job": place.job, "index": place.index, "name": name, "cluster": cluster, "study": study}
    write_json(store.folder(key) / _FILE, record)


def read(store: Store, key: str) -> dict[str, Any] | None:
    """The record of a stage, or None. A damaged one counts as none: at worst there is a job too many, which finds the stage finished."""
    path = store.folder(key) / _FILE
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def place(record: dict[str, Any]) -> Place:
    """Where a record says that the job is."""
    return Place(record["job"], record["index"])


def live(record: dict[str, Any] | None, queue: dict[str, Entry], cluster: str) -> Entry | None:
    """The queue's entry of a recorded job. An id that another job has by now, or that another cluster gave, is stale."""
    if record is None or record["cluster"] != cluster:
        return None
    entries = [e for e in _entries(record, queue) if e.name == record["name"] and not e.hopeless]
    return entries[0] if entries else None


def _entries(record: dict[str, Any], queue: dict[str, Entry]) -> list[Entry]:
    """An element of an array, a job, or what is left of a chain of segments, the running one first."""
    here = str(place(record))
    if here in queue:
        return [queue[here]]
    segments = [e for i, e in queue.items() if i.startswith(f"{here}_")] if record["index"] is None else []
    return sorted(segments, key=lambda e: e.state != "RUNNING")


def jobs_folder(study: Path) -> Path:
    """Where scripts, pickles and logs of a study's jobs lie."""
    return study.resolve() / "jobs"


def log_file(study: Path, record: dict[str, Any]) -> Path:
    """A job's log."""
    name = record["job"] if record["index"] is None else f"{record['job']}_{record['index']}"
    return jobs_folder(study) / f"{name}_0_log.out"
