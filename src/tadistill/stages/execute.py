"""Run one stage (one step of a study, such as a training) in this process.

`run_stage` locks the stage, does its work in the stage's folder, and writes manifest.json last. If an earlier attempt was killed, it
continues from the files of that attempt (docs/concepts/interruptions.md). `plan.kinds` names the function that does the work.
"""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tadistill.errors import ConfigError, Interrupted, StageFailed, TadistillError
from tadistill.models.architectures import is_full
from tadistill.models.forward import attention_for_any_shape
from tadistill.plan.graph import Spec
from tadistill.plan.task import Task
from tadistill.stages.context import Context, Progress, own_device
from tadistill.store import Store

_WAIT, _GO, _FINISHED, _STOPPED = "wait", "go", "finished", "stopped while waiting for another process that runs the same stage"
_Work = Callable[[Context], dict[str, Any]]
_SAVE_SECONDS = 10.0
_PATIENCE = timedelta(hours=1)  # how long a rank waits for another rank, which may be writing a large model


def join(processes: int) -> int:
    """Connect this process to the others that run the stage, if there are any. Return the rank of this process.

    The rank and the number of processes are read from the environment variables RANK and WORLD_SIZE. `runner.processes` sets them for
    processes that it starts. A cluster job must set them itself. Raises ConfigError if WORLD_SIZE is not `processes`.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world != processes:
        raise ConfigError(
            f"`resources.processes` is {processes} for this stage, but the environment variable WORLD_SIZE is {world}; set "
            f"`resources.processes` to {world}; or unset WORLD_SIZE and RANK, if no launcher (such as torchrun) has set them"
        )
    if world > 1 and not dist.is_initialized():
        device = own_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    return rank


def _choose_allocator() -> None:
    # Before CUDA is used. Batches of texts have many sizes; with segments that grow, freed memory fits the next size, too.
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def agree(word: str = "") -> str:
    """Send rank 0's string to all ranks, and return it on every rank."""
    words = [word]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.broadcast_object_list(words, device=torch.device("cpu"))
    return words[0]


def run_stage(task: Task, *, progress: Progress, alarm: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """Run a stage, unless the store already contains its result.

    If `task.resources.processes` is above 1, every rank must call this function with the same task. RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT must be set in its environment. WORLD_SIZE must equal `processes`. All machines need access to the store
    and the models. A rank uses the GPU number LOCAL_RANK of its machine. Only rank 0 locks the stage, writes files and reports progress.

    If `stop` returns True on any rank, all ranks save their state and raise Interrupted. An error is raised only on the rank where it
    happens. The program that started the ranks must then end the other ranks (`srun --kill-on-bad-exit=1`). A process may run several
    stages one after another. Then all ranks must run the same stages, and all training stages must have the same precision.

    Args:
        progress: called with (done, total, text).
        alarm: called with a sentence about a problem in training.
        stop: returns True when the stage should save its state and end.

    Raises:
        StageFailed: an earlier stage, whose result this stage reads, is not finished. Nothing was written.
        Interrupted: `stop` returned True. Finished work is kept.
    """
    _choose_allocator()
    spec, store, rank = task.spec, Store(Path(task.store)), join(task.resources.processes)
    work = work_of(type(spec))
    if rank:
        _follow(task, work, store, stop)
        return
    if store.finished(task.key):
        agree(_FINISHED)
        return
    _check_parents(task, store)

    def waiting() -> None:
        progress(0, task.spec.steps or 1, "another process is running this stage")
        if stop():
            agree(_STOPPED)
            raise Interrupted(_STOPPED)
        agree(_WAIT)

    lock = store.acquire(task.key, waiting)
    try:
        if store.finished(task.key):
            agree(_FINISHED)
            return
        record = {"kind": spec.kind, "label": task.label, "parents": spec.parents}
        folder = store.begin(task.key, record | {"spec": spec.content()})
        agree(_GO)
        clock = _Clock(store, task, progress)
        with clock:
            context = Context(task, store, folder, clock.progress, alarm, stop)
            facts = _worked(work, context)
        rows = [{"role": role, "set": name, **asdict(counts)} for (role, name), counts in context.counts.items()]
        found = versions() | context.versions
        store.finish(task.key, {"key": task.key, **record, "seconds": round(clock.seconds, 2), "versions": found, "rows": rows, **facts})
    finally:
        lock.release()


class _Clock:
    """Counts the seconds of a stage. The time of earlier attempts counts too, if the stage continues from what they saved.

    The seconds are saved during the work, at most every ten seconds, and if the work ends with an error.
    """

    def __init__(self, store: Store, task: Task, progress: Progress):
        self.store, self.task, self.report = store, task, progress
        self.start = time.monotonic() - store.seconds(task.key, task.spec.steps)
        self.saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def progress(self, done: int, total: int, text: str) -> None:
        self.report(done, total, text)
        if time.monotonic() - self.saved > _SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        self.saved = time.monotonic()
        with suppress(TadistillError):  # such as a full disk; the work itself says so, and must not end because of a time
            self.store.save_seconds(self.task.key, self.seconds)

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self._save()


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages on which a stage's numbers depend. The first call is slow, because it parses files."""
    return {name: version(name) for name in ("tadistill", "torch", "transformers", "accelerate")}


def work_of(spec: type[Spec]) -> _Work:
    """Return the function that does the work of a kind of stage. The function's result is stored in the stage's manifest.json."""
    module, name = spec.work.split(":")
    return getattr(import_module(f"tadistill.stages.{module}"), name)


def _check_parents(task: Task, store: Store) -> None:
    for role, key in task.spec.parents.items():
        if not store.finished(key):
            raise StageFailed(
                f"{task.label} ({task.key}) needs {store.label(key)} as its {role}, which is not finished in the store at {store.root} (it "
                "failed, or its files were deleted); run the recipe again to redo what is missing"
            )


def _follow(task: Task, work: _Work, store: Store, stop: Callable[[], bool]) -> None:
    while (word := agree()) == _WAIT:  # rank 0 sends a word every second, because a collective operation does not wait for hours
        pass
    if word == _STOPPED:
        raise Interrupted(_STOPPED)
    if word == _GO:
        _worked(work, Context(task, store, store.folder(task.key), lambda done, total, text: None, lambda text: None, stop))


def _worked(work: _Work, context: Context) -> dict[str, Any]:
    try:
        with attention_for_any_shape():
            return work(context)
    except RuntimeError as error:
        if not is_full(error):
            raise
        used = (str(error).splitlines() or [""])[0].split(". ", 2)[:2]
        changes = context.spec.saves_memory(context.task.resources.processes)
        advice, kept = "use", "finished stages are kept"
        if changes:
            advice = f"set `{'`, or `'.join(changes)}`, or use"
            kept += ', but those with a setting that you change run again (the page "Fit a run into memory" of the documentation)'
        raise StageFailed(
            f"{context.device} has too little memory for this stage ({'; '.join(used)}); {advice} a device with more memory, and run the "
            f"same command again: {kept}"
        ) from error
    except SystemExit as error:  # by the user's own code, or code of a task; the process would end as if the stage were finished
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise StageFailed(
            f"{last.filename}, line {last.lineno} ends the process (SystemExit: {error}); change this line so that it raises another error"
        ) from error
    finally:
        _forget_values(sys.exception())
        context.close()
        gc.collect()  # models are in reference cycles, for example by accelerate's changed `forward`; the process may run another stage
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def _forget_values(error: BaseException | None) -> None:
    # an error keeps the local variables of all functions that it has passed, so the models could not be freed
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
