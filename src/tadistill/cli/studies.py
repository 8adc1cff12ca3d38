"""Commands that use the results of a study: report, watch, export, judge, human."""

import contextlib
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tadistill.cli.shared import Runs, StudyName, comma_separated, complete_arm, console, report_study
from tadistill.errors import ConfigError
from tadistill.store import runs_directory, store_of

app = typer.Typer()


@app.command()
def report(study: StudyName, runs: Runs = None) -> None:
    """Write report.html, report.md and results.json of a study from the finished stages."""
    from tadistill.results.study import find_study

    root = runs_directory(runs)
    report_study(find_study(study, root), root, console)


@app.command()
def watch(
    study: StudyName,
    port: Annotated[int, typer.Option(help="Port of the page on 127.0.0.1 (0: any free port).", min=0, max=65535)] = 8765,
    runs: Runs = None,
) -> None:
    """Show a running or finished study in the browser, on a page that updates itself. No file is changed.

    More: the page "Watch a run" of the documentation.
    """
    from tadistill.results.study import find_study
    from tadistill.watch.server import serve

    root = runs_directory(runs)
    serve(find_study(study, root), store_of(root), port, console)


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
    from tadistill.report.model_card import export as export_model
    from tadistill.results.study import find_study

    if target is None and push is None:
        raise ConfigError("`tadistill export` needs a directory for the copy, or --push REPO; give one of them")
    name, root = hub.full_name(push) if push else "", runs_directory(runs)
    results = read_results(find_study(study, root), store_of(root))
    with contextlib.nullcontext(target) if target else tempfile.TemporaryDirectory() as folder:
        copied = export_model(results, arm, seed, Path(folder), name=name)
        if target:
            console.print(
                f"{target} contains the model; load it with AutoModelForCausalLM.from_pretrained", soft_wrap=True, highlight=False
            )
        if push:
            page = hub.push(copied, name, private=not public, message=f"{arm} of study {results.plan.study}")
            console.print(f"uploaded to {page}", soft_wrap=True, highlight=False)


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
            help="pair: choose the better of two answers. score: rate an arm in % of the scores of the references, as MiniLLM does."
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
    confirm, command = (lambda _: True) if yes else typer.confirm, shlex.join(["tadistill", *sys.argv[1:]])
    try:
        commands.judge(study, chosen, root=runs_directory(runs), console=console, confirm=confirm, command=command)
    except KeyboardInterrupt:
        console.print("interrupted; the replies are kept. Run the same command again to continue")
        raise typer.Exit(130) from None


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

    root = runs_directory(runs)
    if files:
        if arm or on or limit or reference or seed:
            raise ConfigError(
                "with filled-in sheets, only --name and --runs can be used; remove the other options, which are for writing a new sheet"
            )
        commands.read_sheets(study, files, root=root, console=console, command=shlex.join(["tadistill", *sys.argv[1:]]), name=name)
        return
    options = {"name": name, "arms": arm or [], "sets": comma_separated(on), "limit": limit, "reference": reference, "seed": seed}
    sheet = read_settings(BlindSheet, options, (), source="tadistill human")
    commands.export_sheet(study, sheet, root=root, console=console)
