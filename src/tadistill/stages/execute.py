"""Run one stage in this process.

`run_stage` takes the stage's lock, does the work in the stage's folder in the store, and writes the manifest last. It resumes what an
earlier, killed attempt left there (docs/interruptions.md). The work is the function that the stage's spec names (`plan.specs`).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tadistill.errors import ConfigError, Interrupted, StageFailed
from tadistill.plan.specs import Spec
from tadistill.plan.task import Task
from tadistill.stages.context import Context, Progress, own_device
from tadistill.store import Store

_WAIT, _GO, _FINISHED, _STOPPED = "wait", "go", "finished", "stopped while another process ran the stage"
_Work = Callable[[Context], dict[str, Any]]
_PATIENCE = timedelta(hours=1)  # how long a process waits for another one, which may be writing a large model


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the number of processes of the stage.

    The processes read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the environment. `runner.processes` sets them for the
    processes that it starts; a cluster job sets them itself.
    """

    rank: int
    world: int

    @classmethod
    def join(cls, processes: int) -> "Ranks":
        """Join the other processes, if the environment names any. Raises ConfigError if their number is not `processes`."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world != processes:
            raise ConfigError(f"resources.processes is {processes} for this stage, but WORLD_SIZE is {world}; make them equal")
        if world > 1 and not dist.is_initialized():
            device = own_device()
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)
        return cls(rank, world)

    def agree(self, word: str = "") -> str:
        """Broadcast rank 0's decision: all ranks return the same string."""
        words = [word]
        if self.world > 1:
            dist.broadcast_object_list(words, device=torch.device("cpu"))
        return words[0]


def run_stage(task: Task, *, progress: Progress, alarm: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """Run a stage, unless it is already in the store because another process has finished it.

    If `task.resources.processes` > 1, every rank calls this with the same task and with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT in its environment (`runner.processes` sets them on one machine). WORLD_SIZE must equal `processes`. Every rank sees all
    GPUs of its machine and uses the one of its LOCAL_RANK; all machines see the store and the models. Only rank 0 takes the lock, writes
    and reports. `stop` may be true on any rank; then all save and raise Interrupted. An error on one rank is raised only there, and
    the program that started the ranks must end the others (`srun --kill-on-bad-exit=1`). A process may run several stages if its ranks run
    the same stages and its training stages have the same precision.

    Args:
        progress: called with (done, total, text).
        alarm: called with a sentence about a problem in training.
        stop: returns True when the stage should save its state and end.

    Raises:
        StageFailed: a parent of the stage is not finished; nothing was written.
        Interrupted: `stop` returned True; finished work is kept.
    """
    spec, store, ranks = task.spec, Store(Path(task.store)), Ranks.join(task.resources.processes)
    work = work_of(type(spec))
    if ranks.rank:
        _follow(task, work, store, ranks, stop)
        return
    if store.finished(task.key):
        ranks.agree(_FINISHED)
        return
    _check_parents(task, store)

    def waiting() -> None:
        progress(0, task.spec.steps or 1, "another process is running this stage")
        if stop():
            ranks.agree(_STOPPED)
            raise Interrupted(_STOPPED)
        ranks.agree(_WAIT)

    lock = store.acquire(task.key, waiting)
    try:
        if store.finished(task.key):
            ranks.agree(_FINISHED)
            return
        record = {"kind": spec.kind, "label": task.label, "parents": spec.parents}
        folder = store.begin(task.key, record | {"spec": spec.content()})
        ranks.agree(_GO)
        start = time.monotonic()
        facts = work(Context(task, store, folder, progress, alarm, stop))
        seconds = round(time.monotonic() - start, 2)
        versions = {name: version(name) for name in ("tadistill", "torch", "transformers", "accelerate")}
        store.finish(task.key, {"key": task.key, **record, "seconds": seconds, "versions": versions, **facts})
    finally:
        lock.release()


def work_of(spec: type[Spec]) -> _Work:
    """Return the function that does the work of a kind of stage. Its result goes into the manifest."""
    module, name = spec.work.split(":")
    return getattr(import_module(f"tadistill.stages.{module}"), name)


def _check_parents(task: Task, store: Store) -> None:
    for role, key in task.spec.parents.items():
        if not store.finished(key):
            raise StageFailed(
                f"{task.label} ({task.key}) needs {store.label(key)} as its {role}, which is not finished in the store at {store.root} (it "
                "failed, or its files were deleted); run the recipe again to redo what is missing"
            )


def _follow(task: Task, work: _Work, store: Store, ranks: Ranks, stop: Callable[[], bool]) -> None:
    """Do the work of a rank other than 0, after rank 0 has taken the lock and found that there is work."""
    while (word := ranks.agree()) == _WAIT:  # once a second, since a collective operation does not wait for hours
        pass
    if word == _STOPPED:
        raise Interrupted(_STOPPED)
    if word == _GO:
        work(Context(task, store, store.folder(task.key), lambda done, total, text: None, lambda text: None, stop))
