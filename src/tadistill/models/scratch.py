"""Models with random weights: `load: scratch:TYPE` with fields of the transformers configuration.

Called by `loading.load_model`; `scratch_config` alone validates the fields without building anything.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tadistill.errors import ConfigError
from tadistill.models.noise import quiet

_OURS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")  # taken from the tokenizer


def scratch_config(kind: str, fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of a new model of transformers' type `kind`; vocabulary and special tokens are the tokenizer's.

    Raises:
        ConfigError: no such causal language model, no such field, a field that belongs to the tokenizer, or a bad value.
    """
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = _nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(f"scratch:{kind} names no causal language model of transformers{hint}")
    family = type(AutoConfig.for_model(kind))
    known = {field.name for field in dataclasses.fields(family)} | set(family.attribute_map)
    for name in fields:
        if name in _OURS:
            raise ConfigError(f"config.{name} of scratch:{kind} comes from the tokenizer; remove it")
        if name not in known:
            raise ConfigError(f"config.{name} is not a field of scratch:{kind}{_nearest(name, known)}")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    try:
        return AutoConfig.for_model(kind, **{**fields, **special, "vocab_size": len(tokenizer)})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"config of scratch:{kind} is not valid: {_last_line(error)}; correct the field") from error


def scratch_model(config: PreTrainedConfig, *, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights on the CPU: the same for the same seed, and the global generator is left as it was.

    Weights are drawn in float32 and then cast, so that the dtype does not change what is drawn.

    Raises:
        ConfigError: transformers cannot build a model from this configuration.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every GPU's generator
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"config of scratch:{config.model_type} gives no model: {_last_line(error)}; correct the fields") from error
    for parameter in model.parameters():  # not buffers: rotary frequencies stay float32, as after from_pretrained
        parameter.data = parameter.data.to(dtype)
    return model


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean `{close[0]}`?" if close else "; see its page in the transformers documentation"


def _last_line(error: Exception) -> str:
    """Strict dataclasses report on two lines; the second says the rule."""
    return str(error).strip().splitlines()[-1].strip().rstrip(".")
