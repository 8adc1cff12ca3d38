"""Read a recipe file and apply overrides (`method.optim.lr=1e-4`). An error message names the key and its line."""

import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from tadistill.config.recipe import Recipe
from tadistill.errors import ConfigError

Settings = typing.TypeVar("Settings", bound=BaseModel)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file.
        overrides: `key.sub=value` strings, applied in order. Write a name with dots in brackets (`arms[2.D].path=xl > s`).

    Raises:
        ConfigError: the file is missing or not YAML, or the recipe breaks a rule.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no recipe at {path}; give the path of a YAML file, for instance recipes/quickstart.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    return parse(text, overrides, source=str(path))


def parse(text: str, overrides: typing.Sequence[str] = (), *, source: str) -> Recipe:
    """Read a recipe from YAML text, as `load` does. Error messages give `source` as the name of the text."""
    raw = _merged(text, overrides, source, "seeds=[10]")
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} contains no recipe; write a mapping with the keys study, seeds, models, data and arms")
    return validate(_string_keys(raw), source=source, text=text)


def validate(raw: dict[str, Any], *, source: str = "recipe", text: str = "") -> Recipe:
    """Build a recipe from plain data. `text` is the YAML behind the data; error messages give its line numbers.

    Raises:
        ConfigError: the recipe breaks a rule.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_sentence(error, source, _lines(text))) from error


def read_settings(model: type[Settings], given: dict[str, Any], overrides: typing.Sequence[str], *, source: str) -> Settings:
    """Build the settings of a command from its options and `key=value` overrides.

    Raises:
        ConfigError: a key is unknown, or a value breaks a rule.
    """
    try:
        return model.model_validate(_merged(given, overrides, source, "temperature=0.5"))
    except ValidationError as error:
        raise ConfigError(_sentence(error, source, {}, model)) from error


def _merged(base: str | dict[str, Any], overrides: typing.Sequence[str], source: str, example: str) -> Any:
    for item in overrides:
        if item.find("=") < 1:
            raise ConfigError(f"override `{item}` is not KEY=VALUE; write key.sub=value, for instance {example}")
    try:
        tree = OmegaConf.merge(OmegaConf.create(base), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(tree, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {' '.join(str(error).split())}") from error


def _string_keys(value: Any) -> Any:
    # YAML reads an arm called 2.1 as a number
    if isinstance(value, dict):
        return {str(k): _string_keys(v) for k, v in value.items()}
    return [_string_keys(v) for v in value] if isinstance(value, list) else value


def _lines(text: str) -> dict[tuple, int]:
    lines: dict[tuple, int] = {}

    def walk(node: yaml.Node | None, at: tuple) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*at, str(key.value))] = key.start_mark.line + 1
                walk(value, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                walk(value, (*at, i))

    walk(yaml.compose(text), ())
    return lines


def _sentence(error: ValidationError, source: str, lines: dict[tuple, int], root: type[BaseModel] = Recipe) -> str:
    # describes the first problem; unknown keys come first, because they cause other problems
    problem, *others = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    location = tuple(problem["loc"])
    key = _resolve(location, root)[0]
    shown = ".".join(map(str, key)) or "recipe"
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    where = f"{source}, line {line}: `{shown}`" if line else f"{source}: `{shown}`"
    if problem["type"] == "extra_forbidden":
        names = _names_at(location[:-1], root)
        close = difflib.get_close_matches(str(key[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known keys here: {', '.join(sorted(names))}."
        text = f"{where} is not a known key; {hint}"
    elif problem["type"] == "missing":
        text = f"{where} is missing; add it."
    elif problem["type"] == "union_tag_invalid":
        context = problem.get("ctx", {})
        text = f"{where} has type {context.get('tag')!r}; known types: {context.get('expected_tags')}."
    elif problem["type"] == "union_tag_not_found":
        text = f"{where} needs a `type`."
    else:
        message = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        value = f" is {given!r}:" if isinstance(given, (str, int, float, bool)) else ":"
        text = f"{where}{value} {message[0].lower() + message[1:].rstrip('.')}."
    return text + (f" ({len(others)} more problem{'s' * (len(others) > 1)} after this one.)" if others else "")


def _children(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in typing.get_args(annotation) for m in _children(part)]


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {f.alias or name: f.annotation for name, f in model.model_fields.items()}


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    return field.default if field else None


def _resolve(location: tuple, root: type[BaseModel]) -> tuple[tuple, list[type[BaseModel]]]:
    # returns the key without the union tags that pydantic inserts in a location, and the classes at that key
    models: list[type[BaseModel]] = [root]
    key: list = []
    for part in location:
        tagged = [m for m in models if _tag(m) == part]
        if tagged and part not in {n for m in models for n in _fields(m)}:
            models = tagged
            continue
        annotations = [_fields(m)[part] for m in models if part in _fields(m)]
        # inside a mapping or a list the classes stay those of its values
        models = [c for a in annotations for c in _children(a)] if annotations else models
        key.append(part)
    return tuple(key), models


def _names_at(location: tuple, root: type[BaseModel]) -> list[str]:
    return sorted({name for m in _resolve(location, root)[1] for name in _fields(m)})
