"""Try the functions of a recipe's own code before a study starts, so that they do not fail after hours of training."""

import torch

from tadistill.config import Recipe
from tadistill.config.objective import Custom
from tadistill.config.recipe import methods
from tadistill.data import datasets
from tadistill.errors import ConfigError, about
from tadistill.evaluation.own import score_own
from tadistill.own_code import load_function
from tadistill.train.step import own_divergence


def try_own_code(recipe: Recipe) -> None:
    """Score a reference and an empty answer by each metric, and compute each custom objective on random logits.

    Raises:
        ConfigError: a function fails, or returns something else than it should.
    """
    for i, metric in enumerate(recipe.metrics):
        row = datasets.load(recipe.data.test[0], "test", recipe.data)[0]
        with about(f"metrics.{i}"):
            score_own({metric.name: load_function(metric.function, recipe.runtime.code)}, [row.references[0], ""], [row, row])
    for method in methods(recipe):
        if isinstance(method.objective, Custom):
            with about("objective.function"):
                _try_objective(method.objective, recipe.runtime.code)


def _try_objective(objective: Custom, folder: str | None) -> None:
    function = load_function(objective.function, folder)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=generator) for _ in range(2))
    student.requires_grad_()
    what = f"objective `{function.name}` in {function.file}"
    try:
        values = own_divergence(function.call)(student, teacher, temperature=objective.temperature, **objective.settings)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(f"{what} fails on random logits: {type(error).__name__}: {error}; correct the function") from error
    if not isinstance(values, torch.Tensor) or values.shape != (5,):
        found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise ConfigError(f"{what} returns {found} for logits of shape (5, 7); return one value per token, a tensor of shape (5,)")
    if not values.requires_grad or not torch.isfinite(values).all():
        rule = "returns values that are not finite" if values.requires_grad else "has no gradient to the student's logits"
        raise ConfigError(f"{what} {rule}; correct the function")
