"""Completion with the Tab key, for recipes, studies, arms, keys and values. `tadistill --install-completion` installs it in your shell."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from tadistill.store import runs_directory


def recipe_names(incomplete: str) -> list[str]:
    """Shell completion: return names of recipes in the package, and of YAML files and folders in the current directory."""
    from tadistill.config.shipped_recipes import shipped

    here = [path for path in Path().glob(f"{incomplete}*") if path.is_dir() or path.suffix in (".yaml", ".yml")]
    return _beginning(incomplete, [*shipped(), *(f"{path}/" if path.is_dir() else str(path) for path in sorted(here))])


def study_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion: return the names of studies in the runs directory that begin with `incomplete`."""
    from tadistill.results.find import studies

    return _beginning(incomplete, studies(runs_directory(ctx.params.get("runs"))))


def arm_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion: return names of the arms of a study. The study is the one named earlier on the command line."""
    from tadistill.errors import ConfigError
    from tadistill.results.find import arms, find_study

    study = ctx.params.get("study") or next(iter(ctx.args), "")  # while an option lacks its value, the study is in `ctx.args`
    try:
        return _beginning(incomplete, arms(find_study(study, runs_directory(ctx.params.get("runs")))))
    except ConfigError:
        return []


def overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """Shell completion of `KEY=VALUE`: return keys, or after `=` the values of a key. Some keys contain a name from the recipe."""
    return _settings(incomplete, _named(ctx.params.get("recipe")))


def settings(incomplete: str) -> list[str]:
    """Shell completion of `KEY=VALUE` for `eval` and `compare`: return only keys of `data` and `evaluate`, or their values."""
    return [text for text in _settings(incomplete, {}) if text.startswith(("data.", "evaluate."))]


def method_names(incomplete: str) -> list[str]:
    from tadistill.config.shorthand import METHODS

    return _beginning(incomplete, METHODS)


def keys(incomplete: str) -> list[str]:
    """Shell completion: return keys of a recipe, such as `lr` or `method.optim.lr`, and names of metrics."""
    from tadistill.config.reference import reference
    from tadistill.metrics import METRICS

    places = [place for part in reference() for place in part.places]
    names = [key.name for part in reference() for key in part.keys]
    return _beginning(incomplete, sorted({*names, *filter(None, places), *_places({}), *METRICS}))


def _beginning(incomplete: str, texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text.startswith(incomplete)]


def _settings(incomplete: str, named: dict[str, list[str]]) -> list[str]:
    key, given, _ = incomplete.partition("=")
    places = _places(named)
    if given:
        return _beginning(incomplete, [f"{key}={value}" for value in places.get(key, ())])
    return _beginning(incomplete, [f"{place}=" for place in places])


def _places(named: dict[str, list[str]]) -> dict[str, list[str]]:
    from tadistill.config.reference import NAME, reference

    found: dict[str, list[str]] = {}
    for part in reference():
        for place in part.places:
            top = place.split(f".{NAME}")[0]
            for name in named.get(top, ()) if NAME in place else ("",):
                for key in part.keys:
                    full = ".".join(filter(None, (place.replace(NAME, name, 1), key.name)))
                    choices = ["true", "false"] if key.type == "true or false" else key.choices
                    found.setdefault(full, []).extend(choice for choice in choices if choice not in found.get(full, ()))
    return found


def _named(recipe: Any) -> dict[str, list[str]]:
    from tadistill.config import load
    from tadistill.errors import ConfigError

    try:
        loaded = load(recipe)
    except (ConfigError, TypeError):
        return {}
    return {"models": [*loaded.models], "arms": [*loaded.arms], "evaluate.also": [*loaded.evaluate.also], "resources": ["default"]}
