"""Read a recipe file and apply overrides (`method.optim.lr=1e-4`). An error message names the key and its line.

Nothing outside the recipe is read: `${…}` of OmegaConf, which could read environment variables, is an error.
"""

import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from tadistill.config.named import METHODS
from tadistill.config.recipe import Recipe, own_functions
from tadistill.config.short import is_short, lines_of_whole, whole
from tadistill.errors import ConfigError, about

Settings = typing.TypeVar("Settings", bound=BaseModel)
Lines = dict[tuple, int]
_SHOWN = 20
"""Number of problems that are shown at once."""
_DEEPEST = 40
_NO_REFERENCES = "has `${`, but a recipe refers neither to the environment nor to other keys; write the value itself"


def study_in(recipe: Path) -> str | None:
    """Return the name of the study of a recipe file; None if the file is not a recipe."""
    if recipe.suffix not in (".yaml", ".yml") or not recipe.is_file():
        return None
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return str(content["study"]) if isinstance(content, dict) and content.get("study") else None


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
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    return parse(text, overrides, source=str(path), folder=path.parent)


def parse(text: str, overrides: typing.Sequence[str] = (), *, source: str, folder: Path | None = None) -> Recipe:
    """Read a recipe from YAML text, as `load` does. Messages give `source` as the text's name; `folder` has the recipe's own modules."""
    lines = _lines(text, source)
    raw = _merged(text, overrides, source, "seeds=[10]")
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} contains no recipe; write a mapping with the keys study, seeds, models, data and arms")
    recipe = _recipe(_string_keys(raw), source, lines)
    if not own_functions(recipe):
        return recipe
    given, code, there = recipe.runtime.code or "", "", False
    try:
        code = str((folder or Path()).resolve() / Path(given).expanduser())
        there = Path(code).is_dir()
    except (OSError, RuntimeError, ValueError):  # no user of this name, or a path that cannot exist
        pass
    if not there:
        raise ConfigError(
            f"{_where(source, lines, ('runtime', 'code'))} is `{given}`, which is not a folder; name the folder of your modules"
        )
    return recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"code": code})})


def validate(raw: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Build a recipe from plain data.

    Raises:
        ConfigError: the recipe breaks a rule.
    """
    return _recipe(raw, source, {})


def _recipe(raw: dict[str, Any], source: str, lines: Lines) -> Recipe:
    if is_short(raw):
        with about(source):
            raw, lines = whole(raw), lines_of_whole(lines)
    return _validated(Recipe, raw, source, lines)


def read_settings(model: type[Settings], given: dict[str, Any], overrides: typing.Sequence[str], *, source: str) -> Settings:
    """Build the settings of a command from its options and `key=value` overrides.

    Raises:
        ConfigError: a key is unknown, or a value breaks a rule.
    """
    return _validated(model, _merged(given, overrides, source, "temperature=0.5"), source, {})


def _validated(model: type[Settings], raw: dict[str, Any], source: str, lines: Lines) -> Settings:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = _problems(error, raw, model)
        sentences = [f"{_where(source, lines, key)}{text}" for key, text in found[:_SHOWN]]
        rest = [f"{source}: {len(found) - _SHOWN} more problems come after these"] if len(found) > _SHOWN else []
        raise ConfigError(*sentences, *rest) from error


def _merged(base: str | dict[str, Any], overrides: typing.Sequence[str], source: str, example: str) -> Any:
    for item in overrides:
        if item.find("=") < 1:
            raise ConfigError(f"override `{item}` is not KEY=VALUE; write key.sub=value, for instance {example}")
        if "${" in item:
            raise ConfigError(f"override `{item}` {_NO_REFERENCES}")
        if item.split("=")[0].count(".") > _DEEPEST:
            raise ConfigError(f"override `{item}` is nested more than {_DEEPEST} deep, which no recipe needs; correct its key")
    try:
        for item in overrides:
            _check_depth(item.split("=", 1)[1], "")
        tree = OmegaConf.merge(OmegaConf.create(base), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(tree, resolve=False)
    except ConfigError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {' '.join(str(error).split())}") from error


def _string_keys(value: Any) -> Any:
    # YAML reads an arm called 2.1 as a number
    if isinstance(value, dict):
        return {str(k): _string_keys(v) for k, v in value.items()}
    return [_string_keys(v) for v in value] if isinstance(value, list) else value


def _lines(text: str, source: str) -> Lines:
    """Map the path of every key in a YAML text to its line number, from 1.

    Raises:
        ConfigError: the text is not YAML, is nested too deeply, or refers to something outside itself.
    """
    lines: Lines = {}
    seen: set[int] = set()  # an alias stands for a part that was there before

    def walk(node: yaml.Node | None, at: tuple) -> None:
        if node is None or id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and "${" in node.value:
            raise ConfigError(f"{_where(source, lines, at)} is `{node.value}`: it {_NO_REFERENCES}")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.tag == "tag:yaml.org,2002:null":
                    raise ConfigError(f"{source}, line {line}: a key has no name; write it before the colon")
                lines[(*at, str(key.value))] = line
                walk(key, at)
                walk(value, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                walk(value, (*at, i))

    try:
        _check_depth(text, source)
        walk(yaml.compose(text), ())
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}," if error.problem_mark else ""
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{source}{line} cannot be read as YAML: {what}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} cannot be read as YAML: {' '.join(str(error).split())}") from error
    return lines


def _check_depth(text: str, source: str) -> None:
    depth = 0
    for event in yaml.parse(text):  # does not recurse, as all that follows does
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            where = f"{source}, line {event.start_mark.line + 1}" if source else f"override `{text}`"
            raise ConfigError(f"{where}: keys are nested more than {_DEEPEST} deep, which no recipe needs; correct the brackets")


def _where(source: str, lines: Lines, key: tuple) -> str:
    """Name the place of a key: the file, the line of the key or of the nearest key around it, and the key."""
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    shown = ".".join(map(str, key)) or "recipe"
    return f"{source}, line {line}: `{shown}`" if line else f"{source}: `{shown}`"


def _problems(error: ValidationError, raw: Any, root: type[BaseModel]) -> list[tuple[tuple, str]]:
    """Return every key that has a problem, with what is wrong and how to mend it. Unknown keys come first, because they cause others."""
    found: dict[tuple, str] = {}
    for problem in sorted(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] == "too_short")):
        location = tuple(problem["loc"])
        key, kind = _resolve(location, root)[0], problem["type"]
        if kind not in ("extra_forbidden", "missing"):
            key = _given(key, raw)  # without the names that pydantic gives to the choices of a union
        if not key:  # a rule about several keys: its sentence begins with one of them
            key = _given(tuple(problem["msg"].removeprefix("Value error, ").split(" ", 1)[0].split(".")), raw)
        if kind == "too_short" and any(other[: len(key)] == key for other in found):
            continue  # pydantic counts only the items that are right
        found.setdefault(key, _sentence(problem, key, location, root))
    return [*found.items()]


def _sentence(problem: Any, key: tuple, location: tuple, root: type[BaseModel]) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        names = _names_at(location[:-1], root)
        close = difflib.get_close_matches(str(key[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known keys here: {', '.join(sorted(names))}."
        return f" is not a known key; {hint}"
    if kind == "missing":
        return " is missing; add it."
    if kind == "union_tag_invalid" and key and key[-1] == "objective" and context.get("tag") in METHODS:
        return f" has type {context['tag']!r}, which is a method and not an objective; write `method: {context['tag']}`."
    if kind == "union_tag_invalid":
        return f" has type {context.get('tag')!r}; known types: {context.get('expected_tags')}."
    if kind == "union_tag_not_found":
        return " needs a `type`."
    message, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    value = f" is {given!r}:" if isinstance(given, (str, int, float, bool)) else ":"
    return f"{value} {message[0].lower() + message[1:].rstrip('.')}."


def _given(key: tuple, raw: Any) -> tuple:
    """Return the part of a key that the recipe has."""
    for n, part in enumerate(key):
        inside = (isinstance(raw, dict) and part in raw) or (isinstance(raw, list) and isinstance(part, int) and part < len(raw))
        if not inside:
            return key[:n]
        raw = raw[part]
    return key


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
