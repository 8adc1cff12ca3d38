"""The recipes that are shipped with the package, by name: `quickstart`, `methods/gkd`.

They lie in `recipes/` of the repository, and in the folder `recipes` of an installed package.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

import tadistill

_SUFFIXES = (".yaml", ".yml")


@functools.cache
def recipes_folder() -> Path:
    """Return the folder of the shipped recipes."""
    package = Path(tadistill.__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parents[1] / "recipes"


@functools.cache
def shipped() -> dict[str, Path]:
    """Return all shipped recipes: the path below their folder without `.yaml` -> the file."""
    folder = recipes_folder()
    return {str(path.relative_to(folder).with_suffix("").as_posix()): path for path in sorted(folder.rglob("*.yaml"), key=_place)}


def summary(recipe: Path) -> str:
    """Return the first line of a recipe's header comment, without the `#`."""
    with recipe.open(encoding="utf-8") as lines:
        return next(lines, "").strip().lstrip("#").strip()


def located(recipe: str | Path) -> Path:
    """Return the file that a recipe's path or name means; the path itself if there is no such file.

    A file wins over a shipped recipe, also as `NAME.yaml`. A shipped recipe is found by its name, by the last part of its name if no other
    has it, and by its path in the repository (`recipes/quickstart.yaml`).
    """
    path = Path(recipe)
    if path.is_file() or path.is_absolute():
        return path
    if not (found := _named(path)):
        return path
    return next((file for suffix in _SUFFIXES if path.suffix not in _SUFFIXES and (file := Path(f"{path}{suffix}")).is_file()), found)


def remark(recipe: str | Path) -> str:
    """Return a sentence on the choice between a shipped recipe and a file of its name; empty if there was no choice."""
    path, file = Path(recipe), located(recipe)
    if file == path:
        return ""
    if file.is_relative_to(recipes_folder()):
        return f"`{recipe}` is a recipe that is shipped with tadistill: {file}"
    return f"`{recipe}` is the file {file} here, and not the shipped recipe of that name"


def _named(path: Path) -> Path | None:
    name = path.with_suffix("").as_posix() if path.suffix in _SUFFIXES else path.as_posix()
    name = name.removeprefix("recipes/")
    ends = [full for full in shipped() if full.rsplit("/", 1)[-1] == name]
    return shipped().get(name) or (shipped()[ends[0]] if len(ends) == 1 else None)


def _place(path: Path) -> tuple[int, Iterable[str]]:
    return len(path.parts), path.parts
