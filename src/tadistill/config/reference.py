"""A description of all keys of recipes, made from the configuration classes. Each key has a meaning, a type, allowed values and a default.

`tadistill explain`, the JSON schema and the documentation use this description. The meaning of a key is the docstring of its field.
"""

import ast
import functools
import inspect
import itertools
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tadistill.config.common import MOST
from tadistill.config.recipe import Recipe
from tadistill.config.shorthand import SHORT_KEYS
from tadistill.text import counted

WORDS = ("none", "required", "as described")
"""Values of `Key.default`: the key has no default, the key must be given, the meaning of the key says the default."""
NAME = "NAME"
"""Placeholder for a name that the user chooses, as in the key `models.NAME.load`."""
_PAGES = {
    "": "reference/recipe.md",
    "arms": "reference/recipe.md#arms",
    "budgets": "concepts/compute.md#budgets",
    "data": "reference/recipe.md#data",
    "evaluate": "reference/recipe.md#evaluation",
    "method": "reference/recipe.md#method",
    "methods": "recipes.md#methods-of-your-own",
    "metrics": "reference/recipe.md#metrics-and-objectives-of-your-own",
    "models": "reference/recipe.md#models",
    "models.NAME.lora": "concepts/compute.md",
    "models.NAME.serve": "teachers.md",
    "objective": "reference/objectives.md",
    "control": "concepts/paths.md#controls",
    "dense": "concepts/paths.md",
    "fair": "concepts/paths.md#controls",
    "phases": "recipes.md#phases",
    "resources": "reference/cluster.md",
    "runtime": "reference/recipe.md#runtime",
    "sampler": "concepts/minillm.md",
    "search": "concepts/paths.md",
}
"""Maps keys to the page of `docs/` that explains them. A key or a group of keys is given by its place (`models.NAME.lora`), or by the first
or the last word of this place."""

_TITLES = {
    "concepts/compute.md": "Compute: predicted, metered, counted",
    "concepts/minillm.md": "MiniLLM and the samplers",
    "concepts/paths.md": "Paths",
    "reference/cluster.md": "On a cluster",
    "reference/objectives.md": "Objectives",
    "reference/recipe.md": "The recipe",
    "recipes.md": "Recipes by example",
    "teachers.md": "Teachers anywhere",
}

_SHORT_FORM = (
    "A recipe of one distillation, or of one fine-tuning (`student` and `method: sft`). The keys `teacher` and `student` replace `models` "
    "and `arms`. The student is not compared with the teacher."
)


@dataclass(frozen=True)
class Key:
    """The description of a key of a recipe."""

    name: str
    meaning: str
    type: str
    """The kind of value, in words such as `whole number`."""
    allowed: str
    """The allowed values, in words such as `at least 1`. Empty if every value of the type is allowed."""
    default: str
    """The default in the notation of recipes, or one of `WORDS`. Empty if the default is a group of keys with defaults of their own."""
    choices: tuple[str, ...] = ()
    """All allowed values, if they are a fixed list."""


@dataclass(frozen=True)
class Part:
    """The description of a group of keys of a recipe, such as the keys of `optim`."""

    name: str
    """The name of the class that defines the keys."""
    type: str
    """The value of the key `type` that chooses this group, such as `taid`. Empty if the group has no key `type`."""
    meaning: str
    places: tuple[str, ...]
    """All places of the group in a recipe, such as `method.optim` and `arms.NAME.optim`. The shortest place comes first. The place is empty
    for the keys at the top level."""
    keys: tuple[Key, ...]
    page: str
    """The page of `docs/` about the group, such as `reference/recipe.md#data`."""

    @property
    def more(self) -> str:
        """The title of `page`. Messages show it in place of the file's path, because an installed package has no `docs/`."""
        return page_text(self.page)


def page_text(page: str) -> str:
    """Return the name of a page of the documentation for messages. `page` is a path in `docs/`, such as `reference/recipe.md#data`."""
    path, _, anchor = page.partition("#")
    section = f', section "{anchor.replace("-", " ").capitalize()}"' if anchor else ""
    return f'the page "{_TITLES[path]}" of the documentation{section}'


def more_about(key: str, part: Part) -> str:
    """Return the name of the page about a key, such as `method.dense`. It is that of the key's group, `part`, if the key has no page."""
    page = _page(key)
    return page_text(page) if page else part.more


def _page(place: str) -> str | None:
    return _PAGES.get(place) or _PAGES.get(place.rsplit(".", 1)[-1])


@functools.cache
def reference() -> tuple[Part, ...]:
    """Return all groups of keys in the order of a recipe."""
    found: dict[type[BaseModel], list[str]] = {}
    for model, place in groups(Recipe):
        found.setdefault(model, []).append(place)
    parts = [_part(model, tuple(sorted(dict.fromkeys(places), key=lambda place: place.count(".")))) for model, places in found.items()]
    keys = tuple(Key(name, text, "text or keys", "", "required" if name == "student" else "none") for name, text in SHORT_KEYS.items())
    return (*parts, Part("Short form", "", _SHORT_FORM, ("",), keys, "reference/recipe.md#the-short-form"))


def groups(model: type[BaseModel], place: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Yield a configuration class and all classes below it, each with its place, such as `method.optim`. A class can have several
    places."""
    yield model, place
    for name, field in model.model_fields.items():
        below = dotted(place, field.alias or name)
        for child, named in _children(field.annotation):
            yield from groups(child, f"{below}.{NAME}" if named else below)


def _children(annotation: Any, named: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    # the configuration classes in a type annotation; True for those that are values of a dict
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, named
    for part in typing.get_args(annotation):
        yield from _children(part, named or typing.get_origin(annotation) is dict)


def dotted(*words: str) -> str:
    """Return a key with its place, such as `method.optim` and `lr`, as one text. The place is empty at the top level."""
    return ".".join(filter(None, words))


def meaning(model: type[BaseModel], field: str) -> str:
    """Return the docstring of a field. If the field has no docstring, return the first paragraph of the docstring of its type."""
    for cls in model.__mro__:
        if text := _docstrings(cls.__module__).get(cls.__qualname__, {}).get(field):
            return text
    behind = classes(model.model_fields[field].annotation)
    return _first_paragraph(behind[0]) if len(behind) == 1 else ""


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(model) or "").split("\n\n")[0].split())


def classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the configuration classes that the type annotation of a field contains."""
    return [cls for cls, _ in _children(annotation)]


def named_classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the configuration classes in a type annotation that are values of a dict. In a recipe, each object of such a class has a name,
    which is its key in the dict. For example, each model in `models` has a name."""
    return [cls for cls, named in _children(annotation) if named]


def tag(model: type[BaseModel]) -> str:
    """Return the value of `type` that chooses this class in a recipe. Return an empty string for a class without `type`."""
    return str(model.model_fields["type"].default) if "type" in model.model_fields else ""


def _part(model: type[BaseModel], places: tuple[str, ...]) -> Part:
    own = [name for name in model.model_fields if name in model.__annotations__]
    order = dict.fromkeys((["type"] if tag(model) else []) + own + list(model.model_fields))
    keys = tuple(_key(model, name, model.model_fields[name]) for name in order)
    page = _page(places[0]) or _PAGES[places[0].split(".", 1)[0]]
    return Part(model.__name__, tag(model), inspect.getdoc(model) or "", places, keys, page)


def _key(model: type[BaseModel], name: str, field: FieldInfo) -> Key:
    chosen = _choices(field)
    if name == "type":
        return Key(name, f"`{tag(model)}` chooses the following keys. {_first_paragraph(model)}", "text", "", "required", chosen)
    return Key(
        field.alias or name, meaning(model, name), _kind(_written_as(model, name)), _allowed(field, chosen), _default(model, name), chosen
    )


def _written_as(model: type[BaseModel], name: str) -> Any:
    for validator in model.__pydantic_decorators__.field_validators.values():
        if name in validator.info.fields and validator.info.mode == "before":
            return validator.info.json_schema_input_type
    return model.model_fields[name].annotation


@functools.cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    source = getattr(sys.modules.get(module), "__file__", None)
    if source is None or not module.startswith("tadistill."):
        return {}
    bodies = {node.name: node.body for node in ast.parse(Path(source).read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)}
    return {name: dict(_texts(body)) for name, body in bodies.items()}


def _texts(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for first, second in itertools.pairwise(body):
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name) and isinstance(second, ast.Expr):
            text = second.value.value if isinstance(second.value, ast.Constant) else None
            if isinstance(text, str):
                yield first.target.id, " ".join(text.split())


# --- words for types and values -----------------------------------------------------------------------------------------

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}
_MANY = {"whole number": "whole numbers", "number": "numbers", "keys": "groups of keys", "list of texts": "lists of texts"}


def _kind(annotation: Any) -> str:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(inside[0])
    if origin in (typing.Union, types.UnionType):
        kinds = dict.fromkeys(_kind(part) for part in inside if part is not type(None))
        return (", or " if len(kinds) > 1 and any(" or " in kind for kind in kinds) else " or ").join(kinds)
    if origin is typing.Literal:
        return "text" if all(isinstance(value, str) for value in inside) else "number"
    if origin in (tuple, list):
        kind = " or ".join(_MANY.get(part, f"{part}s") for part in _kind(inside[0]).split(" or "))
        return f"list of {len(inside)} {kind}" if len(inside) > 1 and inside[-1] is not Ellipsis else f"list of {kind}"
    if origin is dict:
        return f"{_kind(inside[1])} by name"
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    short = [form for form, key in (("text", annotation.text_sets), ("list", annotation.list_sets)) if key]
    return " or ".join([*short, "keys"])


def _choices(field: FieldInfo) -> tuple[str, ...]:
    types_below = [tag(model) for model in classes(field.annotation)]
    return tuple(dict.fromkeys(str(value) for value in _values(field.annotation))) or tuple(filter(None, types_below))


def _values(annotation: Any) -> list[Any]:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return [*inside]
    extras = [part.json_schema_extra for part in inside if isinstance(part, FieldInfo)]
    listed = [value for extra in extras if isinstance(extra, dict) for value in extra["anyOf"][0]["enum"]]  # type: ignore[index,call-overload]
    return listed + [value for part in (inside[:1] if origin is dict else inside) if not classes(part) for value in _values(part)]


_BOUNDS = {"gt": "greater than {}", "ge": "at least {}", "lt": "less than {}", "le": "at most {}"}
_SIZES = {"min_length": "at least {}", "max_length": "at most {}"}


def _allowed(field: FieldInfo, choices: tuple[str, ...]) -> str:
    if choices:
        return f"{'`type` is ' if classes(field.annotation) else ''}one of {', '.join(choices)}"
    rules = [*field.metadata, *_rules(field.annotation)]
    limits = {name: value for rule in rules for name in _BOUNDS if (value := getattr(rule, name, None)) not in (None, MOST)}
    words = [_BOUNDS[name].format(_plain(value)) for name, value in limits.items()]
    if {*limits} == {"ge", "le"}:
        words = [f"from {_plain(limits['ge'])} to {_plain(limits['le'])}"]
    unit = ("character", "characters") if _kind(field.annotation) == "text" else ("entry", "entries")
    sizes = {name: value for rule in rules for name in _SIZES if (value := getattr(rule, name, None))}
    words += [text.format(counted(value, *unit)) for name, text in _SIZES.items() if (value := sizes.get(name))]
    return ", ".join(words)


def _rules(annotation: Any) -> list[Any]:
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return [rule for extra in inside[1:] for rule in getattr(extra, "metadata", [extra])] + _rules(inside[0])
    parts = inside[1:] if typing.get_origin(annotation) is dict else inside
    return [rule for part in parts for rule in _rules(part)]


def _plain(value: Any) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _default(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    plain = _written(value)
    if plain == {} and value != {}:
        return ""
    if re.search("The default is |By default,", meaning(model, name)):
        return "as described"
    return "none" if value is None or value in ((), "", {}) else _flow(plain)


def _written(value: Any) -> Any:
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return ({"type": tag(type(value))} if tag(type(value)) else {}) | given
    if isinstance(value, dict):
        return {name: _written(part) for name, part in value.items()}
    return [_written(part) for part in value] if isinstance(value, tuple) else value


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
