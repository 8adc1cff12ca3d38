"""Which job a stage was given: job.json in the stage's folder, so that studies with one store know each other's jobs. Imports no torch."""

import contextlib
import json
from pathlib import Path
from typing import Any

from tadistill.cluster.jobs import Place
from tadistill.cluster.queue import Entry
from tadistill.disk import write_json
from tadistill.store import RECORD, Store, key_of


def write(store: Store, key: str, place: Place, name: str, study: str) -> None:
    """Note where a stage's job is, and who submitted it."""
    write_json(store.folder(key) / RECORD, {"job": place.job, "index": place.index, "name": name, "study": study})


def read(store: Store, key: str) -> dict[str, Any] | None:
    """The record of a stage, or None. A damaged one counts as none: at worst there is a job too many, which finds the stage finished."""
    path = store.folder(key) / RECORD
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"job", "index", "name", "study"} <= set(found) else None
    return None


def place(record: dict[str, Any]) -> Place:
    """Where a record says that the job is."""
    return Place(record["job"], record["index"])


def entries(record: dict[str, Any], queue: dict[str, Entry]) -> list[Entry]:
    """What the queue has of a recorded job: an element of an array, a job, or what is left of a chain of segments, the running one first.

    An id that belongs to a job of another name was given again, so the record is stale.
    """
    here = str(place(record))
    segments = [e for i, e in queue.items() if i.startswith(f"{here}_")] if record["index"] is None else []
    found = [queue[here]] if here in queue else sorted(segments, key=lambda e: e.state != "RUNNING")
    return [e for e in found if e.name == record["name"]]


def live(record: dict[str, Any] | None, queue: dict[str, Entry]) -> Entry | None:
    """The queue's entry of a recorded job that runs or will run."""
    return next((e for e in entries(record, queue) if not e.hopeless), None) if record else None


def jobs_folder(study: Path) -> Path:
    """Where scripts, pickles and logs of a study's jobs lie."""
    return study.resolve() / "jobs"


def report_name(study: Path) -> str:
    """What Slurm calls the job that writes a study's report; studies of one name in two folders are two."""
    return f"report-{study.name}-{key_of(str(study.resolve()))[:6]}"
