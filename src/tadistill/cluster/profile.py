"""What a cluster has and what it refuses, as data: one YAML file a site in `profiles/`, or a file of the user's own.

    profile = load("narval")          # or load("path/to/mine.yaml")

A new site is a new file; the fields below are all there is (docs/cluster.md, "Another cluster").
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
    """GB on the device."""
    per_node: int = Field(ge=1)
    """How many of them a node has; slices: how many a job may have."""
    counts: tuple[int, ...] = ()
    """How many of a node's a job may ask for; any number when empty."""
    cpus: int = Field(ge=1)
    """Cores of the site's bundle for one of them; more is billed as more of them."""
    ram: float = Field(gt=0)
    """GB of host memory of that bundle."""
    tflops: float = Field(gt=0)
    """Peak of dense bfloat16 products: the start of an estimate of time where no speed was measured."""
    device: str = ""
    """The name that CUDA gives it, by which measured speeds are found."""
    slice: bool = False
    """One slice per job, and one process."""


class Cpu(Strict):
    """What a job without a GPU is given."""

    cpus: int = Field(default=1, ge=1)
    ram: float = Field(default=4, gt=0)


class Profile(Strict):
    """A site."""

    name: str
    about: str
    """What it is, and where these facts are from."""
    gpus: dict[str, Gpu] = {}
    """By the name that a request gives them; none: stages run on CPUs."""
    request: Literal["gpus-per-node", "gpus", "count"] = "gpus-per-node"
    """How a job asks for them: --gpus-per-node=NAME:N, --gpus=NAME:N, or --gpus-per-node=N where names are refused."""
    cpu: Cpu | None = Cpu()
    """Jobs without a GPU (the report; all where there are no GPUs); null where the site takes none that small."""
    memory_option: bool = True
    """Whether --mem means something."""
    min_hours: float = Field(default=0.0, ge=0)
    """The site's shortest job."""
    max_hours: float = Field(gt=0)
    """The site's longest job."""
    piece_hours: float = Field(default=12.0, gt=0)
    """Jobs are cut to this; the rest goes on after a requeue. Short jobs start sooner."""
    max_jobs: int = Field(default=1000, ge=1)
    """Jobs of a user that may be queued or running, every element of an array counted."""
    account: str = ""
    """Pattern of account names; empty where jobs need none."""
    internet: Literal["none", "proxy", "full"] = "none"
    """Of compute nodes. Jobs never use it; it says whether trackers can send."""
    home: Literal["writable", "read-only", "no-jobs"] = "writable"
    """In jobs: read-only means that runs must lie elsewhere; no-jobs that the site refuses jobs submitted from there."""
    resume: Literal["requeue", "chain"] = "requeue"
    """After a time limit a job queues itself again; or, where compute nodes may not call Slurm, the next of several segments goes on."""
    modules: tuple[str, ...] = ()
    """Loaded in every job, in this order."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the stage, for what modules do not do."""
    pause: float = Field(default=1.0, ge=0)
    """Seconds between two submissions."""
    signal_seconds: Annotated[int, Field(ge=10)] = 300
    """How long before its time limit a job is told to save."""


def names() -> list[str]:
    """The sites that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load(name: str) -> Profile:
    """A profile by name, or from a YAML file.

    Raises:
        ConfigError: there is none, or it breaks a rule.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no cluster profile `{name}`; there are {', '.join(names())}, or give a YAML file of your own (docs/cluster.md says how)"
        )
    try:
        return Profile.model_validate({"name": path.stem} | yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"cluster profile {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"cluster profile {path}: {where}: {first['msg']}; docs/cluster.md lists the fields") from error
