"""Handle signals that ask a run to stop. Code that must save a state polls a `StopFlag`. Other code gets an exception (`raising`). While a
command starts, imports or ends, a signal ends it at once (`end_at_once`).

    stop = StopFlag(signal.SIGUSR2, signal.SIGTERM)     # installs handlers that only set the flag
    run_stage(task, progress=…, alarm=…, stop=stop)     # calls `stop` between two updates; if it is True, saves and raises Interrupted
    stop.received, stop.replaced                        # the signal, and the handlers that it replaced

Before Slurm ends a job, it sends SIGTERM to all processes, and also SIGUSR2 if the job asks for it. A shutdown sends SIGTERM.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Signals that ask a command to stop."""


class Stopped(KeyboardInterrupt):
    """Exception that is raised when Ctrl-C or another signal asks the command to stop."""

    def __init__(self, received: signal.Signals):
        super().__init__(f"stopped by {received.name}")
        self.received = received


class StopFlag:
    """A flag that becomes True when the first signal arrives. Each later signal only calls the function `told`. It does not disturb the
    saving of the state.

    A signal that the process already ignores stays ignored, such as SIGINT in a background job of a shell. Only the main thread can catch
    signals. In another thread the flag stays False.
    """

    def __init__(self, *signals: signal.Signals, told: Callable[[], None] = lambda: None):
        self.received: signal.Signals | None = None
        self.replaced: dict[signal.Signals, Any] = {}
        """For each signal, the handler that was installed before."""
        self._told = told
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.replaced[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        else:
            self._told()

    def __call__(self) -> bool:
        return self.received is not None

    def restore(self) -> None:
        """Restore the signal handlers that this flag replaced."""
        for number, handler in self.replaced.items():
            signal.signal(number, handler)


@contextmanager
def raising() -> Iterator[list[signal.Signals]]:
    """Inside the `with` block, a signal raises `Stopped`. After the first signal, all later ones are ignored. `yield` returns a list that
    then contains the signal, because a library may have turned the exception into another one.

    In an import, a library may also lose the exception. So a signal then ends the process, and nothing is lost: files are written at other
    times, and renamed into place at their ends.
    """
    received: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        if _importing(frame):
            _end(number, frame)
        ignore()
        received.append(signal.Signals(number))
        raise Stopped(received[0])

    before = _handle(stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def ignore() -> None:
    """Ignore all later signals, because the process is ending."""
    _handle(signal.SIG_IGN)


def end_at_once() -> None:
    """From now on, a signal ends the process with the word `interrupted`. Python's own handlers would print where it was."""
    _handle(_end)


def _handle(handler: Any) -> dict[signal.Signals, Any]:
    """Install a handler of the signals in `ENDING` that the process does not ignore. Return the former handlers."""
    return {number: signal.signal(number, handler) for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN}


def _end(number: int, frame: FrameType | None) -> NoReturn:
    ignore()
    with suppress(Exception):  # the process may be in the middle of a write
        sys.stdout.flush()
    with suppress(OSError):
        # on a terminal, remove a spinner and show the cursor, which the spinner hides
        os.write(2, b"\r\x1b[2K\x1b[?25hinterrupted\n" if os.isatty(2) else b"interrupted\n")
    kill_server()
    os._exit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def kill_server() -> None:
    """Kill the server process that forks the stages (`runner.processes`), if this process has started one. Without this, the server ends
    only after its imports."""
    server: Any = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    if pid := getattr(server, "_forkserver_pid", None):
        os.kill(pid, signal.SIGKILL)
        server._stop()


@contextmanager
def held() -> Iterator[None]:
    """Inside the `with` block, the signals in `ENDING` are blocked. A process that is started in the block also blocks them, until it calls
    `release`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release() -> None:
    """Unblock the signals that `held` blocked. A process that was started inside `held` calls this."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
