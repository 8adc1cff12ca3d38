"""Commands that take a recipe: plan, run, search, advise."""

import shlex
from typing import Annotated

import typer

from tadistill.cli.shared import (
    Log,
    Overrides,
    Quiet,
    RecipePath,
    Runs,
    Verbose,
    console,
    interruptible,
    read_recipe,
    run_and_report,
    runs_option,
    terminal_for,
)
from tadistill.store import runs_directory, store_of

app = typer.Typer()


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Before planning, run 20 updates of each kind of training stage here to measure its speed.")
    ] = False,
    runs: Runs = None,
) -> None:
    """Show the stages of a study, which of them are finished, and what the unfinished ones will cost.

    More: the page "Compute: predicted, metered, counted" of the documentation.
    """
    from tadistill.plan import preview, throughput
    from tadistill.plan.arms import make_plan
    from tadistill.runner.trackers import missing_trackers

    loaded = read_recipe(recipe, overrides)
    store, accelerator = store_of(runs_directory(runs)), None
    if measure:
        from tadistill.runner.study import fetch_models

        fetch_models(loaded, console)
    else:
        preview.fetch_descriptions(loaded, console)
    found = make_plan(loaded, partial=not measure)
    if measure:
        import torch

        from tadistill.runner.timing import time_stages

        accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        speeds = time_stages(found, preview.threads(found), lambda text: console.print(f"timing {text}", highlight=False))
        throughput.save_throughput(store, throughput.machine(preview.threads(found), accelerator), speeds)
    for sentence in missing_trackers(loaded):
        console.print(sentence, highlight=False, markup=False)
    preview.print_plan(found, store, console, accelerator)


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = "text",
) -> None:
    """Run a study on this machine and write its report. Finished stages are not repeated. An interrupted run continues where it stopped."""
    from tadistill.config.load import read

    command = shlex.join(["tadistill", "run", str(recipe), *(overrides or []), *runs_option(runs)])
    terminal = terminal_for(quiet, verbose, log)
    run_and_report(read_recipe(recipe, overrides), read(recipe)[0], command, runs_directory(runs), terminal)


@app.command()
def search(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = "text",
) -> None:
    """Train paths of the models in the recipe's section `search`, and choose the best path by dev scores.

    More: the page "Paths" of the documentation.
    """
    from tadistill.search.command import find_path

    terminal = terminal_for(quiet, verbose, log)
    with interruptible(terminal):
        find_path(read_recipe(recipe, overrides), runs=runs_directory(runs), console=terminal)


@app.command()
def advise(
    recipe: RecipePath,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(help="Number of dev prompts on which models are measured.")] = 256,
    runs: Runs = None,
) -> None:
    """Measure a recipe's models on dev prompts and predict which path is worth its compute.

    More: the page "Advice: which path is worth its compute" of the documentation.
    """
    from tadistill.advise.command import advise_recipe

    chosen = overrides or []
    with interruptible():
        advise_recipe(
            read_recipe(recipe, chosen),
            source=str(recipe),
            overrides=[*chosen, *runs_option(runs)],
            runs=runs_directory(runs),
            prompts=prompts,
            console=console,
        )
