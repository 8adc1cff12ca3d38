"""Architectures of models: refuse those that cannot be distilled, check what transformers can build, and build models with random weights.

    config = scratch_config("llama", {"hidden_size": 64, "num_hidden_layers": 2}, tokenizer)
    check_scratch(config)                                       # builds the model without weights; if it is small, also runs it
    model = scratch_model(config, seed=1, dtype=torch.float32)

All causal language models of transformers can be distilled, except those that this module refuses. `tests/e2e/test_architectures.py` checks
every other architecture. It compares training and sampling with a plain forward pass over the whole text: the logits and the sampled tokens
must be equal.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN, FastGELUActivation, NewGELUActivation
from transformers.initialization import no_init_weights
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from tadistill.errors import ConfigError, ModelError, TadistillError, did_you_mean, did_you_mean_then
from tadistill.models.model_files import read_description
from tadistill.models.shapes import BOTH, ENCODERS, REFUSED, check_new, refusal
from tadistill.models.tokens import vocabulary

_KNOWN = {r"(.*_)?act(ivation\w*)?|afn": list(ACT2FN), r"rope_\w+\.(rope_)?type": ["default", *ROPE_INIT_FUNCTIONS]}
"""Maps a regular expression for the names of configuration fields to the values that transformers knows for these fields."""
_MOST_LAYERS = 10_000
"""Largest number of layers. A model with more layers would take minutes to build, even without weights."""
_FULL = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)
"""Words of the errors that torch raises if memory is full. Only its own allocator of a GPU raises OutOfMemoryError: making CUDA's context,
the libraries of NVIDIA, NCCL and the allocator of the CPU raise other errors."""


def check_architecture(config: PreTrainedConfig, model: str) -> None:
    """Raise a ModelError if models with this configuration cannot be distilled. The message names the model and its type."""
    kind = config.model_type
    _check_type(kind, model)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ModelError(f"the configuration of model `{model}` has {layers} layers; write at most {_MOST_LAYERS}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions < 1:
        raise ModelError(f"the configuration of model `{model}` has {positions} positions (max_position_embeddings); write at least 1")
    if config.is_encoder_decoder:
        raise refusal(model, kind, "is an encoder-decoder model")
    if (kind in ENCODERS and not getattr(config, "is_decoder", True)) or not getattr(config, "causal", True):
        flag = "causal" if hasattr(config, "causal") else "is_decoder"
        raise refusal(model, kind, f'{BOTH} unless its config.json has "{flag}": true')


def read_config(directory: Path, load: str) -> PreTrainedConfig:
    """Read the config.json of a model. `load` is the name of the model in error messages.

    Raises:
        ModelError: the file cannot be read, or models of its type need code of their own or cannot be distilled.
    """
    config = parse_config(directory, load)
    check_architecture(config, load)
    return config


def parse_config(directory: Path, load: str) -> PreTrainedConfig:
    """Read the config.json of a model, also of one that only gives its tokenizer and cannot be distilled. Raises a ModelError in the other
    cases of `read_config`."""
    described = read_description(directory / "config.json", load)
    try:
        with quiet():
            return AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # a damaged file can make transformers raise any error
        refuse_code(directory, load, error)
        refuse_field(described, load, error)
        _check_type(described.get("model_type"), load)
        raise ModelError(
            f"config.json of model `{load}` cannot be read ({first_line(error)}); correct the file, or download the model again"
        ) from error


def check_config(directory: Path, load: str) -> None:
    """Check that transformers can build a model from its config.json. No weights are needed.

    Raises:
        ModelError: as `read_config`, or transformers cannot build the model, or a package that the model needs is missing.
    """
    config = read_config(directory, load)
    try:
        build_on_meta(config)
    except Exception as error:  # the code of a model family can raise any error
        refuse_field(config.to_dict(), load, error)
        fix = "install it" if isinstance(error, ImportError) else "correct the file"
        raise ModelError(f"transformers cannot build model `{load}` from its config.json ({first_line(error)}); {fix}") from error


def refuse_field(config: Mapping[str, Any], load: str, error: Exception) -> None:
    """Raise a ModelError if a field of the configuration caused an error of transformers."""
    if why := _wrong_field(error, config):
        raise ModelError(f"config.json of model `{load}`: {why}") from error


def refuse_code(directory: Path, load: str, error: Exception) -> None:
    """Raise a ModelError if an error of transformers says that the files of a model need code of their own."""
    if "trust_remote_code" not in str(error):
        return
    found = [
        read_description(directory / name, load).get("auto_map")
        for name in ("config.json", "tokenizer_config.json")
        if (directory / name).is_file()
    ]
    parts = [part for auto_map in found if isinstance(auto_map, dict) for part in auto_map.values()]
    named = sorted({str(name) for part in parts for name in (part if isinstance(part, list) else [part]) if name})
    raise ModelError(
        f"model `{load}` needs Python code of its own ({', '.join(named) or 'auto_map'}), which tadistill never runs; use a model with an "
        "architecture of transformers, or check this code, and register it with transformers in a package of your own"
    ) from error


def _wrong_field(error: Exception, config: Mapping[str, Any]) -> str | None:
    """Return a sentence about the configuration field that caused an error of transformers, with the fix. Return None if the field is not
    known."""
    if found := re.search(r"Field '(\w+)' with value (.{1,80}) doesn't match any type", str(error)):
        return f"{found[1]} is {found[2]}, which is not a valid value of this field; correct the field"
    for name, value in _fields(config):
        known = next((values for pattern, values in _KNOWN.items() if re.fullmatch(pattern, name)), None)
        if known and isinstance(error, KeyError) and error.args == (value,):
            hint = did_you_mean_then(value, known, f"known values are {', '.join(known)}")
            return f"{name} is `{value}`, which transformers does not know; {hint}"
    return None


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", found) for inner, found in _fields(value))
        elif isinstance(value, str):
            yield name, value


def _check_type(kind: Any, model: str) -> None:
    if str(kind) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise refusal(model, kind, "is not a causal language model of this version of transformers")
    if kind in REFUSED:
        raise refusal(model, kind, REFUSED[kind])


# --- models with random weights ---------------------------------------------------------------------------------------

_FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_TRIED = 5_000_000
"""Largest number of parameters of a model that is built and run as a check. This takes a fraction of a second."""
_LARGEST = {"layer": 1000, "block": 1000, "expert": 10_000, "": 10**9}
"""Maps a part of a field's name to the largest number that fields with such a name may have. The empty part stands for all other names. No
real model has larger numbers, and transformers builds a model with smaller numbers in seconds."""


def scratch_config(kind: str, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the configuration of a new model of the transformers type `kind`. Vocabulary and special tokens come from the tokenizer.

    Raises:
        ConfigError: transformers has no such model type, or a field is unknown, is set by the tokenizer or has a wrong value.
    """
    check_new(kind, fields, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    family = type(AutoConfig.for_model(kind))
    known = {field.name for field in dataclasses.fields(family)} | set(family.attribute_map)
    for name in fields:
        if name in _FROM_TOKENIZER:
            raise ConfigError(f"config.{name} of scratch:{kind} is set by the tokenizer; remove this field from `config`")
        if name not in known:
            hint = did_you_mean(name, known, "see the list in the transformers documentation")
            raise ConfigError(f"config.{name} is not a field of scratch:{kind}; {hint}")
        _check_number(kind, name, fields[name], getattr(family(), name, None))
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        config = AutoConfig.for_model(kind, **{**fields, **special, "vocab_size": vocabulary(tokenizer).size})
    except Exception as error:  # a wrong field can make transformers raise any error
        raise ConfigError(f"`config` of scratch:{kind} is not valid: {_reason(error, fields)}") from error
    check_architecture(config, f"scratch:{kind}")
    return config


def scratch_model(config: PreTrainedConfig, *, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights on the CPU. The state of the global random generator does not change.

    Weights are drawn in float32 and then cast, so the same seed gives the same weights for every dtype.

    Raises:
        ConfigError: transformers cannot build a model from this configuration.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU's generator
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # any error, as in `scratch_config`
            raise ConfigError(
                f"transformers cannot build scratch:{config.model_type} from `config`: {_reason(error, config.to_dict())}"
            ) from error
    for parameter in model.parameters():  # buffers stay float32 (rotary frequencies), as after from_pretrained
        parameter.data = parameter.data.to(dtype)
    return model


def check_scratch(config: PreTrainedConfig) -> None:
    """Check that transformers can build the model, without memory for its weights. A small model also gets weights and runs on two tokens.

    Raises:
        ConfigError: transformers cannot build or run a model of this configuration, or its logits are not finite.
    """
    try:
        if build_on_meta(config).num_parameters() > _TRIED:
            return
        with torch.no_grad(), quiet():
            model = scratch_model(config, seed=0, dtype=torch.float32).eval()
            logits = model(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False).logits
    except Exception as error:  # any error, as in `scratch_config`
        raise ConfigError(
            f"transformers cannot build or run scratch:{config.model_type} with this `config`: {_reason(error, config.to_dict())}"
        ) from error
    if not logits.isfinite().all():
        raise ConfigError(f"a model scratch:{config.model_type} with this `config` computes logits that are not finite; correct `config`")


def _check_number(kind: str, name: str, value: Any, default: Any) -> None:
    if isinstance(value, dict):
        for part, inner in value.items():
            _check_number(kind, f"{name}.{part}", inner, 0)
    if isinstance(default, bool) or not isinstance(default, int | float | None):
        return
    numbers = [*value] if isinstance(value, list | tuple) else [value]
    for number in numbers:
        if isinstance(number, bool) and isinstance(default, int | float):
            raise ConfigError(f"config.{name} of scratch:{kind} is {str(number).lower()}; write a number")
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        largest = next((limit for part, limit in _LARGEST.items() if part in name))
        if abs(number) > largest or not math.isfinite(number):  # in this order, because a whole number may be too large for a float
            raise ConfigError(f"config.{name} of scratch:{kind} is {number}; write a number of at most {largest:,}")
        dropout = "drop" in name
        if number < 0 or (number == 0 and not dropout and default != 0):
            raise ConfigError(f"config.{name} of scratch:{kind} is {number}; write a positive number")
        if dropout and number >= 1:
            raise ConfigError(f"config.{name} of scratch:{kind} is {number}; write a dropout of at least 0 and less than 1")


def count_parameters(config: Mapping[str, Any]) -> int:
    """Return the number of parameters of a causal language model of any family. `config` is the content of its config.json.

    Raises:
        ModelError: transformers cannot build a model from this configuration.
    """
    try:
        return build_on_meta(AutoConfig.for_model(**config)).num_parameters()
    except Exception as error:  # any error, as in `scratch_config`
        raise ModelError(
            f"transformers cannot build a causal language model from a configuration of type {config.get('model_type')} "
            f"({first_line(error)}); correct its config.json"
        ) from error


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model on the device `meta`, which needs no memory for its weights."""
    with torch.device("meta"):
        return build_unset(config).eval()


def build_unset(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Return a model whose weights are not set, for a caller that replaces all of them. Random ones would take longer to draw than the
    others to load. `options` are those of `from_config`. The state of the global random generator does not change."""
    with torch.random.fork_rng(devices=[]), no_init_weights(), quiet():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    model.tie_weights()
    return model


def _reason(error: Exception, fields: Mapping[str, Any]) -> str:
    # errors of strict dataclasses have two lines, and the second line is the reason
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")
    return _wrong_field(error, fields) or f"{last}; correct it"


# --- what transformers and torch say ------------------------------------------------------------------------------------


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, and also the second line if the first ends with a colon. Return the name of the error's
    class if the error has no text."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first).rstrip(".")


def is_full(error: BaseException) -> bool:
    """Return True if torch raised the error because the memory of a device is full.

    Code that runs or loads a model must not turn such an error into an error of the model: `stages.execute` says which keys to change. An
    error of tadistill is never such an error, also if it quotes one.
    """
    if not isinstance(error, RuntimeError) or isinstance(error, TadistillError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _FULL)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and warnings of transformers while a `with` block runs, because they would break the progress display of
    tadistill. Errors are still shown."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if loud := verbosity < ERROR:  # a change of the verbosity takes time, because it clears what all loggers of the process know
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if loud:
            logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- activation functions -----------------------------------------------------------------------------------------------


def fuse_gelu(model: nn.Module) -> None:
    """Compute the tanh form of GELU in one kernel. The modules of transformers for `gelu_new` and `gelu_fast` start eight kernels, and
    autograd keeps five tensors instead of two. The values differ by rounding errors.

    This changes the model lastingly. So only stages do it, and `tadistill.evaluate` does not do it to the user's model.
    """
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
