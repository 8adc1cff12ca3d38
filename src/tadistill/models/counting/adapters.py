"""What low-rank adapters add to a model, and how far gradients go into it, from its configuration alone. Imports no torch.

    size, adapters = size_of(config), adapters_of(config, rank=16, targets=("q_proj", "v_proj"))
    training_flops(with_adapters(size, adapters), adapters, Work(positions=512, pairs=512**2, heads=512))

`models.lora` puts them in.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tadistill.errors import ConfigError
from tadistill.models.counting.shapes import PRUNABLE, shape_of
from tadistill.models.counting.sizes import Config, Size, Work, forward_flops

_LAYER = 10  # places of a layer; those of its matrices follow the order in which they are used, and attention comes after the first


@dataclass(frozen=True)
class Adapters:
    """Adapters of one model."""

    trained: int
    """Their parameters. Each is multiplied with every token."""
    idle: int
    """Entries of all matrices, theirs too, that work on what no trained parameter has touched: their inputs need no gradient."""
    idle_attention: int
    """Layers whose attention works on such inputs."""


@dataclass(frozen=True)
class _Matrix:
    name: str
    """Within its layer, or within the model."""
    inputs: int
    outputs: int
    places: tuple[int, ...]
    """Where in the order of all matrices it is, once per layer."""


def adapters_of(config: Config, rank: int, targets: Iterable[str] = ()) -> Adapters | None:
    """The adapters of the linear layers whose names end in one of `targets`; of all but the head when there are none.

    None for a family that is not counted.

    Raises:
        ConfigError: a target is the name of no such layer.
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
    """peft's rule."""
    return f".{name}".endswith(f".{target}")


def with_adapters(size: Size, adapters: Adapters | None) -> Size:
    """The size of the model with its adapters beside its matrices, as it is while it trains."""
    return size if adapters is None else replace(size, total=size.total + adapters.trained, matmul=size.matmul + adapters.trained)


def training_flops(size: Size, adapters: Adapters, work: Work, *, again: bool = False) -> float:
    """FLOPs of forward and backward passes that train adapters alone, `size` being that with adapters.

    Backward costs one forward pass for the gradients of the inputs, one more of attention and of the adapters; nothing of what comes
    before the first adapter.

    Args:
        again: the layers run forward once more (gradient checkpointing).
    """
    passes = work * 2 + (Work(work.positions, work.pairs) if again else Work())
    attention = 4 * size.attention * work.pairs
    more = 2 * (adapters.trained - adapters.idle) * work.positions + (size.layers - 2 * adapters.idle_attention) * attention
    return forward_flops(size, passes) + more


def _matrices(config: Config) -> list[_Matrix] | None:
    """All but the head."""
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
