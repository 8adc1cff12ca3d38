"""The command line in this process, and its stages too: starting Python, torch and workers takes longer than the stages of tiny models.

What workers do is the matter of `test_study`, `test_signals` and `test_one_store`.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from accelerate.state import AcceleratorState
from rich.console import Console

from tadistill import cli
from tadistill.plan.arms import Plan
from tadistill.plan.task import make_task
from tadistill.stages.execute import run_stage
from tadistill.store import Store

CALLERS = ("tadistill.runner.study", "tadistill.search.command", "tadistill.advise.command")


def run_here(plan: Plan, store: Store, *, jobs: int, console: Console) -> None:
    """Run the stages that the store lacks, as `run_stages` does, one after another in this process."""
    for stage in plan.stages.values():
        run_stage(make_task(plan, stage, store), progress=lambda *_: None, alarm=lambda _: None, stop=lambda: False)
        AcceleratorState._reset_state(True)  # other stages and tests of this process have precisions of their own


@dataclass(frozen=True)
class Done:
    """A command's end."""

    code: int
    out: str
    err: str


def tadistill(*arguments: str) -> Done:
    """Run a command of the command line to its end."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
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
