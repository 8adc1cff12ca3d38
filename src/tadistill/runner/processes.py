"""Start, watch and end the processes of one stage on this machine.

    stage = StageProcesses(task, threads=2)           # as many processes as `task.resources.processes`
    while not stage.ended:
        wait(stage.sources)                           # multiprocessing.connection.wait
        for message in stage.attend(): ...            # (done, total, text), or the text of an alarm
    stage.error                                       # None if the stage succeeded

Each stage gets new processes. So a crash or a changed setting of a library affects one stage only, and a stage frees all its memory at the
end. On Linux a server process imports torch once and is forked for each stage, which takes milliseconds. The server runs no stage and does
not use CUDA. A pipe to each process carries its messages, and the request to stop. If the command dies, the pipe breaks, and the process
ends.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from tadistill.constants import STAGES_PER_GPU
from tadistill.errors import ConfigError, Interrupted, StageFailed, StoreError, TadistillError
from tadistill.models.flops_and_memory import keep_freed_memory
from tadistill.plan.task import Task
from tadistill.runner.interruption import StopFlag, held, kill_server, release
from tadistill.store import Store
from tadistill.text import counted
from tadistill.user_code import path_without_studies

Message = tuple[int, int, str] | str
"""Progress (done, total, text), or the text of an alarm."""

_PRELOADED = ["tadistill.runner.preload"]
_LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of other launchers (Slurm, torchrun). They are removed for the processes of this module."""
_STOP = "stop"
_LAST_WORDS = 1.0
"""After a rank has failed, the other ranks have this many seconds to report their own errors before they are killed."""


def prepare() -> Any:
    """Return the multiprocessing context. On Linux, also start the server that forks the stages, without waiting for its imports."""
    if sys.platform != "linux":  # macOS can fork too, but its own libraries do not survive it
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with held():  # neither the resource tracker nor the server has handlers for all these signals
        resource_tracker.ensure_running()  # in a block of its own, because it unblocks two of the signals
    with held(), _without_main():
        forkserver.ensure_running()
    return context


@contextmanager
def prepared() -> Iterator[None]:
    """Start the server that forks the stages, and run the `with` block, which imports torch and checks the input. If the block fails, kill
    the server, because no stage will run."""
    prepare()
    collects = gc.isenabled()
    gc.disable()  # for the imports, as in `runner.preload`
    try:
        yield
    except BaseException:
        kill_server()
        raise
    finally:
        if collects:
            gc.enable()


@contextmanager
def _without_main() -> Iterator[None]:
    # the new process would import the main module, so a script without a `__main__` guard would run again
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class StageProcesses:
    """The processes of one stage, one for each rank. Together they use `threads` CPU threads. Raises StageFailed if they cannot start."""

    def __init__(self, task: Task, *, threads: int, gpus: Sequence[str] = (), share: int = 1):
        """`gpus` are the GPUs that the processes may use, at least one for each process. By default, the processes see all GPUs.

        `share` is how many stages may use a GPU at the same time. Each of them then takes only a part of the memory that is free.
        """
        self._task = task
        self.ended = False
        self.error: Exception | None = None
        """The cause of a failure. None if the stage succeeded or has not ended."""
        self._errors: dict[int, Exception] = {}
        self._deadline = float("inf")
        self._processes: list[Any] = []
        self._pipes: dict[Connection, int] = {}
        world = task.resources.processes
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
        if gpus:  # CUDA reads this variable at its first use, which is in the new process
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus), STAGES_PER_GPU: str(share)}
        if world > 1:
            environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        context = prepare()
        try:
            for rank in range(world):
                own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
                ours, theirs = context.Pipe()
                work = (task, own, path_without_studies(), max(1, threads // world), theirs)
                process = context.Process(target=_work, args=work, name=task.label)
                with held(), _without_main():
                    process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes[ours] = rank
        except (EOFError, OSError) as error:
            self.end()
            raise StageFailed(f"the stage's process cannot be started ({error}); run the same command again") from error

    @property
    def sources(self) -> list[Any]:
        """Return objects for `multiprocessing.connection.wait`. One of them becomes ready when `attend` has something to do."""
        return [*self._pipes, *(process.sentinel for process in self._processes if process.exitcode is None)]

    def attend(self) -> list[Message]:
        """Return the messages since the last call. If the stage has ended, set `ended`. If it has failed, also set `error`."""
        said = self._read()
        codes = [process.exitcode for process in self._processes]
        if None not in codes:
            said += self._read()  # messages sent between the two lines above
        elif self._deadline == float("inf") and (self._errors or any(codes)):
            self._deadline = time.monotonic() + _LAST_WORDS
        if None not in codes or time.monotonic() > self._deadline:
            self.error = _judged(codes, self._errors) or self._unfinished()
            self.end()
        return said

    def _unfinished(self) -> Exception | None:
        # code of the user or of a library can end a process with exit code 0 in the middle of a stage
        try:
            if Store(Path(self._task.store)).finished(self._task.key):
                return None
        except StoreError as error:
            return error
        return StageFailed("the stage's process ended with exit code 0, but without a result (see its output above)")

    def _read(self) -> list[Message]:
        said = []
        for pipe, rank in [*self._pipes.items()]:
            try:
                while pipe.poll():
                    message = pipe.recv()
                    if isinstance(message, Exception):
                        self._errors[rank] = message
                    else:
                        said.append(message)
            except (EOFError, OSError):  # the process has ended
                del self._pipes[pipe]
                pipe.close()
        return said

    def stop(self) -> None:
        """Ask the processes to save their state and end."""
        for pipe in self._pipes:
            try:
                pipe.send(_STOP)
            except OSError:  # the process has ended
                continue

    def end(self) -> None:
        """Kill the processes that still run."""
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes.clear()
        self.ended = True


def _ignore(text: str) -> None:
    pass


def run_in_processes(
    task: Task, *, threads: int, progress: Callable[[str], None] = _ignore, alarm: Callable[[str], None] = _ignore
) -> None:
    """Run a stage like `stages.execute.run_stage`, but in new processes. If one process fails, the others are killed.

    `progress` is called with texts such as `3/20 loss 2.345`.

    Raises:
        ConfigError: there are fewer GPUs than processes.
        StageFailed: a process was killed, or raised an unexpected error. The message names the process and the reason.
        TadistillError: a process raised an error of `tadistill.errors`, such as ConfigError. This error is raised again here.
    """
    stage = StageProcesses(task, threads=threads)
    try:
        while not stage.ended:
            wait(stage.sources, timeout=0.5)
            for message in stage.attend():
                if isinstance(message, str):
                    alarm(message)
                else:
                    progress("{}/{} {}".format(*message))
    finally:
        stage.end()
    if stage.error:
        raise stage.error


def _judged(codes: list[int | None], errors: dict[int, Exception]) -> Exception | None:
    several = len(codes) > 1
    who = [f"rank {rank} of {len(codes)}" if several else "the stage's process" for rank in range(len(codes))]
    rest = "; the other ranks were ended. Run the same command again to continue from the last saved state" if several else ""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return StageFailed(f"{who[rank]} was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}{rest}")
    for error in errors.values():
        if isinstance(error, Interrupted | TadistillError):
            return error
    for rank, error in errors.items():  # only the first is reported, because the others may fail only as they lose the connection to it
        print(*getattr(error, "__notes__", ()), file=sys.stderr, flush=True)
        return StageFailed(f"{who[rank]} failed: {error}{rest}" if several else str(error))
    for rank, code in enumerate(codes):
        if code:
            return StageFailed(f"{who[rank]} ended with exit code {code} (see its output above){rest}")
    return None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# --- in a process of a stage --------------------------------------------------------------------------------------------


def _work(task: Task, environment: dict[str, str], path: list[str], threads: int, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command, which sends `stop`
    flag, asked = StopFlag(signal.SIGTERM, signal.SIGUSR2), threading.Event()
    release()
    threading.Thread(target=_obey, args=(pipe, asked), daemon=True).start()
    os.environ.clear()  # a forked process has the environment that the server had at its start
    os.environ.update(environment)
    sys.path[:] = path  # without the folder of another study that a thread of the command has planned
    code = 0
    try:
        _prepare_torch(task, threads)
        from tadistill.stages.execute import run_stage  # imports torch

        run_stage(
            task, progress=lambda done, total, text: pipe.send((done, total, text)), alarm=pipe.send, stop=lambda: flag() or asked.is_set()
        )
    except Exception as error:  # the command shows every error
        if not isinstance(error, Interrupted | TadistillError):
            report = traceback.format_exc()
            error = RuntimeError(f"{type(error).__name__}: {error}")
            error.add_note(report)  # the command prints it, unless another rank caused the failure
        pipe.send(error)
        code = 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    util._run_finalizers(0)  # type: ignore[attr-defined]  removes semaphores of libraries such as tqdm; Python would warn of those that are left
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: torch's own exit may wait for other ranks, and sometimes aborts if they are gone


def _prepare_torch(task: Task, threads: int) -> None:
    import torch

    world = task.resources.processes
    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        if task.spec.steps:  # a training
            keep_freed_memory()
    elif torch.cuda.device_count() < world:
        gpus = torch.cuda.device_count()
        raise ConfigError(f"resources.processes is {world}, but this machine has {counted(gpus, 'GPU')}; set it to at most {gpus}")


def _obey(pipe: Connection, asked: threading.Event) -> None:
    try:
        while True:
            if pipe.recv() == _STOP:
                asked.set()
    except (EOFError, OSError):
        os._exit(1)
