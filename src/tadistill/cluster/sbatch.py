"""The resources that a job requests from Slurm, and its batch script.

A request is computed from the plan's estimates, the cluster's profile and the section `resources` of the recipe. If the cluster would
refuse the request, an error names the rule. The GPU is the smallest on which models, gradients and optimizer moments need at most 90 % of
the memory. The time is 1.5 x the estimate. If this is longer than the profile allows, the work needs several jobs.

The library submitit writes the script and pickles the work. It also queues a job again if the job saved its state before the time limit.
"""

import math
import os
import shlex
import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tadistill.cluster.slurm import Cpu, Gpu, Profile
from tadistill.config.machine import Resources
from tadistill.disk import cache_root, user_cache
from tadistill.errors import ConfigError
from tadistill.models.flops_and_memory import spans
from tadistill.plan import throughput
from tadistill.plan.arms import Plan
from tadistill.plan.graph import Stage
from tadistill.plan.kinds import RetokeniseSpec, TemperSpec
from tadistill.plan.task import gpus_of, layout, process_bytes
from tadistill.plan.throughput import Speeds

_SPARE = 0.9  # usable share of a GPU's memory; the rest is for CUDA, fragmentation and errors of the estimate
_UNKNOWN_BYTES = 2e9  # assumed need of a stage whose models have an unknown size
_USED = {"training": 0.15, "sampling": 0.01}
"""Share of a GPU's peak FLOP/s that a stage is assumed to reach if no speed was measured. The share of sampling is low, because memory
bandwidth limits sampling. All other work counts as training."""
_CPU_TFLOPS = 0.02
_EVALUATION_HOURS = 0.5
_UNKNOWN_HOURS = 3.0
_CHAIN_HOURS = 3.0  # minimum for a job of a chain, because a chain cannot get more jobs if the estimate was too short
_TIMEOUTS = 50  # maximum number of requeues after time limits
_PASSED_ON = ("TADISTILL_DATA", "HF_HUB_CACHE")


@dataclass(frozen=True)
class Request:
    """The resources that one job requests from Slurm."""

    gpu: str | None
    gpus: int
    """GPUs per node."""
    nodes: int
    tasks: int
    """Processes per node."""
    cpus: int
    """Cores per process."""
    ram: int
    """Host memory per node in GB."""
    minutes: int
    pieces: int
    """Expected number of jobs that the work needs, one after the other. Each has `minutes` as its time limit."""


class Requests:
    """Computes how many resources the jobs of a plan request on one cluster."""

    def __init__(self, plan: Plan, profile: Profile, speeds: dict[str, Speeds]):
        """`speeds` maps the name of a device to the speeds that were measured on it."""
        self.plan, self.profile, self.speeds = plan, profile, speeds

    def of(self, stages: Seq[Stage]) -> Request:
        """Return the resources for a job that runs these stages one after the other.

        Raises:
            ConfigError: the cluster would refuse the job, or no GPU of the cluster is large enough.
        """
        first = stages[0]
        wanted = layout(self.plan.recipe, first)
        where = f"resources of `{first.kind} {first.model}`"
        per_node = wanted.processes // wanted.nodes
        if not self.profile.gpus:
            return self._without_gpu(stages, wanted, where)
        name = wanted.gpu or self._smallest(stages, wanted)
        if name not in self.profile.gpus:
            raise ConfigError(
                f"{where}: gpu is `{name}`, but {self.profile.name} has no such GPU; use one of {', '.join(self.profile.gpus)}"
            )
        gpu = self.profile.gpus[name]
        count = _count(gpu, max(gpus_of(self.plan.recipe, stage.spec, per_node) for stage in stages), name, where, self.profile.name)
        cpus = wanted.cpus or max(1, gpu.cpus * count // per_node)
        ram = math.ceil(wanted.memory * per_node) if wanted.memory else int(gpu.ram * count)
        self._check_node(cpus * per_node, ram, gpu, where)
        minutes, pieces = self._time(stages, wanted, gpu, where)
        return Request(name, count, wanted.nodes, per_node, cpus, ram, minutes, pieces)

    def report(self) -> Request | None:
        """Return the resources for the job that writes the report. Return None if the cluster refuses such small jobs."""
        cpu = self.profile.cpu
        if cpu is None:
            return None
        minutes = math.ceil(60 * max(self.profile.min_hours, 0.25))
        return Request(None, 0, 1, 1, cpu.cpus, int(cpu.ram), minutes, 1)

    def _without_gpu(self, stages: Seq[Stage], wanted: Resources, where: str) -> Request:
        cpu = self.profile.cpu or Cpu()
        if wanted.gpu:
            raise ConfigError(
                f"{where}: gpu is `{wanted.gpu}`, but the profile {self.profile.name} has no GPUs; add GPUs to the profile, or remove `gpu`"
            )
        per_node = wanted.processes // wanted.nodes
        ram = math.ceil((wanted.memory or cpu.ram) * per_node)
        minutes, pieces = self._time(stages, wanted, None, where)
        return Request(None, 0, wanted.nodes, per_node, wanted.cpus or cpu.cpus, ram, minutes, pieces)

    # --- memory ---------------------------------------------------------------------------------------------------------

    def _smallest(self, stages: Seq[Stage], wanted: Resources) -> str:
        def needs(memory: float) -> float:  # of a GPU with so many GB, of which vLLM takes a share
            return max(process_bytes(self.plan, stage, cuda=True, of_gpu=memory * 1e9) or _UNKNOWN_BYTES for stage in stages)

        usable = {n: g for n, g in self.profile.gpus.items() if not (g.slice and wanted.processes > 1)}
        fits = sorted((g.memory, n) for n, g in usable.items() if needs(g.memory) <= _SPARE * g.memory * 1e9)
        if fits:
            return fits[0][1]
        largest = max(g.memory for g in usable.values())
        raise ConfigError(
            f"{stages[0].label} needs about {needs(largest) / 1e9:.0f} GB on a GPU, but the largest GPU of {self.profile.name} has "
            f"{largest:.0f} GB; lower `optim.micro_batch`, set `gradient_checkpointing`, or spread the stage over several GPUs: "
            f"`resources: {{{stages[0].kind} {stages[0].model}: {{processes: 4, parallel: fsdp}}}}` (to spread the teacher too, add "
            "`teacher: sharded`; to keep it in host memory, add `teacher: offloaded`)"
        )

    # --- time -----------------------------------------------------------------------------------------------------------

    def _time(self, stages: Seq[Stage], wanted: Resources, gpu: Gpu | None, where: str) -> tuple[int, int]:
        profile = self.profile
        hours = sum(self._hours(stage, wanted, gpu) for stage in stages)
        if wanted.hours is not None:
            if not profile.min_hours <= wanted.hours <= profile.max_hours:
                raise ConfigError(
                    f"{where}: hours is {wanted.hours:g}, but {profile.name} allows {profile.min_hours:g} to {profile.max_hours:g} hours "
                    "per job; choose a value in this range (longer work is split into several jobs)"
                )
            limit = wanted.hours
        else:
            least = _CHAIN_HOURS if profile.resume == "chain" else 1.0
            limit = min(profile.piece_hours, profile.max_hours, max(profile.min_hours, 1.5 * hours, least))
        return math.ceil(60 * limit), max(1, math.ceil(1.5 * hours / limit))

    def _hours(self, stage: Stage, wanted: Resources, gpu: Gpu | None) -> float:
        if stage.spec.measures or isinstance(stage.spec, TemperSpec | RetokeniseSpec):
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
                    f"{where}: the job asks for {asked} {what} on a node, but {self.profile.name} gives at most {there:g} with this GPU; "
                    f"lower `{'cpus' if what == 'cores' else 'memory'}`, or remove this key"
                )


def _count(gpu: Gpu, processes: int, name: str, where: str, site: str) -> int:
    if gpu.slice and processes > 1:
        raise ConfigError(
            f"{where}: {processes} processes on `{name}` (a slice of a GPU), but a job can use only one slice; use whole GPUs"
        )
    allowed = gpu.counts or tuple(range(1, gpu.per_node + 1))
    fits = [n for n in allowed if n >= processes]
    if not fits:
        raise ConfigError(
            f"{where}: {processes} processes per node are asked for, but a node of {site} has {gpu.per_node} x {name}; use more nodes"
        )
    return min(fits)


# --- the script --------------------------------------------------------------------------------------------------------


def parameters(name: str, request: Request, profile: Profile, *, account: str | None, dependency: str | None) -> dict[str, Any]:
    """Convert a request to the parameters of submitit's Slurm executor."""
    more: dict[str, Any] = {"requeue" if profile.resume == "requeue" else "no-requeue": True, "kill-on-invalid-dep": "yes"}
    found: dict[str, Any] = {
        "job_name": name,
        "time": request.minutes,
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks,
        "cpus_per_task": request.cpus,
        "signal_delay_s": min(profile.signal_seconds, 60 * request.minutes // 4),
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": _setup(request, profile),
        "additional_parameters": more,
    }
    if request.tasks * request.nodes > 1:  # if one rank fails, the others are ended too
        found["srun_args"] = ["--kill-on-bad-exit=1"]
    if profile.memory_option:
        found["mem"] = f"{request.ram}G"
    if account:
        found["account"] = account
    if dependency:
        found["dependency"] = dependency
    if request.gpu is not None:
        if profile.request == "gpus":
            more["gpus"] = f"{request.gpu}:{request.gpus * request.nodes}"
        else:
            found["gpus_per_node"] = request.gpus if profile.request == "count" else f"{request.gpu}:{request.gpus}"
    if profile.resume == "chain":
        found["array_parallelism"] = 1
    return found


def _setup(request: Request, profile: Profile) -> list[str]:
    lines = [f"module load {shlex.join(profile.modules)}"] if profile.modules else []
    lines += ["export HF_HUB_OFFLINE=1 HF_EVALUATE_OFFLINE=1 TOKENIZERS_PARALLELISM=false"]
    if profile.internet != "full":
        lines += ["export WANDB_MODE=offline"]
    # a site may start jobs with an empty environment, or with other cache folders
    places = {"HF_HOME": os.environ.get("HF_HOME") or str(user_cache() / "huggingface"), "TADISTILL_CACHE": str(cache_root())}
    places |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    lines += [f"export {name}={shlex.quote(value)}" for name, value in places.items()]
    # since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch
    lines += ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK"]
    if request.tasks * request.nodes > 1:
        lines += [
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000)) TORCH_NCCL_ASYNC_ERROR_HANDLING=1",
        ]
    return [*lines, *profile.setup]


def script(folder: Path, elements: int, settings: dict[str, Any]) -> str:
    """Return the text of a batch script. `elements` is the number of jobs in its array."""
    from submitit.slurm import slurm

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return slurm._make_sbatch_string(command=command, folder=folder, map_count=elements if elements > 1 else None, **settings)


def send(folder: Path, work: Seq[Any], settings: dict[str, Any]) -> str:
    """Submit work to Slurm: one item as a job, several items as a job array. Return the id of the job or array.

    Raises:
        CalledProcessError, or an error of submitit: sbatch refused the job. The error contains the output of sbatch.
    """
    import submitit

    executor = submitit.SlurmExecutor(folder, max_num_timeout=_TIMEOUTS)
    executor.update_parameters(**settings)
    with executor.batch():
        jobs = [executor.submit(each) for each in work]
    return str(jobs[0].job_id).partition("_")[0]
