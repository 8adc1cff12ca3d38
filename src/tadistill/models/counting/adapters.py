"""Parameters and FLOPs of low-rank adapters, from the model's configuration alone.

    size, adapters = size_of(config), adapters_of(config, rank=16, targets=("q_proj", "v_proj"))
    training_flops(with_adapters(size, adapters), adapters, Work(positions=512, pairs=512**2, heads=512))

`models.modify` puts them into a model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tadistill.errors import ConfigError
from tadistill.models.counting.shapes import PRUNABLE, shape_of
from tadistill.models.counting.sizes import Config, Size, Work, forward_flops

_LAYER = 10  # numbers reserved for the places of a layer's matrices, in the order of use; attention comes after the first place


@dataclass(frozen=True)
class Adapters:
    """The adapters of one model."""

    trained: int
    """Number of their parameters, each of which is multiplied with every token."""
    idle: int
    """Entries of all matrices, adapters included, that come before the first trained parameter: their inputs need no gradient."""
    idle_attention: int
    """Layers whose attention comes before the first trained parameter."""


@dataclass(frozen=True)
class _Matrix:
    name: str
    """Name within its layer, or within the model."""
    inputs: int
    outputs: int
    places: tuple[int, ...]
    """Its position in the order of all matrices, once per layer."""


def adapters_of(config: Config, rank: int, targets: Iterable[str] = ()) -> Adapters | None:
    """Describe adapters on the linear layers whose names end in one of `targets`, or on all but the head without targets.

    Returns:
        None for a family that is not counted.

    Raises:
        ConfigError: a target is not the name of such a layer.
    """
    matrices = _matrices(config)
    if matrices is None:
        return None
    for target in (targets := tuple(targets)):
        if not any(_named(m.name, target) for m in matrices):
            raise ConfigError(f"`{target}` is no linear layer of this model; choose from {', '.join(m.name for m in matrices)}")
    chosen = [m for m in matrices if not targets or any(_named(m.name, target) for target in targets)]
    first = min(place for m in chosen for place in m.places)
    idle = sum(m.inputs * m.outputs for m in matrices for place in m.places if place <= first)
    idle += sum(rank * m.inputs for m in chosen if first in m.places)
    trained = sum(rank * (m.inputs + m.outputs) * len(m.places) for m in chosen)
    return Adapters(trained, idle, sum(first > layer * _LAYER for layer in range(shape_of(config).layers)))


def _named(name: str, target: str) -> bool:
    # peft's rule
    return f".{name}".endswith(f".{target}")


def with_adapters(size: Size, adapters: Adapters | None) -> Size:
    """Return the size of the model during training, with its adapters beside its matrices."""
    return size if adapters is None else replace(size, total=size.total + adapters.trained, matmul=size.matmul + adapters.trained)


def training_flops(size: Size, adapters: Adapters, work: Work, *, again: bool = False) -> float:
    """Return the FLOPs of forward and backward passes that train only adapters.

    The backward pass costs one forward pass for the gradients of the inputs, plus one more of attention and of the adapters. What comes
    before the first adapter has no backward pass.

    Args:
        size: size of the model with its adapters.
        again: the layers run forward once more (gradient checkpointing).
    """
    passes = work * 2 + (Work(work.positions, work.pairs) if again else Work())
    attention = 4 * size.attention * work.pairs
    more = 2 * (adapters.trained - adapters.idle) * work.positions + (size.layers - 2 * adapters.idle_attention) * attention
    return forward_flops(size, passes) + more


def _matrices(config: Config) -> list[_Matrix] | None:
    """List the matrices of a model, except its head."""
    family = config.get("model_type")
    if family not in PRUNABLE:
        return None
    shape = shape_of(config)
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim

    def matrix(name: str, inputs: int, outputs: int, place: int) -> _Matrix:
        return _Matrix(name, inputs, outputs, tuple(layer * _LAYER + place for layer in range(shape.layers)))

    if family == "gpt2":
        return [
            matrix("attn.c_attn", shape.hidden, 3 * queries, 0),
            matrix("attn.c_proj", queries, shape.hidden, 1),
            matrix("mlp.c_fc", shape.hidden, shape.intermediate, 2),
            matrix("mlp.c_proj", shape.intermediate, shape.hidden, 3),
        ]
    output = "out_proj" if family == "opt" else "o_proj"
    found = [matrix(f"self_attn.{name}_proj", shape.hidden, queries if name == "q" else keys, 0) for name in "qkv"]
    found.append(matrix(f"self_attn.{output}", queries, shape.hidden, 1))
    if family == "opt":
        found += [matrix("fc1", shape.hidden, shape.intermediate, 2), matrix("fc2", shape.intermediate, shape.hidden, 3)]
        outer = config.get("word_embed_proj_dim") or shape.hidden
        if outer != shape.hidden:
            found += [
                _Matrix("project_in", outer, shape.hidden, (-1,)),
                _Matrix("project_out", shape.hidden, outer, (shape.layers * _LAYER,)),
            ]
        return found
    gates = [matrix(f"mlp.{name}_proj", shape.hidden, shape.intermediate, 2) for name in ("gate", "up")]
    return [*found, *gates, matrix("mlp.down_proj", shape.intermediate, shape.hidden, 3)]
