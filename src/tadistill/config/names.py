"""Names in a recipe that stand for nothing: a model, an arm or a checkpoint that it does not have."""

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tadistill.config.recipe import Recipe


def wrong_names(recipe: "Recipe") -> Iterator[str]:
    """Yield a sentence for every name that stands for nothing in a recipe."""
    for name, model in recipe.models.items():
        yield from _unknown(recipe, model.parent, f"models.{name} is made of")
        if model.checkpoint and model.checkpoint.of in recipe.models and model.checkpoint.step not in _kept(recipe, model.checkpoint.of):
            of, step = model.checkpoint.of, model.checkpoint.step
            yield f"models.{name} is `{of}` after update {step}, but that checkpoint is not kept; add {step} to models.{of}.sft.keep"
        if model.temper and model.temper.like is not None and model.temper.like not in recipe.arms:
            yield f"models.{name}.temper.like is `{model.temper.like}`, which is not an arm; {_choice(model.temper.like, recipe.arms)}"
    yield from _unknown(recipe, recipe.teacher, "teacher is")
    for name in (recipe.search.teacher, *recipe.search.assistants, recipe.search.student) if recipe.search else ():
        yield from _unknown(recipe, name, "search names")
    for name, arm in recipe.arms.items():
        for model in arm.models:
            yield from _unknown(recipe, model, f"arms.{name}.path names")
        if recipe.teacher in arm.learners:
            yield f"teacher is `{recipe.teacher}`, but arms.{name} trains this model; name a model that no arm trains"
        if arm.compute and arm.compute[3:] not in recipe.arms:
            yield f"arms.{name}.compute is `{arm.compute}`, which is not an arm; {_choice(arm.compute[3:], recipe.arms)}"


def _unknown(recipe: "Recipe", model: str | None, where: str) -> Iterator[str]:
    if model is not None and model not in recipe.models:
        fix = "write `>` between two models" if re.search(r"[-=–—]$|[→⇒,>]", model) else _choice(model, recipe.models)
        yield f"{where} `{model}`, which is not a model; {fix}"


def _kept(recipe: "Recipe", name: str) -> tuple[int, ...]:
    sft = recipe.models[name].sft
    return sft.keep if sft else ()


def _choice(given: str, names: Iterable[str]) -> str:
    """Return the fix for a name that does not exist: the name that is closest to it, and all names."""
    close = difflib.get_close_matches(given, list(names), n=1)
    return f"{f'did you mean `{close[0]}`? ' if close else ''}{'Choose' if close else 'choose'} one of {', '.join(names)}"
