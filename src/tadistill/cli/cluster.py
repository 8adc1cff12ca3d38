"""Commands for a cluster and for the runs directory: fetch, doctor, submit, status, list, clean, cancel."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tadistill.cli.shared import Overrides, RecipePath, Runs, StudyName, complete_recipe, console, read_recipe
from tadistill.safe_text import counted
from tadistill.store import runs_directory, store_of

app = typer.Typer()
Cluster = Annotated[str | None, typer.Option("--cluster", help="Name or YAML file of a cluster profile (default: variable CC_CLUSTER).")]


@app.command()
def fetch(
    recipe: RecipePath,
    overrides: Overrides = None,
    answers: Annotated[bool, typer.Option("--answers", help="Also get the answers of teachers behind APIs. This may cost money.")] = False,
    runs: Runs = None,
) -> None:
    """Download a recipe's models and data sets, for instance on a login node, so that jobs need no network. GGUF files are converted."""
    from tadistill.cluster.fetch import fetch_recipe

    loaded, root = read_recipe(recipe, overrides), runs_directory(runs)
    fetch_recipe(loaded, root, console)
    if answers:
        from tadistill.runner.remote import ask_now

        ask_now(loaded, store_of(root), console)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A recipe whose models, data and servers are checked too.",
            metavar="[RECIPE]",
            autocompletion=complete_recipe,
        ),
    ] = None,
    cluster: Cluster = None,
    runs: Runs = None,
) -> None:
    """Check this machine: versions, Slurm, account, disks, caches, locks. Problems are printed with remedies, and lead to exit code 1."""
    from tadistill.cluster.doctor import Check, examine, table
    from tadistill.cluster.slurm import load_profile, profile_names

    name = cluster or next((n for n in profile_names() if n == os.environ.get("CC_CLUSTER")), None)
    loaded = read_recipe(recipe, None) if recipe else None
    found = examine(runs=runs_directory(runs), recipe=loaded, profile=load_profile(name) if name else None)
    if loaded and any(model.serve or model.api for model in loaded.models.values()):
        from tadistill.runner.remote import examined

        found += [Check(*row) for row in examined(loaded)]
    console.print(table(found))
    if any(check.state == "problem" for check in found):
        raise typer.Exit(1)


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    cluster: Cluster = None,
    account: Annotated[
        str | None, typer.Option("--account", help="Slurm account, such as def-PROF (default: variable SBATCH_ACCOUNT).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch scripts and submit nothing.")] = False,
    runs: Runs = None,
) -> None:
    """Submit all unfinished stages of a study to Slurm. After a failure, the same command submits the stages that failed or never ran."""
    from tadistill.cluster.submit import submit as submit_recipe
    from tadistill.config.load import read

    try:
        submit_recipe(
            read_recipe(recipe, overrides),
            text=read(recipe)[0],
            command=shlex.join(["tadistill", *sys.argv[1:]]),
            cluster=cluster,
            account=account,
            runs=runs_directory(runs),
            dry_run=dry_run,
            console=console,
        )
    except KeyboardInterrupt:
        console.print("interrupted; the jobs that were submitted continue. Run the same command again to submit the rest")
        raise typer.Exit(130) from None


@app.command()
def status(study: StudyName, runs: Runs = None) -> None:
    """Show every stage of a study: its process or Slurm job, state, time, newest numbers and time left."""
    from tadistill.cluster.status import print_status
    from tadistill.results.study import find_study

    root = runs_directory(runs)
    print_status(find_study(study, root), store_of(root), console)


@app.command("list")
def list_(runs: Runs = None) -> None:
    """List the studies of the runs directory with their date, stages, size and state."""
    from tadistill.cluster.housekeeping import print_studies

    root = runs_directory(runs)
    print_studies(root, store_of(root), console)


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    runs: Runs = None,
) -> None:
    """Delete stored results that no study needs. Stages that are running are kept."""
    from tadistill.cluster.housekeeping import clean as clean_store

    root = runs_directory(runs)
    confirm = (lambda _: True) if yes else typer.confirm
    clean_store(root, store_of(root), console, dry_run=dry_run, confirm=confirm)


@app.command()
def cancel(study: StudyName, runs: Runs = None) -> None:
    """Cancel a study's Slurm jobs. Running stages save their state first. If you submit the study again, they continue from it."""
    from tadistill.cluster.status import cancel as cancel_jobs
    from tadistill.results.study import find_study

    root = runs_directory(runs)
    console.print(f"{counted(cancel_jobs(find_study(study, root), store_of(root)), 'job')} cancelled", highlight=False)
