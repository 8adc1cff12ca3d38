"""Signals that ask a run to stop: a flag that they raise, and an exception for where there is nothing to save. Imports no torch.

    stop = StopFlag(signal.SIGUSR2, signal.SIGTERM)     # their handlers only note the signal
    run_stage(task, progress=…, alarm=…, stop=stop)     # asks between two updates; saves, and raises Interrupted
    stop.received, stop.replaced                        # which signal came; the handlers that were there before

Slurm sends SIGUSR2 (where a job asks for it) and SIGTERM to all processes of a job before it ends them, a shutdown sends SIGTERM.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""What asks a command to stop."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or another signal with the same meaning."""

    def __init__(self, received: signal.Signals = signal.SIGINT):
        super().__init__(f"stopped by {received.name}")
        self.received = received


class StopFlag:
    """Is True once one of the signals came. A second one changes nothing, so it cannot tear a save that the first has led to.

    A signal that is ignored stays ignored (a shell starts background commands so). Only the main thread can catch signals; elsewhere the
    flag stays down.
    """

    def __init__(self, *signals: signal.Signals, told: Callable[[], None] = lambda: None):
        """`told` is called when a further signal comes."""
        self.received: signal.Signals | None = None
        self.at: float | None = None
        """When it came (time.time())."""
        self.replaced: dict[signal.Signals, Any] = {}
        """The handlers that were there before."""
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
        """Put the handlers back that were there before."""
        for number, handler in self.replaced.items():
            signal.signal(number, handler)


@contextmanager
def raising() -> Iterator[None]:
    """For a command: within, SIGTERM and SIGUSR2 raise `Stopped` at once, as Ctrl-C raises KeyboardInterrupt.

    After the first one the process is ending, and further ones are ignored.
    """
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
    """Within: signals wait. A process that is started here begins with them held, so none can kill it before it has its handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release() -> None:
    """Let the signals in that `held` has kept from a process that was started in it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
