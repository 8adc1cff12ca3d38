"""Load a recipe file and apply overrides, such as `method.optim.lr=1e-4`. Error messages name the key and its line.

A recipe cannot refer to anything outside its file. References `${…}` of OmegaConf are errors, because they could read environment
variables.
"""

import difflib
import re
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from tadistill.config.common import Strict
from tadistill.config.error_messages import problems
from tadistill.config.recipe import Recipe, own_functions
from tadistill.config.recipe_files import Lines, check_key, located, settled, shipped, where
from tadistill.config.reference import classes, named_classes
from tadistill.config.shorthand import SHORT_KEYS, is_short, lines_of_whole, whole
from tadistill.errors import ConfigError, about, leads_nowhere
from tadistill.text import counted

Settings = typing.TypeVar("Settings", bound=BaseModel)
T = typing.TypeVar("T")
_SHOWN = 20
"""Largest number of problems that one error message shows."""
_DEEPEST = 40
"""Largest number of levels in which the keys of a recipe can be nested."""
_NO_REFERENCES = "contains `${`, but a recipe cannot refer to environment variables or to other keys; write the value itself"
_NO_VALUE = "which stands for a missing value; write the value itself"


def study_in(recipe: Path) -> str | None:
    """Return the name of the study in a recipe file. Return None if the file is not a recipe."""
    if recipe.suffix not in (".yaml", ".yml") or not recipe.is_file():
        return None
    try:
        content = yaml.load(recipe.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # `study: 010` stays a text
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return str(content["study"]) if isinstance(content, dict) and content.get("study") else None


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
        close = [f"{path.name}.yaml"] if f"{path.name}.yaml" in names else difflib.get_close_matches(path.name, names, n=1)
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
    lines = _lines(given, source) if isinstance(given, str) else {}
    raw = _merged(given, overrides, source, "seeds=[10]", Recipe)
    lines = _with_overrides(lines, overrides)
    recipe = _recipe(raw, source, lines)
    if is_short(raw):
        lines = lines_of_whole(lines)
    if folder:
        recipe = settled(recipe, source, folder, lines)
    if not own_functions(recipe):
        return recipe
    modules, code, there = recipe.runtime.code or "", "", False
    try:
        code = str((folder or Path()).resolve() / Path(modules).expanduser())
        there = Path(code).is_dir()
    except (OSError, RuntimeError, ValueError):  # no user of this name, or a path that cannot exist
        pass
    if not there:
        raise ConfigError(
            f"{where(source, lines, ('runtime', 'code'))} is `{modules}`, which is not a folder; name the folder of your Python modules"
        )
    return recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"code": code})})


def validate(raw: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Build a recipe from plain data (a dict). Raises ConfigError if the recipe breaks a rule. `source` is the recipe's name in
    messages."""
    return _recipe(raw, source, {})


def _recipe(raw: dict[str, Any], source: str, lines: Lines) -> Recipe:
    if is_short(raw):
        with about(source):
            raw, lines = whole(raw), lines_of_whole(lines)
    return _validated(Recipe, raw, source, lines)


def read_settings(model: type[Settings], given: dict[str, Any], overrides: typing.Sequence[str], *, source: str) -> Settings:
    """Return the settings of a command, built from its options (`given`) and its `key=value` overrides.

    Raises:
        ConfigError: a key is unknown, or a value breaks a rule.
    """
    return _validated(model, _merged(given, overrides, source, "temperature=0.5", model), source, {})


def _validated(model: type[Settings], raw: dict[str, Any], source: str, lines: Lines) -> Settings:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = problems(error, raw, model)
        sentences = [f"{where(source, lines, key)}{text}" for key, text in found[:_SHOWN]]
        left = len(found) - _SHOWN
        more = counted(left, "more problem is", "more problems are")
        rest = [f"{source}: {more} shown when those above are corrected"] if left > 0 else []
        raise ConfigError(*sentences, *rest) from error


def _merged(base: str | dict[str, Any], overrides: typing.Sequence[str], source: str, example: str, model: type[BaseModel]) -> dict:
    for item in overrides:
        if "=" not in item or not _levels(item.partition("=")[0]):
            lacks = "key before the `=`" if "=" in item else "`=`"
            raise ConfigError(f"override `{item}` has no {lacks}; write key.sub=value, for instance {example}")
        if "${" in item:
            raise ConfigError(f"override `{item}` {_NO_REFERENCES}")
        if item.split("=")[0].count(".") > _DEEPEST:
            raise ConfigError(f"override `{item}` has a key with more than {_DEEPEST} levels, which no recipe needs; correct the key")
        try:
            _check_depth(item.split("=", 1)[1], "", yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise ConfigError(_not_yaml(error, f"override `{item}`")) from error
    with _readable(source):
        tree: typing.Any = _string_keys(OmegaConf.create(base), source)
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{source} is not a recipe; write a YAML mapping with the keys study, seeds, models, data and arms")
    for item in overrides:
        with _readable(f"override `{item}`"):
            _write_out(tree, _levels(item.partition("=")[0]), model, item)
            change = _string_keys(OmegaConf.from_dotlist([item]), f"override `{item}`")
            _make_room(tree, change)
            tree = OmegaConf.merge(tree, change)
    return OmegaConf.to_container(tree, resolve=False)  # type: ignore[return-value]


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn errors of YAML and OmegaConf in the `with` block into a ConfigError about `what`: the recipe, or one override."""
    try:
        yield
    except yaml.YAMLError as error:
        raise ConfigError(_not_yaml(error, what)) from error
    except KeyValidationError as error:
        raise ConfigError(f"{what} has a key without a name; write its name, or put the value in quotes if it is a text") from error
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{what} cannot be read as YAML: {' '.join(str(error).split())}") from error


def _make_room(tree: Any, change: DictConfig) -> None:
    """Remove what an override replaces, where a merge would keep it (an empty mapping) or fail (a list for a mapping, or vice versa)."""
    for name, value in change.items() if isinstance(tree, DictConfig) else ():
        old = tree.get(name)
        if isinstance(value, DictConfig) and value and isinstance(old, DictConfig):
            _make_room(old, value)
        elif isinstance(value, DictConfig | ListConfig) and isinstance(old, DictConfig | ListConfig):
            tree[name] = None


def _write_out(tree: Any, levels: tuple[str, ...], root: type[BaseModel], item: str) -> None:
    """Replace a text that stands for a group of keys (`Strict.text_sets`) by this group, if an override changes one of its keys.

    Raises a ConfigError if the override `item` changes a part of a list.
    """
    models, named = [root], False
    for depth, name in enumerate(levels[:-1]):
        if not isinstance(tree, DictConfig):
            return
        fields = [] if named else [field for m in models for key, field in m.model_fields.items() if (field.alias or key) == name]
        named = any(named_classes(field.annotation) for field in fields)
        models = [cls for field in fields for cls in classes(field.annotation)] if fields else models
        keys = {m.text_sets for m in models if isinstance(m, type) and issubclass(m, Strict) and m.text_sets}
        if depth == 0 and name in SHORT_KEYS and is_short(tree):  # type: ignore[arg-type]
            keys = {"load"}
        if isinstance(value := tree.get(name), str) and len(keys) == 1:
            tree[name] = {keys.pop(): value}
        tree = tree.get(name)
        if isinstance(tree, ListConfig):
            key = ".".join(levels[: depth + 1])
            raise ConfigError(f"override `{item}` changes a part of the list `{key}`; write the whole list: {key}=[…]")


def _levels(key: str) -> tuple[str, ...]:
    return tuple(inner or plain for inner, plain in re.findall(r"\[([^\]]*)\]|([^.\[\]]+)", key))


def _with_overrides(lines: Lines, overrides: typing.Sequence[str]) -> Lines:
    for item in overrides:
        name, _, value = item.partition("=")
        at = _levels(name)
        for key, _ in _leaves(at, yaml.safe_load(value)):
            lines = {other: line for other, line in lines.items() if other[: len(key)] != key} | {key: item, at: item}
    return lines


def _leaves(at: tuple, value: Any) -> Iterator[tuple[tuple, Any]]:
    # yields the place and the value of each part that is no mapping, or an empty one
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves((*at, str(name)), part)
    else:
        yield at, value


def _string_keys(tree: DictConfig | ListConfig, what: str) -> Any:
    # YAML reads an arm called 2.1 as a number, but an override does not; OmegaConf reads the value ??? as a missing one
    def walk(value: Any) -> Any:
        if isinstance(value, str) and value == "???":
            raise ConfigError(f"{what} contains `???`, {_NO_VALUE}")
        if isinstance(value, dict):
            return {str(k): walk(v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v) for v in value]
        return str(value) if isinstance(value, Path) else value  # a dict from Python may have paths

    return OmegaConf.create(walk(OmegaConf.to_container(tree, resolve=False)))


def _lines(text: str, source: str) -> Lines:
    # also refuses too many levels, and references to anything outside the text
    lines: Lines = {}
    seen: set[int] = set()  # an alias is the same node as its anchor

    def walk(node: yaml.Node | None, at: tuple) -> None:
        if node is None or id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and "${" in node.value:
            raise ConfigError(f"{where(source, lines, at)} is `{node.value}`: it {_NO_REFERENCES}")
        if isinstance(node, yaml.ScalarNode) and node.value == "???":
            raise ConfigError(f"{where(source, lines, at)} is `???`, {_NO_VALUE}")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                check_key(key, f"{source}, line {line}")
                if (*at, str(key.value)) in lines and key.value != "<<":
                    first = lines[(*at, str(key.value))]
                    raise ConfigError(f"{source}, line {line}: the key `{key.value}` is already in line {first}; keep one of the two")
                lines[(*at, str(key.value))] = line
                walk(key, at)
                walk(value, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[(*at, i)] = value.start_mark.line + 1
                walk(value, (*at, i))

    try:
        _quickly(lambda loader: _check_depth(text, source, loader))
        walk(_quickly(lambda loader: yaml.compose(text, Loader=loader)), ())
    except yaml.YAMLError as error:
        raise ConfigError(_not_yaml(error, source)) from error
    return lines


_IN_WORDS = (
    # a part of PyYAML's message -> what is wrong, and how to mend it
    ("found character '\\t'", "a tab is used for indentation; indent with spaces only"),
    ("mapping values are not allowed here", "a colon is not allowed here; put the text in quotes, or correct the indentation"),
    ("while scanning a quoted scalar", "the quote that opens here is never closed; add the closing quote, or remove the opening quote"),
    ("while parsing a flow sequence", "the list that opens here is never closed; close it with ], and put a comma between its items"),
    ("while parsing a flow mapping", "the braces that open here are never closed; close them with }, and put a comma between the items"),
    ("found undefined alias", "YAML reads a value that begins with * as a reference; put the text in quotes"),
    ("that cannot start any token", "a value cannot begin with this character; put the text in quotes"),
    ("could not find expected ':'", "a key has no colon; write `key: value`"),
    (
        "expected <block end>",
        "this line does not fit the lines above it; indent it like them, or close a quote that is still open above",
    ),
    ("expected '<document start>'", "the file is not a YAML mapping; write a mapping with the keys study, seeds, models, data and arms"),
    ("expected a single document", "a second YAML document begins here, but a recipe is only one document; remove the line `---`"),
)


def _not_yaml(error: yaml.YAMLError, source: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{source} cannot be read as YAML: {' '.join(str(error).split())}"
    text = " ".join(filter(None, (error.context, error.problem)))
    what = next((ours for theirs, ours in _IN_WORDS if theirs in text), text)
    opening = "opens here" in what or "open here" in what or "no colon" in what
    mark = (error.context_mark if opening else None) or error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
    return f"{source}{where} cannot be read as YAML: {what}"


def _quickly(read: Callable[[Any], T]) -> T:
    try:
        return read(getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml takes a tenth of the time
    except yaml.YAMLError:
        return read(yaml.SafeLoader)  # its messages say more


def _check_depth(text: str, source: str, loader: Any) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=loader):  # yaml.parse does not recurse, unlike the steps after this check
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            where = f"{source}, line {event.start_mark.line + 1}" if source else f"override `{text}`"
            raise ConfigError(f"{where}: keys are nested in more than {_DEEPEST} levels, which no recipe needs; correct the brackets")
