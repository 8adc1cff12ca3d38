"""`tadistill status` and `tadistill cancel`: the state of a study's stages, from the store, the queue and the logs."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from tadistill.cluster import queue
from tadistill.cluster.job import JobRecord, read_record, report_name
from tadistill.disk import damaged, read_json
from tadistill.store import FAILURE, Store, runs_directory

_COLOUR = {"done": "green", "running": "cyan", "pending": "yellow", "failed": "red", "cancelled": "red", "timeout": "red"}


@dataclass(frozen=True)
class StatusRow:
    """One row of the status table: the state of one stage."""

    label: str
    job: str
    state: str
    """done, failed, `not submitted`, `lost` (Slurm no longer knows the job), or another state of Slurm in lower case."""
    elapsed: str
    last: str
    """The newest line of the training log, or the reason why the stage failed or waits."""


def status_rows(study: Path, store: Store) -> list[StatusRow]:
    """Return one row per stage of a study, in the order of the plan."""
    stages = _stages(study)
    done = {s["key"] for s in stages if store.finished(s["key"])}
    found = {s["key"]: read_record(store, s["key"]) for s in stages}
    open_ = {key: record for key, record in found.items() if record and key not in done}
    queued = queue.queued() if open_ else {}
    live = {key: entry for key, record in open_.items() if (entry := record.live(queued))}
    gone = queue.ended(str(record.place) for key, record in open_.items() if key not in live)
    return [_finished(s, store, found[s["key"]]) if s["key"] in done else _row(s, store, found[s["key"]], live, gone) for s in stages]


def _finished(stage: dict[str, Any], store: Store, record: JobRecord | None) -> StatusRow:
    key, job = stage["key"], str(record.place) if record else ""
    return StatusRow(stage["label"], job, "done", _time(store.manifest(key).get("seconds")), _metric(store.folder(key), stage))


def _row(
    stage: dict[str, Any], store: Store, record: JobRecord | None, live: dict[str, queue.Entry], gone: dict[str, queue.Entry]
) -> StatusRow:
    key, label, folder = stage["key"], stage["label"], store.folder(stage["key"])
    if record is None:
        return StatusRow(label, "", "not submitted", "", _metric(folder, stage))
    job = str(record.place)
    if key in live:
        state = live[key].state.lower()
        return StatusRow(label, job, state, live[key].elapsed, _metric(folder, stage) if state == "running" else live[key].reason)
    reason = folder / FAILURE
    if reason.is_file():
        return StatusRow(label, job, "failed", gone[job].elapsed if job in gone else "", reason.read_text(encoding="utf-8").strip())
    if job in gone:
        return StatusRow(label, job, gone[job].state.lower(), gone[job].elapsed, _metric(folder, stage))
    return StatusRow(label, job, "lost", "", "Slurm no longer knows this job; submit the study again")


def command_for(verb: str, study: Path) -> str:
    """Return the command `tadistill VERB STUDY`, with --runs if the study is not in the default runs directory."""
    place = "" if study.parent.resolve() == runs_directory().resolve() else f" --runs {study.parent}"
    return f"tadistill {verb} {study.name}{place}"


def shortened(label: str, width: int) -> str:
    """Return a stage's label without parentheses. If it is too long, it is cut in the middle, because its end names the seed."""
    text = re.sub(r" \([^)]*\)", "", label)
    if len(text) <= width:
        return text
    tail = min(width // 2, len(text) - text.rindex(",") if "," in text else 0)
    return f"{text[: width - tail - 1]}…{text[len(text) - tail :]}"


def print_status(study: Path, store: Store, width: int) -> Group:
    """Return three parts: the table of stages (`width` columns wide); the number of stages in each state; and the next command to run."""
    found = status_rows(study, store)
    table = Table(box=None, title=study.name, title_justify="left", expand=True)
    for column, least in {"stage": 24, "job": 8, "state": 9, "elapsed": 7, "last": 10}.items():
        table.add_column(column, overflow="ellipsis", no_wrap=column != "last", min_width=least, ratio=1 if column == "last" else None)
    for row in found:
        colour = _COLOUR.get(row.state, "dim")
        label = escape(shortened(row.label, max(24, width - 56)))
        table.add_row(label, row.job, f"[{colour}]{row.state}[/]", row.elapsed, escape(row.last))
    counts = Counter(row.state for row in found)
    return Group(table, "", ", ".join(f"{n} {state}" for state, n in counts.most_common()), _advice(counts, study))


def _advice(counts: Counter[str], study: Path) -> str:
    if set(counts) == {"done"}:
        return f"all stages are done; write the report with {command_for('report', study)}"
    if {"pending", "running", "configuring", "requeued"} & set(counts):
        return f"jobs are queued or running; cancel them with {command_for('cancel', study)}"
    return "no job is queued; run the same `tadistill submit` again to submit the missing stages"


def cancel(study: Path, store: Store) -> int:
    """Cancel the jobs that a study submitted, and return their number.

    A running stage saves its state first, and a later submission resumes it. If another study waits for one of these jobs, submit that
    study again.
    """
    queued = queue.queued()
    # finished stages are included, because segments of their chains may still be queued
    found = [record for s in _stages(study) if (record := read_record(store, s["key"])) and record.study == study.name]
    jobs = {entry.id for record in found for entry in record.entries(queued)}
    queue.cancel(jobs | {entry.id for entry in queued.values() if entry.name == report_name(study)})
    return len(jobs)


def _stages(study: Path) -> list[dict[str, Any]]:
    path = study / "plan.json"
    fix = "submit the recipe again to rewrite it"
    content = read_json(path, fix=fix)
    if not isinstance(content, dict) or "stages" not in content:
        raise damaged(path, "it has no list of stages", fix)
    return content["stages"]


def _metric(folder: Path, stage: dict[str, Any]) -> str:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):  # the last line may be incomplete
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        values = {name: value for name, value in row.items() if name == "train/loss" or name.startswith("dev/")}
        return " ".join([f"{row['step']}/{stage['steps']}", *(f"{name} {value:.3g}" for name, value in values.items())])
    return ""


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
