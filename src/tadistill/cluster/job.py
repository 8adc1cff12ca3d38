"""The Slurm jobs of a study: which stages share a job, a record of each stage's job, and the work inside a job.

All evaluations of one model share a job. Jobs that differ only in their seed are one Slurm array. If a stage fails, Slurm cancels the
jobs that depend on it. If the user submits the study again, the failed stage and the cancelled stages are submitted.

Before the time limit of a job, Slurm sends a signal. All processes then save their state after the current update, and the first process
asks Slurm to queue the job again with the same id. On clusters that forbid this, several jobs are queued in advance, and the next job
continues the work.
"""

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tadistill.cluster.sbatch import Request
from tadistill.cluster.slurm import Entry
from tadistill.disk import write_json
from tadistill.errors import Interrupted, StageFailed, TadistillError
from tadistill.plan.graph import Stage
from tadistill.plan.kinds import AnalyseSpec, EvaluateSpec
from tadistill.plan.task import Task
from tadistill.runner.interruption import StopFlag
from tadistill.store import FAILURE, RECORD, Store, key_of
from tadistill.text import visible

_EVERY = 30.0  # seconds between two lines of progress in the log


# --- the jobs of a plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Stages that run one after the other in one Slurm job."""

    stages: tuple[Stage, ...]
    request: Request
    depth: int
    """Number of jobs in the longest chain of jobs that must finish before this job."""

    @property
    def keys(self) -> set[str]:
        return {stage.key for stage in self.stages}

    @property
    def parents(self) -> set[str]:
        """Return the keys of the stages that must finish in other jobs before this job starts."""
        return {parent for stage in self.stages for parent in stage.parents.values()} - self.keys

    @property
    def family(self) -> tuple:
        """Return a tuple that is equal for two jobs that differ only in their seed."""
        first = self.stages[0]
        # `depth` makes the families of a job and of a job that depends on it different
        return self.depth, first.kind, first.model, tuple(sorted(first.arms)), len(self.stages), self.request

    @property
    def name(self) -> str:
        """Return the job's name in Slurm. An array is named after its first job.

        Slurm prints other characters differently, or uses them to separate fields. The name would then not be found in the queue.
        """
        first = self.stages[0]
        return re.sub(r"[^A-Za-z0-9._-]", "-", f"{first.kind}-{first.model}-{first.key[:8]}")


def bundles(stages: Mapping[str, Stage], todo: Iterable[str]) -> list[tuple[int, tuple[Stage, ...]]]:
    """Divide the stages `todo` into jobs. Return (depth, stages) for each job, with the depth that `Job.depth` explains.

    All stages that measure one model share a job. Every other stage has a job of its own. A job comes after the jobs that it waits for.
    """
    found: dict[str, list[Stage]] = {}
    for key in todo:
        found.setdefault(_home(stages, stages[key]), []).append(stages[key])
    home = {stage.key: name for name, members in found.items() for stage in members}
    depths: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in depths:
            above = {home[p] for stage in found[name] for p in stage.parents.values() if p in home} - {name}
            depths[name] = 1 + max(map(depth, above), default=-1)
        return depths[name]

    return [(depth(name), tuple(found[name])) for name in sorted(found, key=depth)]


def _home(stages: Mapping[str, Stage], stage: Stage) -> str:
    if isinstance(stage.spec, AnalyseSpec):
        stage = stages[stage.spec.answers.stage]
    if isinstance(stage.spec, EvaluateSpec):
        return f"evaluate {stage.spec.model}"
    return stage.key


def families(jobs: Seq[Job]) -> list[list[Job]]:
    """Group the jobs that differ only in the seed. Each group comes after the groups that its jobs wait for."""
    found: dict[tuple, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.family, []).append(job)
    return sorted(found.values(), key=lambda members: members[0].depth)


@dataclass(frozen=True)
class Place:
    """The Slurm id of a stage's job. In a job array, `job` is the id of the array, and `index` is the index of the stage's job."""

    job: str
    index: int | None = None

    def __str__(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"


def arrays(jobs: Seq[Job], places: Mapping[str, Place]) -> list[tuple[list[Job], str | None]]:
    """Put jobs that differ only in their seed into Slurm arrays. Return (jobs, dependency or None) for each array.

    Each job waits only for the earlier jobs that it needs, so a failed seed does not cancel other seeds. All jobs form one array if their
    seeds have the same indices in the earlier arrays: job i then waits for job i of each of these arrays. Otherwise, jobs share an array
    if they wait for the same earlier jobs.
    """
    waits = [{places[parent] for parent in job.parents if parent in places} for job in jobs]
    first, *others = [{f"aftercorr:{p.job}" if p.index == i else f"afterok:{p}" for p in wait} for i, wait in enumerate(waits)]
    if others and first and all(other == first for other in others):
        return [(list(jobs), ",".join(sorted(first)))]
    groups: dict[str | None, list[Job]] = {}
    for job, wait in zip(jobs, waits, strict=True):
        groups.setdefault(f"afterok:{':'.join(sorted(map(str, wait)))}" if wait else None, []).append(job)
    return [(group, dependency) for dependency, group in groups.items()]


# --- records ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobRecord:
    """The Slurm job in which a stage runs, and the study that submitted this job."""

    job: str
    index: int | None
    name: str
    study: str

    @property
    def place(self) -> Place:
        return Place(self.job, self.index)

    def write(self, store: Store, key: str) -> None:
        write_json(store.folder(key) / RECORD, asdict(self))

    def entries(self, queue: Mapping[str, Entry]) -> list[Entry]:
        """Return this job's entries in Slurm's queue. Running ones come first.

        There are several entries if the work was split into several jobs when it was submitted.
        """
        here = str(self.place)
        segments = [e for i, e in queue.items() if i.startswith(f"{here}_")] if self.index is None else []
        found = [queue[here]] if here in queue else sorted(segments, key=lambda e: e.state != "RUNNING")
        # Slurm reuses ids: if the name differs, it is another job and the record is stale
        return [e for e in found if e.name == self.name]

    def live(self, queue: Mapping[str, Entry]) -> Entry | None:
        """Return the job's entry in Slurm's queue if the job runs or can still start. Otherwise return None."""
        return next((e for e in self.entries(queue) if not e.hopeless), None)


def read_record(store: Store, key: str) -> JobRecord | None:
    """Return the record of the job that runs a stage. Return None if the record is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((store.folder(key) / RECORD).read_text(encoding="utf-8"))
        return JobRecord(found["job"], found["index"], found["name"], found["study"])  # another version may have written more keys
    return None


def jobs_folder(study: Path) -> Path:
    """Return the folder with the scripts, pickles and logs of a study's jobs."""
    return study.resolve() / "jobs"


def report_name(study: Path) -> str:
    """Return the Slurm name of the job that writes a study's report. It contains a hash of the study's path, so it is unique."""
    return f"report-{study.name}-{key_of(str(study.resolve()))[:6]}"


# --- the work inside a job ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageJob:
    """The work of one Slurm job: stages that run one after the other."""

    tasks: tuple[Task, ...]
    chain: bool = False
    """True if several jobs, queued in advance, do this work one after the other. False if a job is queued again at its time limit."""

    def __call__(self) -> None:
        stop = StopFlag(signal.SIGUSR2, signal.SIGTERM)
        _name_ranks()
        for task in self.tasks:
            self._run(task, stop)
        if "WORLD_SIZE" in os.environ:
            sys.stdout.flush()
            os._exit(0)  # as in `runner.processes`: torch's exit sometimes aborts when other ranks have exited

    def checkpoint(self) -> Any:
        """Return the work for a job that is queued again. It is the same work, from the saved state. submitit calls this method."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run(self, task: Task, stop: StopFlag) -> None:
        failure = Store(Path(task.store)).folder(task.key) / FAILURE
        if self.chain and os.environ.get("SLURM_ARRAY_TASK_ID") != "0" and failure.is_file():
            raise StageFailed(f"an earlier job of this stage failed: {failure.read_text(encoding='utf-8').strip()}; submit the study again")
        if _first():
            failure.unlink(missing_ok=True)
        say(f"{task.label} ({task.key})")
        try:
            try:
                _run_stage(task, stop)
            except Interrupted as reason:
                say(str(reason))
                self._go_on_later(stop)
        except Exception as error:
            reason = str(error) if isinstance(error, TadistillError) else f"{type(error).__name__}: {error}"
            failure.parent.mkdir(parents=True, exist_ok=True)
            if not failure.exists():  # only the first failure of all ranks is recorded
                failure.write_text(f"{reason}\n", encoding="utf-8")
            print(f"failed: {visible(reason)}", flush=True)
            raise
        say("finished")

    def _go_on_later(self, stop: StopFlag) -> NoReturn:
        if stop.received == signal.SIGTERM:  # the job was cancelled, or was preempted by a site that requeues it
            sys.exit(128 + signal.SIGTERM)
        if not self.chain:
            if not _first():
                time.sleep(3600)  # the requeue ends this process; an exit now could end the first process before its request
            try:
                stop.replaced[signal.SIGUSR2](signal.SIGUSR2, None)  # requeues the job and ends this process
            except subprocess.SubprocessError as error:
                raise StageFailed(
                    f"Slurm did not queue the job again ({error}). The stage's state is saved; submit the study again. If the cluster "
                    "forbids requeues, set `resume: chain` in its profile"
                ) from error
            sys.exit(1)
        if os.environ.get("SLURM_ARRAY_TASK_ID") == os.environ.get("SLURM_ARRAY_TASK_MAX"):
            raise StageFailed("the last job of this stage ended before the stage was finished. The state is saved; submit the study again")
        sys.exit(0)


@dataclass(frozen=True)
class ReportJob:
    """The work of the job that writes a study's report. Slurm starts it when all other jobs have ended."""

    study: str
    store: str

    def __call__(self) -> None:
        from tadistill.report import read_results, write_report

        say(f"report: {write_report(read_results(Path(self.study), Store(Path(self.store))))}")


def _run_stage(task: Task, stop: StopFlag) -> None:
    if "WORLD_SIZE" not in os.environ and Store(Path(task.store)).finished(task.key):  # by an earlier job of a chain
        return
    gc.disable()  # as in runner.preload
    from tadistill.stages.execute import run_stage, work_of  # imports torch

    work_of(type(task.spec))  # imports the libraries that the stage needs
    gc.enable()
    run_stage(task, progress=_Log(), alarm=lambda text: say(f"alarm: {text}"), stop=stop)


def say(text: str) -> None:
    """Print a line to the job's log. If the job has several processes, only the first one prints."""
    if _first():
        print(f"{time.strftime('%H:%M:%S')} {visible(text)}", flush=True)


class _Log:
    def __init__(self) -> None:
        self.last = float("-inf")

    def __call__(self, done: int, total: int, text: str) -> None:
        if done >= total or time.monotonic() - self.last > _EVERY:
            self.last = time.monotonic()
            say(f"{done}/{total} {text}")


def _first() -> bool:
    return os.environ.get("SLURM_PROCID", "0") == "0"


def _name_ranks() -> None:
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
        os.environ.update({name: os.environ[of] for name, of in names.items()})
