"""The processes of one stage on this machine: started, listened to, and ended together.

launch(task, progress=…, alarm=…, stop=…)      # as `execute.run_stage`, by `task.resources.processes` processes
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tadistill.errors import ConfigError, Interrupted, StageFailed, TadistillError
from tadistill.models.counting.memory import keep_freed_memory
from tadistill.plan.task import Task
from tadistill.runner.interruption import StopFlag
from tadistill.stages.execute import run_stage

_LAST_WORDS = 1.0
"""Seconds in which the other ranks, once one has failed, may say what happened to them before they are ended."""


def launch(task: Task, *, progress: Callable[[int, int, str], None], alarm: Callable[[str], None], stop: Callable[[], bool]) -> None:
    """Run a stage by as many processes as it asks for, on this machine; all end when one fails.

    Raises:
        ConfigError: there are fewer GPUs.
        StageFailed: a process died or failed; the sentence says which and why.
        TadistillError: as a process raised it.
        Interrupted: `stop` said so; the state is saved.
    """
    world = task.resources.processes
    if torch.cuda.is_available() and torch.cuda.device_count() < world:
        raise ConfigError(
            f"resources ask for {world} processes for {task.label}, but this machine has {torch.cuda.device_count()} GPUs; lower processes"
        )
    context = multiprocessing.get_context("spawn")
    asked = context.Event()
    threads = max(1, torch.get_num_threads() // world)
    environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks: list[Any] = []
    pipes: dict[Connection, int] = {}
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank, args=(task, own, threads, asked, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            ranks.append(process)
            pipes[ours] = rank
        _attend(ranks, pipes, asked, progress, alarm, stop)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _attend(
    ranks: list[Any],
    pipes: dict[Connection, int],
    asked: Any,
    progress: Callable[[int, int, str], None],
    alarm: Callable[[str], None],
    stop: Callable[[], bool],
) -> None:
    """Pass on what the ranks say until all have ended, or one has failed."""
    errors: dict[int, Exception] = {}
    deadline = float("inf")
    while pipes and time.monotonic() < deadline:
        if stop():
            asked.set()
        for pipe in wait([*pipes], timeout=0.5):
            assert isinstance(pipe, Connection)
            try:
                said = pipe.recv()
            except (EOFError, ConnectionResetError):  # the process has ended
                ranks[pipes.pop(pipe)].join()
                continue
            if isinstance(said, Exception):
                errors[pipes[pipe]] = said
            elif isinstance(said, str):
                alarm(said)
            else:
                progress(*said)
        if deadline == float("inf") and (errors or any(process.exitcode for process in ranks)):
            deadline = time.monotonic() + _LAST_WORDS
    _judge({rank: process.exitcode for rank, process in enumerate(ranks)}, errors)


def _judge(codes: dict[int, int | None], errors: dict[int, Exception]) -> None:
    """Raise what ended the ranks: a death by signal before an error, and the first error before those that followed from it."""
    resumes = "the other ranks were ended, and the same command goes on from the last saved state"
    for rank, code in codes.items():
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            memory = " (out of memory?)" if name == "SIGKILL" else ""
            raise StageFailed(f"rank {rank} of {len(codes)} was killed by {name}{memory}; {resumes}")
    for rank, error in errors.items():
        if isinstance(error, Interrupted | TadistillError):
            raise error
        raise StageFailed(f"rank {rank} of {len(codes)} failed: {error}; {resumes}")
    for rank, code in codes.items():
        if code != 0:
            raise StageFailed(f"rank {rank} of {len(codes)} ended with exit code {code}; {resumes}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank(task: Task, environment: dict[str, str], threads: int, asked: Any, pipe: Connection, parent: int) -> None:
    """One process of a stage, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which sets `asked`
    flag = StopFlag(signal.SIGTERM, signal.SIGUSR2)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        keep_freed_memory()
    code = 0
    try:
        run_stage(
            task,
            progress=lambda done, total, text: pipe.send((done, total, text)),
            alarm=pipe.send,
            stop=lambda: flag() or asked.is_set(),
        )
    except Exception as error:  # whatever it is, the launcher says it and ends the others
        if not isinstance(error, Interrupted | TadistillError):
            traceback.print_exc()
            error = RuntimeError(f"{type(error).__name__}: {error}")
        pipe.send(error)
        code = 1
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: torch's own end may wait for the other ranks, and sometimes aborts where they are gone


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
