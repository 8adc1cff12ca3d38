"""The Python API, with the functions `tadistill.run` and `tadistill.evaluate`."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from tadistill.config import Data, Evaluate, Recipe, load, validate
from tadistill.config.load import read_settings
from tadistill.errors import ConfigError
from tadistill.report import read_results, write_report
from tadistill.runner.study import run_study
from tadistill.store import runs_directory, store_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(recipe: str | Path | Recipe | Mapping[str, Any], overrides: Sequence[str] = (), *, runs: str | Path | None = None) -> Path:
    """Run a study, write its report, and return the path of report.html. Finished stages are reused.

    `recipe` is the path of a file, a `Recipe`, or a dict with the content of a recipe. Call this function under
    `if __name__ == "__main__":`, because stages run in separate processes.

    Raises:
        ConfigError: the recipe is wrong, or overrides were given for a `Recipe` object.
        TadistillError: a stage failed.
    """
    if isinstance(recipe, Mapping):
        recipe = validate(dict(recipe))
    if isinstance(recipe, Recipe):
        if overrides:
            raise ConfigError(
                f"overrides {list(overrides)} apply to a recipe's file, not to a `Recipe`; change the `Recipe`, or give the file's path"
            )
        content = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        loaded, text, arguments = recipe, yaml.safe_dump(content, sort_keys=False, allow_unicode=True), ["recipe"]
    else:
        loaded, text = load(recipe, overrides), Path(recipe).read_text(encoding="utf-8")
        arguments = [repr(str(recipe)), *([repr(list(overrides))] if overrides else [])]
    command = f"tadistill.run({', '.join([*arguments, *([f'runs={str(runs)!r}'] if runs else [])])})"
    root = runs_directory(runs)
    study = run_study(loaded, runs=root, recipe_text=text, command=command)
    return write_report(read_results(study, store_of(root)))


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    on: str | Sequence[str],
    *,
    data_root: str | None = None,
    template: str = "alpaca",
    settings: Evaluate | Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate a loaded model on test sets. Return {set: {metric: mean over prompts and decoding seeds}}.

    Args:
        on: one test set or several. Each is a name (dolly, self_inst, tinyworld…), a JSONL file or a hub id. Its test split is read.
        settings: settings of decoding, also as a dict such as {"seeds": [10], "max_new_tokens": 64}. The default is as in MiniLLM:
            temperature 1, 256 new tokens, seeds 10, 20, 30, 40 and 50.
        limit: the number of rows that are read from the start of each set; None for all rows.
    """
    from tadistill.data import datasets
    from tadistill.data.templates import EvalSet, Lengths, adds_bos, encode_counted
    from tadistill.evaluation.run import evaluate as evaluate_set
    from tadistill.evaluation.scoring import Subject
    from tadistill.models.loading import end_tokens, shared_vocabulary

    sets = [on] if isinstance(on, str) else list(on)
    if not sets:
        raise ConfigError("`on` is empty; give at least one test set, for instance on=['dolly']")
    content = {"train": sets[0], "dev": sets[0], "test": sets, "root": data_root, "template": template, "limit": {"test": limit}}
    data = read_settings(Data, content, (), source="tadistill.evaluate")
    decoding = settings if isinstance(settings, Evaluate) else read_settings(Evaluate, dict(settings or {}), (), source="settings")
    subject = Subject(model.eval(), tokenizer, shared_vocabulary(tokenizer, model), end_tokens(model, tokenizer))
    lengths = Lengths(data.max_prompt, data.max_length, data.long_prompts, adds_bos(tokenizer))
    found = {}
    for ref in data.test:
        examples = datasets.load(ref, "test", data)
        encoded, counts = encode_counted(examples, tokenizer, lengths, template=data.template, name=ref.name)
        if counts.text:
            warnings.warn(f"{ref.name}: {counts.text}", stacklevel=2)
        evaluation = evaluate_set(subject, EvalSet(ref.name, examples, encoded), decoding)
        means = {metric: float(np.mean(values)) for metric, values in evaluation.scores.items()}
        found[ref.name] = means | evaluation.corpus["numbers"]
    return found
