"""The command line. Start-up imports no torch; each command imports what it needs.

tadistill plan RECIPE [key=value …]      what would run, what is cached, what it costs
tadistill run RECIPE [key=value …]       run it and write the report
tadistill report STUDY                   write the report again
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tadistill.errors import ConfigError, DataError, ModelError, StageFailed, TadistillError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="White-box distillation of language models through teacher assistants.",
)
RecipePath = Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, for instance seeds=[10].", metavar="[KEY=VALUE]…")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Where studies and the store live (TADISTILL_RUNS; default ./runs).")]
console = Console()


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, runs: Runs = None) -> None:
    """Show the stages: which are in the store, which would run, and the estimated training FLOPs."""
    from tadistill.config import load
    from tadistill.study.plan import make_plan
    from tadistill.study.run import runs_directory
    from tadistill.study.store import Store

    found = make_plan(load(recipe, overrides or []))
    store = Store(runs_directory(runs) / "store")
    table = Table(title=f"{found.recipe.study}: {len(found.stages)} stages", title_justify="left", box=None)
    for column, width in (("key", 16), ("", 4), ("FLOPs", 8), ("stage", None), ("parents", None)):
        table.add_column(column, justify="right" if column == "FLOPs" else "left", no_wrap=True, overflow="ellipsis", min_width=width)
    for stage in found.stages.values():
        state = "[green]hit[/]" if store.finished(stage.key) else "[yellow]miss[/]"
        parents = " ".join(key[:6] for key in dict.fromkeys(stage.parents.values()))
        flops = "–" if stage.kind == "evaluate" else "?" if stage.flops is None else f"{stage.flops:.2e}"
        table.add_row(stage.key, state, flops, stage.label, parents)
    console.print(table)
    console.print()
    costs = Table(title="training behind each arm, one seed", title_justify="left", box=None)
    for column in ("arm", "path", "FLOPs"):
        costs.add_column(column, justify="right" if column == "FLOPs" else "left")
    for arm in found.arms:
        costs.add_row(arm.name, " > ".join(arm.arm.path), "?" if arm.flops is None else f"{arm.flops:.3e}")
    console.print(costs)


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None, runs: Runs = None) -> None:
    """Run a study here and write its report. Finished stages are reused; an interrupted run goes on."""
    from tadistill.config import load
    from tadistill.report import summary_table, write_report
    from tadistill.study.run import run as run_study
    from tadistill.study.run import runs_directory

    root = runs_directory(runs)
    loaded = load(recipe, overrides or [])
    command = shlex.join(["tadistill", "run", str(recipe), *(overrides or [])])
    try:
        study = run_study(loaded, runs=root, recipe_text=recipe.read_text(encoding="utf-8"), command=command, console=console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where it stopped")
        raise typer.Exit(130) from None
    page = write_report(study, root / "store")
    console.print(summary_table(study, root / "store"))
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


@app.command()
def report(study: Annotated[str, typer.Argument(help="A study's name, or its directory.", metavar="STUDY")], runs: Runs = None) -> None:
    """Write report.html, report.md and results.json of a study from what the store holds."""
    from tadistill.report import summary_table, write_report
    from tadistill.study.run import runs_directory

    root = runs_directory(runs)
    directory = Path(study) if (Path(study) / "plan.json").is_file() else root / study
    page = write_report(directory, root / "store")
    console.print(summary_table(directory, root / "store"))
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point: maps errors to one sentence and an exit code (1 a run failed, 2 the input is wrong)."""
    errors = Console(stderr=True)
    try:
        app()
    except TadistillError as error:
        kind = "failed" if isinstance(error, StageFailed) else "error"
        errors.print(f"[bold red]{kind}[/]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, (ConfigError, DataError, ModelError)) else 1)
