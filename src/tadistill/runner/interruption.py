"""Handle signals that ask a run to stop. Code that must save a state polls a `StopFlag`. Other code gets an exception (`raising`).

    stop = StopFlag(signal.SIGUSR2, signal.SIGTERM)     # installs handlers that only set the flag
    run_stage(task, progress=…, alarm=…, stop=stop)     # calls `stop` between two updates; if it is True, saves and raises Interrupted
    stop.received, stop.replaced                        # the signal, and the handlers that it replaced

Before Slurm ends a job, it sends SIGTERM to all processes, and also SIGUSR2 if the job asks for it. A shutdown sends SIGTERM.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Signals that ask a command to stop."""


class Stopped(KeyboardInterrupt):
    """Exception that is raised when Ctrl-C or another signal asks the command to stop."""

    def __init__(self, received: signal.Signals = signal.SIGINT):
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
        self.at: float | None = None
        """Time of the first signal, in seconds since the epoch. None before it."""
        self.replaced: dict[signal.Signals, Any] = {}
        """For each signal, the handler that was installed before."""
        self._told = told
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.replaced[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.at = signal.Signals(number), time.time()
        else:
            self._told()

    def __call__(self) -> bool:
        return self.received is not None

    def restore(self) -> None:
        """Restore the signal handlers that this flag replaced."""
        for number, handler in self.replaced.items():
            signal.signal(number, handler)


@contextmanager
def raising() -> Iterator[None]:
    """Inside the `with` block, SIGTERM and SIGUSR2 raise `Stopped`. After the first signal, all later ones are ignored."""
    before = {number: signal.signal(number, _raise) for number in ENDING if number != signal.SIGINT}
    ending = False
    try:
        yield
    except KeyboardInterrupt:
        _ignore()
        ending = True
        raise
    finally:
        if not ending:
            for number, handler in before.items():
                signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _ignore()
    raise Stopped(signal.Signals(number))


def _ignore() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


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
