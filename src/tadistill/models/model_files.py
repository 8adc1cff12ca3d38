"""The files of a model: find them on this disk, download them from the Hub, and check them before transformers reads them, because they may
come from strangers."""

import hashlib
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.version import Version

from tadistill import disk
from tadistill.data import hub
from tadistill.errors import ModelError, cause

WEIGHTS = (".safetensors", ".bin")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")  # names of the files that peft writes
_DESCRIPTION = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer, hashed in full
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
_SAFETENSORS = ["model*.safetensors", ADAPTER_WEIGHTS[0]]
_PICKLES = ["pytorch_model*.bin", ADAPTER_WEIGHTS[1]]
_TEXTS = (".jinja", ".txt")  # such files may be empty: a tokenizer without merges has an empty merges.txt
_NOT_IN_JSON = ("NaN", "Infinity", "-Infinity")  # numbers that JSON cannot write
_POINTER = b"version https://git-lfs"
POINTER = "only a pointer of Git LFS; run `git lfs pull` in its folder to get the file"
"""Text for messages about a file that Git LFS has not downloaded yet."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_GGUF = Version("5.23")
"""The first version of transformers that reads the tokenizers of GGUF files well. In 5.18 to 5.22, Gemma's has no BOS. In 5.8, pad tokens
are lost, and Gemma's words are split into letters."""


def is_adapter(directory: Path) -> bool:
    """Return True if a directory contains an adapter, but not the weights of a whole model."""
    return (directory / ADAPTER).is_file() and not any(
        any(directory.glob(f"{name}*")) for name in ("model*.safetensors", "pytorch_model*.bin")
    )


def has_weights(adapter: Path) -> bool:
    """Return True if the directory of an adapter contains its weights."""
    return any((adapter / file).is_file() for file in ADAPTER_WEIGHTS)


def is_described(directory: Path) -> bool:
    """Return True if a directory contains the configuration of a model or of a tokenizer."""
    return any((directory / name).is_file() for name in ("config.json", "tokenizer_config.json"))


def check_gguf_reader(load: str) -> None:
    """Check that the installed transformers can convert the GGUF file `load`. An older version does not use a finished conversion either.

    Raises:
        ModelError: transformers is too old.
    """
    try:
        installed = version("transformers")
    except PackageNotFoundError:  # `tadistill doctor` says so
        return
    if Version(installed) < _GGUF:
        raise ModelError(
            f"GGUF file `{load}` needs transformers {_GGUF} or newer, because version {installed}, which is installed, splits text "
            "wrongly; run `pip install --upgrade transformers`, or use the model's hub id"
        )


def complete(directory: Path) -> bool:
    """Return True if the directory has a config.json and all weight files. Raises a ModelError if the index of the weights is damaged."""
    if not (directory / "config.json").is_file():
        return False
    for single, index in (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (directory / single).is_file():
            return True
        if (directory / index).is_file() and all((directory / shard).is_file() for shard in set(weight_map(directory / index).values())):
            return True
    return False


def weight_map(index: Path) -> dict[str, str]:
    """Return the content of an index (model.safetensors.index.json): a mapping from names of weights to names of files. Raises a ModelError
    if the index is damaged, or names a file outside its folder."""
    named = read_description(index, str(index.parent)).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) and 0 < len(name) < 250 for name in named.values()):
        raise ModelError(f"{index} does not map weights to files; download or save the model again")
    for name in named.values():
        if PurePosixPath(name).name != name or "\\" in name or name in (".", ".."):
            raise ModelError(f"{index} names the file `{name}`, which is outside the folder of the model; do not use this model")
    return named


def read_description(path: Path, load: str) -> dict[str, Any]:
    """Return the content of a JSON file of a model, such as its config.json. `load` is the name of the model in error messages.

    Raises:
        ModelError: the file is damaged, or this user may not read it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except PermissionError as error:
        raise _not_permitted(path, load, error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} of model `{load}` is damaged ({error}); download or save the model again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} of model `{load}` is not a JSON object; download or save the model again")
    return found


def _not_permitted(path: Path, load: str, error: PermissionError) -> ModelError:
    return ModelError(f"{path.name} of model `{load}` cannot be read ({cause(error)}); {disk.PERMIT}")


def _number(found: dict[str, Any]) -> Any:
    # transformers writes infinity as {"__float__": "Infinity"}
    return float(found["__float__"]) if found.keys() == {"__float__"} and found["__float__"] in _NOT_IN_JSON else found


def read_or_empty(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dict if the file is missing, is damaged, or contains no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_files(directory: Path, load: str) -> None:
    """Check that no file of a model is empty, and that no file is only a pointer of Git LFS.

    Raises:
        ModelError: a file is empty or only a pointer, this user may not read it, or the directory contains both an adapter and a whole
            model. The message names the file.
    """
    for path in sorted(directory.iterdir()):
        if path.suffix not in (*WEIGHTS, ".json", ".model", *_TEXTS) or not path.is_file():
            continue
        if not path.stat().st_size and path.suffix not in _TEXTS:
            raise ModelError(f"{path.name} of model `{load}` is empty; download or save the model again")
        try:
            pointer = is_pointer(path)
        except PermissionError as error:
            raise _not_permitted(path, load, error) from error
        if pointer:
            raise ModelError(f"{path.name} of model `{load}` is {POINTER}")
    if (directory / ADAPTER).is_file() and not is_adapter(directory):
        raise ModelError(
            f"model `{load}` contains both a whole model and an adapter ({ADAPTER}); move the adapter's files to another folder, and load "
            "that folder to use the adapter"
        )


def is_pointer(path: Path) -> bool:
    """Return True if the file is only a pointer of Git LFS."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def base_of(adapter: Path, load: str) -> tuple[str, str]:
    """Return the source and the revision of the base model of an adapter. `load` is the adapter's name in error messages.

    Raises:
        ModelError: the adapter is not a LoRA adapter, or does not name a base model that can be found.
    """
    settings = read_description(adapter / ADAPTER, load)
    if str(settings.get("peft_type")).upper() != "LORA":
        raise ModelError(
            f"adapter `{load}` is of type {settings.get('peft_type')}, but only LORA adapters can be merged; choose a LORA adapter"
        )
    local = Path(load).expanduser() == adapter
    fix = f"as base_model_name_or_path into {ADAPTER}"
    if not local:
        fix = f"{fix} of a copy of the adapter (`hf download {load} --local-dir DIR`), and load DIR"
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(f"adapter `{load}` does not name its base model; write the base's hub id or directory {fix}")
    try:
        for folder in (Path(base).expanduser(), *((adapter / base, adapter.parent / base) if local else ())):
            if (folder / "config.json").is_file() or is_adapter(folder):
                return os.path.normpath(folder), "main"
    except (OSError, RuntimeError) as error:  # a part has more than 255 characters, or ~NAME is no user
        raise ModelError(f"adapter `{load}` belongs to `{base}`, which is not a valid path ({cause(error)}); correct {ADAPTER}") from error
    if not HUB_ID.fullmatch(base):
        raise ModelError(
            f"adapter `{load}` belongs to the model `{base}`, which is no directory here and no hub id; write its directory or hub id {fix}"
        )
    return base, revision if isinstance(revision, str) and revision else "main"


def directory_digest(directory: Path) -> str:
    """Return a digest of a model's JSON files, tokenizer and weights. Of a large weight file, only some blocks are hashed."""
    described = sorted({p for pattern in _DESCRIPTION for p in directory.glob(pattern)})
    weights = sorted(p for p in directory.iterdir() if p.suffix in WEIGHTS)
    lines = [f"{p.name} {disk.sha256(p)}" for p in described] + [f"{p.name} {disk.sampled_digest(p)}" for p in weights]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- the Hugging Face Hub --------------------------------------------------------------------------------------------------


def hub_folder(name: str, revision: str) -> Path | None:
    """Return the folder of a model of the Hub, without network. Return None if its description is not on this disk."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", ADAPTER)]
    except HFValidationError as error:
        raise hub.invalid(ModelError, name, error) from error
    return next((Path(file).parent for file in found if isinstance(file, str) and Path(file).is_file()), None)


def hub_cached(name: str, revision: str, weights: bool) -> Path | None:
    """Return the folder of a model of the Hub, without network. Return None if a file is not on this disk. Without `weights`, configuration
    and tokenizer are enough."""
    path = hub_folder(name, revision)
    if path is None or weights:
        return path if path and complete(path) else None
    return path if any((path / file).is_file() for file in TOKENIZERS) else None


def hub_description(name: str, revision: str) -> Path | None:
    """Download config.json of a model of the Hub, and return its path. For an adapter, download its description, and return None.

    Raises:
        ModelError: the file cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub.explained(ModelError, "model", name, revision):
        try:
            return Path(hf_hub_download(name, "config.json", revision=revision))
        except RemoteEntryNotFoundError:
            hf_hub_download(name, ADAPTER, revision=revision)
    return None


def hub_download(name: str, revision: str, weights: bool, workers: int) -> Path:
    """Download a model of the Hub, and return its folder. If `weights` is False, only the configuration and the tokenizer are downloaded.

    The weights of a LoRA adapter are always downloaded.

    Raises:
        ModelError: the model cannot be downloaded, or has no weights.
    """
    from huggingface_hub import snapshot_download

    options = {"revision": revision, "ignore_patterns": ["*/*", "consolidated*"], "max_workers": workers}
    with hub.explained(ModelError, "model", name, revision):
        path = Path(snapshot_download(name, allow_patterns=[*_DESCRIPTION, *(_SAFETENSORS if weights else ())], **options))
        if is_adapter(path) and not has_weights(path):
            snapshot_download(name, allow_patterns=_SAFETENSORS, **options)
        if not (has_weights(path) if is_adapter(path) else complete(path) or not weights):  # older repositories have only pickled weights
            snapshot_download(name, allow_patterns=_PICKLES, **options)
    if weights and not complete(path) and not is_adapter(path):
        raise ModelError(
            f"model `{name}` at revision `{revision}` has no config.json or no weights (*.safetensors or *.bin); choose another model"
        )
    return path
