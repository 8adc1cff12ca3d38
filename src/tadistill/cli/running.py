"""Commands that run models: plan, run, search and advise with a recipe, eval and compare without one, and serve for a served teacher."""

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml

from tadistill.cli.shared import (
    Log,
    Overrides,
    Quiet,
    RecipePath,
    Runs,
    Verbose,
    comma_separated,
    complete_setting,
    console,
    interruptible,
    read_recipe,
    run_and_report,
    runs_option,
    terminal_for,
)
from tadistill.errors import ConfigError
from tadistill.store import runs_directory, store_of
from tadistill.terminal import Terminal

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
        from tadistill.runner.run_study import fetch_models

        fetch_models(loaded, console)
    else:
        preview.fetch_descriptions(loaded, console)
    found = make_plan(loaded, partial=not measure)
    if measure:
        from tadistill.runner.schedule import inspect_gpus
        from tadistill.runner.timing import time_stages

        # before the measurements, which would be lost if a GPU cannot be used; in a new process, because this one never uses CUDA
        accelerator = next((gpu.name for gpu in inspect_gpus()), None)
        speeds = time_stages(found, preview.threads(found), console)
        throughput.save_throughput(store, throughput.machine(preview.threads(found), accelerator), speeds)
    for sentence in missing_trackers(loaded):
        console.say(sentence)
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
            overrides=chosen,
            options=runs_option(runs),
            runs=runs_directory(runs),
            prompts=prompts,
            console=console,
        )


On = Annotated[str, typer.Option("--on", help="Test sets, separated by commas: names, JSONL files or hub ids.")]
OnOrSuite = Annotated[
    str | None,
    typer.Option("--on", help="Comma-separated test sets: names, JSONL files or hub ids (default: MiniLLM's five; none with --tasks)."),
]
Harness = Annotated[Literal["lm-eval"] | None, typer.Option("--harness", help="Also run the --tasks of EleutherAI's lm-eval.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Decoding seeds, separated by commas.")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="Also measure KL divergences from this model.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A recipe setting as KEY=VALUE, such as data.template=chat, evaluate.temperature=0, data.limit.test=50.",
        autocompletion=complete_setting,
    ),
]


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A Hub id, a directory, a .gguf file, or wheel://…", metavar="MODEL")],
    on: OnOrSuite = None,
    seeds: Seeds = "10,20,30,40,50",
    teacher: Teacher = None,
    harness: Harness = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks of lm-eval, separated by commas: names or YAML files.")] = "",
    settings: Settings = None,
    runs: Runs = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = "text",
) -> None:
    """Evaluate a model, by default on MiniLLM's five test sets, and write a report."""
    if (harness is None) != (tasks == ""):
        raise ConfigError("--harness and --tasks belong together, for instance --harness lm-eval --tasks arc_easy,gsm8k; give both or none")
    _evaluate([model], (on, tasks), seeds, teacher, settings, runs, terminal_for(quiet, verbose, log))


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="Two or more models, as in `tadistill eval`.", metavar="MODEL MODEL …")],
    on: On = "dolly",
    seeds: Seeds = "10",
    teacher: Teacher = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Number of prompts per test set to print, with all answers.")] = 2,
    settings: Settings = None,
    runs: Runs = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    log: Log = "text",
) -> None:
    """Compare several models on the same prompts. Print their answers side by side, and the differences of their scores."""
    from tadistill.report import read_results
    from tadistill.report.plain_text import side_by_side

    if len(models) < 2:
        raise ConfigError(f"`tadistill compare` needs at least two models, but got only {models[0]}; add one, or use `tadistill eval`")
    terminal = terminal_for(quiet, verbose, log)
    study = _evaluate(models, (on, ""), seeds, teacher, settings, runs, terminal)
    terminal.print(side_by_side(read_results(study, store_of(study.parent)), show))


def _evaluate(
    models: list[str],
    measured: tuple[str | None, str],
    seeds: str,
    teacher: str | None,
    settings: list[str] | None,
    runs: Path | None,
    terminal: Terminal,
) -> Path:
    """Evaluate models, and return the study's directory. `measured` has the values of --on and --tasks."""
    from tadistill.config import parse
    from tadistill.runner.run_study import SUITE, evaluation_command, evaluation_recipe

    tasks = measured[1]
    on = measured[0] if measured[0] is not None else "" if tasks else ",".join(SUITE)
    numbers = comma_separated(seeds)
    if not numbers or not all(part.isdecimal() for part in numbers):
        raise ConfigError(f"--seeds is `{seeds}`; give whole numbers separated by commas, for instance 10,20,30")
    text = evaluation_recipe(models, _sets(on), seeds=[int(n) for n in numbers], teacher=teacher, tasks=_sets(tasks))
    command = evaluation_command(models, on, seeds, teacher=teacher, settings=settings or [], runs=runs, tasks=tasks)
    source = " ".join(command.split()[:2])
    loaded = parse(yaml.safe_load(text), settings or [], source=source)  # as data: messages name no line of this text
    return run_and_report(loaded, text, command, runs_directory(runs), terminal)


def _sets(text: str) -> list[str]:
    parts = text.split(",")
    for end in range(len(parts), 1, -1):
        if os.path.exists(os.path.expanduser(",".join(parts[:end]))):
            return [",".join(parts[:end]), *_sets(",".join(parts[end:]))]
    return [*comma_separated(parts[0]), *(_sets(",".join(parts[1:])) if parts[1:] else [])]


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    recipe: RecipePath,
    model: Annotated[str, typer.Argument(help="The model's name in the recipe.", metavar="MODEL")],
    host: Annotated[str | None, typer.Option("--host", help="Address at which the server listens (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port (default: the port in the recipe, or 8000).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and start nothing.")] = False,
) -> None:
    """Print the command that starts a server of vLLM for a teacher of the recipe, and run it.

    Arguments after `--` are passed to `vllm serve`, such as `-- --tensor-parallel-size 4`.
    """
    from tadistill.runner.remote import server_command, start_server

    loaded = read_recipe(recipe, None)
    command = server_command(loaded, model, host=host, port=port, more=context.args)
    console.say(shlex.join(command))
    if not dry_run:
        start_server(loaded, model, command)
