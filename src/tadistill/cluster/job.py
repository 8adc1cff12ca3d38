"""The work of a Slurm job: its stages, one after the other, in one process per task. `cluster.submit` pickles it.

A signal only sets a flag. All ranks agree on it between two updates and the state is saved. Then the first process hands over to submitit,
whose handler queues the job again under the same id; if jobs may not do that, the next segment of a chain goes on.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tadistill.errors import Interrupted, StageFailed, TadistillError
from tadistill.plan.task import Task
from tadistill.runner.interruption import StopFlag
from tadistill.store import FAILURE, Store

_EVERY = 30.0  # seconds between two lines of progress in the log


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
                    f"Slurm did not queue the job again ({error}); its state is saved, so submit the study again, and where the site "
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
        from tadistill.report import write_report

        say(f"report: {write_report(Path(self.study), Path(self.store))}")


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
