"""Start the command line in a process of its own, without the ten seconds of CPU that the imports of a study take.

The process is forked from this one, which has all modules. So is the server from which the command forks its stages. Apart from that, the
processes are those of `python -m tadistill`, which `test_study` and `test_bad_input` start as a user does.
"""

import gc
import os
import signal
import subprocess
import sys
import traceback
from multiprocessing import forkserver, process, resource_tracker, util
from typing import Any, NoReturn
from unittest import mock

from tadistill import cli

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)


def start(*arguments: str, **options: Any) -> subprocess.Popen:
    """Start `tadistill` with these arguments in a process group of its own; the options are those of `subprocess.Popen`."""
    from tadistill.runner import preload  # noqa: F401

    gc.collect()
    gc.freeze()  # garbage that owns files, collected in the fork, would close files of the fork that have the same numbers
    return subprocess.Popen(["tadistill", *arguments], start_new_session=True, preexec_fn=lambda: _command(arguments), **options)


def run(*arguments: str) -> tuple[int, str]:
    """Run `tadistill` to its end; return its exit code and all its output."""
    program = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text, _ = program.communicate(timeout=600)
    return program.returncode, text


def _command(arguments: tuple[str, ...]) -> None:
    """Be the program, in place of the one that Popen would load."""
    as_new()  # closes Popen's pipe, which tells it that the program has started
    sys.argv = ["tadistill", *arguments]
    code: Any = 1
    try:
        with mock.patch.object(util, "spawnv_passfds", spawn):
            cli.main()
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        end(int(code or 0))


def as_new() -> None:
    """Make a forked process like a program that has just started, which knows no other process."""
    _fresh()
    server, tracker = forkserver._forkserver, resource_tracker._resource_tracker
    server._forkserver_pid = server._forkserver_address = server._forkserver_alive_fd = None
    tracker._fd = tracker._pid = None
    process._children.clear()


def end(code: int) -> NoReturn:
    """End a process that `as_new` has made."""
    util._exit_function()
    _end(code)


def spawn(path: str, arguments: list[str], kept: list[int]) -> int:
    """Fork one of multiprocessing's servers, where multiprocessing would start Python: `python -c CODE`."""
    child = os.fork()
    if not child:
        _fresh(*kept)
        try:
            exec(arguments[-1], {})
        finally:
            _end(0)
    return child


def _fresh(*kept: int) -> None:
    """Make a forked process like one that has just started: handlers of signals, open files, output."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    last = 2
    for number in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(last + 1, number)
        last = number
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:  # the resource tracker closes its output
            stream.flush()
    os._exit(code)
