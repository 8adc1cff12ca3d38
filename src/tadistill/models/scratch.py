"""Models with random weights: check their configuration, and build them.

config = scratch_config("llama", {"hidden_size": 64, "num_hidden_layers": 2}, tokenizer)
check_scratch(config)                                       # builds the model without weights; if it is small, also runs it
model = scratch_model(config, seed=1, dtype=torch.float32)
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tadistill.errors import ConfigError, ModelError
from tadistill.models.architectures import check_architecture, quiet, wrong_field
from tadistill.models.pretrained import first_line

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
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = _nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(f"scratch:{kind}: transformers has no causal language model of this type{hint}")
    family = type(AutoConfig.for_model(kind))
    known = {field.name for field in dataclasses.fields(family)} | set(family.attribute_map)
    for name in fields:
        if name in _FROM_TOKENIZER:
            raise ConfigError(f"config.{name} of scratch:{kind} is set by the tokenizer; remove this field from `config`")
        if name not in known:
            raise ConfigError(f"config.{name} is not a field of scratch:{kind}{_nearest(name, known)}")
        _check_number(kind, name, fields[name], getattr(family(), name, None))
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        config = AutoConfig.for_model(kind, **{**fields, **special, "vocab_size": len(tokenizer)})
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
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean `{close[0]}`?" if close else "; see the list in the transformers documentation"


def _reason(error: Exception, fields: Mapping[str, Any]) -> str:
    # errors of strict dataclasses have two lines, and the second line is the reason
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")
    return wrong_field(error, fields) or f"{last}; correct it"
