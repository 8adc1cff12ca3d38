"""Profiles of clusters. A profile is a YAML file with the hardware and the rules of one cluster.

    profile = load_profile("narval")          # or load_profile("path/to/mine.yaml")

The package contains some profiles in `profiles/`. For another cluster, write a file with the fields below.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from tadistill.config.common import Strict
from tadistill.errors import ConfigError

_FOLDER = Path(__file__).parent / "profiles"


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
    """Network access of compute nodes. It decides whether W&B can log online. Models and data are never downloaded in jobs."""
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


def names() -> list[str]:
    """Return the names of the profiles in the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """Load a profile by its name, or from a YAML file. Raises ConfigError if the file does not exist or is not valid."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(names())
        raise ConfigError(
            f"there is no cluster profile `{name}`; use one of {known}, or write a YAML file, as the documentation explains on the page "
            '"On a cluster"'
        )
    try:
        return Profile.model_validate({"name": path.stem} | yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"cluster profile {path} cannot be read as YAML; correct it: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f'cluster profile {path}: {where}: {first["msg"]}; the page "On a cluster" of the documentation lists the fields'
        ) from error
