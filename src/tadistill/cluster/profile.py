"""Profiles of clusters: what a site offers and refuses, as one YAML file per site in `profiles/`, or a file of the user's own.

    profile = load("narval")          # or load("path/to/mine.yaml")

A new site needs only a new file with the fields below (docs/cluster.md, "Another cluster").
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
    """GB of device memory."""
    per_node: int = Field(ge=1)
    """Number per node; for slices, the number per job."""
    counts: tuple[int, ...] = ()
    """Numbers per node that a job may request; any number when empty."""
    cpus: int = Field(ge=1)
    """Cores in the site's bundle for one GPU; a job with more is billed for more GPUs."""
    ram: float = Field(gt=0)
    """GB of host memory in that bundle."""
    tflops: float = Field(gt=0)
    """Peak of dense bfloat16 products, from which time is estimated when no speed was measured."""
    device: str = ""
    """CUDA's name of the device, by which measured speeds are found."""
    slice: bool = False
    """True for a slice: a job has one, and one process."""


class Cpu(Strict):
    """The cores and memory of a job without a GPU."""

    cpus: int = Field(default=1, ge=1)
    ram: float = Field(default=4, gt=0)


class Profile(Strict):
    """The rules and the hardware of a site."""

    name: str
    about: str
    """Description of the site, and the source of these facts."""
    gpus: dict[str, Gpu] = {}
    """Kinds of GPU by their name in a request; without any, stages run on CPUs."""
    request: Literal["gpus-per-node", "gpus", "count"] = "gpus-per-node"
    """Form of a request: --gpus-per-node=NAME:N, --gpus=NAME:N, or --gpus-per-node=N if the site refuses names."""
    cpu: Cpu | None = Cpu()
    """Resources of jobs without a GPU (the report; all jobs if there are no GPUs); null if the site takes no job that small."""
    memory_option: bool = True
    """True if the site accepts --mem."""
    min_hours: float = Field(default=0.0, ge=0)
    """Shortest job that the site takes."""
    max_hours: float = Field(gt=0)
    """Longest job that the site takes."""
    piece_hours: float = Field(default=12.0, gt=0)
    """Longest job that is submitted; the rest goes on after a requeue. Short jobs start sooner."""
    max_jobs: int = Field(default=1000, ge=1)
    """Number of jobs that a user may have queued or running; every element of an array counts."""
    account: str = ""
    """Pattern of account names; empty if jobs need none."""
    internet: Literal["none", "proxy", "full"] = "none"
    """Network of compute nodes. Jobs read nothing from it; trackers send their data only if it is full."""
    home: Literal["writable", "read-only", "no-jobs"] = "writable"
    """Use of the home folder in jobs. read-only: runs must be elsewhere. no-jobs: the site refuses jobs submitted from there."""
    resume: Literal["requeue", "chain"] = "requeue"
    """After a time limit, a job queues itself again (requeue); if compute nodes may not call Slurm, the next segment goes on (chain)."""
    modules: tuple[str, ...] = ()
    """Modules that every job loads, in this order."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run before the stage."""
    pause: float = Field(default=1.0, ge=0)
    """Seconds between two submissions."""
    signal_seconds: Annotated[int, Field(ge=10)] = 300
    """Seconds before the time limit at which a job is told to save."""


def names() -> list[str]:
    """Return the names of the profiles in the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load(name: str) -> Profile:
    """Return a profile by its name, or from a YAML file. Raises ConfigError if it does not exist, or it breaks a rule."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"there is no cluster profile `{name}`; use one of {', '.join(names())}, or a YAML file of your own (docs/cluster.md)"
        )
    try:
        return Profile.model_validate({"name": path.stem} | yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"cluster profile {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"cluster profile {path}: {where}: {first['msg']}; docs/cluster.md lists the fields") from error
