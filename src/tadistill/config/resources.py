"""What a stage is given to run on. None of it is part of a stage's identity: the same numbers come out, up to the order of sums.

resources:
  default: {hours: 3}
  sft: {processes: 4, parallel: fsdp}          # every stage of a kind
  sft xl: {gpu: h100, processes: 8, nodes: 2}  # that kind of stage of one model
"""

from typing import Literal

from pydantic import Field, model_validator

from tadistill.config.strict import Strict


class Resources(Strict):
    """Devices and limits of a stage; on a cluster what is absent follows from the plan's estimates and the cluster's profile."""

    processes: int = Field(default=1, ge=1)
    """Ranks, with one GPU each where there are GPUs. Training stages only."""
    nodes: int = Field(default=1, ge=1)
    """Machines that the processes are spread over."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes hold the student whole (DDP), or a part each (FSDP2)."""
    teacher: Literal["replicated", "sharded", "offloaded"] = "replicated"
    """The teacher is whole on every device, in parts over the processes (FSDP2), or in host memory and brought in layer by layer."""
    gpu: str | None = None
    """A GPU or slice of the cluster's profile; the smallest that is large enough when absent."""
    cpus: int | None = Field(default=None, ge=1)
    """Cores of a process."""
    memory: float | None = Field(default=None, gt=0)
    """GB of host memory of a process."""
    hours: float | None = Field(default=None, gt=0)
    """Time limit of a job. A stage that needs longer saves its state, is queued again and goes on."""

    @model_validator(mode="after")
    def _check(self):
        if self.processes % self.nodes:
            raise ValueError(f"processes {self.processes} is not a multiple of nodes {self.nodes}; change one of them")
        if self.processes == 1 and (self.parallel == "fsdp" or self.teacher == "sharded"):
            given = "parallel fsdp" if self.parallel == "fsdp" else "teacher sharded"
            raise ValueError(f"{given} spreads a model over several processes, but processes is 1; raise it")
        return self
