"""A job as a batch script, through submitit: it writes the script, pickles the work, and queues a job again that saved its state in time.

The text of a dry run is the text that is submitted. Imports no torch.
"""

import os
import shlex
import sys
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from tadistill.cluster.profile import Profile
from tadistill.cluster.request import Request
from tadistill.disk import cache_root, user_cache

_TIMEOUTS = 50  # requeues at time limits: a stage ends by its own budget
_PASSED_ON = ("TADISTILL_DATA", "HF_HUB_CACHE")


def parameters(name: str, request: Request, profile: Profile, *, account: str | None, dependency: str | None) -> dict[str, Any]:
    """What submitit's Slurm executor is told."""
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
    if request.tasks * request.nodes > 1:  # a rank that dies ends the others
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
    """Shell before the work: modules, no network, threads, and where the ranks meet."""
    lines = [f"module load {shlex.join(profile.modules)}"] if profile.modules else []
    lines += ["export HF_HUB_OFFLINE=1 HF_EVALUATE_OFFLINE=1 TOKENIZERS_PARALLELISM=false"]
    if profile.internet != "full":
        lines += ["export WANDB_MODE=offline"]
    # by their places here: a site may start jobs with an empty environment, or with caches of their own
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _places().items()]
    # since 22.05 srun does not take --cpus-per-task over from sbatch
    lines += ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK"]
    if request.tasks * request.nodes > 1:
        lines += [
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000)) TORCH_NCCL_ASYNC_ERROR_HANDLING=1",
        ]
    return [*lines, *profile.setup]


def _places() -> dict[str, str]:
    """Where models and data lie."""
    found = {"HF_HOME": os.environ.get("HF_HOME") or str(user_cache() / "huggingface"), "TADISTILL_CACHE": str(cache_root())}
    return found | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def script(folder: Path, elements: int, settings: dict[str, Any], *, python: str = sys.executable) -> str:
    """The text that would be submitted, with `elements` in its array."""
    from submitit.slurm import slurm

    command = f"{shlex.quote(python)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return slurm._make_sbatch_string(command=command, folder=folder, map_count=elements if elements > 1 else None, **settings)


def send(folder: Path, work: Seq[Any], settings: dict[str, Any]) -> str:
    """Submit callables as a job, or as an array where there are several; returns its id.

    Raises:
        subprocess and submitit errors, with what sbatch said.
    """
    import submitit

    executor = submitit.SlurmExecutor(folder, max_num_timeout=_TIMEOUTS)
    executor.update_parameters(**settings)
    with executor.batch():
        jobs = [executor.submit(each) for each in work]
    return str(jobs[0].job_id).partition("_")[0]
