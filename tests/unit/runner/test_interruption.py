"""The flag that signals raise, and the exception that they are to a command."""

import os
import signal
import subprocess
import sys
import threading
from multiprocessing import util

import pytest

from tadistill import cli
from tadistill.errors import ModelError
from tadistill.runner import processes
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


LOSES_IT = """
import os, signal
try:
    os.kill(os.getpid(), signal.{0})
    for _ in range(1000): pass
except BaseException:  # as libraries do that try whether another one can be imported
    raise ImportError("no such library") from None
"""
STARTS = "from tadistill.runner.interruption import end_at_once; end_at_once()"
RUNS = "from tadistill.runner.interruption import raising; kept = raising(); kept.__enter__()"


@pytest.mark.parametrize(("begin", "how", "code"), [(STARTS, "SIGINT", 130), (RUNS, "SIGTERM", 143)])
def test_a_signal_in_an_import_ends_the_command_with_one_word(tmp_path, begin, how, code):
    (tmp_path / "loses_it.py").write_text(LOSES_IT.format(how))
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); print('works'); {begin}\nimport loses_it"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "works\n", "interrupted\n")


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR2, 128 + signal.SIGUSR2)])
@pytest.mark.parametrize("error", [None, ModelError("`transformers` cannot be imported"), ValueError("a library's")])
def test_every_command_ends_a_signal_with_one_word_whatever_a_library_makes_of_it(monkeypatch, capsys, how, code, error):
    def app():
        try:
            os.kill(os.getpid(), how)
        except Stopped:
            raise error or SystemExit(130) from None  # typer makes such an exit of Ctrl-C

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (code, "interrupted\n")


def test_a_command_says_itself_what_an_interrupted_run_keeps(monkeypatch, capsys):
    def app():
        with cli.shared.interruptible(kept="the replies are kept"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    found = capsys.readouterr()
    assert (ended.value.code, found.out, found.err) == (130, "interrupted; the replies are kept\n", "")


def test_a_stage_removes_the_semaphores_of_libraries_before_it_ends_at_once():
    """Python warned of leaked semaphore objects after a stage in which tqdm had made one."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        util.Finalize(None, os.write, (writer, b"removed"), exitpriority=0)
        processes._leave(3)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert (os.waitstatus_to_exitcode(status), os.read(reader, 20)) == (3, b"removed")
    os.close(reader)
