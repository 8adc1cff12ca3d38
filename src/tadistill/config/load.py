"""Load a recipe file and apply overrides, such as `method.optim.lr=1e-4`. Error messages name the key and its line.

A recipe cannot refer to anything outside its file. References `${…}`, as OmegaConf has them, are errors.
"""

import contextlib
import difflib
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tadistill.config.common import Strict
from tadistill.config.error_messages import problems
from tadistill.config.recipe import Recipe, own_functions
from tadistill.config.recipe_files import (
    DEEPEST,
    NO_REFERENCES,
    Lines,
    check_nesting,
    contents,
    located,
    settled,
    shipped,
    where,
    with_loader,
)
from tadistill.config.reference import classes, named_classes
from tadistill.config.shorthand import SHORT_KEYS, in_short, is_short, lines_of_whole, whole
from tadistill.errors import ConfigError, about, leads_nowhere
from tadistill.text import counted

Settings = typing.TypeVar("Settings", bound=BaseModel)
_SHOWN = 20
"""Largest number of problems that one error message shows."""


def study_in(recipe: Path) -> str | None:
    """Return the name of the study in a recipe file. Return None if the file is not a recipe.

    Other keys may be wrong, because the file may have been edited since the study ran.
    """
    if recipe.suffix not in (".yaml", ".yml") or not recipe.is_file():
        return None
    try:
        text = recipe.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None

    def name(loader: Any) -> str | None:
        check_nesting(text, str(recipe), loader)
        node = yaml.compose(text, Loader=loader)
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        names = [value.value for key, value in pairs if key.value == "study" and isinstance(value, yaml.ScalarNode)]
        return next(filter(None, names), None)

    with contextlib.suppress(yaml.YAMLError, ConfigError):
        return with_loader(name)
    return None


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    Args:
        path: a YAML file, or the name of a recipe of the package (`config.recipe_files`).
        overrides: `key.sub=value` strings, applied in order. A name that contains dots is written in brackets, as in
            `arms[2.D].path=xl > s`.

    Raises:
        ConfigError: the file is missing or not YAML, or the recipe breaks a rule.
    """
    text, folder = read(path)
    return parse(text, overrides, source=str(path), folder=folder)


def read(recipe: str | Path) -> tuple[str, Path]:
    """Return the text of a recipe and the folder of its file. `recipe` is a path, or the name of a recipe of the package.

    Raises:
        ConfigError: there is no such recipe, or it cannot be read.
    """
    path = located(recipe)
    if path.is_dir():
        there = ", ".join(sorted(p.name for p in path.glob("*.y*ml"))[:8])
        raise ConfigError(f"`{path}` is a folder; write the path of a recipe's file{f' in it ({there})' if there else ''}")
    if broken := leads_nowhere(path):
        raise ConfigError(f"there is no recipe `{path}`: {broken}")
    if not path.is_file():
        names = [p.name for p in path.absolute().parent.glob("*.y*ml")]
        stems = {Path(name).stem: name for name in names}  # the suffix makes all names similar
        near = difflib.get_close_matches(path.stem, stems, n=1)
        close = [f"{path.name}.yaml"] if f"{path.name}.yaml" in names else [stems[stem] for stem in near]
        close = [str(path.parent / name) for name in close] or difflib.get_close_matches(
            path.as_posix().removesuffix(path.suffix), shipped(), n=1
        )
        hint = f"did you mean `{close[0]}`?" if close else "give the path of a YAML file, or a name that `tadistill recipes` lists"
        raise ConfigError(f"there is no recipe `{path}` in {path.absolute().parent}; {hint}")
    try:
        return path.read_text(encoding="utf-8-sig"), path.absolute().parent
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error


def parse(given: str | dict[str, typing.Any], overrides: typing.Sequence[str] = (), *, source: str, folder: Path | None = None) -> Recipe:
    """Parse and validate a recipe, given as YAML text or as plain data.

    Args:
        overrides: as for `load`.
        source: the name of the recipe in error messages.
        folder: the folder in which relative paths of the recipe start. By default, they start in the working directory.

    Raises:
        ConfigError: the text is not YAML, or the recipe breaks a rule.
    """
    recipe, lines = _built(*_merged(given, overrides, source, "seeds=[10]", Recipe), source)
    if folder:
        recipe = settled(recipe, source, folder, lines)
    return _with_code(recipe, source, folder, lines) if own_functions(recipe) else recipe


def validate(raw: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Build a recipe from plain data (a dict). Raises ConfigError if the recipe breaks a rule. `source` is the recipe's name in
    messages."""
    return _built(raw, {}, source)[0]


def _built(raw: dict[str, Any], lines: Lines, source: str) -> tuple[Recipe, Lines]:
    # a recipe, and the line of each key of its long form
    if not is_short(raw):
        return _validated(Recipe, raw, source, lines), lines
    with about(source):
        raw, lines = whole(raw), lines_of_whole(lines)
    return _validated(Recipe, raw, source, lines, in_short), lines


def _with_code(recipe: Recipe, source: str, folder: Path | None, lines: Lines) -> Recipe:
    # the recipe with the path of the folder that has the user's own modules
    modules, code, there = recipe.runtime.code or "", "", False
    try:
        code = os.path.normpath((folder or Path()).resolve() / Path(modules).expanduser())
        there = Path(code).is_dir()
    except (OSError, RuntimeError, ValueError):  # no user of this name, or a path that cannot exist
        pass
    if not there:
        raise ConfigError(
            f"{where(source, lines, ('runtime', 'code'))} is `{modules}`, which is not a folder; name the folder of your Python modules"
        )
    if recipe._origin:
        recipe._origin.written.setdefault(code, modules)
    return recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"code": code})})


def read_settings(model: type[Settings], given: dict[str, Any], overrides: typing.Sequence[str], *, source: str) -> Settings:
    """Return the settings of a command, built from its options (`given`) and its `key=value` overrides.

    Raises:
        ConfigError: a key is unknown, or a value breaks a rule.
    """
    return _validated(model, _merged(given, overrides, source, "temperature=0.5", model)[0], source, {})


def _validated(
    model: type[Settings], raw: dict[str, Any], source: str, lines: Lines, worded: Callable[[str], str] = lambda sentence: sentence
) -> Settings:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = problems(error, raw, model)
        sentences = [worded(f"{where(source, lines, key)}{text}") for key, text in found[:_SHOWN]]
        left = len(found) - _SHOWN
        more = counted(left, "more problem is", "more problems are")
        rest = [f"{source}: {more} shown when those above are corrected"] if left > 0 else []
        raise ConfigError(*sentences, *rest) from error


def _merged(
    given: str | dict[str, Any], overrides: typing.Sequence[str], source: str, example: str, model: type[BaseModel]
) -> tuple[dict[str, Any], Lines]:
    content, lines = contents(given, source) if isinstance(given, str) else (given, {})
    tree = _plain(content, source, lines)
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} is not a recipe; write a YAML mapping with the keys study, seeds, models, data and arms")
    for item in overrides:
        name, sign, text = item.partition("=")
        at = _levels(name)
        if not sign or not name:
            lacks = "key before the `=`" if sign else "`=`"
            raise ConfigError(f"override `{item}` has no {lacks}; write key.sub=value, for instance {example}")
        if not at:
            raise ConfigError(
                f"override `{item}`: `{name}` is not a key; write one dot between two names, and a name with dots in brackets, as in "
                "arms[2.D].path"
            )
        if "${" in item:
            raise ConfigError(f"override `{item}` {NO_REFERENCES}")
        if len(at) > DEEPEST:
            raise ConfigError(f"override `{item}` has a key with more than {DEEPEST} levels, which no recipe needs; correct the key")
        value = _plain(contents(text, f"override `{item}`", check_keys=False)[0], f"override `{item}`", {}, at)
        _set(tree, at, value, model, item)
        for key in _leaves(at, value):
            lines = {other: line for other, line in lines.items() if other[: len(key)] != key} | {key: item, at: item}
    return tree, lines


def _plain(value: Any, what: str, lines: Lines, at: tuple = ()) -> Any:
    # a copy; YAML reads an arm called 2.1 as a number, but an override does not
    if hasattr(value, "tolist") and not isinstance(value, type):  # a number, a text or an array of NumPy or torch, in a dict from Python
        value = value.tolist()
    if isinstance(value, dict):
        if None in value:
            raise ConfigError(f"{what} has a key without a name; write its name, or put the value in quotes if it is a text")
        return {str(name): _plain(part, what, lines, (*at, str(name))) for name, part in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(part, what, lines, (*at, i)) for i, part in enumerate(value)]
    if isinstance(value, Path):  # in a dict from Python
        return str(value)
    if value is not None and not isinstance(value, str | int | float):
        place = where(what, lines, at).removesuffix(":")
        raise ConfigError(f"{place} is {value!r}, but a value is a text, a number, true, false, a list or a group of keys")
    return value


def _set(tree: dict[str, Any], levels: tuple[str, ...], value: Any, root: type[BaseModel], item: str) -> None:
    """Change the value of a key. A text above this key that stands for a group of keys (`Strict.text_sets`) is replaced by this group.

    Raises a ConfigError if the override `item` changes a part of a list.
    """
    models, named = [root], False
    for depth, name in enumerate(levels[:-1]):
        fields = [] if named else [field for m in models for key, field in m.model_fields.items() if (field.alias or key) == name]
        named = any(named_classes(field.annotation) for field in fields)
        models = [cls for field in fields for cls in classes(field.annotation)] if fields else models
        keys = {m.text_sets for m in models if isinstance(m, type) and issubclass(m, Strict) and m.text_sets}
        if depth == 0 and name in SHORT_KEYS and is_short(tree):
            keys = {"load"}
        below = tree.get(name)
        if isinstance(below, list):
            key = ".".join(levels[: depth + 1])
            raise ConfigError(f"override `{item}` changes a part of the list `{key}`; write the whole list: {key}=[…]")
        if not isinstance(below, dict):
            below = {keys.pop(): below} if isinstance(below, str) and len(keys) == 1 else {}
        tree[name] = below
        tree = below
    tree[levels[-1]] = _changed(tree.get(levels[-1]), value)


def _changed(old: Any, new: Any) -> Any:
    # a group of keys changes only the keys that it names, but an empty group empties
    if isinstance(old, dict) and isinstance(new, dict) and new:
        return old | {name: _changed(old.get(name), part) for name, part in new.items()}
    return new


_PLAIN, _BRACKETS = r"[^.\[\]]+", r"\[[^\[\]]+\]"
_KEY = re.compile(rf"({_PLAIN}|{_BRACKETS})(\.{_PLAIN}|\.?{_BRACKETS})*")


def _levels(key: str) -> tuple[str, ...]:
    # the names in a key such as arms[2.D].path; none if it is malformed
    return tuple(name.strip("[]") for name in re.findall(rf"{_PLAIN}|{_BRACKETS}", key)) if _KEY.fullmatch(key) else ()


def _leaves(at: tuple, value: Any) -> Iterator[tuple]:
    # yields the place of each part that is no mapping, or an empty one
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves((*at, name), part)
    else:
        yield at
