"""Commands for the results of a study: report, watch, export, judge, human. Commands for a cluster: fetch, doctor, submit, status, cancel.
Commands for the runs directory: list, clean."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tadistill.cli.shared import (
    Overrides,
    RecipePath,
    Runs,
    StudyName,
    comma_separated,
    complete_arm,
    complete_recipe,
    console,
    interruptible,
    read_recipe,
    report_study,
)
from tadistill.disk import from_home
from tadistill.errors import ConfigError, NotPlanned, TadistillError
from tadistill.store import Store, runs_directory, store_of
from tadistill.text import counted, this_command

app = typer.Typer()


def _located(study: str, runs: Path | None, *, searches: bool = False) -> tuple[Path, Store]:
    """Return the directory and the store of a study. If `study` is a recipe that has changed since the study's last run, print a note."""
    from tadistill.config.load import read, study_in
    from tadistill.results.study import find_study, load_plan

    recipe, (directory, store) = from_home(study, "the study"), find_study(study, runs, searches=searches)
    if study_in(recipe):
        with contextlib.suppress(TadistillError):  # the command itself says what is damaged
            plan = load_plan(directory)
            if plan.recipe_text and plan.recipe_text != read(recipe)[0]:
                console.say(f"{recipe} has changed since the last run of the study, `{plan.command}`; the following is about that run")
    return directory, store


def _confirmation(yes: bool) -> Callable[[str], bool]:
    # a function that asks the user, unless --yes is given
    return (lambda _: True) if yes else typer.confirm


# --- results --------------------------------------------------------------------------------------------------------------


@app.command()
def report(study: StudyName, runs: Runs = None) -> None:
    """Write report.html, report.md and results.json of a study from the finished stages."""
    report_study(*_located(study, runs), console)


@app.command()
def watch(
    study: StudyName,
    port: Annotated[int, typer.Option(help="Port of the page on 127.0.0.1 (0: any free port).", min=0, max=65535)] = 8765,
    runs: Runs = None,
) -> None:
    """Show a running or finished study in the browser, on a page that updates itself. No file is changed.

    More: the page "Watch a run" of the documentation.
    """
    from tadistill.watch.server import serve

    told = False
    while True:
        try:
            found = _located(study, runs)
            break
        except NotPlanned as early:
            if not told:
                console.say(f"{early}; waiting for its stages …")
            told = True
            time.sleep(0.5)
    serve(*found, port, console)


@app.command()
def export(
    study: StudyName,
    arm: Annotated[str, typer.Argument(help="Name of the arm whose model is copied.", metavar="ARM", autocompletion=complete_arm)],
    target: Annotated[
        Path | None, typer.Argument(help="The new directory for the copy; not needed with --push.", metavar="[TARGET]")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Training seed (default: the first seed).")] = None,
    push: Annotated[
        str | None, typer.Option("--push", help="Also upload the model to this repository of the Hugging Face Hub.", metavar="REPO")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="If --push creates the repository, make it public (default: private).")] = False,
    runs: Runs = None,
) -> None:
    """Copy a trained model into a directory in the Hugging Face format, with a model card. With --push, upload it to the Hub."""
    from tadistill.data import hub
    from tadistill.report import read_results
    from tadistill.report.export import export as export_model

    if target is None and push is None:
        raise ConfigError("`tadistill export` needs a directory for the copy, or --push REPO; give one of them")
    target = from_home(target, "the directory for the copy") if target else None
    name = hub.full_name(push) if push else ""
    results = read_results(*_located(study, runs))
    with contextlib.nullcontext(target) if target else tempfile.TemporaryDirectory() as folder:
        copied = export_model(results, arm, seed, Path(folder), name=name)
        if target:
            console.say(f"{target} contains the model; load it with AutoModelForCausalLM.from_pretrained")
        if push:
            page = hub.push(copied, name, private=not public, message=f"{arm} of study {results.plan.study}")
            console.say(f"uploaded to {page}")


Arms = Annotated[
    list[str] | None,
    typer.Option("--arm", help="An arm to rate. Repeat the option for more arms (default: all).", autocompletion=complete_arm),
]
JudgedOn = Annotated[str, typer.Option("--on", help="Test sets, separated by commas (default: all).")]
Limit = Annotated[int | None, typer.Option("--limit", help="Number of prompts per test set, evenly spaced (default: all).")]


@app.command()
def judge(
    study: StudyName,
    model: Annotated[str, typer.Option(help="Name of the language model that rates, as the API at --base-url knows it.")],
    base_url: Annotated[
        str, typer.Option(envvar="OPENAI_BASE_URL", help="URL of an OpenAI-compatible API. The variable OPENAI_API_KEY has the key.")
    ] = "https://api.openai.com/v1",
    mode: Annotated[
        str,
        typer.Option(
            help="pair: choose the better of two answers. score: rate an arm in % of the scores of the references, as MiniLLM does.",
            metavar="<pair|score>",
        ),
    ] = "pair",
    arm: Arms = None,
    against: Annotated[
        str, typer.Option(help="What each arm is compared with: another arm, or `reference` for the reference answers.")
    ] = "reference",
    on: JudgedOn = "",
    limit: Limit = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the judge as KEY=VALUE, such as all_seeds=true, temperature=0.5, jobs=8.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Send the requests without asking first.")] = False,
    runs: Runs = None,
) -> None:
    """Let a language model rate the answers of a study. Replies are saved, so after an interruption the same command continues.

    More: the page "Judges: a language model, or people" of the documentation.
    """
    from tadistill.config.evaluate import Judge
    from tadistill.config.load import read_settings
    from tadistill.judge import commands

    options = {
        "model": model,
        "base_url": base_url,
        "mode": mode,
        "arms": arm or [],
        "against": against,
        "sets": comma_separated(on),
        "limit": limit,
    }
    chosen = read_settings(Judge, options, settings or [], source="tadistill judge")
    with interruptible(kept="the replies are kept. Run the same command again to continue"):
        commands.judge(study, chosen, runs=runs, console=console, confirm=_confirmation(yes), command=this_command())


@app.command()
def human(
    study: StudyName,
    files: Annotated[list[Path] | None, typer.Argument(help="Filled-in sheets, one for each rater.", metavar="[ANSWERS.csv]…")] = None,
    arm: Arms = None,
    on: JudgedOn = "",
    limit: Limit = None,
    reference: Annotated[bool, typer.Option("--reference", help="Also show the reference answer.")] = False,
    name: Annotated[str, typer.Option(help="Name of the sheet.")] = "blind",
    seed: Annotated[int, typer.Option(help="Seed of the random order.")] = 0,
    runs: Runs = None,
) -> None:
    """Write a sheet on which people rate answers without knowing the models. If filled-in sheets are given, evaluate them instead.

    More: the page "Judges: a language model, or people" of the documentation.
    """
    from tadistill.config.evaluate import BlindSheet
    from tadistill.config.load import read_settings
    from tadistill.judge import commands

    if files:
        if arm or on or limit or reference or seed:
            raise ConfigError(
                "with filled-in sheets, only --name and --runs can be used; remove the other options, which are for writing a new sheet"
            )
        files = [from_home(file, "the sheet") for file in files]
        commands.read_sheets(study, files, runs=runs, console=console, command=this_command(), name=name)
        return
    options = {"name": name, "arms": arm or [], "sets": comma_separated(on), "limit": limit, "reference": reference, "seed": seed}
    sheet = read_settings(BlindSheet, options, (), source="tadistill human")
    commands.export_sheet(study, sheet, runs=runs, console=console)


# --- a cluster, and the runs directory ------------------------------------------------------------------------------------


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

    with interruptible(kept="the jobs that were submitted continue. Run the same command again to submit the rest"):
        submit_recipe(
            read_recipe(recipe, overrides),
            text=read(recipe)[0],
            command=this_command(),
            cluster=cluster,
            account=account,
            runs=runs_directory(runs),
            dry_run=dry_run,
            console=console,
        )


@app.command()
def status(study: StudyName, runs: Runs = None) -> None:
    """Show every stage of a study or a search: its process or Slurm job, state, time, newest numbers and time left."""
    from tadistill.cluster.status import print_status

    try:
        found = _located(study, runs, searches=True)
    except NotPlanned as early:  # not a mistake, but the state of the study
        console.say(str(early))
        return
    print_status(*found, console)


@app.command("list")
def list_(runs: Runs = None) -> None:
    """List the studies and searches of the runs directory with their date, stages, size and state."""
    from tadistill.cluster.list_and_clean import print_studies

    root = runs_directory(runs)
    print_studies(root, store_of(root), console)


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    runs: Runs = None,
) -> None:
    """Delete stored results that no study needs. Stages that are running are kept."""
    from tadistill.cluster.list_and_clean import clean as clean_store

    root = runs_directory(runs)
    clean_store(root, store_of(root), console, dry_run=dry_run, confirm=_confirmation(yes))


@app.command()
def cancel(study: StudyName, runs: Runs = None) -> None:
    """Cancel a study's Slurm jobs. Running stages save their state first. If you submit the study again, they continue from it."""
    from tadistill.cluster.status import cancel as cancel_jobs

    console.say(f"{counted(cancel_jobs(*_located(study, runs)), 'job')} cancelled")
