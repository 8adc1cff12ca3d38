"""The jobs of a study: which stages share a job or an array, the record of the job that each stage was given, and the work inside a job.

Evaluations of one model share a job, seeds with equal requests share an array, and parents come before children. If a stage fails, Slurm
cancels the jobs that depend on it (afterok); a second submission finds them missing and the rest finished.

`StageJob` is pickled by `cluster.submit` and runs in the job, in one process per task. A signal only sets a flag. All ranks agree on it
between two updates and the state is saved. Then the first process hands over to submitit, whose handler queues the job again under the same
id; if jobs may not do that, the next segment of a chain goes on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tadistill.cluster.queue import Entry
from tadistill.cluster.sbatch import Request
from tadistill.disk import write_json
from tadistill.errors import Interrupted, StageFailed, TadistillError
from tadistill.plan.graph import Stage
from tadistill.plan.specs import AnalyseSpec, EvaluateSpec
from tadistill.plan.task import Task
from tadistill.runner.interruption import StopFlag
from tadistill.store import FAILURE, RECORD, Store, key_of

_EVERY = 30.0  # seconds between two lines of progress in the log


# --- the jobs of a plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Stages that run one after the other in one job."""

    stages: tuple[Stage, ...]
    request: Request
    depth: int
    """Length of the longest chain of jobs before it."""

    @property
    def keys(self) -> set[str]:
        """Return the keys of its stages."""
        return {stage.key for stage in self.stages}

    @property
    def parents(self) -> set[str]:
        """Return the stages of other jobs that must be finished first."""
        return {parent for stage in self.stages for parent in stage.parents.values()} - self.keys

    @property
    def family(self) -> tuple:
        """Return a value that is equal for jobs that differ only in their seed."""
        first = self.stages[0]
        # depth keeps a job apart from one that depends on it
        return self.depth, first.kind, first.model, tuple(sorted(first.arms)), len(self.stages), self.request

    @property
    def name(self) -> str:
        """Return its name in Slurm; an array has the name of its first element."""
        first = self.stages[0]
        return f"{first.kind}-{first.model}-{first.key[:8]}"


def bundles(stages: Mapping[str, Stage], todo: Iterable[str]) -> list[tuple[int, tuple[Stage, ...]]]:
    """Return depth and stages of each job for the stages `todo`, parents first.

    All stages that measure one model share a job; every other stage has a job of its own.
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
    """Return what identifies the stage's job: the stage itself, or the model that it measures."""
    if isinstance(stage.spec, AnalyseSpec):
        stage = stages[stage.spec.answers.stage]
    if isinstance(stage.spec, EvaluateSpec):
        return f"evaluate {stage.spec.model}"
    return stage.key


def families(jobs: Seq[Job]) -> list[list[Job]]:
    """Group jobs that differ only in their seed, parents first."""
    found: dict[tuple, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.family, []).append(job)
    return sorted(found.values(), key=lambda members: members[0].depth)


@dataclass(frozen=True)
class Place:
    """A stage's job in Slurm: its id, and its index if it is an element of an array."""

    job: str
    index: int | None = None

    def __str__(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"


def arrays(jobs: Seq[Job], places: Mapping[str, Place]) -> list[tuple[list[Job], str | None]]:
    """Group the jobs of one family into arrays, each with its dependency.

    Element i of an array waits only for element i of its parents' arrays (aftercorr), so that a seed that fails does not cancel others.
    Jobs whose parents are not arranged like that share an array only if they wait for the same jobs.
    """
    waits = [{places[parent] for parent in job.parents if parent in places} for job in jobs]
    if len(jobs) > 1 and (together := _corresponding(waits)) is not None:
        return [(list(jobs), together)]
    groups: dict[str | None, list[Job]] = {}
    for job, wait in zip(jobs, waits, strict=True):
        groups.setdefault(_after(wait), []).append(job)
    return [(group, dependency) for dependency, group in groups.items()]


def _corresponding(waits: Seq[set[Place]]) -> str | None:
    """Return the dependency of a whole array, or None if its elements wait for different things."""

    def parts(i: int) -> set[str]:
        return {f"aftercorr:{place.job}" if place.index == i else f"afterok:{place}" for place in waits[i]}

    first = parts(0)
    return ",".join(sorted(first)) if first and all(parts(i) == first for i in range(len(waits))) else None


def _after(wait: set[Place]) -> str | None:
    return f"afterok:{':'.join(sorted(map(str, wait)))}" if wait else None


# --- records ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The job that a stage was given, and the study that submitted it."""

    job: str
    index: int | None
    name: str
    study: str

    @property
    def place(self) -> Place:
        """Return the job's id and index."""
        return Place(self.job, self.index)

    def write(self, store: Store, key: str) -> None:
        """Write it into a stage's folder."""
        write_json(store.folder(key) / RECORD, asdict(self))

    def entries(self, queue: Mapping[str, Entry]) -> list[Entry]:
        """Return the queue's entries of the job: the job, an element of an array, or what is left of a chain, the running segment first."""
        here = str(self.place)
        segments = [e for i, e in queue.items() if i.startswith(f"{here}_")] if self.index is None else []
        found = [queue[here]] if here in queue else sorted(segments, key=lambda e: e.state != "RUNNING")
        # Slurm gives ids again: a job of another name is another job, and the record is stale
        return [e for e in found if e.name == self.name]

    def live(self, queue: Mapping[str, Entry]) -> Entry | None:
        """Return the queue's entry of the job if it runs or will run."""
        return next((e for e in self.entries(queue) if not e.hopeless), None)


def read_record(store: Store, key: str) -> Record | None:
    """Return the record of a stage. A damaged one counts as none: at worst one job too many starts and finds the stage finished."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((store.folder(key) / RECORD).read_text(encoding="utf-8"))
        return Record(found["job"], found["index"], found["name"], found["study"])
    return None


def jobs_folder(study: Path) -> Path:
    """Return the folder with the scripts, pickles and logs of a study's jobs."""
    return study.resolve() / "jobs"


def report_name(study: Path) -> str:
    """Return Slurm's name of the job that writes a study's report; two studies of one name in two folders differ."""
    return f"report-{study.name}-{key_of(str(study.resolve()))[:6]}"


# --- the work inside a job ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageJob:
    """The stages of one job."""

    tasks: tuple[Task, ...]
    chain: bool = False
    """True if segments follow each other instead of a requeue."""

    def __call__(self) -> None:
        """Run the stages; an error fails the job, so that Slurm cancels the jobs that depend on it."""
        stop = StopFlag(signal.SIGUSR2, signal.SIGTERM)
        _name_ranks()
        for task in self.tasks:
            self._run(task, stop)
        if "WORLD_SIZE" in os.environ:
            sys.stdout.flush()
            os._exit(0)  # as in `runner.processes`: torch's own exit sometimes aborts when other ranks are gone

    def checkpoint(self) -> Any:
        """Return the work that submitit queues again: the same, which resumes from the saved state."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run(self, task: Task, stop: StopFlag) -> None:
        from tadistill.stages.execute import run_stage  # imports torch

        failure = Store(Path(task.store)).folder(task.key) / FAILURE
        if self.chain and os.environ.get("SLURM_ARRAY_TASK_ID") != "0" and failure.is_file():
            raise StageFailed(f"an earlier segment failed: {failure.read_text(encoding='utf-8').strip()}")
        if _first():
            failure.unlink(missing_ok=True)
        say(f"{task.label} ({task.key})")
        try:
            try:
                run_stage(task, progress=_Log(), alarm=lambda text: say(f"alarm: {text}"), stop=stop)
            except Interrupted as reason:
                say(str(reason))
                self._go_on_later(stop)
        except Exception as error:
            reason = str(error) if isinstance(error, TadistillError) else f"{type(error).__name__}: {error}"
            failure.parent.mkdir(parents=True, exist_ok=True)
            if not failure.exists():  # the first failure of any rank counts
                failure.write_text(f"{reason}\n", encoding="utf-8")
            print(f"failed: {reason}", flush=True)
            raise
        say("finished")

    def _go_on_later(self, stop: StopFlag) -> NoReturn:
        """Queue the job again, or leave the rest to the next segment; the state is saved."""
        if stop.received == signal.SIGTERM:  # cancelled, or preempted by a site that requeues jobs itself
            sys.exit(128 + signal.SIGTERM)
        if not self.chain:
            if not _first():
                time.sleep(3600)  # the requeue ends this process; exiting now could end the first one before it has requested that
            try:
                stop.replaced[signal.SIGUSR2](signal.SIGUSR2, None)  # ends this process
            except subprocess.SubprocessError as error:
                raise StageFailed(
                    f"Slurm did not requeue the job ({error}); its state is saved, so submit the study again, and where the site "
                    "forbids it set `resume: chain` in the cluster's profile"
                ) from error
            sys.exit(1)
        if os.environ.get("SLURM_ARRAY_TASK_ID") == os.environ.get("SLURM_ARRAY_TASK_MAX"):
            raise StageFailed("the last segment of the chain ended before the stage did; its state is saved, so submit the study again")
        sys.exit(0)


@dataclass(frozen=True)
class ReportJob:
    """The report of a study, written when all its jobs have ended."""

    study: str
    store: str

    def __call__(self) -> None:
        """Write the report."""
        from tadistill.report import read_results, write_report

        say(f"report: {write_report(read_results(Path(self.study), Store(Path(self.store))))}")


def say(text: str) -> None:
    """Print a line of the job's log; only the first process does."""
    if _first():
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class _Log:
    """Progress as lines of the log, at most one every 30 seconds."""

    def __init__(self) -> None:
        self.last = float("-inf")

    def __call__(self, done: int, total: int, text: str) -> None:
        if done >= total or time.monotonic() - self.last > _EVERY:
            self.last = time.monotonic()
            say(f"{done}/{total} {text}")


def _first() -> bool:
    return os.environ.get("SLURM_PROCID", "0") == "0"


def _name_ranks() -> None:
    """Set torch's variables for the ranks from Slurm's, if the job has several tasks."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
        os.environ.update({name: os.environ[of] for name, of in names.items()})
