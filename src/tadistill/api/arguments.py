"""Read the arguments of the Python API: a recipe in any of its forms, its overrides, and lists of names."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tadistill.config import Recipe, load, parse
from tadistill.config.load import read
from tadistill.errors import ConfigError
from tadistill.text import shown

Given = str | Path | Recipe | Mapping[str, Any]
"""A recipe: the path of its file, the name of a recipe of the package, its YAML text, its content as a dict, or a `Recipe`."""


def read_recipe(recipe: Given, overrides: Sequence[str]) -> tuple[Recipe, str, str]:
    if isinstance(recipe, Recipe):
        if checked(overrides):
            raise ConfigError(f"overrides {list(overrides)} apply to a recipe's file, not to a `Recipe`; change it, or give the file")
        return recipe, _yaml(recipe), "recipe"
    is_text = isinstance(recipe, str) and ("\n" in recipe or recipe.lstrip().startswith("{"))
    if isinstance(recipe, str | Path) and not is_text:
        return load(recipe, checked(overrides)), read(recipe)[0], repr(str(recipe))
    if not isinstance(recipe, str | Mapping):
        raise ConfigError(f"`recipe` is {shown(recipe)}; give a path, the name of a recipe, YAML text, a dict or a Recipe")
    loaded = parse(recipe if isinstance(recipe, str) else dict(recipe), checked(overrides), source="recipe", folder=Path.cwd())
    return loaded, recipe if isinstance(recipe, str) else _yaml(loaded), "recipe"


def listed(name: str, given: Any, kinds: Any = str | Path) -> list[Any]:
    """Return what was given for the argument `name`, one item or several, as a list in which paths are texts."""
    items = [given] if isinstance(given, str | Path | Mapping) else list(given) if isinstance(given, Iterable) else []
    wrong = [item for item in items if not isinstance(item, kinds) or item == ""]
    if wrong or not items:
        what = f"has {shown(wrong[0])}" if wrong and len(items) > 1 else f"is {shown(given)}"
        raise ConfigError(f"`{name}` {what}; give a list of names, paths or hub ids")
    return [str(item) if isinstance(item, Path) else item for item in items]


def checked(overrides: Sequence[str]) -> Sequence[str]:
    if isinstance(overrides, str) or not isinstance(overrides, Sequence) or not all(isinstance(item, str) for item in overrides):
        raise ConfigError(f"overrides are {shown(overrides)}; give a list of texts KEY=VALUE, for instance ['seeds=[10]']")
    return overrides


def _yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True, exclude_unset=True), sort_keys=False, allow_unicode=True)
