"""Merge a LoRA adapter that was trained with peft into its base model."""

import warnings
from pathlib import Path
from typing import Any

import torch

from tadistill.disk import ordinary_permissions
from tadistill.errors import ModelError
from tadistill.models import sources
from tadistill.models.directory import ADAPTER, ADAPTER_WEIGHTS, check_files, read_description
from tadistill.models.reading import first_line, quiet, read_model, read_tokenizer

_USED = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "lora_bias"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters"),
)
"""The settings of an adapter that change its outputs. All other settings keep peft's defaults, because they concern only the training, or
could make peft import foreign code."""
_REFUSED = ("megatron_config", "layer_replication", "alora_invocation_tokens", "trainable_token_indices")


def merge(base: Path, base_name: str, adapter: Path, load: str, target: Path) -> None:
    """Merge an adapter into its base model, and write the result to `target` as an ordinary model in float32.

    The result has the adapter's tokenizer, or the tokenizer of the base if the adapter has none. Error messages name the base `base_name`
    and the adapter `load`.

    Raises:
        ModelError: peft is missing, or the adapter is damaged or does not fit its base.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(f"the package peft is needed to merge adapter `{load}`; run `pip install 'tadistill[lora]'`") from error
    check_files(adapter, load)
    settings = read_description(adapter / ADAPTER, load)
    if odd := [name for name in _REFUSED if settings.get(name)]:
        raise ModelError(
            f"adapter `{load}` has the setting {odd[0]}, which tadistill cannot merge; merge the adapter with the program that trained it"
        )
    model = read_model(base, base_name, torch.float32)
    own = any((adapter / name).is_file() for name in sources.TOKENIZERS)
    tokenizer = read_tokenizer(adapter if own else base, load if own else base_name)
    with quiet(), warnings.catch_warnings(action="ignore"):  # peft's warnings about transformers
        try:
            chosen = {name: settings[name] for name in _USED if settings.get(name) is not None}
            tuner: Any = peft.get_peft_model(model, peft.LoraConfig(**chosen))  # type: ignore[arg-type]
            weights = _weights(adapter)
            found = peft.set_peft_model_state_dict(tuner, weights)
            merged = tuner.merge_and_unload(safe_merge=True)
        except Exception as error:  # a damaged adapter can make peft raise any error
            raise ModelError(
                f"adapter `{load}` cannot be merged with its base `{base_name}` ({first_line(error)}); check that this is the right "
                "base model"
            ) from error
        lacking = [name for name in found.missing_keys if "lora_" in name]
        if lacking or found.unexpected_keys:
            name = (lacking or found.unexpected_keys)[0]
            raise ModelError(
                f"adapter `{load}` does not fit its base `{base_name}` (one of them lacks the weight {name}); correct "
                "`base_model_name_or_path` of the adapter"
            )
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
    ordinary_permissions(target)


def _weights(adapter: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    safe, pickled = (adapter / name for name in ADAPTER_WEIGHTS)
    return load_file(safe) if safe.is_file() else torch.load(pickled, weights_only=True, map_location="cpu")
