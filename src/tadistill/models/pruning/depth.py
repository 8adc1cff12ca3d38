"""Depth pruning: a smaller model made from some layers of a larger one, of any family with one stack of layers.

    student = prune_depth(teacher, keep_list(6, teacher.config.num_hidden_layers))

`configured`, `renumbered` and `assembled` are its three steps; `width` uses them too.
"""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tadistill.errors import ConfigError, ModelError
from tadistill.models.loading import quiet

_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")  # configuration lists with one entry per layer


def keep_list(layers: int | Sequence[int], total: int) -> tuple[int, ...]:
    """Return the layers of `total` to keep: a list of indices as it is, or a number of evenly spaced ones with the first and the last.

    Raises:
        ConfigError: a number outside 2..total (1 has no first AND last), or indices that are empty, out of range or not ascending.
    """
    if isinstance(layers, int):
        if layers == total == 1:
            return (0,)
        if not 2 <= layers <= total:
            raise ConfigError(
                f"layers is {layers}, but the model has {total}; a number keeps the first, the last and evenly spaced ones between, "
                f"so write 2 to {total}, or a list such as [0] to choose yourself"
            )
        # rounds to the nearest whole number, halves up, with integers only: the same on every machine
        return tuple((2 * i * (total - 1) + layers - 1) // (2 * (layers - 1)) for i in range(layers))
    keep = tuple(layers)
    if not keep or any(not 0 <= i < total for i in keep) or any(a >= b for a, b in itertools.pairwise(keep)):
        raise ConfigError(f"layers is {list(keep)}; write ascending indices without repeats, between 0 and {total - 1}")
    return keep


def prune_depth(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """Make a new, ordinary model with copies of the kept layers' weights; `model` is not changed.

    It has the same dtype and device and is in eval mode. The layers are renumbered, so that caches and saving work.

    Raises:
        ConfigError: `keep` is not a valid list for this model.
        ModelError: the model's layers cannot be taken apart.
    """
    total = model.config.num_hidden_layers
    keep = keep_list(tuple(keep), total)
    stack = _stack(model, total)
    return assembled(model, configured(model.config, keep), renumbered(model.state_dict(), stack, keep))


def configured(config: PreTrainedConfig, keep: Sequence[int]) -> PreTrainedConfig:
    """Return a copy of the configuration for the kept layers.

    Raises:
        ModelError: a layer's output depends on its number.
    """
    config, total = copy.deepcopy(config), config.num_hidden_layers
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):  # GPT-2 only
        raise ModelError("scale_attn_by_inverse_layer_idx makes a layer depend on its number; such a model cannot be pruned in depth")
    for name in _PER_LAYER:
        values = getattr(config, name, None)  # only some families have these fields
        if isinstance(values, list | tuple) and len(values) == total:
            setattr(config, name, [values[i] for i in keep])
    config.num_hidden_layers = len(keep)  # gpt2 maps this name to n_layer
    return config


def renumbered(weights: Mapping[str, torch.Tensor], stack: str, keep: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the weights of the kept layers under their new numbers, and all weights outside the stack."""
    number = {old: new for new, old in enumerate(keep)}
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    renumbered = {}
    for name, tensor in weights.items():
        match = pattern.match(name)
        if match is None:
            renumbered[name] = tensor
        elif int(match[1]) in number:
            renumbered[f"{stack}.{number[int(match[1])]}.{name[match.end() :]}"] = tensor
    return renumbered


def assembled(model: PreTrainedModel, config: PreTrainedConfig, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Make a model of `config` with copies of `weights`, and with the dtype, device and generation settings of `model`.

    Raises:
        ModelError: the weights do not fit the configuration.
    """
    with torch.random.fork_rng(devices=[]), quiet():  # the random weights made here are replaced at once
        pruned = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation=config._attn_implementation)
    try:
        pruned.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"a {config.model_type} model cannot be pruned: {str(error).splitlines()[-1].strip()}") from error
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.to(model.device).eval()


def _stack(model: PreTrainedModel, total: int) -> str:
    """Return the name of the only list of decoder layers."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total]
    # a list inside a layer (experts, for instance) may have the same length by chance
    outer = [name for name in names if not any(name.startswith(other + ".") for other in names)]
    if len(outer) != 1:
        kind = model.config.model_type
        raise ModelError(f"a {kind} model has {len(outer)} stacks of {total} layers; only one with a single stack can be pruned in depth")
    return outer[0]
