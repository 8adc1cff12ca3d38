"""The command line: `tadistill -h` lists the commands. Each command imports what it needs, so start-up is fast."""

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tadistill import __version__
from tadistill.cluster.cli import Overrides, RecipePath, Runs, StudyName
from tadistill.cluster.cli import app as cluster_app
from tadistill.errors import ConfigError, DataError, JudgeFailed, ModelError, StageFailed, TadistillError
from tadistill.store import runs_directory, store_of
from tadistill.terminal import Terminal, output

if TYPE_CHECKING:
    from tadistill.config import Recipe

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="White-box distillation of language models through teacher assistants.",
)
app.add_typer(cluster_app)
console = Terminal()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tadistill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Before planning, run 20 updates of each kind of training stage here to measure its speed.")
    ] = False,
    runs: Runs = None,
) -> None:
    """Show the stages of a study, which of them are finished, and the cost of the others (docs/compute.md)."""
    from tadistill.config import load
    from tadistill.plan import preview, throughput
    from tadistill.plan.arms import make_plan
    from tadistill.runner.trackers import missing_trackers

    loaded = load(recipe, overrides or [])
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
def run(recipe: RecipePath, overrides: Overrides = None, runs: Runs = None) -> None:
    """Run a study on this machine and write its report. Finished stages are reused; an interrupted run resumes."""
    from tadistill.config import load

    command = shlex.join(["tadistill", "run", str(recipe), *(overrides or []), *_runs_option(runs)])
    _run_and_report(load(recipe, overrides or []), recipe.read_text(encoding="utf-8"), command, runs_directory(runs))


def _run_and_report(loaded: "Recipe", text: str, command: str, root: Path) -> Path:
    from tadistill.report import read_results, summary_table, write_report
    from tadistill.runner.study import run_study

    with _interruptible():
        study = run_study(loaded, runs=root, recipe_text=text, command=command, console=console)
    results = read_results(study, store_of(root))
    page = write_report(results)
    console.print(summary_table(results))
    console.print(f"report: {page}", soft_wrap=True, highlight=False)
    return study


@app.command()
def search(recipe: RecipePath, overrides: Overrides = None, runs: Runs = None) -> None:
    """Train paths of the recipe's `search` until its strategy has chosen one by dev values (docs/paths.md)."""
    from tadistill.config import load
    from tadistill.search.command import find_path

    with _interruptible():
        find_path(load(recipe, overrides or []), runs=runs_directory(runs), console=console)


@app.command()
def report(study: StudyName, runs: Runs = None) -> None:
    """Write report.html, report.md and results.json of a study from the finished stages."""
    from tadistill.report import read_results, summary_table, write_report
    from tadistill.results.study import find_study

    root = runs_directory(runs)
    directory = find_study(study, root)
    results = read_results(directory, store_of(root))
    page = write_report(results)
    console.print(summary_table(results))
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


@app.command()
def advise(
    recipe: RecipePath,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(help="Number of dev prompts to measure on.")] = 256,
    runs: Runs = None,
) -> None:
    """Measure a recipe's models on dev prompts and predict which path is worth its compute (docs/advise.md)."""
    from tadistill.advise.command import advise_recipe
    from tadistill.config import load

    chosen = overrides or []
    with _interruptible():
        advise_recipe(
            load(recipe, chosen),
            source=str(recipe),
            overrides=[*chosen, *_runs_option(runs)],
            runs=runs_directory(runs),
            prompts=prompts,
            console=console,
        )


On = Annotated[str, typer.Option("--on", help="Test sets, separated by commas: names, JSONL files or hub ids.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Decoding seeds, separated by commas.")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Also measure KL divergences to this model.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE as in a recipe, such as data.template=chat, evaluate.temperature=0, data.limit.test=50."),
]


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, directory, x.gguf, or wheel://…", metavar="MODEL")],
    on: On = "dolly,self_inst,vicuna,sinst,uinst",
    seeds: Seeds = "10,20,30,40,50",
    teacher: Teacher = None,
    settings: Settings = None,
    runs: Runs = None,
) -> None:
    """Evaluate any model on MiniLLM's five test sets or others, and write a report."""
    _evaluate([model], on, seeds, teacher, settings, runs, ["tadistill", "eval", model])


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Two models or more.", metavar="MODEL MODEL …")],
    on: On = "dolly",
    seeds: Seeds = "10",
    teacher: Teacher = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Number of prompts per test set to print, with all answers.")] = 2,
    settings: Settings = None,
    runs: Runs = None,
) -> None:
    """Compare several models on the same prompts: answers side by side, and paired differences."""
    from tadistill.report import read_results
    from tadistill.report.plain import side_by_side

    if len(models) < 2:
        raise ConfigError(f"`tadistill compare` needs at least two models, but got only {models[0]}; add one, or use `tadistill eval`")
    study = _evaluate(models, on, seeds, teacher, settings, runs, ["tadistill", "compare", *models])
    console.print(side_by_side(read_results(study, store_of(study.parent)), show))


def _evaluate(
    models: list[str], on: str, seeds: str, teacher: str | None, settings: list[str] | None, runs: Path | None, verb: list[str]
) -> Path:
    from tadistill.config import parse
    from tadistill.runner.study import evaluation_recipe

    numbers = _parts(seeds)
    if not numbers or not all(part.isdigit() for part in numbers):
        raise ConfigError(f"--seeds is `{seeds}`; give whole numbers separated by commas, for instance 10,20,30")
    text = evaluation_recipe(models, _sets(on), seeds=[int(n) for n in numbers], teacher=teacher)
    chosen = [part for option in settings or [] for part in ("--set", option)] + (["--teacher", teacher] if teacher else [])
    command = shlex.join([*verb, "--on", on, "--seeds", seeds, *chosen, *_runs_option(runs)])
    return _run_and_report(parse(text, settings or [], source=" ".join(verb[:2])), text, command, runs_directory(runs))


@app.command()
def export(
    study: StudyName,
    arm: Annotated[str, typer.Argument(help="The arm whose model is copied.", metavar="ARM")],
    target: Annotated[Path, typer.Argument(help="The new directory for the copy.", metavar="TARGET")],
    seed: Annotated[int | None, typer.Option("--seed", help="Training seed (default: the first seed).")] = None,
    runs: Runs = None,
) -> None:
    """Copy a trained model to a Hugging Face directory with a model card."""
    from tadistill.report import read_results
    from tadistill.report.cards import export as export_model
    from tadistill.results.study import find_study

    root = runs_directory(runs)
    export_model(read_results(find_study(study, root), store_of(root)), arm, seed, target)
    console.print(f"{target}: load it with AutoModelForCausalLM.from_pretrained", soft_wrap=True, highlight=False)


Arms = Annotated[list[str] | None, typer.Option("--arm", help="An arm to use. Repeat the option for more arms (default: all).")]
JudgedOn = Annotated[str, typer.Option("--on", help="Test sets, separated by commas (default: all).")]
Limit = Annotated[int | None, typer.Option("--limit", help="Number of prompts per test set, evenly spaced (default: all).")]


@app.command()
def judge(
    study: StudyName,
    model: Annotated[str, typer.Option(help="The name of the judging model at its endpoint.")],
    base_url: Annotated[
        str, typer.Option(envvar="OPENAI_BASE_URL", help="Any OpenAI-compatible endpoint; the key is OPENAI_API_KEY.")
    ] = "https://api.openai.com/v1",
    mode: Annotated[str, typer.Option(help="pair: which answer is better. score: MiniLLM's score, in % of the reference's.")] = "pair",
    arm: Arms = None,
    against: Annotated[str, typer.Option(help="The opponent: an arm, or `reference` for the reference answers.")] = "reference",
    on: JudgedOn = "",
    limit: Limit = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, such as all_seeds=true, temperature=0.5, jobs=8 (docs/judge.md)."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before sending.")] = False,
    runs: Runs = None,
) -> None:
    """Let a language model rate the answers of a study (docs/judge.md). Replies are kept, and the same command resumes."""
    from tadistill.config.judge import Judge
    from tadistill.config.load import read_settings
    from tadistill.judge import commands

    options = {
        "model": model,
        "base_url": base_url,
        "mode": mode,
        "arms": arm or [],
        "against": against,
        "sets": _parts(on),
        "limit": limit,
    }
    chosen = read_settings(Judge, options, settings or [], source="tadistill judge")
    confirm, command = (lambda _: True) if yes else typer.confirm, shlex.join(["tadistill", *sys.argv[1:]])
    try:
        commands.judge(study, chosen, root=runs_directory(runs), console=console, confirm=confirm, command=command)
    except KeyboardInterrupt:
        console.print("interrupted; replies are kept. Run the same command again to continue")
        raise typer.Exit(130) from None


@app.command()
def human(
    study: StudyName,
    files: Annotated[list[Path] | None, typer.Argument(help="Filled-in sheets, one for each rater.", metavar="[ANSWERS.csv]…")] = None,
    arm: Arms = None,
    on: JudgedOn = "",
    limit: Limit = None,
    reference: Annotated[bool, typer.Option("--reference", help="Also show the reference answer.")] = False,
    name: Annotated[str, typer.Option(help="The sheet's name.")] = "blind",
    seed: Annotated[int, typer.Option(help="Seed of the random order.")] = 0,
    runs: Runs = None,
) -> None:
    """Write a blind sheet of a study's answers for people to rate, or read filled-in sheets back (docs/judge.md)."""
    from tadistill.config.judge import BlindSheet
    from tadistill.config.load import read_settings
    from tadistill.judge import commands

    root = runs_directory(runs)
    if files:
        if arm or on or limit or reference or seed:
            raise ConfigError("with filled-in sheets only --name and --runs are allowed; the other options are for writing a new sheet")
        commands.read_sheets(study, files, root=root, console=console, command=shlex.join(["tadistill", *sys.argv[1:]]), name=name)
        return
    options = {"name": name, "arms": arm or [], "sets": _parts(on), "limit": limit, "reference": reference, "seed": seed}
    sheet = read_settings(BlindSheet, options, (), source="tadistill human")
    commands.export_sheet(study, sheet, root=root, console=console)


@contextmanager
def _interruptible() -> Iterator[None]:
    """On Ctrl-C, SIGTERM or SIGUSR2, end the command with a message and exit code 128 + signal (docs/interruptions.md)."""
    from tadistill.runner.interruption import Stopped, raising

    try:
        with raising():
            yield
    except KeyboardInterrupt as asked:
        console.print("interrupted; run the same command again to continue")
        received = asked.received if isinstance(asked, Stopped) else signal.SIGINT
        raise typer.Exit(128 + received) from None


def _runs_option(runs: Path | None) -> list[str]:
    return ["--runs", str(runs)] if runs else []


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _sets(text: str) -> list[str]:
    """Return names and paths that stand between commas; the path of an existing file may hold commas itself."""
    parts = text.split(",")
    for end in range(len(parts), 1, -1):
        if Path(",".join(parts[:end])).expanduser().exists():
            return [",".join(parts[:end]), *_sets(",".join(parts[end:]))]
    return [*_parts(parts[0]), *(_sets(",".join(parts[1:])) if parts[1:] else [])]


def main() -> None:
    """Run the command line. Print an error as one sentence and exit with 1 (a run failed) or 2 (the input is wrong)."""
    try:
        with output():
            app()
    except TadistillError as error:
        kind, errors = "failed" if isinstance(error, StageFailed | JudgeFailed) else "error", Terminal(stderr=True)
        with contextlib.suppress(SystemExit), output():
            for problem in error.problems:
                errors.print(f"[bold red]{kind}[/]: ", end="")
                errors.print(problem, markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, (ConfigError, DataError, ModelError)) else 1)
