"""Slurm on a cluster: profiles of clusters, and the state of this user's jobs.

    profile = load_profile("narval")          # or load_profile("path/to/mine.yaml")
    entries = queued()                        # this user's jobs in the queue, by id

A profile is a YAML file with the hardware and the rules of one cluster. The package contains some profiles in `profiles/`. For another
cluster, write a file with the fields below. `squeue` lists jobs in the queue. `sacct` lists jobs that have left the queue.
"""

import datetime
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from tadistill.config.common import Strict
from tadistill.disk import from_home
from tadistill.errors import ConfigError, TadistillError

_FOLDER = Path(__file__).parent / "profiles"
_NEVER = "DependencyNeverSatisfied"
_SECONDS = 30


# --- profiles -----------------------------------------------------------------------------------------------------------


class Gpu(Strict):
    """A kind of GPU, or a slice of a GPU (MIG)."""

    memory: float = Field(gt=0)
    """Device memory in GB."""
    per_node: int = Field(ge=1)
    """Number of GPUs per node. For slices, it is the number of slices that one job can use."""
    counts: tuple[int, ...] = ()
    """Numbers of GPUs per node that a job may request. If empty, all numbers up to `per_node` are allowed."""
    cpus: int = Field(ge=1)
    """CPU cores that a job gets with one GPU. A job with more cores is charged for more GPUs."""
    ram: float = Field(gt=0)
    """Host memory in GB that a job gets with one GPU."""
    tflops: float = Field(gt=0)
    """Peak TFLOP/s of dense bfloat16 matrix products. Times are estimated from it if no speed has been measured."""
    device: str = ""
    """The GPU's name in CUDA. Measured speeds are stored under this name."""
    slice: bool = False
    """True for a slice of a GPU. A job can use only one slice, with one process."""


class Cpu(Strict):
    """The cores and memory of a job without a GPU."""

    cpus: int = Field(default=1, ge=1)
    ram: float = Field(default=4, gt=0)


class Profile(Strict):
    """The hardware and the rules of one cluster."""

    name: str
    about: str
    """Description of the cluster, and where these facts come from."""
    gpus: dict[str, Gpu] = {}
    """Kinds of GPU by their name in Slurm. If empty, all stages run on CPUs."""
    request: Literal["gpus-per-node", "gpus", "count"] = "gpus-per-node"
    """How a job asks Slurm for GPUs: with --gpus-per-node=NAME:N, with --gpus=NAME:N, or with --gpus-per-node=N."""
    cpu: Cpu | None = Cpu()
    """Resources of jobs without a GPU, such as the job that writes the report. null if the cluster refuses such small jobs."""
    memory_option: bool = True
    """True if the cluster accepts the option --mem."""
    min_hours: float = Field(default=0.0, ge=0)
    """Shortest time limit of a job that the cluster accepts, in hours."""
    max_hours: float = Field(gt=0)
    """Longest time limit of a job that the cluster accepts, in hours."""
    piece_hours: float = Field(default=12.0, gt=0)
    """Longest time limit that tadistill requests, in hours. Short jobs start sooner. A longer stage needs several jobs."""
    max_jobs: int = Field(default=1000, ge=1)
    """Number of jobs that a user may have in the queue, running jobs included. Every element of a job array counts."""
    account: str = ""
    """Regular expression that account names must match. Empty if jobs need no account."""
    internet: Literal["none", "proxy", "full"] = "none"
    """Network access of compute nodes. Jobs download nothing, and log to no tracker. Unless it is `full`, the user's own code in a job gets
    WANDB_MODE=offline.
    """
    home: Literal["writable", "read-only", "no-jobs"] = "writable"
    """How jobs can use the home folder. `read-only`: jobs cannot write there, so the runs directory must be elsewhere. `no-jobs`: no job
    can be submitted from it.
    """
    resume: Literal["requeue", "chain"] = "requeue"
    """The action at the time limit of a job. `requeue`: Slurm queues the same job again. `chain`: another job, which was queued in
    advance, continues the work.
    """
    modules: tuple[str, ...] = ()
    """Software modules that every job loads, in this order."""
    setup: tuple[str, ...] = ()
    """Shell commands that every job runs before its work."""
    pause: float = Field(default=1.0, ge=0)
    """Seconds between two submissions of jobs."""
    signal_seconds: Annotated[int, Field(ge=10)] = 300
    """Slurm asks a job to save its state this many seconds before the job's time limit."""


def profile_names() -> list[str]:
    """Return the names of the profiles in the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """Load a profile by its name, or from a YAML file. Raises ConfigError if the file does not exist or is not valid."""
    path = from_home(name, "cluster profile") if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(profile_names())
        raise ConfigError(
            f"there is no cluster profile `{name}`; use one of {known}, or write a YAML file, as the documentation explains on the page "
            '"On a cluster"'
        )
    try:
        return Profile.model_validate({"name": path.stem} | yaml.safe_load(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise ConfigError(f"cluster profile {path} is not UTF-8; save the file as UTF-8") from error
    except (yaml.YAMLError, TypeError, OSError) as error:
        raise ConfigError(f"cluster profile {path} cannot be read as YAML; correct it: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f'cluster profile {path}: {where}: {first["msg"]}; the page "On a cluster" of the documentation lists the fields'
        ) from error


def accounts_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the accounts in environment variables, by the names of the variables. They override the account in a batch script."""
    return {name: environment[name] for name in ("SBATCH_ACCOUNT", "SLURM_ACCOUNT") if environment.get(name)}


# --- the queue ----------------------------------------------------------------------------------------------------------


def output_of(*command: str, seconds: float | None = None) -> str | None:
    """Run a program and return its output. Return None if it is not on PATH, fails, or runs longer than `seconds` (30)."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds or _SECONDS, check=False, stdin=subprocess.DEVNULL
        )
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
    ended: float = 0.0
    """Time at which the job ended, in seconds since the epoch. 0 if it is not known."""

    @property
    def hopeless(self) -> bool:
        """True if the job waits for a job that has failed. Some clusters keep such jobs in the queue for ever."""
        return self.reason == _NEVER


def queued(*, strict: bool = True) -> dict[str, Entry]:
    """Return this user's waiting and running jobs, by id. A job array has one entry per element.

    Raises:
        ConfigError: squeue fails. With `strict=False`, the result is then empty.
    """
    return _squeue("--me", strict=strict)


def ended(ids: Iterable[str]) -> dict[str, Entry]:
    """Return the last states of jobs that have left the queue, by job id. Jobs that Slurm no longer knows are left out."""
    wanted = sorted(ids)
    if not wanted:
        return {}
    roots = ",".join(sorted({i.partition("_")[0] for i in wanted}))
    fields = "--format=JobID,State,Elapsed,End,JobName"  # last the name, which can contain `|`
    out = output_of("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={roots}", fields)
    lines = [line.split("|", 4) for line in (out or "").splitlines()]
    found = {f[0]: Entry(f[0], f[1].split()[0], f[2], f[4], ended=_seconds(f[3])) for f in lines if len(f) == 5 and f[1]}
    if not found:  # if accounting is off, the controller still knows recent jobs
        found = _squeue("--states=all", f"--jobs={roots}", strict=False)
    return {i: entry for i in wanted if (entry := found.get(i) or _of_segments(i, found))}


def _seconds(time: str) -> float:
    # Slurm's local time in seconds since the epoch; 0 if it is `Unknown`, or has the user's own SLURM_TIME_FORMAT
    try:
        return datetime.datetime.fromisoformat(time).timestamp()
    except ValueError:
        return 0.0


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


def _squeue(*options: str, strict: bool) -> dict[str, Entry]:
    out = output_of("squeue", "--noheader", "--array", "--format=%i|%T|%M|%j|%r", *options)
    if out is None:
        if strict:
            raise ConfigError("squeue does not answer, so the state of jobs is unknown; run this command on a login node of the cluster")
        return {}
    found = {}
    for line in out.splitlines():
        if line.count("|") >= 4:
            id, state, elapsed, rest = line.strip().split("|", 3)
            name, _, reason = rest.rpartition("|")  # a name can contain the character
            found[id] = Entry(id, state, elapsed, name, reason)
    return found
