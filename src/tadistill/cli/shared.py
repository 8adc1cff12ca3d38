"""Arguments, options and steps that several commands share."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tadistill.cli import complete
from tadistill.store import store_of
from tadistill.terminal import Terminal

if TYPE_CHECKING:
    from tadistill.config import Recipe

console = Terminal()

RecipePath = Annotated[
    Path,
    typer.Argument(
        help="A recipe (YAML), or the name of a shipped one (`tadistill recipes`).", metavar="RECIPE", autocompletion=complete.recipe_names
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values that replace values of the recipe, for instance seeds=[10].",
        metavar="[KEY=VALUE]…",
        autocompletion=complete.overrides,
    ),
]
StudyName = Annotated[
    str,
    typer.Argument(help="The name, the directory or the recipe of a study.", metavar="STUDY", autocompletion=complete.study_names),
]
Runs = Annotated[
    Path | None, typer.Option("--runs", help="Directory of studies and the store (default: variable TADISTILL_RUNS, else ./runs).")
]


def read_recipe(recipe: Path, overrides: list[str] | None) -> "Recipe":
    """Load a recipe with its overrides. Say which file it is, if it is given by the name of a shipped recipe."""
    from tadistill.config import load
    from tadistill.config.shipped import remark

    if said := remark(recipe):
        Terminal(stderr=True).print(said, markup=False, highlight=False, soft_wrap=True)
    return load(recipe, overrides or [])


def run_and_report(loaded: "Recipe", text: str, command: str, root: Path) -> Path:
    """Run a study, write its report, print its table, and return the study's directory."""
    from tadistill.report import read_results, summary_table, write_report
    from tadistill.runner.study import run_study

    with interruptible():
        study = run_study(loaded, runs=root, recipe_text=text, command=command, console=console)
    results = read_results(study, store_of(root))
    page = write_report(results)
    console.print(summary_table(results))
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
    return study


@contextmanager
def interruptible() -> Iterator[None]:
    """On Ctrl-C, SIGTERM or SIGUSR2, end the command with a message and exit code 128 + signal (docs/concepts/interruptions.md)."""
    from tadistill.runner.interruption import Stopped, raising

    try:
        with raising():
            yield
    except KeyboardInterrupt as asked:
        console.print("interrupted; run the same command again to continue")
        received = asked.received if isinstance(asked, Stopped) else signal.SIGINT
        raise typer.Exit(128 + received) from None


def runs_option(runs: Path | None) -> list[str]:
    """Return the words of the option `--runs` in a command that is printed for the user."""
    return ["--runs", str(runs)] if runs else []


def comma_separated(text: str) -> list[str]:
    """Return the texts between commas, without spaces around them."""
    return [part.strip() for part in text.split(",") if part.strip()]
