"""Devices and limits of stages. None of it is part of a stage's key: results are the same, up to the order of sums.

resources:
  default: {hours: 3}
  sft: {processes: 4, parallel: fsdp}          # every stage of a kind
  sft xl: {gpu: h100, processes: 8, nodes: 2}  # that kind of stage of one model
"""

from typing import Literal

from pydantic import Field, model_validator

from tadistill.config.common import Strict


class Resources(Strict):
    """Devices and limits of a stage. On a cluster, defaults follow from the plan's estimates and the cluster's profile."""

    processes: int = Field(default=1, ge=1)
    """Number of processes (ranks), each with its own GPU if there are GPUs. Training stages only."""
    nodes: int = Field(default=1, ge=1)
    """Machines over which the processes are spread."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Placement of the student: whole in every process (`ddp`), or in parts over the processes (`fsdp`, FSDP2)."""
    teacher: Literal["replicated", "sharded", "offloaded"] = "replicated"
    """Placement of the teacher: whole on every device, in parts over the processes (FSDP2), or in host memory and loaded layer by layer."""
    gpu: str | None = None
    """A GPU or slice in the cluster's profile; the smallest that is large enough by default."""
    cpus: int | None = Field(default=None, ge=1)
    """Cores per process."""
    memory: float | None = Field(default=None, gt=0)
    """Host memory per process, in GB."""
    hours: float | None = Field(default=None, gt=0)
    """Time limit of a job. A stage that needs longer saves its state, is queued again and continues."""

    @model_validator(mode="after")
    def _check(self):
        if self.processes % self.nodes:
            raise ValueError(f"processes {self.processes} is not a multiple of nodes {self.nodes}; change one of them")
        if self.processes == 1 and (self.parallel == "fsdp" or self.teacher == "sharded"):
            given = "parallel fsdp" if self.parallel == "fsdp" else "teacher sharded"
            raise ValueError(f"{given} spreads a model over several processes, but processes is 1; raise it")
        return self
