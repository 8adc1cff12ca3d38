"""Profiles of clusters: the hardware and the rules of a cluster, in one YAML file. It is in `profiles/`, or it is a file of the user.

    profile = load_profile("narval")          # or load_profile("path/to/mine.yaml")

A new cluster needs only a new file with the fields below.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from tadistill.config.common import Strict
from tadistill.errors import ConfigError

_FOLDER = Path(__file__).parent / "profiles"


class Gpu(Strict):
    """A kind of GPU, or a slice of one (MIG)."""

    memory: float = Field(gt=0)
    """Device memory in GB."""
    per_node: int = Field(ge=1)
    """Number of GPUs per node. For slices, it is the number of slices per job."""
    counts: tuple[int, ...] = ()
    """Numbers of GPUs per node that a job may request. If empty, any number is allowed."""
    cpus: int = Field(ge=1)
    """Cores that the site includes with one GPU. A job with more cores is charged for more GPUs."""
    ram: float = Field(gt=0)
    """Host memory in GB that the site includes with one GPU."""
    tflops: float = Field(gt=0)
    """Peak TFLOP/s of dense bfloat16 matrix products. Times are estimated from it if no speed was measured."""
    device: str = ""
    """The device's name in CUDA. Measured speeds are stored under this name."""
    slice: bool = False
    """True for a slice. A job then has one slice and one process."""


class Cpu(Strict):
    """The cores and memory of a job without a GPU."""

    cpus: int = Field(default=1, ge=1)
    ram: float = Field(default=4, gt=0)


class Profile(Strict):
    """The rules and the hardware of a cluster (a site)."""

    name: str
    about: str
    """Description of the site, and the source of these facts."""
    gpus: dict[str, Gpu] = {}
    """Kinds of GPU by their name in a request. If empty, stages run on CPUs."""
    request: Literal["gpus-per-node", "gpus", "count"] = "gpus-per-node"
    """Form of a request: --gpus-per-node=NAME:N, --gpus=NAME:N, or --gpus-per-node=N if the site refuses names."""
    cpu: Cpu | None = Cpu()
    """Resources of jobs without a GPU: the report's job, and all jobs if `gpus` is empty. null if the site refuses such small jobs."""
    memory_option: bool = True
    """True if the site accepts --mem."""
    min_hours: float = Field(default=0.0, ge=0)
    """Shortest time limit, in hours, that the site accepts for a job."""
    max_hours: float = Field(gt=0)
    """Longest time limit, in hours, that the site accepts for a job."""
    piece_hours: float = Field(default=12.0, gt=0)
    """Longest time limit, in hours, that tadistill requests. A longer stage needs several jobs. Short jobs start sooner."""
    max_jobs: int = Field(default=1000, ge=1)
    """Number of jobs that a user may have queued or running. Every element of an array is one job."""
    account: str = ""
    """Regular expression that account names must match. Empty if jobs need no account."""
    internet: Literal["none", "proxy", "full"] = "none"
    """Network access of compute nodes. Jobs download nothing."""
    home: Literal["writable", "read-only", "no-jobs"] = "writable"
    """How jobs can use the home folder. `read-only`: the runs directory must be elsewhere. `no-jobs`: no job can be submitted from it."""
    resume: Literal["requeue", "chain"] = "requeue"
    """How work continues after a time limit. `requeue`: the job requeues itself. `chain`: another job, which is already queued, continues
    it."""
    modules: tuple[str, ...] = ()
    """Modules that every job loads, in this order."""
    setup: tuple[str, ...] = ()
    """Shell commands that run before the stage."""
    pause: float = Field(default=1.0, ge=0)
    """Seconds between two submissions."""
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
        raise ConfigError(f"there is no cluster profile `{name}`; use one of {known}, or write a YAML file (docs/reference/cluster.md)")
    try:
        return Profile.model_validate({"name": path.stem} | yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"cluster profile {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"cluster profile {path}: {where}: {first['msg']}; docs/reference/cluster.md lists the fields") from error
