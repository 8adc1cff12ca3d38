"""Evaluate a loaded model on test sets."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import create_model

from tadistill.api.arguments import listed
from tadistill.config import Data, Evaluate
from tadistill.config.common import DTYPES, Strict
from tadistill.config.data import Limit, TestSets
from tadistill.config.load import read_settings
from tadistill.errors import ConfigError
from tadistill.results.collect import with_passes
from tadistill.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tadistill.data.encoding import EvalSet
    from tadistill.data.encoding_rules import Rules
    from tadistill.evaluation.run import Evaluation
    from tadistill.evaluation.token_scores import Subject


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    on: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    *,
    data_root: str | Path | None = None,
    template: str | None = None,
    settings: Evaluate | Mapping[str, Any] | None = None,
    limit: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate a loaded model on test sets. Return {set: {metric: mean over prompts and decoding seeds}}.

    Args:
        on: one test set or several. Each is a name (dolly, self_inst, tinyworld…), a JSONL file or a hub id with a test split, or a dict
            with the keys of a data set, such as {"load": "sums.jsonl", "columns": {"numeric": "answer"}}.
        data_root: the folder of local data sets; by default the variable TADISTILL_DATA.
        template: the text around an instruction: `alpaca` (the default), `chat` or `plain`.
        settings: the keys of a recipe's `evaluate`, such as {"seeds": [10], "max_new_tokens": 64}. The defaults are those of MiniLLM:
            temperature 1, 256 new tokens, seeds 10, 20, 30, 40 and 50. Unlike in a recipe, `also` and `bits_per_byte` are only measured
            if they are set, the metrics of `also` are called METRIC@NAME, and the model keeps its own number format. `tasks`, `fewshot`
            and `engine: vllm` are refused.
        limit: the number of rows that are used, from the start of each set; None for all rows.
        data: further keys of a recipe's `data`, such as {"max_prompt": 64, "world": {"people": 20}}. Use those with which the model was
            trained.

    Raises:
        ConfigError: an argument is wrong, for instance the name of a model instead of a loaded model.
    """
    from tadistill.data import datasets
    from tadistill.data.encoding import adds_bos, encoded_set
    from tadistill.data.encoding_rules import Rules
    from tadistill.evaluation.token_scores import Subject, unknown_text
    from tadistill.models.forward import evaluating
    from tadistill.models.tokens import end_tokens, shared_vocabulary

    sets = listed("on", on, str | Path | Mapping)
    read_settings(_Arguments, {"on": sets}, (), source="tadistill.evaluate")
    named = {"template": template, "root": data_root, "limit": None if limit is None else {"test": limit}}
    of_data = _data(sets, data, {key: value for key, value in named.items() if value is not None})
    if not isinstance(settings, Evaluate | Mapping | None):
        raise ConfigError(f"`settings` is {settings!r}; give a dict with keys of `evaluate`, for instance {{'seeds': [10]}}")
    decoding = settings if isinstance(settings, Evaluate) else read_settings(Evaluate, dict(settings or {}), (), source="settings")
    _check_call(model, tokenizer, decoding, of_data)
    model = getattr(model, "_orig_mod", model)  # torch.compile would compile the model again for each shape of a batch
    subject = Subject(model, tokenizer, shared_vocabulary(tokenizer, model), end_tokens(model, tokenizer))
    rules = Rules.of(of_data, "test", bos=of_data.bos == "auto" and adds_bos(tokenizer))
    found = {}
    with evaluating(model):
        for ref in of_data.test:
            examples = datasets.load(ref, "test", of_data)
            of_set, counts = encoded_set(ref.name, examples, tokenizer, rules)
            per_byte = rules if decoding.bits_per_byte else None
            for text in (f"{ref.name}: {counts.text}" if counts.text else "", unknown_text(of_set, tokenizer) if per_byte else ""):
                if text:
                    warnings.warn(text, stacklevel=2)
            found[ref.name] = _scores(subject, of_set, decoding, per_byte)
    return found


def _scores(subject: "Subject", of_set: "EvalSet", decoding: Evaluate, per_byte: "Rules | None") -> dict[str, float]:
    from tadistill.evaluation.run import evaluate as evaluate_set

    found = _means(evaluate_set(subject, of_set, decoding, per_byte=per_byte), decoding.pass_at)
    for name in decoding.also if "also" in decoding.model_fields_set else ():
        means = _means(evaluate_set(subject, of_set, decoding.other(name), read_references=False))
        found |= {f"{metric}@{name}": value for metric, value in means.items()}
    return found


_SETS = ("train", "dev", "test", "corpus")
"""Keys of `data` that an evaluation does not have, because its only data sets are those of `on`."""


def _without(model: type[Strict], *keys: str, **others: type[Strict]) -> Any:
    # a class with the other keys of `model`; `others` are the classes of groups of keys
    kept = {name: field for name, field in model.model_fields.items() if name not in keys}
    fields: dict[str, Any] = {name: (others.get(name, field.annotation), field) for name, field in kept.items()}
    return create_model(model.__name__, __base__=Strict, **fields)


_Keys = _without(Data, *_SETS, limit=_without(Limit, "train", "dev"))
"""The keys of `data` that an evaluation has. Messages about an unknown key name only these."""


class _Arguments(Strict):
    on: TestSets
    data: _Keys | None = None  # type: ignore[valid-type]
    """Is not read from here. With this field, the message about an unknown key of a set can name a key of `data`."""


def _data(sets: Sequence[Any], given: Mapping[str, Any] | None, named: Mapping[str, Any]) -> Data:
    """Return the settings of data: the test sets, the argument `data` (`given`), and the keys of other arguments (`named`)."""
    if not isinstance(given, Mapping | None):
        raise ConfigError(f"`data` is {shown(given)}; give a dict with keys of a recipe's `data`, for instance {{'max_prompt': 256}}")
    content = dict(given or {})
    if unused := [key for key in _SETS if key in content]:
        raise ConfigError(f"`data` has `{unused[0]}`, but the data sets of an evaluation are those of `on`; remove `{unused[0]}`")
    limits = content.get("limit")
    if unused := [key for key in ("train", "dev") if isinstance(limits, Mapping) and key in limits]:
        raise ConfigError(f"`data` has `limit.{unused[0]}`, but an evaluation only reads test sets; remove it, or write `limit.test`")
    if twice := [key for key in named if key in content]:
        argument = "data_root" if twice[0] == "root" else twice[0]
        raise ConfigError(f"`data` has `{twice[0]}`, which the argument `{argument}` also sets; remove one of the two")
    source = "tadistill.evaluate, data" if content else "tadistill.evaluate"
    read_settings(_Keys, {**content, **named}, (), source=source)
    rows = {"train": sets[0], "dev": sets[0], "test": list(sets)}  # nothing is trained, but `data` must have these keys
    return read_settings(Data, {**content, **named, **rows}, (), source=source)


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
