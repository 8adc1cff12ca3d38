"""The state of this user's Slurm jobs. `squeue` lists jobs in the queue. `sacct` lists jobs that have left the queue."""

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tadistill.errors import ConfigError, TadistillError

_NEVER = "DependencyNeverSatisfied"
_SECONDS = 30


def output_of(*command: str) -> str | None:
    """Run a program and return its output. Return None if it is not on PATH, fails, or runs longer than 30 seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class Entry:
    """The state of a job, or of one element of a job array, in Slurm."""

    id: str
    state: str
    elapsed: str
    name: str
    reason: str = ""

    @property
    def hopeless(self) -> bool:
        """True if the job waits for a job that has failed. Some clusters keep such jobs in the queue for ever."""
        return self.reason == _NEVER


def queued() -> dict[str, Entry]:
    """Return this user's waiting and running jobs, by id. A job array has one entry per element. Raises ConfigError if squeue fails."""
    return _squeue("--me")


def ended(ids: Iterable[str]) -> dict[str, Entry]:
    """Return the last states of jobs that have left the queue, by job id. Jobs that Slurm no longer knows are left out."""
    wanted = sorted(ids)
    if not wanted:
        return {}
    roots = ",".join(sorted({i.partition("_")[0] for i in wanted}))
    out = output_of("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={roots}", "--format=JobID,State,Elapsed,JobName")
    lines = [line.split("|") for line in (out or "").splitlines()]
    found = {f[0]: Entry(f[0], f[1].split()[0], f[2], f[3]) for f in lines if len(f) == 4 and f[1]}
    if not found:  # if accounting is off, the controller still knows recent jobs
        found = _squeue("--states=all", f"--jobs={roots}", strict=False)
    return {i: entry for i in wanted if (entry := found.get(i) or _of_segments(i, found))}


def _of_segments(id: str, found: Mapping[str, Entry]) -> Entry | None:
    segments = [entry for i, entry in found.items() if i.startswith(f"{id}_")]
    return next((entry for entry in segments if entry.state != "COMPLETED"), segments[-1] if segments else None)


def cancel(ids: Iterable[str]) -> None:
    """Cancel jobs. Jobs that have already ended are ignored. Raises TadistillError if a job could not be cancelled."""
    wanted = sorted(ids)
    if not wanted or output_of("scancel", "--quiet", *wanted) is not None:
        return
    # scancel also fails if one of the jobs has already ended
    if left := [i for i, entry in queued().items() if i in wanted and entry.state == "PENDING"]:
        raise TadistillError(
            f"scancel failed for {', '.join(left)}; run `squeue --me` to see whether they still run, then cancel them with scancel"
        )


def _squeue(*options: str, strict: bool = True) -> dict[str, Entry]:
    out = output_of("squeue", "--noheader", "--array", "--format=%i|%T|%M|%j|%r", *options)
    if out is None:
        if strict:
            raise ConfigError("squeue does not answer, so the state of jobs is unknown; run this command on a login node of the cluster")
        return {}
    lines = [line.strip().split("|") for line in out.splitlines()]
    return {f[0]: Entry(*f) for f in lines if len(f) == 5}
