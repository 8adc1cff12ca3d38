"""Scores by metrics of the user's own code."""

import math
from collections.abc import Mapping, Sequence

from tadistill.data.datasets import Example
from tadistill.errors import ConfigError
from tadistill.own_code import OwnFunction


def score_own(functions: Mapping[str, OwnFunction], predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, list[float]]:
    """Return the scores of each metric, one value per prediction. A metric is called with a prediction and the list of its references.

    Raises:
        ConfigError: a metric fails, or returns something else than a finite number.
    """
    return {
        name: [_score(function, text, list(example.references)) for text, example in zip(predictions, examples, strict=True)]
        for name, function in functions.items()
    }


def _score(function: OwnFunction, prediction: str, references: list[str]) -> float:
    given = f"metric `{function.name}` in {function.file}, for the answer {prediction!r} and the references {references!r},"
    try:
        found = function.call(prediction, references)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{given} failed with {type(error).__name__}: {error}; correct the function") from error
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{given} returned {found!r}; return a number") from error
    if not math.isfinite(value):
        raise ConfigError(f"{given} returned {value}; return a finite number")
    return value
