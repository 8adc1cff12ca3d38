"""docs/reference/recipe.md names every key of a recipe."""

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from tadistill.config import Recipe

FILE = Path(__file__).parents[3] / "docs" / "reference" / "recipe.md"
PAGE = re.sub(r"```.*?```", "", FILE.read_text(encoding="utf-8"), flags=re.DOTALL)
ELSEWHERE = {"Search": "paths.md", "Resources": "cluster.md"}


def classes(annotation: Any) -> set[type[BaseModel]]:
    """Return the configuration classes that an annotation mentions, at any depth."""
    found = {annotation} if isinstance(annotation, type) and issubclass(annotation, BaseModel) else set()
    return found.union(*(classes(part) for part in get_args(annotation)))


def reached(start: type[BaseModel]) -> set[type[BaseModel]]:
    """Return the classes behind a class's fields, with itself."""
    todo, seen = [start], set()
    while todo:
        if (cls := todo.pop()) not in seen:
            seen.add(cls)
            todo += [c for field in cls.model_fields.values() for c in classes(field.annotation)]
    return seen


def test_recipe_page_names_every_key_and_type():
    named = set(re.findall(r"[A-Za-z_0-9]+", " ".join(re.findall(r"`([^`]+)`", PAGE))))
    for cls in reached(Recipe):
        if cls.__name__ in ELSEWHERE:
            assert ELSEWHERE[cls.__name__] in PAGE
            continue
        for name, field in cls.model_fields.items():
            assert (field.alias or name) in named, f"{cls.__name__}.{name} is not in docs/reference/recipe.md"
            if name == "type":
                assert field.default in named, f"type {field.default} is not in docs/reference/recipe.md"
