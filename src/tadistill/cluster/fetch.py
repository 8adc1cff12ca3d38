"""`tadistill fetch`: download the models and data sets of a recipe, so that jobs need no network. GGUF files are converted.

    fetch_recipe(recipe, runs, console)   -> downloads and converts what is missing, prints a table, records commits in RUNS/fetched.json
    compare(recipe, runs)                 -> what a job with HF_HUB_OFFLINE=1 would not find, and what has another commit than in this file

A model is complete if all its shards and a tokenizer are on the disk. The repository of a data set does not say which files are needed, so
fetched.json lists them. Without this list, a data set counts as complete if some of its files are there.

A teacher that runs on a server is needed only in part: its tokenizer and, with `serve.gives: hidden`, the file with its output head.
fetched.json lists its files too. Without this list, the teacher counts as complete if its tokenizer and, for
`hidden`, some file with weights are there.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from tadistill.config import Recipe
from tadistill.config.recipe_files import placed
from tadistill.data import datasets, hub
from tadistill.data.tinyworld import TOKENIZERS
from tadistill.disk import read_json, write_json
from tadistill.errors import TadistillError
from tadistill.models import sources
from tadistill.models.sources import Gives, fetch_part, locate_part, needed_part
from tadistill.terminal import Terminal
from tadistill.text import size

_RECORD = "fetched.json"
_WORKERS = 1
"""Number of files that are downloaded at the same time. It is low because login nodes kill a process that uses much memory."""


@dataclass(frozen=True)
class Need:
    """A model, tokenizer or data set that must be downloaded or converted before a recipe runs."""

    kind: Literal["model", "tokenizer", "data set"]
    name: str
    """Hub id of the repository, the name of a wheel (a Python package that contains a model), or the path of a GGUF file."""
    revision: str
    file: str | None = None
    """The file that is needed from the repository of a data set. None if all its files are needed."""
    tokenizer: bool = False
    """True if the tokenizer is in the repository of the model."""
    gives: Gives | None = None
    """Outputs that the model's server sends (`serve.gives`). They decide which files of the model are needed. None if all are needed."""

    @property
    def shown(self) -> str:
        """Return the name for display, with the file if there is one."""
        return f"{self.name}/{self.file}" if self.file else self.name

    @property
    def key(self) -> str:
        return f"{self.kind} {self.shown}@{self.revision}"


@dataclass(frozen=True)
class Found:
    """The files of one model, tokenizer or data set on this disk."""

    commit: str | None
    """Commit of the repository on the Hugging Face Hub. None if the files do not come from the Hub."""
    bytes: int
    files: tuple[str, ...]
    """Names of the files in the repository. Empty if only one file is read."""


def needs(recipe: Recipe) -> list[Need]:
    """Return the models, tokenizers and data sets that a recipe reads from the Hugging Face Hub or from Python packages.

    Raises:
        DataError, ModelError: a name in the recipe is not valid.
    """
    found = []
    for name, model in recipe.models.items():
        if model.load and sources.parse_source(model.load).kind in ("hub", "wheel"):
            gives = needed_part(recipe, name)
            found.append(Need("model", model.load, model.revision, tokenizer=model.tokenizer is None, gives=gives))
        elif model.load and (base := sources.adapter_base(model.load)) and sources.parse_source(base[0]).kind == "hub":
            found.append(Need("model", *base))
        if model.tokenizer and model.tokenizer not in TOKENIZERS and sources.parse_source(model.tokenizer).kind in ("hub", "wheel"):
            found.append(Need("tokenizer", model.tokenizer, model.revision))
    data = recipe.data
    for role, ref in [*data.splits(), *([("train", data.corpus)] if data.corpus else [])]:
        if place := datasets.on_hub(ref, role, data):
            found.append(Need("data set", place[0], ref.revision, place[1]))
    return list(dict.fromkeys(found))


def conversions(recipe: Recipe) -> list[Need]:
    """Return the models and tokenizers of a recipe that are GGUF files on this disk. They must be converted."""
    models = recipe.models.values()
    named = [Need("model", model.load, "main") for model in models if model.load]
    named += [Need("tokenizer", model.tokenizer, "main") for model in models if model.tokenizer]
    return [n for n in dict.fromkeys(named) if n.name not in TOKENIZERS and sources.parse_source(n.name).kind == "gguf"]


def compare(recipe: Recipe, runs: Path) -> tuple[list[str], list[str]]:
    """Return a sentence for each model, tokenizer or data set of the recipe that is not on this disk, and a warning for each whose commit
    differs from that in fetched.json, which finished stages used. No network is used.

    Raises:
        DataError, ModelError: a name in the recipe is not valid, or a file in a cache is damaged.
    """
    record, missing, moved = _read(runs), list[str](), list[str]()
    for need in needs(recipe):
        if (found := look(need, record)) is None:
            at = f"{need.kind} `{need.shown}` at revision `{need.revision}`"
            missing.append(f"{at} is not on this disk; run `tadistill fetch RECIPE` with network access")
        elif change := _change(need, found, record):
            moved.append(change)
    return missing, moved


def look(need: Need, record: Mapping[str, Any]) -> Found | None:
    """Find the files of a model, tokenizer or data set on this disk. Return None if some are missing. No network is used.

    Raises:
        DataError, ModelError: the name is not valid, or a file in a cache is damaged.
    """
    if need.kind == "data set" or need.gives:
        path = locate_part(need.name, need.revision, need.gives) if need.gives else hub.cached(need.name, need.revision, need.file)
        if path is None:
            return None
        found, listed = _found(path), record.get(need.key, {})
        lost = listed.get("commit") == found.commit and not set(listed.get("files", ())) <= set(found.files)
        return None if lost else found
    path = sources.locate(need.name, need.revision, weights=need.kind == "model")
    if path is None or (need.tokenizer and sources.locate(need.name, need.revision, weights=False) is None):
        return None
    return _found(path)


def _found(path: Path) -> Found:
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    names = tuple(str(p.relative_to(path)) for p in files) if path.is_dir() else ()
    return Found(commit, sum(p.stat().st_size for p in files), names)


@placed
def fetch_recipe(recipe: Recipe, runs: Path, console: Terminal) -> None:
    """Download the models and data sets of a recipe, convert its GGUF files, print a table and record the commits.

    If a download fails, the other downloads are still made. Then a TadistillError is raised.
    """
    # huggingface_hub reads this variable when it is imported (later); its Xet protocol fails on login nodes
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    wanted, before, failures = [*needs(recipe), *conversions(recipe)], _read(runs), []
    if not wanted:
        console.say(f"study {recipe.study} needs no downloads")
        return
    after, changes = dict(before), []
    table = Table(title=f"{recipe.study}: models and data", title_justify="left", box=None)
    for column in ("what", "name", "revision", "commit", "size", "state"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for need in wanted:
        try:
            found, state = _fetch(need, before, console)
        except TadistillError as error:
            failures.append(error)
            table.add_row(need.kind, escape(need.shown), escape(need.revision), "", "", "missing")
            continue
        if change := _change(need, found, before):
            changes.append(change)
        after[need.key] = {**asdict(found), "files": list(found.files)}
        table.add_row(need.kind, escape(need.shown), escape(need.revision), (found.commit or "")[:12], size(found.bytes), state)
    console.print(table)
    for change in changes:
        console.say(change)
    if after != before:
        write_json(runs / _RECORD, after)
    if failures:
        raise type(failures[0])(*(problem for failure in failures for problem in failure.problems))


def _fetch(need: Need, record: Mapping[str, Any], console: Terminal) -> tuple[Found, str]:
    known = need.file is not None or need.key in record or (need.kind != "data set" and need.gives is None)
    if known and (found := look(need, record)):
        return found, "already here"
    console.say(f"fetching {need.kind} {need.shown} …")
    if need.kind == "data set":
        return _found(hub.download(need.name, need.revision, need.file, workers=_WORKERS)), "fetched"
    if need.gives:
        return _found(fetch_part(need.name, need.revision, need.gives, workers=_WORKERS)), "fetched"
    path = sources.fetch(need.name, need.revision, weights=need.kind == "model", workers=_WORKERS)
    if need.tokenizer:  # only the weights may have been on this disk
        sources.fetch(need.name, need.revision, weights=False, workers=_WORKERS)
    return _found(path), "converted" if sources.parse_source(need.name).kind == "gguf" else "fetched"


def _change(need: Need, found: Found, record: Mapping[str, Any]) -> str | None:
    old = record.get(need.key, {}).get("commit")
    if old in (None, found.commit):
        return None
    return (
        f"{need.kind} {need.shown}: revision `{need.revision}` has moved from commit {old[:12]} to {(found.commit or 'none')[:12]}; "
        "finished stages used the old commit, so set `revision` in the recipe to one of the two commits"
    )


def _read(runs: Path) -> dict[str, Any]:
    path = runs / _RECORD
    return read_json(path, fix="delete it and run `tadistill fetch RECIPE` again") if path.is_file() else {}
