"""Try the user's own metrics and objectives before a study starts, so that their mistakes are found before any stage has run."""

from dataclasses import replace
from functools import partial

import torch

from tadistill.config import Data, DataRef, Recipe
from tadistill.config.objective import Custom
from tadistill.config.recipe import methods
from tadistill.data.datasets import SplitRows
from tadistill.data.rows import Example
from tadistill.errors import ConfigError, about
from tadistill.evaluation.text_scores import score_own
from tadistill.train.step import own_divergence
from tadistill.user_code import load_function

_TRIED = 5  # tokens


def try_metrics(recipe: Recipe) -> None:
    """Call the recipe's own metrics with answers to the first rows of every test set.

    Raises:
        ConfigError: a metric fails, or returns what its unit does not allow.
        DataError: a test set cannot be read.
    """
    if recipe.metrics and not recipe.data.test:
        raise ConfigError("`metrics` need a test set, but data.test names none; name one, or remove `metrics`")
    rows = {ref.name: _first_two(ref, recipe.data) for ref in recipe.data.test} if recipe.metrics else {}
    for i, metric in enumerate(recipe.metrics):
        with about(f"metrics.{i}"):
            own, (low, high) = {metric.name: load_function(metric.function, recipe.runtime.code)}, metric.row.bounds
            for name, (row, *more) in rows.items():  # a right answer, that of another row, and two that a poor model may write
                answers = [row.references[0], *(other.references[0] for other in more[:1]), "", "?"]
                scores = score_own(own, answers, [row] * len(answers))[metric.name]
                if outside := [value for value in scores if not low <= value <= high]:
                    raise ConfigError(
                        f"`{metric.name}` returned {outside[0]:g} for a row of `{name}`, but the unit `{metric.unit}` allows only "
                        f"{low:g} to {high:g}; change the function, or give the metric another `unit`"
                    )


def try_objectives(recipe: Recipe, vocab: int) -> None:
    """Call the recipe's own objectives with random logits over `vocab` tokens, the vocabulary that the models share.

    Raises:
        ConfigError: an objective fails, does not return one finite value with a gradient per token, or mixes tokens.
    """
    for method in methods(recipe):
        if isinstance(method.objective, Custom):
            with about("objective.function"):
                _try_objective(method.objective, recipe.runtime.code, vocab)


def _first_two(ref: DataRef, data: Data) -> list[Example]:
    rows = SplitRows.of(ref, "test", data)
    return replace(rows, limit=min(rows.limit or 2, 2)).read()


def _try_objective(objective: Custom, folder: str | None, vocab: int) -> None:
    function = load_function(objective.function, folder)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(_TRIED, vocab, generator=generator) for _ in range(2))
    student.requires_grad_()
    what = f"objective `{function.name}` in {function.file}"
    divergence = partial(own_divergence(function.call), temperature=objective.temperature, **objective.settings)
    try:
        values = divergence(student, teacher)
        again, some = (divergence(student[:n], teacher[:n]) for n in (_TRIED, 2))
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        shape = f"random logits of shape ({_TRIED}, {vocab})"
        raise ConfigError(f"{what} fails on {shape}: {type(error).__name__}: {error}; correct the function") from error
    if not isinstance(values, torch.Tensor) or values.shape != (_TRIED,):
        found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise ConfigError(
            f"{what} returns {found} for logits of shape ({_TRIED}, {vocab}); return one value per token, a tensor of shape ({_TRIED},)"
        )
    if not values.requires_grad or not torch.isfinite(values).all():
        rule = "returns values that are not finite" if values.requires_grad else "has no gradient to the student's logits"
        raise ConfigError(f"{what} {rule}; correct the function")
    if torch.equal(values, again) and not torch.allclose(values[:2], some, rtol=1e-3, atol=1e-5):  # one that draws numbers is not compared
        raise ConfigError(
            f"{what} gives two tokens other values when they are alone than among {_TRIED} tokens, but the loss is computed for a few "
            "tokens at a time; make a token's value depend on this token's logits only"
        )
