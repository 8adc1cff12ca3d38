"""Find the line of a recipe's key, for error messages, and the file that a relative path in a recipe means. Relative paths start in the
folder of the recipe."""

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from tadistill.config.data import DataRef
from tadistill.config.recipe import Recipe
from tadistill.errors import ConfigError, DataError, ModelError

Lines = dict[tuple, int | str]
"""Maps each key of a recipe (a tuple of names) to its line number, from 1, or to the text of the override that sets the key."""
Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Origin:
    """The file of a recipe, and the line of each of its keys."""

    source: str
    """The file's path, as messages show it."""
    folder: Path
    lines: Lines
    written: dict[str, str] = field(default_factory=dict)
    """Maps a resolved path of a model to the path as the recipe has it. The keys of stored results are made from the recipe's text, so they
    do not depend on the recipe's folder."""


def where(source: str, lines: Lines, key: tuple) -> str:
    """Return the text that names a key in messages: file, line and key, or the override and the key.

    If the recipe does not contain the key, the text has the line of the closest group of keys around it.
    """
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    shown = f" `{'.'.join(map(str, key))}`" if key else ""
    if isinstance(line, str):
        return f"override `{line}`:{shown}"
    return f"{source}, line {line}:{shown}" if line else f"{source}:{shown}"


def settled(recipe: Recipe, source: str, folder: Path, lines: Lines) -> Recipe:
    """Return the recipe with its relative paths resolved. A path is tried beside the recipe's file, then in the working directory."""
    written: dict[str, str] = {}

    def found(load: str | None) -> str | None:
        beside = _beside(folder, load) if load else None
        if load and beside:
            written[beside] = load
        return beside or load

    models = {name: m.model_copy(update={"load": found(m.load), "tokenizer": found(m.tokenizer)}) for name, m in recipe.models.items()}
    for _, ref in _data_sets(recipe):
        ref._folder = folder
    root = _folder_beside(folder, recipe.data.root)
    copy = recipe.model_copy(update={"models": models, "data": recipe.data.model_copy(update={"root": root})})
    copy._origin = Origin(source, folder, lines, written)
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


def _folder_beside(folder: Path, root: str | None) -> str | None:
    try:
        beside = root and not Path(root).expanduser().is_absolute() and (folder / root).is_dir()
    except (OSError, RuntimeError, ValueError):
        return root
    return str(folder / root) if root and beside else root


def placed(work: Callable[Concatenate[Recipe, Given], Result]) -> Callable[Concatenate[Recipe, Given], Result]:
    """Wrap a function that checks a recipe. Its error messages then name the recipe's file, and the line of the wrong key."""

    @functools.wraps(work)
    def checked(recipe: Recipe, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return work(recipe, *args, **kwargs)
        except (ConfigError, DataError, ModelError) as error:
            origin = recipe._origin
            if origin is None:
                raise
            raise type(error)(*(_with_place(problem, recipe, origin) for problem in error.problems)) from error

    return checked


def _with_place(problem: str, recipe: Recipe, origin: Origin) -> str:
    if problem.startswith((origin.source, "override `")):
        return problem
    named = (key for key in origin.lines if len(key) > 1 and re.match(re.escape(_dotted(key)) + r"[:. ]", problem))
    key = max(named, key=len, default=())
    about = {at: problem.find(f"`{load}`") for at, load in _sources(recipe) if at[: len(key)] == key}
    quoted = min((at for at, place in about.items() if place >= 0), key=lambda at: about[at], default=())  # the first one in the message
    if key:
        return f"{where(origin.source, origin.lines, quoted or key).split(': `')[0]}: {problem}"
    return f"{where(origin.source, origin.lines, quoted)}: {problem}" if quoted else problem


def _dotted(key: tuple) -> str:
    return ".".join(map(str, key))


def _data_sets(recipe: Recipe) -> Iterator[tuple[tuple, DataRef]]:
    data = recipe.data
    named: dict[tuple, DataRef | None] = {("data", "corpus"): data.corpus}
    for role, given in (("train", data.train), ("dev", data.dev)):
        named |= {("data", role): given} if isinstance(given, DataRef) else {("data", role, name): ref for name, ref in given.items()}
    named |= {("data", "test", i): ref for i, ref in enumerate(data.test)}
    return ((key, ref) for key, ref in named.items() if ref is not None)


def _sources(recipe: Recipe) -> Iterator[tuple[tuple, str]]:
    yield from ((key, ref.load) for key, ref in _data_sets(recipe))
    for name, model in recipe.models.items():
        yield from ((("models", name, key), load) for key, load in (("load", model.load), ("tokenizer", model.tokenizer)) if load)
