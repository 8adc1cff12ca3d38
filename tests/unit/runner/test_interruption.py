"""The flag that signals raise, and the exception that they are to a command."""

import os
import signal
import threading

import pytest

from tadistill.runner.interruption import ENDING, StopFlag, Stopped, raising


@pytest.fixture(autouse=True)
def handlers():
    """Handlers as they were before the test."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_flag_notes_the_first_signal_and_remembers_the_handlers():
    heard, further = [], []
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    flag = StopFlag(signal.SIGUSR2, signal.SIGTERM, told=lambda: further.append(1))
    assert not flag()
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag()
    assert (flag.received, further, heard) == (signal.SIGUSR2, [1], [])
    assert flag.at is not None
    flag.replaced[signal.SIGUSR2](signal.SIGUSR2, None)  # as a job does that asks to be queued again
    flag.restore()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert heard == [signal.SIGUSR2] * 2


def test_an_ignored_signal_stays_ignored_and_other_threads_catch_none():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert StopFlag(signal.SIGINT).replaced == {}
    found = []
    thread = threading.Thread(target=lambda: found.append(StopFlag(signal.SIGTERM)))
    thread.start()
    thread.join()
    assert found[0].replaced == {}


def test_a_command_is_ended_by_the_first_signal_and_not_torn_by_the_second():
    before = signal.getsignal(signal.SIGTERM)
    with raising():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Stopped) as caught, raising():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.received == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)  # ignored: the process is ending
