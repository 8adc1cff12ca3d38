"""What a job asks Slurm for: from the plan's estimates, the site's profile and the recipe's `resources`; refused here with the rule where
the site would refuse it. Imports no torch.

Memory decides the GPU: the smallest that holds the models, gradients and moments with a tenth to spare. Time is 1.5 x the estimate, cut to
pieces that a requeue joins again.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from tadistill.cluster.profile import Cpu, Gpu, Profile
from tadistill.config.resources import Resources
from tadistill.errors import ConfigError
from tadistill.models.counting.cost import spans
from tadistill.models.counting.memory import resident_bytes
from tadistill.plan import throughput
from tadistill.plan.arms import Plan
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Stage
from tadistill.plan.inputs import FromStage, Handle, Loaded
from tadistill.plan.layout import layout
from tadistill.plan.specs import TemperSpec, TrainingSpec
from tadistill.plan.throughput import Speeds

_SPARE = 0.9  # of a GPU's memory: the rest is CUDA's own, fragments and what an estimate misses
_WORK = 2e9  # bytes for activations and caches of a stage that only evaluates
_USED = {"training": 0.15, "sampling": 0.01}
"""Share of the peak that a stage's span reaches, until a speed is measured: decoding waits for memory. Other spans count as training."""
_CPU_TFLOPS = 0.02
_EVALUATION_HOURS = 0.5
_UNKNOWN_HOURS = 3.0
_CHAIN_HOURS = 3.0  # at least, for a segment: a chain cannot be made longer when the estimate was too short


@dataclass(frozen=True)
class Request:
    """One job's share of the machine."""

    gpu: str | None
    gpus: int
    """Per node."""
    nodes: int
    tasks: int
    """Processes per node."""
    cpus: int
    """Of a process."""
    ram: int
    """GB of a node."""
    minutes: int
    pieces: int
    """Jobs of that length that the estimate needs; 1 where it fits."""


class Requests:
    """Makes the requests of one plan on one site."""

    def __init__(self, plan: Plan, profile: Profile, speeds: dict[str, Speeds]):
        """`speeds`: what was measured, by the device's name."""
        self.plan, self.profile, self.speeds = plan, profile, speeds
        self.ledger = Ledger(plan.recipe)

    def of(self, stages: Seq[Stage]) -> Request:
        """The request of a job that runs these stages one after the other.

        Raises:
            ConfigError: the site would refuse it, or no GPU of the site is large enough.
        """
        first = stages[0]
        wanted = layout(self.plan.recipe, first)
        where = f"resources of `{first.kind} {first.model}`"
        per_node = wanted.processes // wanted.nodes
        if not self.profile.gpus:
            return self._without_gpu(stages, wanted, where)
        name = wanted.gpu or self._smallest(stages, wanted)
        if name not in self.profile.gpus:
            raise ConfigError(f"{where}: gpu is `{name}`, which {self.profile.name} has not; it has {', '.join(self.profile.gpus)}")
        gpu = self.profile.gpus[name]
        count = _count(gpu, per_node, name, where, self.profile.name)
        cpus = wanted.cpus or max(1, gpu.cpus * count // per_node)
        ram = math.ceil(wanted.memory * per_node) if wanted.memory else int(gpu.ram * count)
        self._check_node(cpus * per_node, ram, gpu, where)
        minutes, pieces = self._time(stages, wanted, gpu, where)
        return Request(name, count, wanted.nodes, per_node, cpus, ram, minutes, pieces)

    def report(self) -> Request | None:
        """Of the job that writes the report; None where the site takes no job that small."""
        cpu = self.profile.cpu
        if cpu is None:
            return None
        minutes = math.ceil(60 * max(self.profile.min_hours, 0.25))
        return Request(None, 0, 1, 1, cpu.cpus, int(cpu.ram), minutes, 1)

    def _without_gpu(self, stages: Seq[Stage], wanted: Resources, where: str) -> Request:
        cpu = self.profile.cpu or Cpu()
        if wanted.gpu:
            raise ConfigError(f"{where}: gpu is `{wanted.gpu}`, but profile {self.profile.name} names no GPUs; add it there")
        per_node = wanted.processes // wanted.nodes
        ram = math.ceil((wanted.memory or cpu.ram) * per_node)
        minutes, pieces = self._time(stages, wanted, None, where)
        return Request(None, 0, wanted.nodes, per_node, wanted.cpus or cpu.cpus, ram, minutes, pieces)

    # --- memory ---------------------------------------------------------------------------------------------------------

    def _smallest(self, stages: Seq[Stage], wanted: Resources) -> str:
        """The smallest GPU, or slice for a single process, that holds the stages."""
        needs = max((self._need(stage, wanted) for stage in stages), default=0.0)
        usable = {n: g for n, g in self.profile.gpus.items() if not (g.slice and wanted.processes > 1)}
        fits = sorted((g.memory, n) for n, g in usable.items() if needs <= _SPARE * g.memory * 1e9)
        if fits:
            return fits[0][1]
        largest = max(g.memory for g in usable.values())
        raise ConfigError(
            f"{stages[0].label} needs about {needs / 1e9:.0f} GB on a device, but the largest of {self.profile.name} has {largest:.0f}; "
            f"spread it with resources: {{{stages[0].kind} {stages[0].model}: {{processes: 4, parallel: fsdp}}}} "
            "(and teacher: sharded or offloaded), lower optim.micro_batch, or set gradient_checkpointing"
        )

    def _need(self, stage: Stage, wanted: Resources) -> float:
        """Bytes on one device; 0 where sizes are not known."""
        frozen = {self._name(handle) for role, handle in stage.spec.models.items() if role not in ("student", "model")}
        half = isinstance(stage.spec, TrainingSpec) and stage.spec.optim.precision == "bf16"
        teachers = sum(self._weights(name, "bfloat16" if half else "float32") for name in frozen)
        if stage.cost is None or stage.cost.memory is None:
            return teachers + self._weights(stage.model, "float32") + _WORK
        need, size = stage.cost.memory, self.ledger.size(stage.model)
        if wanted.parallel == "fsdp" and size:
            need -= resident_bytes(size.total, training=True) * (1 - 1 / wanted.processes)
        if wanted.teacher != "replicated":
            need -= teachers * (1 - 1 / wanted.processes if wanted.teacher == "sharded" else 1)
        return need

    def _weights(self, name: str | None, dtype: str) -> float:
        size = self.ledger.size(name) if name else None
        return resident_bytes(size.total, training=False, dtype=dtype) if size else 0.0

    def _name(self, handle: Handle) -> str | None:
        """The model whose weights a handle stands for."""
        if isinstance(handle, FromStage):
            return self.plan.stages[handle.stage].model
        if not isinstance(handle, Loaded):
            return self._name(handle.of)
        loads: dict[Any, str] = {model.load: name for name, model in self.plan.recipe.models.items()}
        return loads.get(handle.load)

    # --- time -----------------------------------------------------------------------------------------------------------

    def _time(self, stages: Seq[Stage], wanted: Resources, gpu: Gpu | None, where: str) -> tuple[int, int]:
        """(minutes, pieces)."""
        profile = self.profile
        hours = sum(self._hours(stage, wanted, gpu) for stage in stages)
        if wanted.hours is not None:
            if not profile.min_hours <= wanted.hours <= profile.max_hours:
                raise ConfigError(
                    f"{where}: hours is {wanted.hours:g}, but a job on {profile.name} has {profile.min_hours:g} to {profile.max_hours:g}; "
                    "a stage that needs longer is cut into pieces by itself"
                )
            limit = wanted.hours
        else:
            least = _CHAIN_HOURS if profile.resume == "chain" else 1.0
            limit = min(profile.piece_hours, profile.max_hours, max(profile.min_hours, 1.5 * hours, least))
        return math.ceil(60 * limit), max(1, math.ceil(1.5 * hours / limit))

    def _hours(self, stage: Stage, wanted: Resources, gpu: Gpu | None) -> float:
        """An estimate: measured speeds, else a share of the device's peak."""
        if stage.measures or isinstance(stage.spec, TemperSpec):
            return _EVALUATION_HOURS
        if gpu and (seconds := throughput.seconds(stage.cost, self.speeds.get(gpu.device, {}))) is not None:
            return seconds / 3600 / wanted.processes
        if stage.cost is None or not stage.cost.parts:
            return _UNKNOWN_HOURS
        peak = 1e12 * (gpu.tflops if gpu else _CPU_TFLOPS) * wanted.processes
        flops = spans(stage.cost.phases())
        return sum(value / (peak * (_USED.get(span, _USED["training"]) if gpu else 1)) for span, value in flops.items()) / 3600

    def _check_node(self, cpus: int, ram: int, gpu: Gpu, where: str) -> None:
        whole = gpu.per_node if not gpu.slice else 1
        for what, asked, there in (("cores", cpus, gpu.cpus * whole), ("GB of memory", ram, gpu.ram * whole)):
            if asked > there:
                raise ConfigError(
                    f"{where}: {asked} {what} on a node, but {self.profile.name} gives at most {there:g} with this GPU; lower "
                    f"{'cpus' if what == 'cores' else 'memory'}, or leave it out"
                )


def _count(gpu: Gpu, processes: int, name: str, where: str, site: str) -> int:
    """GPUs of a node: one a process, or the next number that the site allows."""
    if gpu.slice and processes > 1:
        raise ConfigError(
            f"{where}: {processes} processes on `{name}`, but a job has one slice, and slices cannot talk to each other; use whole GPUs"
        )
    allowed = gpu.counts or tuple(range(1, gpu.per_node + 1))
    fits = [n for n in allowed if n >= processes]
    if not fits:
        raise ConfigError(f"{where}: {processes} processes a node, but a node of {site} has {gpu.per_node} x {name}; raise nodes")
    return min(fits)
