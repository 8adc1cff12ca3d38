"""Settings of the machines on which a study runs: processes, devices, memory and vLLM. They change results only by rounding errors, and by
the masks of dropout."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tadistill.config.common import MOST, Strict
from tadistill.errors import ConfigError

Tracker = Literal["wandb", "trackio", "tensorboard"]


class Vllm(Strict):
    """Settings of vLLM, for the stages (single steps of work) in which it samples text (`engine: vllm`)."""

    memory: float = Field(default=0.3, gt=0, lt=1)
    """Share of a GPU's memory that vLLM may use for the weights and for the keys and values of earlier tokens. Without a GPU, it is the
    share of the machine's memory."""
    tensor_parallel: int = Field(default=1, ge=1, le=1024)
    """Number of GPUs over which vLLM splits the weights. It must be 1 in a training with several processes, because each process then runs
    vLLM on its own GPU."""
    eager: bool | None = None
    """True: vLLM compiles nothing and captures no CUDA graphs, so it starts faster and samples more slowly. The default is false on a GPU
    and true without one."""
    sleep: bool = True
    """True: vLLM frees its GPU memory while the student trains. The setting has no effect without a GPU, and in stages that do not
    train."""


class Runtime(Strict):
    """Settings of a run on this machine. After a change, stored results stay valid, because the settings change results only by
    rounding."""

    jobs: int | None = Field(default=None, ge=1, le=1024)
    """Number of stages (single steps of work) that run at the same time. The default is the number of GPUs, or of CPU cores if there is no
    GPU."""
    checkpoint_seconds: float | None = Field(default=None, gt=0, le=1e6)
    """Seconds between two saves of the state of a training. The default is 30, or 20 times the duration of the last save if this is
    longer."""
    trackers: tuple[Tracker, ...] = ()
    """Experiment trackers to which training writes its curves."""
    vllm: Vllm = Vllm()
    code: str | None = None
    """Folder of the user's own Python modules (for `metrics`, and for the objective `custom`). The default is the recipe's folder."""


class Resources(Strict):
    """Devices and limits of stages (single steps of work). A change affects only rounding errors, and the masks of dropout, so
    stored results stay valid.

        resources:
          default: {hours: 3}
          sft: {processes: 4, parallel: fsdp}          # all stages of the kind `sft`
          sft xl: {gpu: h100, processes: 8, nodes: 2}  # the stages of the kind `sft` for the model xl

    On a cluster, missing values are chosen automatically, from the plan's estimates and the description of the cluster.
    """

    processes: int = Field(default=1, ge=1, le=MOST)
    """Number of processes (ranks) of a stage that trains or records teacher outputs. Each process has its own GPU if there are GPUs. Other
    stages use one process."""
    nodes: int = Field(default=1, ge=1, le=MOST)
    """Number of machines on which the processes run."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Placement of the student's weights. `ddp`: every process has all weights. `fsdp`: they are sharded over the processes (FSDP2)."""
    teacher: Literal["replicated", "sharded", "offloaded"] = "replicated"
    """Placement of the teacher's weights. `replicated`: every device has all weights. `sharded`: they are sharded over the processes
    (FSDP2), except while the teacher takes part in sampling. `offloaded`: they are in host memory, and are loaded layer by layer."""
    gpu: str | None = None
    """Name of a GPU, or of a slice of a GPU, in the cluster's profile. The default is the GPU with the least memory, among those with
    enough memory for the stage."""
    cpus: int | None = Field(default=None, ge=1, le=MOST)
    """Number of CPU cores per process."""
    memory: float | None = Field(default=None, gt=0, le=1e6)
    """Host memory of each process, in GB."""
    hours: float | None = Field(default=None, gt=0, le=1e5)
    """Time limit of a job. A stage that needs more time saves its state, is queued again, and continues."""

    @model_validator(mode="after")
    def _check(self):
        if self.processes % self.nodes:
            raise ValueError(f"processes {self.processes} is not a multiple of nodes {self.nodes}; change one of them")
        if self.processes == 1 and (self.parallel == "fsdp" or self.teacher == "sharded"):
            given = "`parallel: fsdp`" if self.parallel == "fsdp" else "`teacher: sharded`"
            raise ValueError(f"{given} splits a model over several processes, but `processes` is 1; set `processes` to 2 or more")
        return self


def vllm_folder(needs_it: str = "`engine: vllm`", instead: str = "set `engine: native`") -> Path:
    """Return the folder with the program `vllm` and the Python that runs it.

    The folder is `bin` of the environment that the variable TADISTILL_VLLM names. If this variable is not set, it is the folder of this
    Python, or a folder on PATH.

    Args:
        needs_it, instead: parts of error messages: the setting that needs vLLM, and what the user can do without vLLM.

    Raises:
        ConfigError: vLLM is not installed there, or this is not Linux.
    """
    if sys.platform != "linux":
        raise ConfigError(f"{needs_it} runs on Linux only; {instead}")
    given = os.environ.get("TADISTILL_VLLM")
    named = given and os.path.expanduser(given)
    places = [f"{named}/bin"] if named else [str(Path(sys.executable).parent), os.environ.get("PATH")]
    found = next(filter(None, (shutil.which("vllm", path=place) for place in places)), None)
    if found is None or not Path(found).with_name("python").is_file():
        where = f"vLLM is not installed in {named} (TADISTILL_VLLM)" if named else "vLLM is not installed"
        raise ConfigError(
            f"{where}, but {needs_it} needs it; install vLLM into an environment of its own (`python -m venv .vllm && .vllm/bin/pip "
            f"install vllm`) and set TADISTILL_VLLM to the folder of this environment, or {instead}"
        )
    return Path(found).parent.absolute()


def entries_of(resources: Mapping[str, Resources], kind: str, model: str) -> list[str]:
    """Return the names of the entries of a recipe's `resources` for the stages of a kind that train or run `model`. Later entries override
    earlier ones."""
    return [name for name in ("default", kind, f"{kind} {model}") if name in resources]


def given_resources(resources: Mapping[str, Resources], kind: str, model: str) -> dict[str, Any]:
    """Return the settings in these entries, without default values."""
    entries = [resources[name] for name in entries_of(resources, kind, model)]
    return {field: getattr(entry, field) for entry in entries for field in entry.model_fields_set}


def processes_of(resources: Mapping[str, Resources], kind: str, model: str) -> int:
    """Return the number of processes of these stages."""
    return given_resources(resources, kind, model).get("processes", Resources.model_fields["processes"].default)
