"""Load a model directory with transformers, safely: no code from the directory runs, and missing weights or additional layers are errors.

tokenizer = read_tokenizer(directory, "ORG/NAME")
model = read_model(directory, "ORG/NAME", torch.float32)
read_model(directory, "ORG/NAME", torch.float32, device="meta")     # headers only: takes milliseconds, finds all errors except NaN
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tadistill.errors import ModelError
from tadistill.models.architectures import check_architecture, quiet, wrong_field
from tadistill.models.directory import check_files, read_description
from tadistill.models.tokens import check_ends

_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")
_SHOWN = 3
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def read_tokenizer(directory: Path, load: str) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a directory. `load` is the name of the model in error messages.

    Raises:
        ModelError: there is no tokenizer, it cannot be read, or it needs code of its own.
    """
    check_files(directory, load)
    with quiet():
        try:
            tokenizer = _tokenizer_of(directory)
        except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
            _refuse_code(directory, load, error)
            _refuse_config(directory, load)
            if not any((directory / name).is_file() for name in _VOCABULARIES):
                raise ModelError(
                    f"model `{load}` has no tokenizer (tokenizer.json); save its tokenizer into the same directory, or set `tokenizer:`"
                ) from error
            raise ModelError(
                f"the tokenizer of model `{load}` cannot be read ({first_line(error)}); download it again, or set `tokenizer:`"
            ) from error
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"model_max_length in tokenizer_config.json of model `{load}` is {tokenizer.model_max_length!r}; write a number, or remove "
            "the field"
        )
    return tokenizer


def _tokenizer_of(directory: Path) -> PreTrainedTokenizerBase:
    # For some types of models, such as qwen2, AutoTokenizer ignores the class that the file names, and uses the class of the type. That
    # class splits text in another way, so a saved tokenizer of the general class would be loaded as a different tokenizer.
    try:
        described = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        described = None
    if isinstance(described, dict) and described.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in described:
        return PreTrainedTokenizerFast.from_pretrained(directory, trust_remote_code=False)
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def read_model(directory: Path, load: str, dtype: torch.dtype, device: str | None = None) -> PreTrainedModel:
    """Read the causal language model of a directory, in eval mode. `load` is the name of the model in error messages.

    On the device `meta`, only the headers of the files are read.

    Raises:
        ModelError: the files cannot be read, need code of their own, do not fit the configuration, or have an architecture that cannot be
            distilled.
    """
    check_files(directory, load)
    options: Any = {"dtype": dtype, "device_map": device} if device else {"dtype": dtype}
    with quiet():
        try:
            check_architecture(AutoConfig.from_pretrained(str(directory), trust_remote_code=False), load)
            # returns weights of a wrong size in a list. By default, transformers only logs them, and `quiet` hides this log
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(directory), trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except ModelError:
            raise
        except Exception as error:  # a damaged file can make transformers raise any error
            _refuse_code(directory, load, error)
            if why := _wrong_field(error, directory, load):
                raise ModelError(f"config.json of model `{load}`: {why}") from error
            fix = "install it" if isinstance(error, ImportError) else "download it again"
            raise ModelError(f"model `{load}` cannot be loaded as a causal language model ({first_line(error)}); {fix}") from error
    model, info = loaded
    check_ends(directory, load)
    _check_weights(load, info)
    if device != "meta":
        _check_finite(model, load)
    quantised = getattr(model.config, "quantization_config", None)
    if quantised and not getattr(model, "is_quantized", False):  # transformers ignores methods that it does not know
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(f"model `{load}` is quantised as {method}, which transformers cannot read; use the model's full weights")
    return model.eval()


def _check_weights(load: str, info: dict[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        some = ", ".join(missing[:_SHOWN])
        raise ModelError(
            f"{len(missing)} weights of this architecture are missing in the files of `{load}` ({some}); download or save the model again"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise ModelError(
            f"{len(mismatched)} weights of `{load}` have another shape than in config.json: {name} has the shape {list(stored)}, but "
            f"needs {list(wanted)}; correct config.json (vocab_size or another size), or download the model again"
        )
    if layers := _layers(info["unexpected_keys"]):
        raise ModelError(
            f"the files of `{load}` have more layers than num_hidden_layers in config.json (weights {', '.join(layers[:_SHOWN])}); "
            "set num_hidden_layers to the number of layers in the files, and use `init: {from: …, layers: …}` if you want fewer layers"
        )


def _check_finite(model: PreTrainedModel, load: str) -> None:
    for name, weight in model.named_parameters():
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():  # a sum needs no second tensor
            raise ModelError(
                f"model `{load}`: the weight {name} contains NaN or infinite values; download the model again, or save it again"
            )


def _layers(unexpected: Collection[str]) -> list[str]:
    return sorted(key for key in unexpected if (found := _LAYER.fullmatch(key)) and re.search(r"(layers|h|blocks?)\.$", found[1]))


def _refuse_config(directory: Path, load: str) -> None:
    if not (directory / "config.json").is_file():
        return
    try:
        AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # any error, as in `read_model`
        if why := _wrong_field(error, directory, load):
            raise ModelError(f"config.json of model `{load}`: {why}") from error
        raise ModelError(
            f"config.json of model `{load}` cannot be read ({first_line(error)}); correct the file, or download the model again"
        ) from error


def _refuse_code(directory: Path, load: str, error: Exception) -> None:
    if "trust_remote_code" not in str(error):
        return
    found = [read_description(directory / name, load).get("auto_map") for name in ("config.json", "tokenizer_config.json")
             if (directory / name).is_file()]  # fmt: skip
    parts = [part for auto_map in found if isinstance(auto_map, dict) for part in auto_map.values()]
    named = sorted({str(name) for part in parts for name in (part if isinstance(part, list) else [part]) if name})
    raise ModelError(
        f"model `{load}` needs Python code of its own ({', '.join(named) or 'auto_map'}), which tadistill never runs; use a model with an "
        "architecture of transformers, or check this code, and register it with transformers in a package of your own"
    ) from error


def _wrong_field(error: Exception, directory: Path, load: str) -> str | None:
    try:
        return wrong_field(error, read_description(directory / "config.json", load))
    except ModelError:  # the file is damaged, as `error` says
        return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, and also the second line if the first ends with a colon. Return the name of the error's
    class if the error has no text."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first).rstrip(".")
