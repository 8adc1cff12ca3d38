"""Quick ways to run the product: starting Python and torch takes longer than the stages of tiny models.

`tadistill` runs the command line in this process, its stages too. `ranks` forks processes that form a group. `test_study`, `test_signals`,
`test_one_store` and `test_ranks` test stages that run in processes of their own.
"""

import contextlib
import gc
import io
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from multiprocessing.connection import wait
from typing import Any
from unittest import mock

import pytest
import submitit  # noqa: F401  here: its import closes the streams of absl's handlers, unless they are sys.stdout and sys.stderr
from accelerate.state import AcceleratorState
from rich.console import Console
from transformers import PreTrainedModel

from tadistill import cli
from tadistill.plan.arms import Plan
from tadistill.plan.task import make_task
from tadistill.rollout import decoder
from tadistill.stages import context
from tadistill.stages.execute import run_stage
from tadistill.store import Store

gc.freeze()  # each stage ends with a collection, which would look through all imported modules; `runner.preload` does the same
CALLERS = ("tadistill.runner.run_study", "tadistill.search.command", "tadistill.advise.command")


def once(try_out: Callable[[PreTrainedModel], Any]) -> Callable[[PreTrainedModel], Any]:
    """Try out only the first of the models with the same modules and the same configuration. Every stage loads its models anew."""
    found: dict[str, Any] = {}

    @wraps(try_out)
    def instead(model: PreTrainedModel) -> Any:
        kind = f"{model} {model.config.to_json_string()} {model.dtype}"
        if kind not in found:
            found[kind] = try_out(model)
        return found[kind]

    return instead


FIRST_RIGHT, CHECK_READING = once(decoder._first_right), once(context.check_reading)


@contextlib.contextmanager
def tried_once() -> Iterator[None]:
    """Try out models of the same kind once in this process and its forks, while a `with` block runs."""
    with mock.patch.object(decoder, "_first_right", FIRST_RIGHT), mock.patch.object(context, "check_reading", CHECK_READING):
        yield


def unheard(text: str) -> None:
    """Hear an alarm, and do nothing."""


def run_here(
    plan: Plan, store: Store, *, jobs: int, console: Console, needs: Iterable[str] = (), alarm: Callable[[str], object] = unheard
) -> None:
    """Run the stages that the store lacks, as `run_stages` does, one after another in this process."""
    with tried_once():
        for stage in plan.stages.values():
            run_stage(make_task(plan, stage, store), progress=lambda *_: None, alarm=alarm, stop=lambda: False)
            gc.freeze()  # the stage has collected its garbage; the next one need not look through what is left
            AcceleratorState._reset_state(True)  # other stages and tests of this process have precisions of their own


@dataclass(frozen=True)
class Done:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def tadistill(*arguments: str) -> Done:
    """Run a command of the command line to its end."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("tadistill.runner.schedule.prepared"))  # starts the server that stages are forked from
        for module in CALLERS:
            stack.enter_context(mock.patch(f"{module}.run_stages", run_here))
        stack.enter_context(mock.patch.object(sys, "argv", ["tadistill", *arguments]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def ranks(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Run `work` in `count` forked processes. They find each other through environment variables, as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def rank(number: int) -> None:
        os.environ |= common | {"RANK": str(number), "LOCAL_RANK": str(number)}
        work(*arguments)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    try:
        while running:
            for sentinel in wait([*running], timeout=500) or pytest.fail("the processes do not end"):
                process = running.pop(sentinel)
                process.join()
                assert process.exitcode == 0
    finally:
        for process in running.values():
            process.kill()
            process.join()


def ended(group: int) -> bool:
    """Wait up to ten seconds until no process of a group is left; return True if none is."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
