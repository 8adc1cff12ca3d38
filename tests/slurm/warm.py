"""A Python for Slurm's jobs that has the imports of a stage already, which take most of the time of a tiny job.

`python(folder)` starts a server, forked from this process, and returns a program that takes the place of Python in the script of a job. The
program hands its arguments, environment, folder and open files to the server, which forks the job. It then passes signals on to the job,
and ends as the job ends. If it is killed, the job is, too. The test of chained jobs uses the real Python.
"""

import ctypes
import json
import logging.config
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from accelerate.state import AcceleratorState
from submitit.core import logger
from tests.e2e import forked

_PR_SET_PDEATHSIG = 1
JOB = ["-u", "-m", "submitit.core._submit"]
PROGRAM = """#!{python} -SE
import contextlib, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [b"%8d" % len(request)], [0, 1, 2])
server.sendall(request)
job = int(server.recv(8))
def pass_on(number, frame):
    with contextlib.suppress(ProcessLookupError):
        os.kill(job, number)
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
    signal.signal(number, pass_on)
sys.exit(int(server.recv(8) or 1))
"""


@contextmanager
def python(folder: Path) -> Iterator[str]:
    """Return the path of the program; the server ends with the `with` block."""
    from tadistill.runner import preload  # noqa: F401

    address, program = folder / "warm.socket", folder / "warm-python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    program.write_text(PROGRAM.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    server = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,))
    server.start()
    listener.close()
    try:
        yield str(program)
    finally:
        server.terminate()
        server.join()


def _serve(listener: socket.socket) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # a killed pytest ends it too
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # its children are waited for by nobody
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            try:
                _watch(connection)
            finally:
                os._exit(1)
        connection.close()


def _watch(connection: socket.socket) -> None:
    """Fork a job, and tell the program its number and, at its end, its exit code. End it if the program has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as sent:
        arguments, environment, folder = json.loads(sent.read(int(size)))
    assert arguments[:3] == JOB
    job = os.fork()
    if not job:
        _run(arguments[3:], environment, folder, files)
    connection.sendall(b"%8d" % job)
    while True:
        ended, status = os.waitpid(job, os.WNOHANG)
        if ended:
            connection.sendall(b"%8d" % os.waitstatus_to_exitcode(status))
            os._exit(0)
        if select.select([connection], [], [], 0.05)[0]:
            os.kill(job, signal.SIGKILL)


def _run(arguments: list[str], environment: dict[str, str], folder: str, files: list[int]) -> NoReturn:
    """Be the job."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    forked.as_new()
    AcceleratorState._reset_state(True)
    logging.config.dictConfig(logger.CONFIG)  # to the output of this process
    sys.argv = ["_submit", *arguments]
    code = 1
    try:
        runpy.run_module("submitit.core._submit", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        forked.end(code)
