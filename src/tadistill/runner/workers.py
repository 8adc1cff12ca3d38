"""Run a plan on this machine: ready stages go to worker processes, progress comes back to one screen.

Workers are separate processes, so that stages which use one thread well (small models) run side by side and a crash takes
one stage only. They share nothing but the store. A worker whose parent dies ends itself. A signal to stop may come to this process or to
all of them (Slurm does that): running stages save their state and end.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tadistill.errors import ConfigError, DataError, Interrupted, ModelError, StageFailed, TadistillError
from tadistill.models.counting.memory import keep_freed_memory
from tadistill.plan.arms import Plan, Stage
from tadistill.plan.task import Task, make_task
from tadistill.plan.throughput import cores
from tadistill.runner.interruption import ENDING, StopFlag, Stopped, held, release
from tadistill.store import Store

_worker: dict[str, Any] = {}
"""In a worker process: whether it is asked to stop, whether it runs a stage, and the queue to the screen."""
_POLL = 0.5


def run_stages(plan: Plan, store: Store, *, jobs: int, console: Console) -> None:
    """Run every stage that the store lacks.

    Raises:
        StageFailed: stages failed; those that do not depend on them were still run.
        Stopped (a KeyboardInterrupt): after the workers have saved their state.
    """
    todo = {k: s for k, s in plan.stages.items() if not store.finished(k)}
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    flag = StopFlag(*ENDING, told=_still_saving)
    try:
        with held():  # the process that looks after these has no handler for SIGUSR2
            stop, messages = context.Event(), context.SimpleQueue()
        threads = max(1, cores() // jobs)
        pool = ProcessPoolExecutor(min(jobs, len(todo)), context, _start_worker, (stop, messages, threads, os.getpid()))
        with _Screen(console, len(plan.stages), len(plan.stages) - len(todo), messages) as screen:
            try:
                failed = _schedule(plan, todo, store, pool, screen, jobs, flag)
            except Stopped as asked:
                console.print(f"{asked.received.name}: the running stages save their state …", highlight=False)
                raise
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        flag.restore()
    if failed:
        key, error = next(iter(failed.items()))
        more = f"; {len(failed) - 1} more failed" if len(failed) > 1 else ""
        text = f"{plan.stages[key].label} ({key}): {_reason(error)}{more}. Finished stages are kept; the same command goes on from them"
        # a mistake in the input stays one (exit code 2), wherever it comes to light
        raise type(error)(text) if isinstance(error, (ConfigError, DataError, ModelError)) else StageFailed(text)


def _schedule(
    plan: Plan, todo: dict[str, Stage], store: Store, pool: ProcessPoolExecutor, screen: "_Screen", jobs: int, flag: StopFlag
) -> dict[str, BaseException]:
    """Submit stages whose parents are finished, those with the longest way behind them first; returns the failures.

    Raises:
        Stopped: this process or a worker was asked to stop.
    """
    weight = _weights(plan)
    done = set(plan.stages) - set(todo)
    running: dict[Future, str] = {}
    failed: dict[str, BaseException] = {}
    alive: set[int | None] = set()
    while True:
        ready = [
            k for k, s in todo.items() if k not in running.values() and k not in done | set(failed) and set(s.parents.values()) <= done
        ]
        for key in sorted(ready, key=lambda k: -weight[k])[: jobs - len(running)]:
            screen.start(key, todo[key].label, todo[key].steps)
            with held():
                running[pool.submit(_work, make_task(plan, todo[key], store))] = key
        if not running:
            return failed
        ended = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED).done
        if flag.received:
            raise Stopped(flag.received)
        before, alive = alive, {child.pid for child in multiprocessing.active_children()}
        if before - alive:
            _look_again(pool)
        for future in ended:
            key = running.pop(future)
            error = future.exception()
            if isinstance(error, Interrupted):  # the signal went to the worker alone
                raise Stopped(signal.SIGTERM)
            if error is None:
                done.add(key)
                screen.end(key)
                continue
            failed[key] = error
            screen.end(key, _reason(error))
            if isinstance(error, BrokenProcessPool):  # the pool is gone, and with it what else was running
                return failed


def _look_again(pool: ProcessPoolExecutor) -> None:
    """A worker has died. The pool does not see that of one that it started while it was waiting, until something else wakes it."""
    with contextlib.suppress(BrokenProcessPool):
        pool.submit(os.getpid)


def _reason(error: BaseException) -> str:
    """Why a stage failed, in words."""
    if isinstance(error, BrokenProcessPool):
        return "the worker process died (out of memory?)"
    return str(error) if isinstance(error, TadistillError) else f"{type(error).__name__}: {error}"


def _weights(plan: Plan) -> dict[str, float]:
    """FLOPs of a stage plus those of the dearest chain after it."""
    weight: dict[str, float] = {k: s.flops or 0.0 for k, s in plan.stages.items()}
    for key in reversed(plan.stages):
        for parent in set(plan.stages[key].parents.values()):
            weight[parent] = max(weight[parent], (plan.stages[parent].flops or 0.0) + weight[key])
    return weight


def _still_saving() -> None:
    os.write(2, b"already stopping: the running stages save their state\n")  # from a signal's handler, where print may not be called


# --- in the worker ------------------------------------------------------------------------------------------------------


def _start_worker(stop: Any, messages: Any, threads: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sets `stop`
    flag = StopFlag(signal.SIGTERM, signal.SIGUSR2)
    release()
    _worker.update(stop=lambda: flag() or stop.is_set(), busy=False, messages=messages)
    threading.Thread(target=_end_with, args=(parent, flag), daemon=True).start()
    import torch  # in the worker only

    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        keep_freed_memory()


def _end_with(parent: int, flag: StopFlag) -> None:
    """End this process with its parent, or when it has nothing to do after a signal: the pool ends idle workers by SIGTERM."""
    idle = 0
    while os.getppid() == parent and idle < 2:  # twice, so that what the last stage returned is on its way
        time.sleep(_POLL)
        idle = idle + 1 if flag() and not _worker["busy"] else 0
    os._exit(1)


def _work(task: Task) -> None:
    from tadistill.runner.launch import launch
    from tadistill.stages.execute import run_stage  # imports torch

    def progress(done: int, total: int, text: str) -> None:
        _worker["messages"].put((task.key, done, total, text))

    def alarm(text: str) -> None:
        _worker["messages"].put((task.key, None, None, text))

    run = launch if task.resources.processes > 1 else run_stage
    _worker["busy"] = True
    try:
        run(task, progress=progress, alarm=alarm, stop=_worker["stop"])
    finally:
        _worker["busy"] = False


# --- the screen ---------------------------------------------------------------------------------------------------------


class _Screen:
    """Progress bars: all stages, and each running one with its speed and what is left."""

    def __init__(self, console: Console, total: int, finished: int, messages: Any):
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.all = self.progress.add_task("all stages", total=total, completed=finished, note="")
        self.tasks: dict[str, Any] = {}
        self.started: dict[str, tuple[str, float]] = {}
        self.messages, self.total, self.done = messages, total, finished
        self.reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "_Screen":
        self.progress.start()
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.messages.put(None)
        self.reader.join(timeout=2)
        self.progress.stop()

    def _read(self) -> None:
        while (message := self.messages.get()) is not None:
            key, done, total, text = message
            if done is None:
                label = self.started[key][0] if key in self.started else key
                self.progress.console.print(f"[bold yellow]alarm[/] {label}: ", escape(text), highlight=False)
            elif key in self.tasks:
                self.progress.update(self.tasks[key], completed=done, total=total, note=text)

    def start(self, key: str, label: str, steps: int | None) -> None:
        self.started[key] = (label, time.monotonic())
        self.tasks[key] = self.progress.add_task(label, total=steps or 1, note="")

    def end(self, key: str, failure: str | None = None) -> None:
        label, start = self.started.pop(key)
        self.progress.remove_task(self.tasks.pop(key))
        if failure is not None:
            self.progress.console.print(f"[bold red]failed[/] {label}: ", escape(failure), highlight=False)
            return
        self.done += 1
        self.progress.update(self.all, completed=self.done)
        self.progress.console.print(
            f"[dim]{self.done:3d}/{self.total}[/] {label} [dim]{time.monotonic() - start:.1f} s[/]", highlight=False
        )
