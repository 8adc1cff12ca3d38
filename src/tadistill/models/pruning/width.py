"""Pruning in depth and width at once, after Muralidharan et al. 2024 (Minitron, arXiv 2407.14679).

student = prune(teacher, shape, importance(teacher, sequences))
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tadistill.errors import ConfigError, ModelError
from tadistill.models.counting.shapes import Shape, changes, check_shape, shape_of
from tadistill.models.pruning.activations import Importance, keep_important
from tadistill.models.pruning.depth import assembled, configured, keep_list, renumbered
from tadistill.models.pruning.families import FAMILIES, Axis, Family


def prune(model: PreTrainedModel, shape: Shape, importance: Importance | None, layers: Sequence[int] | None = None) -> PreTrainedModel:
    """Make a new, ordinary model of the same family and of `shape`, with copies of the kept weights; `model` is not changed.

    The same channels are kept in all layers; neurons and heads are chosen in each layer. Kept weights stay in order and keep their values:
    removing channels changes the mean square that RMSNorm and LayerNorm divide by, and as in Minitron nothing compensates for it before
    training. With grouped queries a key-value head is removed with all its queries: a group's score is the sum of its best
    `heads / kv_heads` queries, the best groups are kept, and each keeps those queries, so that all groups have the same size. The model has
    the same dtype and device and is in eval mode.

    Args:
        importance: the importances of this model; None keeps its width.
        layers: the layers to keep; None keeps those of highest block influence, or evenly spaced ones without `importance`.

    Raises:
        ConfigError: the model cannot be cut to this shape, the number of `layers` is not `shape.layers`, or `importance` is missing for a
            narrower shape, or is that of another model.
        ModelError: the family, or a weight of this model, is not supported.
    """
    check_shape(model.config, shape)
    family, have = FAMILIES[model.config.model_type], shape_of(model.config)
    if importance is None and changes(model.config, replace(shape, layers=have.layers)) != changes(model.config, have):
        raise ConfigError(f"a shape narrower than the model ({shape}) needs importances to choose by; measure them on a calibration set")
    if importance is not None:
        _check_importance(importance, have)
    keep = _layers(shape.layers, have.layers, importance, layers)
    config = configured(model.config, keep)
    for name, value in changes(model.config, shape).items():
        setattr(config, name, value)
    cuts = _Cuts(shape, have, importance, whole_words=_projected(model))
    weights = {}
    for name, tensor in model.state_dict().items():
        layer, axes = _axes(family, name, model.config.model_type)
        if layer is None or layer in keep:
            weights[name] = cuts.cut(tensor, axes, layer)
    return assembled(model, config, renumbered(weights, family.stack, keep))


class _Cuts:
    """The kept indices along each axis."""

    def __init__(self, shape: Shape, have: Shape, importance: Importance | None, *, whole_words: bool):
        self._shape, self._have, self._importance, self._whole_words = shape, have, importance, whole_words
        self._indices: dict[tuple[Axis, int | None], Tensor | None] = {}

    def cut(self, tensor: Tensor, axes: tuple[Axis, ...], layer: int | None) -> Tensor:
        """Return the kept part of a weight; the weight itself if nothing is removed."""
        for dim, axis in enumerate(axes):
            place = None if axis in ("channels", "words") else layer
            if (axis, place) not in self._indices:
                self._indices[axis, place] = self._kept(axis, place)
            kept = self._indices[axis, place]
            if kept is not None:
                tensor = tensor.index_select(dim, kept.to(tensor.device))
        return tensor

    def _kept(self, axis: Axis, layer: int | None) -> Tensor | None:
        """Return the kept indices along `axis`, ascending; None if all are kept."""
        shape, scores = self._shape, self._importance
        if axis is None or scores is None or (axis == "words" and self._whole_words):
            return None
        if axis in ("channels", "words"):
            return torch.tensor(keep_important(shape.hidden, scores.hidden))
        assert layer is not None  # every other axis lies in a layer
        if axis == "neurons":
            return torch.tensor(keep_important(shape.intermediate, scores.neurons[layer]))
        queries, keys = _heads(scores.heads[layer], shape, self._have)
        queries, keys = _spread(queries, shape.head_dim), _spread(keys, shape.head_dim)
        if axis == "fused":
            width = self._have.heads * self._have.head_dim
            return torch.cat([queries, width + queries, 2 * width + queries])
        return queries if axis == "queries" else keys


def _heads(scores: Tensor, shape: Shape, have: Shape) -> tuple[Tensor, Tensor]:
    """Return the (query heads, key-value heads) to keep in a layer with (A,) scores."""
    size, keep = have.heads // have.groups, shape.heads // shape.groups
    groups = scores.view(have.groups, size)
    keys = keep_important(shape.groups, groups.sort(descending=True).values[:, :keep].sum(1))
    queries = [key * size + head for key in keys for head in keep_important(keep, groups[key])]
    return torch.tensor(queries), torch.tensor(keys)


def _spread(heads: Tensor, head_dim: int) -> Tensor:
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def _layers(count: int, total: int, importance: Importance | None, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is not None:
        keep = keep_list(tuple(layers), total)
        if len(keep) != count:
            raise ConfigError(f"layers is {list(keep)}, {len(keep)} of them, but the shape has {count} layers; write the same number")
        return keep
    return keep_list(count, total) if importance is None else keep_important(count, importance.layers)


def _check_importance(importance: Importance, have: Shape) -> None:
    found = [tuple(s.shape) for s in (importance.hidden, importance.neurons, importance.heads, importance.layers)]
    if found != [(have.hidden,), (have.layers, have.intermediate), (have.layers, have.heads), (have.layers,)]:
        raise ConfigError("the importances belong to a model of another shape; measure them on the model that is pruned")


def _projected(model: PreTrainedModel) -> bool:
    # the embedding of OPT-350m has another width than the hidden states
    return model.config.model_type == "opt" and model.config.word_embed_proj_dim != model.config.hidden_size


def _axes(family: Family, name: str, kind: str) -> tuple[int | None, tuple[Axis, ...]]:
    """Return (layer or None, names of the axes) of a weight."""
    if name.startswith(family.stack + "."):
        number, rest = name.removeprefix(family.stack + ".").split(".", 1)
        layer, axes = int(number), family.inside.get(rest)
    else:
        layer, axes = None, family.outside.get(name)
    if axes is None:
        raise ModelError(f"{kind} models with a weight {name} cannot be pruned in width, because that weight is not supported")
    return layer, axes
