"""The recipes that come with the package. Each has a name, such as `quickstart` or `methods/gkd`.

They are in `recipes/` of the repository, and in the folder `recipes` of an installed package.
"""

import functools
import re
from pathlib import Path

import tadistill

_SUFFIXES = (".yaml", ".yml")


@functools.cache
def recipes_folder() -> Path:
    """Return the folder with the recipes of the package."""
    package = Path(tadistill.__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parents[1] / "recipes"


@functools.cache
def shipped() -> dict[str, Path]:
    """Return the recipes of the package, as a mapping from name to file. A name is the file's path in the recipes' folder, without
    `.yaml`."""
    folder = recipes_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def summary(recipe: Path) -> str:
    """Return the first sentence of the comment at the start of a recipe file."""
    with recipe.open(encoding="utf-8") as lines:
        return re.split(r"(?<=\.) (?=[A-Z])", next(lines, "").strip("# \n"), maxsplit=1)[0]


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
