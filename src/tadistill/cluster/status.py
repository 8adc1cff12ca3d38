"""`tadistill status` shows the state of a study's stages, in Slurm or on this machine. `tadistill cancel` stops its Slurm jobs."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from tadistill.cluster import slurm
from tadistill.cluster.job import read_record, report_name
from tadistill.config.arm import path_text
from tadistill.disk import damaged, read_json
from tadistill.plan.graph import distinct_labels, table_lines
from tadistill.plan.throughput import spoken
from tadistill.runner.local import LOG, SEARCH, LocalRun, StageProgress, about_planning, described, local_runs, unfinished_stages
from tadistill.store import FAILURE, RECORD, STAGE, Store, command_for
from tadistill.terminal import Terminal
from tadistill.text import counted

BAD = frozenset({"failed", "killed", "lost", "cancelled", "timeout", "out_of_memory", "node_fail", "preempted", "boot_fail", "deadline"})
"""States in which a stage needs the user's attention."""
_COLOUR = {"done": "green", "running": "cyan", "queued": "yellow", **dict.fromkeys(BAD, "red")}
_STARTED = frozenset({"running", "completing", "suspended", "stopped", "signaling", "stage_out", "resizing"})
"""States of jobs in Slurm's queue that have started. Jobs in other states will start, such as `pending` and `requeue_hold`."""
_USUAL = frozenset({"running", "completing", "pending", "configuring", "requeued"})
_PLAN = "plan.json"
_METRICS = "metrics.jsonl"
_TAIL = 64 << 10  # bytes at the end of a log, in which the newest line is
_NARROW = 100  # columns; on a narrower screen a stage has two lines
Queue = Callable[..., Mapping[str, slurm.Entry]]
"""A function with the parameters and the result of `slurm.queued`."""


@dataclass(frozen=True)
class StatusRow:
    """One row of the status table: the state of one stage."""

    label: str
    job: str
    """The id of the stage's Slurm job. For a run without Slurm, it is HOST:PID."""
    state: str
    """One of done, running, queued, waiting (not started yet), stopped, failed, killed, `lost` (Slurm no longer knows the job), or another
    state of Slurm in lower case."""
    elapsed: str
    last: str
    """The newest numbers of a training, or the reason why the stage failed or waits."""
    at: float = 0.0
    """Time to which the row belongs: infinite if the stage runs or its job is in the queue; else the time at which the job ended (if not
    known, at which it was submitted), or at which the run last wrote its state."""
    progress: StageProgress | None = None
    """The progress of a stage of a run without Slurm."""
    where: str = ""
    """A clause that says where the next run continues an unfinished stage. It is empty if no clause is needed."""


def status_rows(study: Path, store: Store) -> list[StatusRow]:
    """Return one row for each stage of a study, in the order of the plan."""
    stages = (read_plan(study) if (study / _PLAN).is_file() else search_plan(study, store))["stages"]
    labels = distinct_labels((s["key"], s["label"], s.get("arms", ())) for s in stages)
    done = {s["key"] for s in stages if store.finished(s["key"])}
    here = local_rows(local_runs(study))
    jobs = job_rows(store, [s["key"] for s in stages if s["key"] not in done], here)

    def row(stage: dict[str, Any]) -> StatusRow:
        key, updates = stage["key"], stage.get("steps")
        row = newest(here.get(key), jobs.get(key))
        found = _finished(key, store) if key in done else unfinished(store, key, updates, row)
        last = found.last or _metric(store.folder(key), updates)
        return replace(found, label=labels[key], last="; ".join(filter(None, (last, found.where))))

    return [row(stage) for stage in stages]


def unfinished(store: Store, key: str, updates: int | None, row: StatusRow | None) -> StatusRow:
    """Return the row of a stage that is not finished.

    Args:
        updates: the number of updates of a training, and None for other stages.
        row: the newest row of its runs and jobs, or None if there is none.
    """
    if row and row.state == "running":
        return row
    where = store.continues(key, updates)
    if row is None:
        began = where or (store.folder(key) / _METRICS).is_file()
        row = StatusRow("", "", "stopped" if began else "waiting", "", "")
    saved = store.saved_update(key) if updates else None
    if row.progress and saved and saved > row.progress.done:  # a killed run could not write its last progress
        now = replace(row.progress, done=saved)
        row = replace(row, progress=now, last=described(now))
    nothing = "no state was saved, so the next run starts at update 0" if updates and row.state in ("stopped", "killed") else ""
    return replace(row, where=f"the next run continues {where}" if where else nothing)


def study_state(states: Iterable[str], runs: Sequence[LocalRun]) -> str:
    """Return the state of a study, from those of its stages and its runs without Slurm, the newest of them last.

    It is one of finished, running, queued, killed, failed, interrupted and `not running`.
    """
    found = {*states}
    if found <= {"done"}:
        return "finished"
    if "running" in found or any(run.state == "running" for run in runs):
        return "running"
    if "queued" in found:
        return "queued"
    newest = runs[-1].state if runs else ""
    if newest == "killed" or "killed" in found:
        return "killed"
    return newest if newest in ("failed", "interrupted") else "failed" if found & BAD else "not running"


def newest(*rows: StatusRow | None) -> StatusRow | None:
    """Return the row with the present state of a stage: one that runs or is in the queue, else the newest. None stands for no row."""
    return max(filter(None, rows), key=lambda row: row.at, default=None)


def local_rows(runs: Iterable[LocalRun]) -> dict[str, StatusRow]:
    """Return the status rows of the stages of runs without Slurm, by stage key. The field `label` of the rows is empty."""
    found: dict[str, StatusRow] = {}
    for run in runs:
        rows = {key: StatusRow("", run.name, "failed", "", reason, run.seen) for key, reason in run.failed.items()}
        state = {"interrupted": "stopped"}.get(run.state, run.state)
        if state in ("running", "killed", "stopped"):
            at = math.inf if state == "running" else run.seen
            for key, stage in run.stages.items():
                now = stage if state == "running" else replace(stage, left=None)
                rows[key] = StatusRow("", run.name, state, _time(now.seconds), described(now), at, now)
        found |= {key: newest(row, found.get(key)) or row for key, row in rows.items()}
    return found


def job_rows(store: Store, keys: Iterable[str], here: Mapping[str, StatusRow], queue: Queue | None = None) -> dict[str, StatusRow]:
    """Return the status rows of the stages in `keys` that were submitted to Slurm, by stage key. The field `label` of the rows is empty.

    Stages that run on this machine are left out. `here` has the rows of `local_rows`. If `queue` is given, it is called in place of
    `slurm.queued`, and Slurm is not asked how jobs ended. Raises ConfigError if squeue does not answer and the newest state of a stage is
    that of its job.
    """
    running = {key for key, row in here.items() if row.at == math.inf}
    open_ = {key: record for key in keys if key not in running and (record := read_record(store, key))}
    needed = any(key not in here or _submitted(store.folder(key)) > here[key].at for key in open_)
    queued = (queue or slurm.queued)(strict=needed) if open_ else {}
    live = {key: entry for key, record in open_.items() if (entry := record.live(queued))}
    gone = {} if queue else slurm.ended(str(record.place) for key, record in open_.items() if key not in live)
    return {key: _job(store.folder(key), str(record.place), live.get(key), gone.get(str(record.place))) for key, record in open_.items()}


def _job(folder: Path, job: str, live: slurm.Entry | None, gone: slurm.Entry | None) -> StatusRow:
    if live:
        word = live.state.lower()
        state = "running" if word in _STARTED else word if word in BAD else "queued"  # with SQUEUE_STATES, squeue also shows ended jobs
        notes = "" if word in _USUAL | BAD else f"{word} in Slurm", "" if state == "running" else live.reason
        return StatusRow("", job, state, live.elapsed, ", ".join(filter(None, notes)), math.inf)
    reason, submitted = folder / FAILURE, _submitted(folder)
    if reason.is_file():
        text, at = reason.read_text(encoding="utf-8").strip(), max(submitted, reason.stat().st_mtime)
        return StatusRow("", job, "failed", gone.elapsed if gone else "", text, at)
    if gone:
        return StatusRow("", job, gone.state.lower(), gone.elapsed, "", max(submitted, gone.ended))
    return StatusRow("", job, "lost", "", "Slurm no longer knows this job; submit the study again", submitted)


def _submitted(folder: Path) -> float:
    return (folder / RECORD).stat().st_mtime


def _finished(key: str, store: Store) -> StatusRow:
    record = read_record(store, key)
    return StatusRow("", str(record.place) if record else "", "done", _time(store.manifest(key).get("seconds")), "")


def print_status(study: Path, store: Store, console: Terminal) -> None:
    """Print the table of stages, the number of stages in each state, the runs of the study, and the command to run next."""
    found, runs = status_rows(study, store), local_runs(study)
    table = Table(box=None, title=study.name, title_justify="left", expand=True)
    beside = console.width >= _NARROW
    for column in ("stage", "job", "state", "elapsed", *(("last",) if beside else ())):
        table.add_column(column, overflow="fold", no_wrap=column == "state", ratio={"stage": 3, "last": 2}.get(column))
    rows = {row.label: row for row in found}
    for text, labels in table_lines({label: row.state for label, row in rows.items()}):
        row = rows[labels[0]] if len(labels) == 1 else StatusRow(text, "", rows[labels[0]].state, "", "")
        colour = _COLOUR.get(row.state, "dim")
        stage = escape(row.label) if beside or not row.last else f"{escape(row.label)}\n  [dim]{escape(row.last)}[/]"
        table.add_row(stage, row.job, f"[{colour}]{row.state}[/]", row.elapsed, *([escape(row.last)] if beside else []))
    counts = Counter(row.state for row in found)
    summary = ", ".join(f"{n} {state}" for state, n in counts.most_common())
    console.print(table)
    if table.row_count < len(found) and (study / _PLAN).is_file():
        console.say(f"a line of several seeds stands for their stages; {command_for('watch', study, store=store)} shows each")
    for line in ("", summary, *map(_about, runs), *_choice(study), _advice(counts, study, store, runs)):
        console.say(line)


def _about(run: LocalRun) -> str:
    if run.planning:
        return about_planning(run)
    left = f"about {spoken(run.left)} left" if run.left is not None else "the time left is not known yet"
    how = {
        "running": f"runs this study: {run.done}/{counted(run.total, 'stage')} done, {left}; `kill {run.pid}` stops it and saves its state",
        "killed": f"no longer runs: it was killed, or its machine stopped, after {spoken(run.seconds)}",
        "finished": f"finished after {spoken(run.seconds)}",
        "failed": "ended because a stage failed",
        "interrupted": "was interrupted; its stages saved their state",
    }
    return f"process {run.pid} on {run.host} (started {run.started}) {how[run.state]}"


def _advice(counts: Counter[str], study: Path, store: Store, runs: list[LocalRun]) -> str:
    search = not (study / _PLAN).is_file()
    running = any(run.state == "running" for run in runs)
    if set(counts) == {"done"} and not search:
        return f"all stages are done; {report_text(study, store)}"
    if running:
        page = "a search has no page to watch" if search else f"{command_for('watch', study, store=store)} shows the run in a browser"
        return f"the log of the run is {study / LOG}; {page}"
    if search:
        command = next((run.command for run in reversed(runs) if run.searches), "tadistill search RECIPE")
        finished = set(counts) == {"done"} and (study / SEARCH).is_file()
        return f"`{command}` {'shows all paths, and trains nothing' if finished else 'continues the search'}"
    if {"queued", "running"} & set(counts):
        return f"jobs are queued or running; cancel them with {command_for('cancel', study, store=store)}"
    if runs:
        return f"nothing is running; continue with `{runs[-1].command}`"
    return f"nothing is queued or running; continue with `{read_plan(study).get('command') or 'tadistill run RECIPE'}`"


def _choice(study: Path) -> Iterator[str]:
    """Return sentences about the path that a search has chosen."""
    if not (found := _search_result(study)):
        return
    (best, *_), compared = found["paths"], found["expected_best_of"]["k"]
    yield f"the search chose {path_text(best['path'])} (dev {found['metric']} {best['mean']:.4g}), the best of {counted(compared, 'path')}"
    confirm = study / "confirm.yaml"
    if confirm.is_file():
        command = shlex.join(["tadistill", "run", str(confirm), "--runs", str(study.parent)])
        yield f"compare it with direct training of equal compute on new seeds: `{command}`"
    else:
        yield "this is the direct path, so there is no path with assistants to confirm"


def report_text(study: Path, store: Store) -> str:
    """Say where the report of a finished study is, or how to write it."""
    page, command = study / "report.html", command_for("report", study, store=store)
    return f"the report is {page} ({command} writes it again)" if page.is_file() else f"write the report with {command}"


def cancel(study: Path, store: Store) -> int:
    """Cancel the Slurm jobs of a study, and return their number.

    A running stage saves its state first, and continues from it when the study is submitted again. If another study waits for one of these
    jobs, submit that study again too.
    """
    queued, plan = slurm.queued(), read_plan(study)
    name = plan.get("study", study.name)  # the folder of an earlier run has another name
    # finished stages are included, because later jobs of their chains may still be queued
    found = [record for s in plan["stages"] if (record := read_record(store, s["key"])) and record.study == name]
    jobs = {entry.id for record in found for entry in record.entries(queued)}
    slurm.cancel(jobs | {entry.id for entry in queued.values() if entry.name == report_name(study)})
    return len(jobs)


def read_plan(study: Path) -> dict[str, Any]:
    """Return plan.json, which has a list of stages with their keys. Raises StoreError if the file is missing or damaged."""
    path = study / _PLAN
    fix = "run or submit the recipe again to rewrite it"
    content = read_json(path, fix=fix)
    if not isinstance(content, dict) or "stages" not in content:
        raise damaged(path, "it has no list of stages", fix)
    return content


def search_plan(study: Path, store: Store) -> dict[str, Any]:
    """Return the stages of a search that are known so far, in the form of `read_plan`."""
    keys = [key for run in local_runs(study) if run.searches for key in run.needs] or unfinished_stages(study, "search")

    def stage(key: str) -> dict[str, Any]:
        path = store.folder(key) / STAGE
        record = read_json(path, fix="delete its folder and search again") if path.is_file() else {}
        optim = record.get("spec", {}).get("optim") or {}
        return {"key": key, "label": record.get("label", "a stage that has not started"), "steps": optim.get("steps")}

    return {"stages": [stage(key) for key in dict.fromkeys([*_search_result(study).get("stages", ()), *keys])]}


def _search_result(study: Path) -> dict[str, Any]:
    path, fix = study / SEARCH, "search again to rewrite it"
    found = read_json(path, fix=fix) if path.is_file() else {}
    if not isinstance(found, dict) or (path.is_file() and not found.get("paths")):
        raise damaged(path, "it has no list of paths", fix)
    return found


def _metric(folder: Path, updates: int | None) -> str:
    path = folder / _METRICS
    if not path.is_file():
        return ""
    with path.open("rb") as file:  # a long run's log has many lines; the newest is at the end
        file.seek(max(path.stat().st_size - _TAIL, 0))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):  # the first and the last line may be incomplete
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        values = {name: value for name, value in row.items() if name == "train/loss" or name.startswith("dev/")}
        return " ".join([f"{row['step']}/{updates}", *(f"{name} {value:.3g}" for name, value in values.items())])
    return ""


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
