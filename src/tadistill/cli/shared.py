"""Arguments, options and steps that several commands share, and the completion of arguments with the Tab key.

`tadistill --install-completion` installs the completion of recipes, studies, arms, keys and values in your shell.
"""

import shlex
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from tadistill.disk import read_json
from tadistill.errors import ConfigError, TadistillError
from tadistill.runner.interruption import Stopped, ignore
from tadistill.store import Store, command_for, runs_directory, store_of
from tadistill.terminal import Terminal

if TYPE_CHECKING:
    from tadistill.config import Recipe
    from tadistill.results.collect import Results

console = Terminal()
_MOST_SEEDS = 50  # largest number of seeds for which a run is proposed as a command


# --- completion -------------------------------------------------------------------------------------------------------------


def complete_recipe(incomplete: str) -> list[str]:
    """Shell completion: return names of recipes in the package, and of YAML files and folders in the current directory."""
    from tadistill.config.recipe_files import shipped

    here = [path for path in Path().glob(f"{incomplete}*") if path.is_dir() or path.suffix in (".yaml", ".yml")]
    return _beginning(incomplete, [*shipped(), *(f"{path}/" if path.is_dir() else str(path) for path in sorted(here))])


def complete_study(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion: return the names of studies in the runs directory that begin with `incomplete`."""
    from tadistill.results.study import studies

    return _beginning(incomplete, studies(runs_directory(ctx.params.get("runs"))))


def complete_arm(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion: return names of the arms of a study. The study is the one named earlier on the command line."""
    from tadistill.results.study import find_study

    study = ctx.params.get("study") or next(iter(ctx.args), "")  # while an option lacks its value, the study is in `ctx.args`
    try:
        plan, _ = find_study(study, ctx.params.get("runs"))
        return _beginning(incomplete, [arm["name"] for arm in read_json(plan / "plan.json")["arms"]])
    except (TadistillError, KeyError, TypeError):  # a damaged plan too
        return []


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion of `KEY=VALUE`: return keys, or after `=` the values of a key. Some keys contain a name from the recipe."""
    return _settings(incomplete, _named(ctx.params.get("recipe")))


def complete_setting(incomplete: str) -> list[str]:
    """Shell completion of `KEY=VALUE` for `eval` and `compare`: return only keys of `data` and `evaluate`, or their values."""
    return [text for text in _settings(incomplete, {}) if text.startswith(("data.", "evaluate."))]


def complete_method(incomplete: str) -> list[str]:
    from tadistill.config.method import METHODS

    return _beginning(incomplete, METHODS)


def complete_key(incomplete: str) -> list[str]:
    """Shell completion: return keys of a recipe, such as `lr` or `method.optim.lr`, and names of metrics."""
    from tadistill.config.reference import reference
    from tadistill.metrics import METRICS

    places = [place for part in reference() for place in part.places]
    names = [key.name for part in reference() for key in part.keys]
    return _beginning(incomplete, sorted({*names, *filter(None, places), *_places({}), *METRICS}))


def _beginning(incomplete: str, texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text.startswith(incomplete)]


def _settings(incomplete: str, named: dict[str, list[str]]) -> list[str]:
    key, given, _ = incomplete.partition("=")
    places = _places(named)
    if given:
        return _beginning(incomplete, [f"{key}={value}" for value in places.get(key, ())])
    return _beginning(incomplete, [f"{place}=" for place in places])


def _places(named: dict[str, list[str]]) -> dict[str, list[str]]:
    from tadistill.config.reference import NAME, dotted, reference

    found: dict[str, list[str]] = {}
    for part in reference():
        for place in part.places:
            top = place.split(f".{NAME}")[0]
            for name in named.get(top, ()) if NAME in place else ("",):
                for key in part.keys:
                    full = dotted(place.replace(NAME, name, 1), key.name)
                    choices = ["true", "false"] if key.type == "true or false" else key.choices
                    found.setdefault(full, []).extend(choice for choice in choices if choice not in found.get(full, ()))
    return found


def _named(recipe: Any) -> dict[str, list[str]]:
    from tadistill.config import load

    try:
        loaded = load(recipe)
    except (ConfigError, TypeError):
        return {}
    return {"models": [*loaded.models], "arms": [*loaded.arms], "evaluate.also": [*loaded.evaluate.also], "resources": ["default"]}


# --- arguments and options --------------------------------------------------------------------------------------------------

RecipePath = Annotated[
    Path,
    typer.Argument(help="A recipe (YAML file), or a name from `tadistill recipes`.", metavar="RECIPE", autocompletion=complete_recipe),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values that replace values of the recipe, for instance seeds=[10]. Keys of {…} are added to those of the recipe; to replace "
        "all arms, write arms={} before 'arms={…}'.",
        metavar="[KEY=VALUE]…",
        autocompletion=complete_override,
    ),
]
StudyName = Annotated[
    str,
    typer.Argument(help="The name, the directory or the recipe of a study.", metavar="STUDY", autocompletion=complete_study),
]
Runs = Annotated[
    Path | None, typer.Option("--runs", help="Directory for studies and results (default: variable TADISTILL_RUNS, else ./runs).")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="While stages run, print only problems.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also print a line when a stage starts (with its key and folder) or ends.")]
Log = Annotated[
    Literal["text", "json"], typer.Option("--log", help="json: write each event as a line of JSON to stdout, and all text to stderr.")
]


# --- steps ------------------------------------------------------------------------------------------------------------------


def read_recipe(recipe: Path, overrides: list[str] | None) -> "Recipe":
    """Load a recipe with its overrides. If `recipe` is the name of a recipe in the package, print the path of its file."""
    from tadistill.config import load
    from tadistill.config.recipe_files import remark

    if said := remark(recipe):
        Terminal(stderr=True).say(said)
    return load(recipe, overrides or [])


def terminal_for(quiet: bool, verbose: bool, log: str) -> Terminal:
    """Return the terminal for the options `--quiet`, `--verbose` and `--log` of a command. Raises ConfigError if they contradict."""
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose cannot be used together; give one of them")
    if not (quiet or verbose or log == "json"):
        return console
    terminal = Terminal(detail="problems" if quiet else "everything" if verbose else "progress", events=log == "json")
    if terminal.events:
        terminal.keep_stdout()
    return terminal


def run_and_report(loaded: "Recipe", text: str, command: str, root: Path, terminal: Terminal) -> Path:
    """Run a study, write its report, print how it ended, and return the study's directory."""
    from tadistill.runner.run_study import run_study

    with interruptible(terminal):
        study = run_study(loaded, runs=root, recipe_text=text, command=command, console=terminal)
    report_study(study, store_of(root), terminal)
    return study


def report_study(study: Path, store: Store, terminal: Terminal) -> None:
    """Write the report of a study. Print the answer to the study's question, a table of arms, and commands to run next."""
    with terminal.working("writing the report"):
        from tadistill.report import read_results, summary_table, write_report
        from tadistill.report.answer import answer

        results = read_results(study, store)
        page = write_report(results)
    if terminal.events:
        terminal.event("report", page=str(page.resolve()), answer=answer(results).answer)
        return
    terminal.print(summary_table(results))
    terminal.say(f"report: {page}", style=f"link {page.resolve().as_uri()}")
    for command, why in _next_commands(results, study):
        terminal.print(f"[dim]{escape(why)}:[/]\n  {escape(command)}", soft_wrap=True, highlight=False)


def _next_commands(results: "Results", study: Path) -> Iterator[tuple[str, str]]:
    from tadistill.metrics import MEAN
    from tadistill.report.against_sft import student_of
    from tadistill.report.answer import next_seeds
    from tadistill.results.collect import primary_metric

    if results.missing:
        yield results.plan.command, "Run what is missing"
        return
    trained = [arm for arm in results.plan.arms if arm.is_trained]
    if not trained:
        return
    student, metric = student_of(results), primary_metric(results)
    copied = [arm for arm in trained if arm.model == student and arm.control is None]
    means = {arm.name: s.mean for arm in copied if (s := results.summaries.get((arm.name, MEAN, metric)))}
    yield command_for("watch", study, store=results.store), "Look at curves, samples and stages in a browser"
    if means:
        best = max(means, key=lambda name: means[name])
        which = " with the highest mean" if len(means) > 1 else ""
        yield command_for("export", study, best, f"./{best}", store=results.store), f"Copy the model{which}"
    seeds, wanted = [*dict.fromkeys(seed for arm in results.plan.arms for seed in arm.evaluate)], next_seeds(results) or 0
    if len(seeds) < wanted <= _MOST_SEEDS and results.plan.command.startswith("tadistill run "):
        yield _with_seeds(results.plan.command, seeds, wanted), f"Train {wanted} seeds"


def _with_seeds(command: str, seeds: Sequence[int], count: int) -> str:
    # the recipe's order stays: the first seed is exported, and determines the compute of equal budgets
    words, ranked = [word for word in shlex.split(command) if not word.startswith("seeds=")], sorted(seeds)
    step = ranked[-1] - ranked[-2] if len(seeds) > 1 else 10 if seeds[0] % 10 == 0 else 1
    more = [*seeds, *(ranked[-1] + step * i for i in range(1, count - len(seeds) + 1))]
    return shlex.join([*words[:3], f"seeds=[{','.join(map(str, more))}]", *words[3:]])


class Told(SystemExit):
    """The end of a command that has said why it ends."""


@contextmanager
def interruptible(terminal: Terminal = console, kept: str = "run the same command again to continue") -> Iterator[None]:
    """Run the `with` block. If a signal interrupts it, print what is kept, and exit with code 128 + signal number."""
    try:
        yield
    except KeyboardInterrupt as asked:
        ignore()
        terminal.say(f"interrupted; {kept}")
        raise Told(128 + (asked.received if isinstance(asked, Stopped) else signal.SIGINT)) from None


def runs_option(runs: Path | None) -> list[str]:
    """Return `--runs` and its value, for a command that is shown to the user. The list is empty if the user did not give the option."""
    return ["--runs", str(runs)] if runs else []


def comma_separated(text: str) -> list[str]:
    """Split a text at its commas, and remove spaces around the parts."""
    return [part.strip() for part in text.split(",") if part.strip()]
