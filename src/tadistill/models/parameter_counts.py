"""Compute exact parameter counts and FLOPs from a config.json alone, for gpt2, opt, llama, mistral, qwen2, qwen3 and gemma3_text.

    config = read_config("gpt2")            # from this disk; None if the model is not on it
    size = size_of(config)                  # None for other families
    forward_flops(size, Work(positions=512, pairs=512**2, heads=512))
    adapters = adapters_of(config, rank=16, targets=("q_proj", "v_proj"))       # low-rank adapters; `models.modify` puts them into a model
    training_flops(with_adapters(size, adapters), adapters, Work(positions=512, pairs=512**2, heads=512), again=False)

A study can therefore be planned before any weights are loaded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tadistill.config.remote import Serve
from tadistill.errors import ConfigError, ModelError
from tadistill.models import sources
from tadistill.models.model_files import read_description
from tadistill.models.shapes import COUNTED, Shape, check_new, shape_of, size_in

Config = Mapping[str, Any]
_TIED = ("gpt2", "opt", "gemma3_text")  # families whose default in transformers is a head with the embeddings' weights
_ANY_HEADS = ("gpt2", "opt")  # families whose counts do not depend on the number of heads, so a config.json may lack this number


@dataclass(frozen=True)
class Size:
    """Parameter counts and widths of a causal language model."""

    total: int
    """Number of parameters. Tied weights are counted once."""
    matmul: int
    """Number of entries of all matrices with which each token is multiplied. These include the LM head, but not the embeddings."""
    layers: int
    attention: int
    """Width of the attention: the number of query heads times head_dim."""
    head: int
    """Number of entries of the LM head's matrix."""
    hidden: int
    """Width of the hidden states."""
    keys: int
    """Width of the keys at one position of one layer. The values have the same width."""


@dataclass(frozen=True)
class Work:
    """The amount of work in forward passes, from which FLOPs are computed."""

    positions: float = 0.0
    """Token positions that pass through the layers, including padding."""
    pairs: float = 0.0
    """Number of query-key pairs in attention, including masked pairs. A sequence of T positions has T^2 pairs."""
    heads: float = 0.0
    """Token positions at which logits are computed."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.positions + other.positions, self.pairs + other.pairs, self.heads + other.heads)

    def __mul__(self, times: float) -> "Work":
        return Work(self.positions * times, self.pairs * times, self.heads * times)


def read_config(load: str, revision: str = "main", config: Config | None = None, vocab_size: int | None = None) -> dict[str, Any] | None:
    """Return the content of a model's config.json, without using the network.

    A model with random weights (`scratch:TYPE`) has no file. Return the recipe's `config` with model_type and vocab_size, or None if
    vocab_size is not known. For any other model that is not on this disk, return the recipe's `config`, or None if there is none.

    Raises:
        ModelError: a local source does not exist or is damaged, or the recipe's `config` differs from the model's own.
    """
    source = sources.parse_source(load)
    if source.kind == "scratch":
        check_new(source.name, config or {})
        known = {"model_type": source.name, **(config or {})}
        if vocab_size is not None:
            known["vocab_size"] = vocab_size
        return known if "vocab_size" in known else None
    file = sources.description_file(load, revision)
    if file is None:
        return dict(config) if config else None
    found = read_description(file, load)
    for name, value in (config or {}).items():
        if found.get(name) != value:
            raise ModelError(f"`config` has {name}: {value}, but config.json of `{load}` has {found.get(name)}; correct or remove `config`")
    return found


def with_layers(config: Config, layers: int) -> dict[str, Any]:
    """Return the configuration with another number of layers, for counting parameters only."""
    return {**config, "n_layer" if config.get("model_type") == "gpt2" else "num_hidden_layers": layers}


def size_of(config: Config) -> Size | None:
    """Return the parameter counts of a model from its configuration. Return None for a model family that is not in this module.

    The required fields for gpt2 are vocab_size, n_positions, n_embd and n_layer. For opt they are vocab_size, max_position_embeddings,
    hidden_size, ffn_dim and num_hidden_layers. For the others they are vocab_size, hidden_size, intermediate_size, num_hidden_layers and
    num_attention_heads. All other fields have the defaults of transformers.

    Raises:
        ConfigError: a required field is missing or is not a positive whole number.
    """
    if config.get("model_type") not in COUNTED:
        return None
    if config["model_type"] in _ANY_HEADS:
        config = {"n_head": 1, "num_attention_heads": 1, **config}
    vocab, shape = size_in(config, "vocab_size"), shape_of(config)
    head = vocab * _embedded(config, shape)
    matrices = sum(m.inputs * m.outputs * m.layers for m in _matrices(config, shape))
    in_layer, outside = _vectors(config, shape)
    total = (1 if tied(config) else 2) * head + matrices + shape.layers * in_layer + outside
    keys = shape.groups * shape.head_dim
    return Size(total, matrices + head, shape.layers, shape.heads * shape.head_dim, head, shape.hidden, keys)


def forward_flops(size: Size, work: Work) -> float:
    """Return the FLOPs of forward passes. A backward pass costs twice as many (Kaplan et al. 2020).

    Layers cost 2 FLOPs per matrix entry and position. Attention costs 4 x its width per query-key pair and layer. Masked pairs are
    included, also those outside of a sliding window, as in `torch.utils.flop_counter`. The LM head costs 2 FLOPs per entry and position
    with logits.
    """
    return 2 * (size.matmul - size.head) * work.positions + 4 * size.layers * size.attention * work.pairs + 2 * size.head * work.heads


def tied(config: Config) -> bool:
    """Return True if the LM head's weights are the embeddings."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in _TIED))


def _embedded(config: Config, shape: Shape) -> int:
    # the width of the embeddings, which in some OPT models differs from the width of the hidden states
    outer = config.get("word_embed_proj_dim") if config["model_type"] == "opt" else None
    return shape.hidden if outer is None else size_in(config, "word_embed_proj_dim")


def _vectors(config: Config, shape: Shape) -> tuple[int, int]:
    # the numbers of parameters that are in no matrix: in each layer, and outside of the layers; the table of positions is among the latter
    family, width, inner = config["model_type"], shape.hidden, shape.intermediate
    if family == "gpt2":
        positions = size_in(config, "n_positions", "max_position_embeddings")
        return 5 * width + inner + 4 * width, positions * width + 2 * width  # biases, and norms with two vectors each
    if family == "opt":
        norm = 2 * width if config.get("layer_norm_elementwise_affine", True) else 0
        final = norm if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False) else 0
        biases = 5 * width + inner if config.get("enable_bias", True) else 0
        # OPT's table has two more rows than there are positions
        return biases + 2 * norm, (size_in(config, "max_position_embeddings") + 2) * width + final
    projected = (shape.heads + 2 * shape.groups) * shape.head_dim  # queries, keys and values
    found = (4 if family == "gemma3_text" else 2) * width
    if family in ("qwen3", "gemma3_text"):  # norms of queries and keys, each the same for all heads
        found += 2 * shape.head_dim
    if family == "qwen2":  # always has these biases
        found += projected
    elif family != "mistral" and config.get("attention_bias", False):
        found += projected + width
    if family not in ("qwen2", "mistral") and config.get("mlp_bias", False):
        found += 2 * inner + width
    return found, width


_LAYER = 10  # the places of layer i are 10 i to 10 i + 9, in the order of use; attention runs between its places 0 and 1


@dataclass(frozen=True)
class Adapters:
    """The parameter counts of the low-rank adapters of one model."""

    trained: int
    """Number of trained parameters. A forward pass multiplies each token with all of them."""
    idle: int
    """Number of entries of all matrices that a forward pass uses before the first trained parameter. These matrices have no backward
    pass."""
    idle_attention: int
    """Number of layers whose attention a forward pass computes before the first trained parameter."""


@dataclass(frozen=True)
class _Matrix:
    name: str
    inputs: int
    outputs: int
    first: int  # its place in the first layer; places grow in the order in which a forward pass uses the matrices
    layers: int  # the number of layers that have this matrix, each at its own place

    def up_to(self, place: int) -> int:
        # the number of its places that are at most `place`
        return max(0, min(self.layers, (place - self.first) // _LAYER + 1))


def adapters_of(config: Config, rank: int, targets: Iterable[str] = ()) -> Adapters | None:
    """Return the parameter counts of adapters on all linear layers whose names end with one of `targets`.

    Without `targets`, all linear layers except the head have adapters. The result is None for a model family that is not in this module.

    Raises:
        ConfigError: a target is not the name of a linear layer.
    """
    if config.get("model_type") not in COUNTED:
        return None
    shape = shape_of(config)
    matrices = _matrices(config, shape)
    for target in (targets := tuple(targets)):
        if not any(_named(m.name, target) for m in matrices):
            raise ConfigError(f"`{target}` is not a linear layer of this model; choose from {', '.join(m.name for m in matrices)}")
    chosen = [m for m in matrices if not targets or any(_named(m.name, target) for target in targets)]
    first = min(m.first for m in chosen)
    idle = sum(m.inputs * m.outputs * m.up_to(first) for m in matrices)
    idle += sum(rank * m.inputs for m in chosen if m.first == first)
    trained = sum(rank * (m.inputs + m.outputs) * m.layers for m in chosen)
    return Adapters(trained, idle, max(0, min(shape.layers, -(-first // _LAYER))))


def _named(name: str, target: str) -> bool:
    # peft compares names in the same way
    return f".{name}".endswith(f".{target}")


def with_adapters(size: Size, adapters: Adapters | None) -> Size:
    """Return the size of a model during training, with its LoRA adapters included."""
    return size if adapters is None else replace(size, total=size.total + adapters.trained, matmul=size.matmul + adapters.trained)


def training_flops(size: Size, adapters: Adapters, work: Work, *, again: bool) -> float:
    """Return the FLOPs of forward and backward passes if only adapters are trained.

    In frozen matrices, a backward pass costs as much as a forward pass, because their weights have no gradients. In attention and in
    adapters, it costs twice as much. Parts of the model before the first adapter have no backward pass.

    Args:
        size: the size of the model with its adapters.
        again: True if gradient checkpointing runs the forward pass of the layers a second time.
    """
    passes = work * 2 + (Work(work.positions, work.pairs) if again else Work())
    attention = 4 * size.attention * work.pairs
    more = 2 * (adapters.trained - adapters.idle) * work.positions + (size.layers - 2 * adapters.idle_attention) * attention
    return forward_flops(size, passes) + more


def _matrices(config: Config, shape: Shape) -> list[_Matrix]:
    # all matrices except the head
    family, queries, keys = config["model_type"], shape.heads * shape.head_dim, shape.groups * shape.head_dim

    def matrix(name: str, inputs: int, outputs: int, place: int) -> _Matrix:
        return _Matrix(name, inputs, outputs, place, shape.layers)

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
        if (outer := _embedded(config, shape)) != shape.hidden:
            last = shape.layers * _LAYER
            found += [_Matrix("project_in", outer, shape.hidden, -1, 1), _Matrix("project_out", shape.hidden, outer, last, 1)]
        return found
    gates = [matrix(f"mlp.{name}_proj", shape.hidden, shape.intermediate, 2) for name in ("gate", "up")]
    return [*found, *gates, matrix("mlp.down_proj", shape.intermediate, shape.hidden, 3)]


@dataclass(frozen=True)
class Described:
    """A model with its parameter counts and its configuration."""

    size: Size
    config: Mapping[str, Any]
    serve: Serve | None = None
    """The servers that run the model, if it does not run in this process."""

    @property
    def head(self) -> bool:
        """True if this process has the model's head (output layer), and computes the model's logits."""
        return self.serve is None or self.serve.gives == "hidden"

    @property
    def present(self) -> int:
        """Number of the model's parameters that this process holds."""
        return self.size.total if self.serve is None else self.size.head * self.head

    @property
    def tied(self) -> bool:
        """True if the head's weights are the embeddings."""
        return tied(self.config)

    @property
    def vocab(self) -> float:
        return self.config["vocab_size"]
