"""Find or download the files that a study needs of a teacher on a server: configuration, tokenizer and, if the server sends hidden states,
the output head.

    locate_part("ORG/NAME", "main", "hidden")    -> the directory, or None if these files are not on this disk
    fetch_part("ORG/NAME", "main", "hidden")     -> the directory, after downloading these files

A model that does not come from the Hub always has all its files.
"""

from pathlib import Path
from typing import Literal

from tadistill.config import Recipe
from tadistill.models import sources

Gives = Literal["hidden", "top_k"]
"""The outputs that a server sends (`serve.gives`). Only hidden states need the output head."""


def needed_part(recipe: Recipe, name: str) -> Gives | None:
    """Return the outputs that the server of a model sends (`serve.gives`). Return None if this process needs the whole model, to run or
    prune it."""
    serve = recipe.models[name].serve
    return None if serve is None or any(model.parent == name for model in recipe.models.values()) else serve.gives


def locate_part(load: str, revision: str, gives: Gives) -> Path | None:
    """Return the directory of a model, without network. Return None if a file that is needed is not on this disk.

    For a model of the Hub, the configuration and the tokenizer are needed. If the server sends hidden states, at least one weight file
    (safetensors) is needed too. This function does not check whether that file contains the output head. If the file with the head is
    missing, `fetch_part` downloads it.

    Raises:
        ModelError: as in `sources.locate`.
    """
    if sources.parse_source(load).kind != "hub":
        return sources.locate(load, revision)
    found = sources.locate(load, revision, weights=False)
    return None if found is None or (gives == "hidden" and not any(found.glob("*.safetensors"))) else found


def fetch_part(load: str, revision: str, gives: Gives, *, workers: int = 8) -> Path:
    """Return the directory of a model, after downloading the files that are missing. Raises ModelError as `sources.fetch` does."""
    if sources.parse_source(load).kind == "hub" and gives == "hidden":
        from tadistill.models.head import fetch_head  # imports torch

        return fetch_head(load, revision)
    found = sources.fetch(load, revision, weights=sources.parse_source(load).kind != "hub", workers=workers)
    assert found is not None, "a model with `serve` cannot be `scratch:TYPE`, so it has a directory"
    return found
