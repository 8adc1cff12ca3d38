"""The command line `tadistill`. Each command imports only the modules that it needs, so that it starts fast."""

import contextlib
import sys
from typing import Annotated

import typer
from rich.text import Text

from tadistill import __version__
from tadistill.cli import running, studies, writing
from tadistill.cli.shared import Told
from tadistill.errors import WRONG_INPUT, JudgeFailed, ServerFailed, StageFailed, TadistillError
from tadistill.runner.interruption import end_at_once, raising
from tadistill.terminal import Terminal, output

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="White-box distillation of language models, directly or through teacher assistants.",
)
for commands in (writing, running, studies):
    app.add_typer(commands.app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tadistill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. An error is printed as one sentence. The exit code is then 1 (a run failed) or 2 (the input is wrong). A signal
    that asks the command to stop is no error, whatever a library made of it. The exit code is then 128 + signal number."""
    try:
        with raising() as received:
            try:
                with output():
                    app()
            except Told:
                raise
            except BaseException as error:
                if not received or (isinstance(error, SystemExit) and not error.code):
                    raise
                with contextlib.suppress(SystemExit), output():
                    Terminal(stderr=True).say("interrupted")
                sys.exit(128 + received[0])
    except TadistillError as error:
        kind, errors = "failed" if isinstance(error, StageFailed | JudgeFailed | ServerFailed) else "error", Terminal(stderr=True)
        with contextlib.suppress(SystemExit), output():
            for problem in error.problems:
                errors.print(Text.assemble((kind, "bold red"), f": {problem}"), soft_wrap=True)
        sys.exit(2 if isinstance(error, WRONG_INPUT) else 1)
    finally:
        end_at_once()  # also while Python ends
