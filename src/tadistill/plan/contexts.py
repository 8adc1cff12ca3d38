"""Teachers with a prompt of their own (`context`), and checks of models that teach themselves."""

from collections.abc import Iterator

from tadistill.config import Arm, Method, Recipe
from tadistill.config.arm import ModelPath, flat
from tadistill.config.combinations import apply, phases_of
from tadistill.config.method_parts import TeacherContext
from tadistill.errors import ConfigError, about


def check_itself(recipe: Recipe, name: str, arm: Arm, teacher: str, learner: str, method: Method) -> None:
    """Check that a student of the arm `name` does not learn from an exact copy of itself, and that the arm can use `ema`.

    With `ema`, the teacher is a moving average of the student.

    Raises:
        ConfigError: teacher and student have the same weights and read the same prompts, so the loss would be 0. Or `ema` is set, but the
            teacher is another model than the student. Or `ema` is set in a control.
    """
    if method.ema is not None and teacher != learner:
        raise ConfigError(
            f"arms.{name}: with `ema`, the teacher is a moving average of the student, but in `{arm.text}`, {teacher} teaches {learner}; "
            f"write `{learner} > {learner}`, or remove `ema`"
        )
    if method.ema is not None and arm.controls:
        raise ConfigError(
            f"arms.{name} is a control (`{arm.control}`), whose teacher must not change, but with `ema`, the teacher follows the student; "
            f"set `ema` in arms.{arm.controls.arm}, not in the recipe's `method`"
        )
    same = _is_students_prompt(recipe, method.context)
    if teacher != learner or not method.uses_teacher or (method.context and not same):
        return
    prompt = ", and the teacher's `context` is exactly the student's prompt" if same else ""
    if method.ema is None:
        raise ConfigError(
            f"arms.{name}: in `{arm.text}`, {learner} teaches itself{prompt}, so there is nothing to learn; give the teacher a prompt of "
            "its own (`context`), or name an older checkpoint of the model as teacher (`models.NAME: {checkpoint: {of: MODEL, step: N}}`)"
        )
    if not method.objective.imitates_text:
        raise ConfigError(
            f"arms.{name}: with `ema`, student and teacher begin with the same weights and read the same prompts{prompt}, so there is "
            "nothing to learn; give the teacher a prompt of its own (`context`), such as `{output} {prompt}`"
        )


def _is_students_prompt(recipe: Recipe, context: TeacherContext | None) -> bool:
    if context is None or context.template != "{prompt}" or context.system is not None:
        return False
    return recipe.data.template != "chat" if context.chat is None else not context.chat  # a chat template would write a turn around it


def contexts_of(recipe: Recipe) -> dict[TeacherContext, set[str]]:
    """Return every `context` (own prompt of a teacher) of a recipe, with the names of the models that teach with it.

    Equal contexts are one entry. Models behind an API are left out, because they get messages and not tokens.

    Raises:
        ConfigError: settings of an arm's method do not fit together.
    """
    found: dict[TeacherContext, set[str]] = {}
    for name, arm in recipe.arms.items():
        with about(f"arms.{name}"):
            for method, path, i in _distillations(recipe, arm):
                if method.context:
                    names = {name for name in flat(path[:i] if method.dense else path[i - 1 : i]) if not recipe.models[name].api}
                    found.setdefault(method.context, set()).update(names)
    return {context: names for context, names in found.items() if names}


def _distillations(recipe: Recipe, arm: Arm) -> Iterator[tuple[Method, ModelPath, int]]:
    # the method of each phase, the path, and the student's index in the path
    for path in arm.path:
        for i, model in enumerate(path[1:], 1):
            for method, _ in phases_of(apply(recipe.method, recipe.models[model].distill, arm.patch)):
                yield method, path, i
