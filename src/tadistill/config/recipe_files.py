"""The files of recipes: those that come with the package, their YAML and its lines, and the files that relative paths mean.

Each recipe of the package has a name, such as `quickstart` or `methods/gkd`. These recipes are in `recipes/` of the repository, and in the
folder `recipes` of an installed package. Relative paths in a recipe start in the folder of the recipe.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import yaml

import tadistill
from tadistill.config.data import DataRef
from tadistill.config.recipe import Recipe, own_functions
from tadistill.errors import WRONG_INPUT, ConfigError

_SUFFIXES = (".yaml", ".yml")


# --- recipes of the package -----------------------------------------------------------------------------------------------


@functools.cache
def recipes_folder() -> Path:
    """Return the folder with the recipes of the package."""
    package = Path(tadistill.__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parents[1] / "recipes"


@functools.cache
def shipped() -> dict[str, Path]:
    """Return the files of the package's recipes by name. A name is the file's path in the recipes' folder, without `.yaml`."""
    folder = recipes_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def summary(recipe: Path) -> str:
    """Return the first sentence of the comment at the start of a recipe file."""
    comment = re.findall(r"\A(?:# (?! ).+\n)+", recipe.read_text(encoding="utf-8"))[0]  # the lines of commands are indented
    return re.split(r"(?<=\.) (?=[A-Z`])", " ".join(comment.replace("# ", "").split()), maxsplit=1)[0]


def located(recipe: str | Path) -> Path:
    """Return the file of a recipe, given by its path or name. If there is no such file, return the path itself.

    A recipe of the package is found by its name, by the last part of its name if this is unique, or by its path in the repository
    (`recipes/quickstart.yaml`). If the user also has a file of this name, the user's file is returned. For the name `gkd`, the user's file
    can be `gkd`, `gkd.yaml` or `gkd.yml`.
    """
    path = Path(recipe)
    if path.is_file() or path.is_absolute():
        return path
    if not (found := _named(path)):
        return path
    return next((file for suffix in _SUFFIXES if path.suffix not in _SUFFIXES and (file := Path(f"{path}{suffix}")).is_file()), found)


def remark(recipe: str | Path) -> str:
    """Return a sentence that says whether a recipe's name means a file of the package or a file of the user. Return an empty string if
    `recipe` is the path of a file."""
    path, file = Path(recipe), located(recipe)
    if file == path:
        return ""
    if file.is_relative_to(recipes_folder()):
        return f"`{recipe}` is a recipe that comes with tadistill: {file}"
    return f"`{recipe}` is read from your file {file}, and not from the recipe of tadistill with this name"


def _named(path: Path) -> Path | None:
    name = path.with_suffix("").as_posix() if path.suffix in _SUFFIXES else path.as_posix()
    name = name.removeprefix("recipes/")
    ends = [full for full in shipped() if full.rsplit("/", 1)[-1] == name]
    return shipped().get(name) or (shipped()[ends[0]] if len(ends) == 1 else None)


# --- places of keys -------------------------------------------------------------------------------------------------------


_NAMED = 3
"""Largest number of overrides that one message shows."""
Lines = dict[tuple, int | str]
"""Maps each key of a recipe (a tuple of names) to its line number, from 1, or to the text of the override that sets the key."""
Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Origin:
    """The file of a recipe, and the line of each of its keys."""

    source: str
    """The file's path, as messages show it."""
    lines: Lines
    written: dict[str, str] = field(default_factory=dict)
    """Maps a resolved path of a model or folder to the path as the recipe has it. The keys of stored results are made from the recipe's
    text, so they do not depend on the recipe's folder."""


def where(source: str, lines: Lines, key: tuple) -> str:
    """Return the text that names a key in messages: file, line and key, or the override and the key.

    If the recipe does not contain the key, the text has the line of the closest group of keys around it. If overrides change a part of the
    key's value, the text names these overrides too.
    """
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    shown = f" `{_dotted(key)}`" if key else ""
    inside = [*dict.fromkeys(item for at, item in lines.items() if isinstance(item, str) and at[: len(key)] == key)] if key else []
    if isinstance(line, str) or (inside and key not in lines):
        return f"override `{line if isinstance(line, str) else inside[0]}`:{shown}"
    few = f"`{'`, `'.join(inside)}`" if len(inside) <= _NAMED else f"`{inside[0]}` and {len(inside) - 1} more"
    changed = f" with {'override' if len(inside) == 1 else 'overrides'} {few}" if inside else ""
    return f"{_place(source, line)}{changed}:{shown}"


def _place(source: str, line: int | None) -> str:
    return source if line is None or source.startswith("override `") else f"{source}, line {line}"  # an override is short


# --- YAML -----------------------------------------------------------------------------------------------------------------


DEEPEST = 40
"""Largest number of levels in which the keys of a recipe can be nested."""
_MOST = 10_000
"""Largest number of keys and values of a recipe. YAML's references can make a few lines expand to billions."""
NO_REFERENCES = "contains `${`, but a recipe cannot refer to environment variables or to other keys; write the value itself"


def _loader(base: Any) -> Any:
    # PyYAML reads 1e-3 as a text, and texts such as 2026-01-31 as dates
    rules = {first: [rule for rule in some if not rule[0].endswith(":timestamp")] for first, some in base.yaml_implicit_resolvers.items()}
    loader = type("RecipeLoader", (base,), {"yaml_implicit_resolvers": rules})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(_\d+)*(\.[\d_]*)?[eE][-+]?\d+$", re.A), [*"-+0123456789"])
    return loader


_FAST = _loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml takes a tenth of the time
_CLEAR = _loader(yaml.SafeLoader)  # its messages say more


def with_loader(work: Callable[[Any], Result]) -> Result:
    """Return the result of `work` with the loader of recipes, which is its argument."""
    try:
        return work(_FAST)
    except yaml.YAMLError:
        return work(_CLEAR)


def contents(text: str, what: str, *, check_keys: bool = True) -> tuple[Any, Lines]:
    """Return what a YAML text contains, and the line of each of its keys.

    Args:
        what: the name of the text in messages: a file, or an override.
        check_keys: refuse keys that YAML does not read as the text that is written there, such as 010.

    Raises:
        ConfigError: the text is not YAML, has a key twice, refers to something outside it, or is too deep or too large.
    """
    try:
        return with_loader(lambda loader: _read(loader, text, what, check_keys))
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number with thousands of digits
        raise ConfigError(_not_yaml(error, what)) from error


def _read(kind: Any, text: str, what: str, check_keys: bool) -> tuple[Any, Lines]:
    lines: Lines = {}
    sizes: dict[int, float] = {}  # an alias is the same node as its anchor

    def walk(node: yaml.Node, at: tuple) -> float:
        # returns the number of values in a node, with its aliases written out
        if sizes.get(id(node)) == math.inf:
            raise ConfigError(f"{where(what, lines, at)} is a reference to a part of the recipe that contains it; write the value itself")
        if id(node) in sizes:
            return sizes[id(node)]
        sizes[id(node)] = math.inf  # until its parts are counted
        size = 1.0
        if isinstance(node, yaml.ScalarNode) and "${" in node.value:
            raise ConfigError(f"{where(what, lines, at)} is `{node.value}`: it {NO_REFERENCES}")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line, inside = key.start_mark.line + 1, (*at, str(key.value))
                place = _place(what, line)
                if check_keys:
                    _check_key(key, loader, place)
                if inside in lines and key.value != "<<":
                    raise ConfigError(f"{place}: the key `{key.value}` is already in line {lines[inside]}; keep one of the two")
                lines[inside] = line
                size += walk(key, at) + walk(value, inside)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[(*at, i)] = value.start_mark.line + 1
                size += walk(value, (*at, i))
        if size > _MOST:
            place = where(what, lines, at).removesuffix(":")
            raise ConfigError(f"{place} has more than {_MOST:,} keys and values, with what its references `*NAME` stand for; write fewer")
        sizes[id(node)] = size
        return size

    check_nesting(text, what, kind)
    loader = kind(text)
    node = loader.get_single_node()
    return node and walk(node, ()) and loader.construct_document(node), lines


def _check_key(key: yaml.Node, loader: yaml.SafeLoader, place: str) -> None:
    """Raise a ConfigError if `loader` does not read a key as the text that is written there. `place` is its place in messages."""
    if key.tag == "tag:yaml.org,2002:null":
        raise ConfigError(f"{place}: a key has no name; write its name before the colon")
    if key.tag == "tag:yaml.org,2002:bool":
        raise ConfigError(f"{place}: YAML reads the key `{key.value}` as true or false; put it in quotes")
    if key.tag.endswith((":int", ":float")) and str(read := loader.construct_object(key)) != key.value:
        raise ConfigError(f"{place}: YAML reads the key `{key.value}` as the number {read}; put it in quotes")


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
    ("expected <block end>", "this line does not fit the lines above it; indent it like them, or close a quote that is still open above"),
    ("expected '<document start>'", "the file is not a YAML mapping; write a mapping with the keys study, seeds, models, data and arms"),
    ("expected a single document", "a second YAML document begins here, but a recipe is only one document; remove the line `---`"),
)


def _not_yaml(error: Exception, source: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{source} cannot be read as YAML: {' '.join(str(error).split())}"
    text = " ".join(filter(None, (error.context, error.problem)))
    what = next((ours for theirs, ours in _IN_WORDS if theirs in text), text)
    opening = "opens here" in what or "open here" in what or "no colon" in what
    mark = (error.context_mark if opening else None) or error.problem_mark or error.context_mark
    where = f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""
    return f"{source}{where} cannot be read as YAML: {what}"


def check_nesting(text: str, what: str, loader: Any) -> None:
    """Raise a ConfigError if the keys of a YAML text are nested too deep."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):  # yaml.parse does not recurse, unlike the steps after this check
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            place = _place(what, event.start_mark.line + 1)
            raise ConfigError(f"{place}: keys are nested in more than {DEEPEST} levels, which no recipe needs; correct the brackets")


# --- relative paths -------------------------------------------------------------------------------------------------------


def settled(recipe: Recipe, source: str, folder: Path, lines: Lines) -> Recipe:
    """Return the recipe with its relative paths resolved. A path is tried beside the recipe's file, then in the working directory."""
    models, written = {}, dict[str, str]()
    for name, model in recipe.models.items():
        found = {key: _beside(folder, load) for key, load in (("load", model.load), ("tokenizer", model.tokenizer)) if load}
        beside = {key: path for key, path in found.items() if path}
        written |= {path: getattr(model, key) for key, path in beside.items()}
        models[name] = model.model_copy(update=beside)  # sets no other key: those without a value are not in the recipe
    for _, ref in data_sets(recipe):
        ref._folder = folder
    root = {"root": _folder_beside(folder, recipe.data.root)} if recipe.data.root else {}
    written |= {path: recipe.data.root for path in root.values() if recipe.data.root}
    copy = recipe.model_copy(update={"models": models, "data": recipe.data.model_copy(update=root)})
    copy._origin = Origin(source, lines, written)
    return copy


def _beside(folder: Path, load: str) -> str | None:
    try:
        path = Path(load).expanduser()
        if load.startswith("scratch:") or "://" in load or path.is_absolute():
            return None
        beside = folder / path
        model = beside.is_file() or (beside.is_dir() and any(beside.glob("*.json")))
        named = load.startswith(".") or load.endswith(".gguf")  # no hub id has such a name
        if not model and not (named and (beside.exists() or not path.exists())):
            return None
        return None if os.path.normpath(beside) == os.path.abspath(path) else os.path.normpath(beside)
    except (OSError, RuntimeError, ValueError):  # a path that cannot exist; the check of the model reports it
        return None


def _folder_beside(folder: Path, root: str) -> str:
    try:
        beside = not Path(root).expanduser().is_absolute() and (folder / root).is_dir()
    except (OSError, RuntimeError, ValueError):
        return root
    return str(folder / root) if beside else root


def placed(work: Callable[Concatenate[Recipe, Given], Result]) -> Callable[Concatenate[Recipe, Given], Result]:
    """Wrap a function that checks a recipe. Its error messages then name the recipe's file, and the line of the wrong key."""

    @functools.wraps(work)
    def checked(recipe: Recipe, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return work(recipe, *args, **kwargs)
        except WRONG_INPUT as error:
            origin = recipe._origin
            if origin is None:
                raise
            raise type(error)(*(_with_place(problem, recipe, origin) for problem in error.problems)) from error

    return checked


def _with_place(problem: str, recipe: Recipe, origin: Origin) -> str:
    if problem.startswith((origin.source, "override `")):
        return problem
    keys = [*origin.lines, *(at[:2] for at, _ in data_sets(recipe))]  # in the short form, `data` has the line of all data sets
    named = (key for key in keys if len(key) > 1 and re.match(re.escape(_dotted(key)) + r"[:. ]", problem))
    key = max(named, key=len, default=())
    found = [(problem.find(text), not re.search(part, problem), at) for at, text, part in _sources(recipe) if at[: len(key)] == key]
    *_, quoted = min((each for each in found if each[0] >= 0), key=lambda each: each[:2], default=((),))  # the first
    if key:
        return f"{where(origin.source, origin.lines, quoted or key).split(': `')[0]}: {problem}"
    return f"{where(origin.source, origin.lines, quoted)}: {problem}" if quoted else problem


def _dotted(key: tuple) -> str:
    return ".".join(map(str, key))


def data_sets(recipe: Recipe) -> Iterator[tuple[tuple, DataRef]]:
    """Return pairs of the key and the data set, for all data sets of a recipe."""
    data = recipe.data
    for role, given in (("train", data.train), ("dev", data.dev), ("test", dict(enumerate(data.test))), ("corpus", data.corpus or {})):
        refs = {("data", role): given} if isinstance(given, DataRef) else {("data", role, name): ref for name, ref in given.items()}
        yield from refs.items()


def _sources(recipe: Recipe) -> Iterator[tuple[tuple, str, str]]:  # a key, how messages quote it, and a pattern of its part of the data
    for at, ref in data_sets(recipe):
        part = rf"(\(split|no file|no split) `?{re.escape(ref.split or str(at[1]))}\b|\({at[1]}\)|the {at[1]} set"
        yield from ((at, text, part) for text in (f"`{ref.load}`", f"set `{ref.name}`", *(f"set `{name}`" for name in at[2:])))
    models = ((("models", name, key), getattr(model, key)) for name, model in recipe.models.items() for key in ("load", "tokenizer"))
    yield from ((at, f"`{text}`", "$^") for at, text in (*models, *own_functions(recipe).items()) if text)
