"""Try the user's own metrics and objectives before a study starts, so that their mistakes are found before any stage has run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from tadistill.config import Data, DataRef, Recipe
from tadistill.config.objective import Custom
from tadistill.config.sampling import TopKSignal
from tadistill.data.datasets import SplitRows
from tadistill.data.rows import Example
from tadistill.errors import ConfigError, about
from tadistill.evaluation.text_scores import score_own
from tadistill.plan.arms import Plan
from tadistill.plan.graph import Stage
from tadistill.plan.kinds import TrainingSpec
from tadistill.plan.task import trainings
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


def try_objectives(plan: Plan, vocab: Callable[[str], int]) -> None:
    """Call the plan's own objectives with random logits, over as many columns as the trainings with them have.

    Args:
        vocab: returns the number of tokens that a model shares with the models of its tokenizer.

    Raises:
        ConfigError: an objective fails, does not return one finite value with a gradient per token, or mixes tokens.
    """
    tried: list[tuple[Custom, int]] = []
    for stage, spec in trainings(plan):
        objective = spec.method.objective
        if isinstance(objective, Custom) and (case := (objective, _columns(plan, stage, spec, vocab(stage.model)))) not in tried:
            tried.append(case)
            _try_objective(objective, plan.recipe.runtime.code, case[1])


def _columns(plan: Plan, stage: Stage, spec: TrainingSpec, vocab: int) -> int:
    # of a teacher's top tokens, the objective gets only these, and one column for all others
    served = [model.serve.signal for name in stage.teachers if (model := plan.recipe.models[name]).serve]
    signal = spec.method.signal or next(iter(served), None)
    return vocab if not isinstance(signal, TopKSignal) or signal.k >= vocab else signal.k + (signal.tail == "lump")


def _first_two(ref: DataRef, data: Data) -> list[Example]:
    rows = SplitRows.of(ref, "test", data)
    return replace(rows, limit=min(rows.limit or 2, 2)).read()


def _try_objective(objective: Custom, folder: str | None, columns: int) -> None:
    function = load_function(objective.function, folder)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(_TRIED, columns, generator=generator) for _ in range(2))
    student.requires_grad_()
    what = f"objective `{function.name}` in {function.file}"
    divergence = partial(own_divergence(function.call), temperature=objective.temperature, **objective.settings)

    def values(rows: list[int]) -> torch.Tensor:
        shape = f"logits of shape ({len(rows)}, {columns})"
        try:
            found = divergence(student[rows], teacher[rows])
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise ConfigError(f"{what} fails on random {shape}: {type(error).__name__}: {error}; correct the function") from error
        if not isinstance(found, torch.Tensor) or found.shape != (len(rows),):
            other = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
            raise ConfigError(f"{what} returns {other} for {shape}; return one value per token, a tensor of shape ({len(rows)},)")
        return found

    every = [*range(_TRIED)]
    found = values(every)
    if not found.requires_grad or not torch.isfinite(found).all():
        rule = "returns values that are not finite" if found.requires_grad else "has no gradient to the student's logits"
        raise ConfigError(f"{what} {rule}; correct the function")
    draws = not torch.equal(found, values(every))  # a function that draws random numbers is not compared
    for rows in ([0], [4, 1], [2, 3, 4], every[::-1]):
        if not torch.allclose(values(rows), found[rows], rtol=1e-3, atol=1e-5) and not draws:
            raise ConfigError(
                f"{what} gives a token another value if other tokens are beside it, but the loss is computed for a few tokens at a time; "
                "make a token's value depend on this token's logits only"
            )
