"""The teacher of an arm that is a control of another arm (`arms.X.control`)."""

from collections.abc import Callable

from tadistill.config import Arm
from tadistill.errors import ConfigError
from tadistill.plan.builder import StageBuilder
from tadistill.plan.inputs import BehindApi, Handle, RandomWeights, is_served


def first_teacher(
    stages: StageBuilder, name: str, arm: Arm, teacher: Handle, seed: int, path_of: Callable[[str, int], list[Handle]]
) -> Handle:
    """Return the model that teaches first in the arm `name`. In a control, it can have random weights or another temperature.

    Args:
        teacher: the first model of the arm's path.
        path_of: returns the models of another arm's path, given its name and a seed.

    Raises:
        ConfigError: the control changes a teacher that is served.
    """
    control, model = arm.controls, arm.last[0]
    if control is None or control.kind == "no_teacher":
        return teacher
    if isinstance(teacher, BehindApi):
        raise ConfigError(
            f"arms.{name}.control is `{arm.control}`, but {model} is behind an API, so its weights and logits cannot be changed; remove "
            f"arms.{name}" + ("" if arm.control is None else ", or use the control `no_teacher`")
        )
    if is_served(teacher):
        raise ConfigError(
            f"arms.{name}.control is `{arm.control}`, but {model} is served, so its weights and logits cannot be changed here; remove "
            f"`serve` of {model}, or remove arms.{name}"
        )
    if control.kind == "random_teacher":
        return RandomWeights(random=seed, of=teacher)
    return stages.tempered(model, teacher, path_of(control.arm, seed)[-2], control.arm, seed)
