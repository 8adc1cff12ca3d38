"""Pruning: make a smaller model from parts of a larger model's weights. A model with the key `init` in the recipe is made in this way.

    student = prune_depth(teacher, keep_list(6, teacher.config.num_hidden_layers))      # keeps evenly spaced layers; works for any family

    measured = importance(teacher, calibration)                                         # for depth and width, by activations
    shape = dataclasses.replace(shape_of(teacher.config), layers=6, intermediate=1024)
    student = prune(teacher, shape, measured)

The result is an ordinary model of the same family. Pruning in depth works for any family with a single stack of layers, if the kept layers
compute in their new places what they computed before. Pruning in depth and width follows Minitron (Muralidharan et al. 2024).
`models.prunable_parts` measures the importance of the parts.
"""

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tadistill.errors import ConfigError, ModelError
from tadistill.models.architectures import build_on_meta, build_unset, first_line, is_full
from tadistill.models.prunable_parts import FAMILIES, Axis, Family, Importance, keep_important
from tadistill.models.shapes import Shape, changes, check_shape, shape_of

_PER_LAYER = (
    *("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "indexer_types", "layers_block_type"),
    *("layer_rope_theta", "num_attention_heads_per_layer", "activation_sparsity_pattern", "intermediate_size"),
)
"""Configuration fields that are lists with one entry per layer, or can be such lists."""
_LAYER_NUMBERS = ("attn_layer_indices", "hybrid_layer_ids", "mlp_only_layers")
"""Configuration fields that are lists of layers."""
_CHANGING = ("training", "gradient_checkpointing")
"""Attributes of a module that can differ although it computes the same."""
_PLAIN = bool | int | float | str | None
"""Types of attributes that are compared."""


def keep_list(layers: int | Sequence[int], total: int) -> tuple[int, ...]:
    """Return the indices of the layers to keep. `layers` is a list of these indices, or the number of layers to keep.

    If it is a number, the kept layers are evenly spaced, and include the first and the last of the `total` layers.

    Raises:
        ConfigError: the number is not between 2 and `total`, or the list is empty, not ascending or out of range.
    """
    if isinstance(layers, int):
        if layers == total == 1:
            return (0,)
        if not 2 <= layers <= total:
            raise ConfigError(
                f"layers is {layers}; write a number from 2 to {total} (for evenly spaced layers), or a list of layers such as [0]"
            )
        # rounds to the nearest whole number (halves up) with integers only, so that all machines agree
        return tuple((2 * i * (total - 1) + layers - 1) // (2 * (layers - 1)) for i in range(layers))
    keep = tuple(layers)
    if not keep or any(not 0 <= i < total for i in keep) or any(a >= b for a, b in itertools.pairwise(keep)):
        raise ConfigError(f"layers is {list(keep)}; write indices from 0 to {total - 1} in ascending order, without repeats")
    return keep


def prune_depth(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """Return a new, ordinary model that has only the layers `keep`, with copies of their weights. `model` is not changed.

    The new model has the same dtype and device, and is in eval mode. Its layers are numbered from 0.

    Raises:
        ConfigError: `keep` is empty, not ascending or out of range.
        ModelError: the layers of this model type cannot be removed.
    """
    keep = keep_list(tuple(keep), depth(model.config))
    check_depth(model.config, keep)
    return _pruned(model, keep)


def check_depth(config: PreTrainedConfig, layers: int | Sequence[int]) -> PreTrainedConfig:
    """Check that a model with this configuration can be pruned to `layers` (as in `keep_list`), and return the configuration of the pruned
    model. Raises the errors of `prune_depth`.

    The check builds both models without memory for their weights. It compares new models, because some families change attributes of their
    modules in a forward pass.
    """
    model = build_on_meta(config)
    keep = keep_list(layers, depth(model.config))
    pruned = _pruned(model, keep)
    _check_layers(model, pruned, _stack(model, depth(model.config)), keep)
    if (error := _initial_weights(pruned)) and not _initial_weights(model):
        raise _cannot_prune(config, first_line(error)) from error
    return pruned.config


def _initial_weights(model: PreTrainedModel) -> Exception | None:
    # computes initial weights on the device `meta`, and returns the error; without them, the pruned model cannot be built or loaded
    try:
        model.apply(model._init_weights)
    except Exception as error:  # the code of a model family can raise any error
        return error
    return None


def _pruned(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    weights = _renumbered(model.state_dict(), _stack(model, depth(model.config)), keep)
    return _assembled(model, _configured(model.config, keep), weights)


def depth(config: PreTrainedConfig) -> int:
    """Return the number of layers in a configuration. Raises a ModelError if it has no such number."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ModelError(f"a {config.model_type} model has no single stack of layers, so it cannot be pruned; choose another model")
    return layers


def prune(model: PreTrainedModel, shape: Shape, importance: Importance, layers: Sequence[int] | None = None) -> PreTrainedModel:
    """Return a new, ordinary model of the same family with the sizes of `shape`. It has copies of the kept weights. `model` is not changed.

    All layers keep the same channels, but each layer keeps its own neurons and heads. Kept weights keep their order and their values. As in
    Minitron, the norms are not corrected for the removed channels. With grouped-query attention, each key-value head keeps only its best
    query heads. The score of a key-value head is the sum of the scores of these query heads. The key-value heads with the highest scores
    are kept. The new model has the same dtype and device, and is in eval mode.

    Args:
        importance: the importance scores of this model.
        layers: the layers to keep, as many as `shape.layers`. None means the layers with the highest block influence.

    Raises:
        ConfigError: the model cannot have this shape.
        ModelError: the family of the model, or one of its weights, is not supported.
    """
    check_shape(model.config, shape)
    family, have = FAMILIES[model.config.model_type], shape_of(model.config)
    keep = keep_important(shape.layers, importance.layers) if layers is None else tuple(layers)
    assert len(keep) == shape.layers
    config = _configured(model.config, keep)
    for name, value in changes(model.config, shape).items():
        setattr(config, name, value)
    # in OPT-350m the embeddings are narrower than the hidden states
    projected = model.config.model_type == "opt" and model.config.word_embed_proj_dim != model.config.hidden_size
    weights, known = {}, dict[tuple[Axis, int | None], Tensor | None]()
    for name, tensor in model.state_dict().items():
        layer, axes = _axes(family, name, model.config.model_type)
        if layer is not None and layer not in keep:
            continue
        for dim, axis in enumerate(axes):
            if axis == "words" and projected:
                continue
            if (axis, layer) not in known:
                known[axis, layer] = _kept(axis, layer, shape, have, importance)
            if (kept := known[axis, layer]) is not None:
                tensor = tensor.index_select(dim, kept.to(tensor.device))
        weights[name] = tensor
    return _assembled(model, config, _renumbered(weights, family.stack, keep))


def _configured(config: PreTrainedConfig, keep: Sequence[int]) -> PreTrainedConfig:
    config, total = copy.deepcopy(config), config.num_hidden_layers
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):  # GPT-2 only
        raise ModelError(
            "the model cannot be pruned in depth: its setting scale_attn_by_inverse_layer_idx makes each layer depend on its number; "
            "choose another model"
        )
    try:
        for name in _PER_LAYER:
            values = getattr(config, name, None)  # only some families have these fields
            if isinstance(values, list | tuple) and len(values) == total:
                with suppress(AttributeError):  # the family computes the list from other fields, so nothing can be set
                    setattr(config, name, [values[i] for i in keep])
        for name in _LAYER_NUMBERS:
            if isinstance(at := getattr(config, name, None), list | tuple):
                setattr(config, name, [i for i, kept in enumerate(keep) if kept in at])
        config.num_hidden_layers = len(keep)  # gpt2 maps this name to n_layer
        type(config).from_dict(config.to_dict())  # as when the pruned model is loaded
    except Exception as error:  # the code of a model family can raise any error
        raise _cannot_prune(config, first_line(error)) from error
    return config


def _renumbered(weights: Mapping[str, torch.Tensor], stack: str, keep: Sequence[int]) -> dict[str, torch.Tensor]:
    number = {old: new for new, old in enumerate(keep)}
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    found = {}
    for name, tensor in weights.items():
        match = pattern.match(name)
        if match is None:
            found[name] = tensor
        elif int(match[1]) in number:
            found[f"{stack}.{number[int(match[1])]}.{name[match.end() :]}"] = tensor
    return found


def _assembled(model: PreTrainedModel, config: PreTrainedConfig, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    try:
        with torch.device("meta" if model.device.type == "meta" else "cpu"):
            pruned = build_unset(config, dtype=model.dtype, attn_implementation=config._attn_implementation)
        pruned.load_state_dict(weights)
    except Exception as error:  # the code of a model family can raise any error
        if is_full(error):
            raise
        raise _cannot_prune(config, first_line(error)) from error
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.to(model.device).eval()  # type: ignore[arg-type]


def _cannot_prune(config: PreTrainedConfig, why: str) -> ModelError:
    return ModelError(
        f"this {config.model_type} model cannot be pruned to these layers; keep others, or choose another model ({why[:200]})"
    )


def _check_layers(model: PreTrainedModel, pruned: PreTrainedModel, stack: str, keep: Sequence[int]) -> None:
    # Weights are copies, so a layer computes something else only if an attribute of one of its modules has another value. Two kinds of
    # attributes may differ: the number of a layer, if it is the new number of the same layer, and copies of configuration fields.
    def same(old: Any, new: Any) -> bool:
        if isinstance(old, list | tuple) and isinstance(new, list | tuple):
            return len(old) == len(new) and all(map(same, old, new))
        if not (isinstance(old, _PLAIN) and isinstance(new, _PLAIN)):
            return True  # for instance a configuration, or a function
        renumbered = isinstance(new, int) and not isinstance(new, bool) and 0 <= new < len(keep) and keep[new] == old
        return renumbered or old == new

    for i, kept in enumerate(keep):
        parts = dict(pruned.get_submodule(f"{stack}.{i}").named_modules())
        for name, module in model.get_submodule(f"{stack}.{kept}").named_modules():
            if type(part := parts.get(name)) is not type(module):
                raise _cannot_prune(model.config, f"layer {kept} would become layer {i}, with another part {name}")
            for field, old in vars(module).items():
                new = vars(part).get(field, old)
                if field.startswith("_") or field in _CHANGING or same(old, new):
                    continue
                if (getattr(model.config, field, None), getattr(pruned.config, field, None)) != (old, new):
                    at = f"{name}.{field}".lstrip(".")
                    raise _cannot_prune(model.config, f"layer {kept} would become layer {i}, and its {at} {new} instead of {old}")


def _stack(model: PreTrainedModel, total: int) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total]
    # a list inside a layer (of experts, for instance) may have the same length
    outer = [name for name in names if not any(name.startswith(other + ".") for other in names)]
    if len(outer) != 1:
        kind = model.config.model_type
        raise ModelError(f"a {kind} model has {len(outer)} stacks of {total} layers; choose a model with exactly one stack")
    return outer[0]


def _kept(axis: Axis, layer: int | None, shape: Shape, have: Shape, scores: Importance) -> Tensor | None:
    # returns the kept indices in ascending order, or None to keep all
    if axis is None:
        return None
    if axis in ("channels", "words"):
        return torch.tensor(keep_important(shape.hidden, scores.hidden))
    assert layer is not None  # every other axis lies in a layer
    if axis == "neurons":
        return torch.tensor(keep_important(shape.intermediate, scores.neurons[layer]))
    queries, keys = _heads(scores.heads[layer], shape, have)
    if axis == "fused":
        width = have.heads * have.head_dim
        return torch.cat([queries, width + queries, 2 * width + queries])
    return queries if axis == "queries" else keys


def _heads(scores: Tensor, shape: Shape, have: Shape) -> tuple[Tensor, Tensor]:
    # returns the kept indices of the queries and of the keys of a layer, whose heads have (A,) scores
    size, keep, inside = have.heads // have.groups, shape.heads // shape.groups, torch.arange(shape.head_dim)
    groups = scores.view(have.groups, size)
    keys = keep_important(shape.groups, groups.sort(descending=True).values[:, :keep].sum(1))
    queries = [key * size + head for key in keys for head in keep_important(keep, groups[key])]
    kept_queries, kept_keys = ((torch.tensor(heads).unsqueeze(1) * shape.head_dim + inside).flatten() for heads in (queries, keys))
    return kept_queries, kept_keys


def _axes(family: Family, name: str, kind: str) -> tuple[int | None, tuple[Axis, ...]]:
    if name.startswith(family.stack + "."):
        number, rest = name.removeprefix(family.stack + ".").split(".", 1)
        layer, axes = int(number), family.inside.get(rest)
    else:
        layer, axes = None, family.outside.get(name)
    if axes is None:
        raise ModelError(f"{kind} models with a weight {name} cannot be pruned in width; choose a model without this weight")
    return layer, axes
