"""The functions of the user's own code that a recipe names, as parts of stages. They are imported and their signatures are checked."""

from tadistill.config import Recipe
from tadistill.config.objective import Custom, ObjectiveBase
from tadistill.errors import about
from tadistill.own_code import load_function
from tadistill.plan.inputs import OwnCode


def plan_objective(objective: ObjectiveBase, folder: str | None) -> OwnCode | None:
    """Return the function of a custom objective; None for other objectives. Raises ConfigError if it cannot be used."""
    if not isinstance(objective, Custom):
        return None
    with about("objective.function"):
        found = load_function(objective.function, folder)
        found.check("an objective is called with", "student_logits", "teacher_logits", **objective.settings)
    return OwnCode(function=found.name, source=found.digest)


def plan_metrics(recipe: Recipe) -> tuple[OwnCode, ...]:
    """Return the functions of the recipe's own metrics. Raises ConfigError if one cannot be used."""
    functions = []
    for i, metric in enumerate(recipe.metrics):
        with about(f"metrics.{i}"):
            functions.append(load_function(metric.function, recipe.runtime.code))
            functions[-1].check("a metric is called with", "prediction", "references")
    return tuple(OwnCode(function=found.name, source=found.digest) for found in functions)
