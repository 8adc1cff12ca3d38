"""The teacher of an arm that is a control of another arm (`arms.X.control`)."""

from collections.abc import Callable, Iterator, Mapping

from tadistill.config import Arm, Recipe
from tadistill.config.arm import is_route, members
from tadistill.errors import ConfigError
from tadistill.plan.builder import StageBuilder
from tadistill.plan.inputs import BehindApi, Handle, RandomWeights, is_served


def teaching(
    stages: StageBuilder, name: str, arm: Arm, head: str, made: Mapping[str, Handle], seed: int, path_of: Callable[[str, int], list[Handle]]
) -> list[tuple[str, Handle]]:
    """Return name and model of each teacher at the start of a path. In a control, a teacher can have random weights or another temperature.

    Args:
        head: the first part of the path: a model, or the teachers of a route.
        made: the models of the arm by name.
        path_of: returns the models of another arm's path, given its name and a seed.

    Raises:
        ConfigError: the control changes a teacher that is served, or the teachers of a route.
    """
    control = arm.controls
    if control is None or control.kind == "no_teacher":
        return [(model, made[model]) for model in members(head)]
    if is_route(head):
        raise ConfigError(
            f"arms.{name}.control is `{arm.control}`, but in `{head}` several models teach; use `no_teacher of {control.arm}`, or name an "
            "arm with one teacher"
        )
    return [(head, _changed(stages, name, arm, made[head], seed, path_of))]


def fair_notes(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence if `fair: true` adds no arm to the recipe."""
    chains = [arm for arm in recipe.arms.values() if len(arm.path) == 1 and len(arm.last) > 2]
    if recipe.fair and not any(not (arm.control or arm.init or arm.compute) for arm in chains):
        yield (
            "`fair: true` adds no arms, because it needs an arm with a single path through an assistant, such as A > B > C, and with "
            "neither `init` nor `compute`."
        )


def _changed(stages: StageBuilder, name: str, arm: Arm, teacher: Handle, seed: int, path_of: Callable[[str, int], list[Handle]]) -> Handle:
    control, model = arm.controls, arm.last[0]
    assert control is not None
    if isinstance(teacher, BehindApi):
        raise ConfigError(
            f"arms.{name}.control is `{arm.control}`, but {model} is behind an API, so its weights and logits cannot be changed; remove "
            f"arms.{name}, or use the control `no_teacher`"
        )
    if is_served(teacher):
        raise ConfigError(
            f"arms.{name}.control is `{arm.control}`, but {model} is served, so its weights and logits cannot be changed here; remove "
            f"`serve` of {model}, or remove arms.{name}"
        )
    if control.kind == "random_teacher":
        return RandomWeights(random=seed, of=teacher)
    like = stages.recipe.arms[control.arm].last[-2], path_of(control.arm, seed)[-2]
    return stages.tempered(model, teacher, like, control.arm, seed)
