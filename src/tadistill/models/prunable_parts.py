"""The parts of a model that pruning in width can remove: the names and axes of their weights, and the importance of each part.

    measured = importance(model, sequences)          # one list of token ids per sequence; runs forward passes only

Each dimension of a weight has one of these axis names:

    channels   the residual stream, H
    neurons    the inner width of the MLP, I
    queries    query heads times head_dim, head after head
    keys       key-value heads times head_dim
    fused      queries, keys and values of GPT-2, one after the other
    words      the width of the embeddings, which some OPT models project to H
    None       never pruned: vocabulary, positions, head_dim

Importance is measured by activations on a small calibration set. That of channels, neurons and heads is computed in two steps: the mean of
absolute values over the tokens of a sequence, and then the L2 norm over the sequences (Muralidharan et al. 2024, Minitron,
arXiv 2407.14679, section 2.2). The importance of layers is the block influence (Men et al. 2024, ShortGPT, arXiv 2403.03853).

Axes: B sequences, T tokens, H channels, I neurons, A heads, L layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tadistill.errors import ConfigError, ModelError
from tadistill.models.forward import evaluating
from tadistill.models.shapes import PRUNABLE, shape_of

Axis = Literal["channels", "neurons", "queries", "keys", "fused", "words"] | None
Axes = Mapping[str, tuple[Axis, ...]]


@dataclass(frozen=True)
class Family:
    """The names that transformers gives to modules and weights in the models of one family."""

    stack: str
    """Name of the list of layers."""
    norms: tuple[str, str]
    """Names of the two norms of a layer."""
    attention: str
    """Name of the projection whose input is the concatenated outputs of all heads."""
    mlp: str
    """Name of the projection whose input is the neurons of the MLP."""
    inside: Axes
    """Maps the name of a weight inside a layer to its axes."""
    outside: Axes
    """Maps the full name of any other weight to its axes."""


def _linear(name: str, output: Axis, inputs: Axis) -> Axes:
    return {f"{name}.weight": (output, inputs), f"{name}.bias": (output,)}


def _conv1d(name: str, output: Axis, inputs: Axis) -> Axes:
    # GPT-2 stores the weights of its linear layers transposed
    return {f"{name}.weight": (inputs, output), f"{name}.bias": (output,)}


def _norm(name: str) -> Axes:
    return {f"{name}.weight": ("channels",), f"{name}.bias": ("channels",)}


def _table(name: str, width: Axis) -> Axes:
    return {f"{name}.weight": (None, width)}


_GPT2 = Family(
    stack="transformer.h",
    norms=("ln_1", "ln_2"),
    attention="attn.c_proj",
    mlp="mlp.c_proj",
    inside={
        **_norm("ln_1"),
        **_conv1d("attn.c_attn", "fused", "channels"),
        **_conv1d("attn.c_proj", "channels", "queries"),
        **_norm("ln_2"),
        **_conv1d("mlp.c_fc", "neurons", "channels"),
        **_conv1d("mlp.c_proj", "channels", "neurons"),
    },
    outside={
        **_table("transformer.wte", "channels"),
        **_table("transformer.wpe", "channels"),
        **_norm("transformer.ln_f"),
        **_table("lm_head", "channels"),
    },
)

_OPT = Family(
    stack="model.decoder.layers",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    attention="self_attn.out_proj",
    mlp="fc2",
    inside={
        **_linear("self_attn.q_proj", "queries", "channels"),
        **_linear("self_attn.k_proj", "keys", "channels"),
        **_linear("self_attn.v_proj", "keys", "channels"),
        **_linear("self_attn.out_proj", "channels", "queries"),
        **_norm("self_attn_layer_norm"),
        **_linear("fc1", "neurons", "channels"),
        **_linear("fc2", "channels", "neurons"),
        **_norm("final_layer_norm"),
    },
    outside={
        **_table("model.decoder.embed_tokens", "words"),
        **_table("model.decoder.embed_positions", "channels"),
        **_linear("model.decoder.project_in", "channels", "words"),
        **_linear("model.decoder.project_out", "words", "channels"),
        **_norm("model.decoder.final_layer_norm"),
        **_table("lm_head", "words"),
    },
)

_ROTARY = Family(
    stack="model.layers",
    norms=("input_layernorm", "post_attention_layernorm"),
    attention="self_attn.o_proj",
    mlp="mlp.down_proj",
    inside={
        **_norm("input_layernorm"),
        **_linear("self_attn.q_proj", "queries", "channels"),
        **_linear("self_attn.k_proj", "keys", "channels"),
        **_linear("self_attn.v_proj", "keys", "channels"),
        **_linear("self_attn.o_proj", "channels", "queries"),
        "self_attn.q_norm.weight": (None,),  # qwen3: one norm of head_dim for all heads
        "self_attn.k_norm.weight": (None,),
        **_norm("post_attention_layernorm"),
        **_linear("mlp.gate_proj", "neurons", "channels"),
        **_linear("mlp.up_proj", "neurons", "channels"),
        **_linear("mlp.down_proj", "channels", "neurons"),
    },
    outside={**_table("model.embed_tokens", "channels"), **_norm("model.norm"), **_table("lm_head", "channels")},
)

FAMILIES: Mapping[str, Family] = {"gpt2": _GPT2, "opt": _OPT} | dict.fromkeys(set(PRUNABLE) - {"gpt2", "opt"}, _ROTARY)
"""Maps a `model_type` of transformers to the names and axes of its weights."""


# --- the importance of the parts --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance scores of the parts of a model, in float64 on the CPU. Neurons and heads can be compared only within a layer."""

    hidden: Tensor
    """Scores of the channels, of shape (H,): absolute outputs of the norms, summed over both norms of all layers."""
    neurons: Tensor
    """Scores of the neurons, of shape (L, I): absolute inputs of the last projection of each MLP."""
    heads: Tensor
    """Scores of the heads, of shape (L, A): L2 norms of the outputs of the heads, before the output projection."""
    layers: Tensor
    """Scores of the layers, of shape (L,): the block influence, from 0 to 2. It is 1 - cos(input of the layer, output of the layer),
    averaged over tokens."""


def importance(model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, batch_size: int = 8) -> Importance:
    """Return the importance of the parts of a model, measured on `sequences` of token ids. `batch_size` changes only rounding errors.

    Raises:
        ModelError: the model's family cannot be pruned in width, or its activations are not finite.
    """
    shape = shape_of(model.config)
    ordered = sorted(sequences, key=len)  # puts sequences of similar length into one batch
    sums = _Sums(shape.layers, shape.heads)
    with torch.no_grad(), evaluating(model), _recorded(model, sums):
        for start in range(0, len(ordered), batch_size):
            rows = [torch.tensor(row) for row in ordered[start : start + batch_size]]
            mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
            sums.mask_BT = mask_BT.bool()
            # padding is on the right, where no token of a causal model reads it
            model.base_model(input_ids=pad_sequence(rows, batch_first=True).to(model.device), attention_mask=mask_BT, use_cache=False)
    measured = sums.result()
    if not all(torch.isfinite(scores).all() for scores in (measured.hidden, measured.neurons, measured.heads, measured.layers)):
        raise ModelError(
            "the model's activations on the calibration set are not finite, so its parts cannot be ranked for pruning; check the model's "
            "weights"
        )
    return measured


def keep_important(count: int, scores: Tensor) -> tuple[int, ...]:
    """Return the indices of the `count` highest of the n scores, in ascending order. Among equal scores, lower indices are kept.

    Raises:
        ConfigError: `count` is not between 1 and n.
    """
    if not 1 <= count <= len(scores):
        raise ConfigError(f"pruning cannot keep {count} of {len(scores)} parts; write a number from 1 to {len(scores)}")
    return tuple(sorted(torch.sort(scores.cpu(), descending=True, stable=True).indices[:count].tolist()))


class _Sums:
    def __init__(self, layers: int, heads: int):
        self.mask_BT = torch.ones(0, 0, dtype=torch.bool)
        self._heads = heads
        self._squares: dict[tuple[str, int], Tensor] = {}  # sums over sequences of squared means
        self._cosines = torch.zeros(layers, dtype=torch.float64)
        self._tokens = [0] * layers

    def add(self, kind: str, place: int, values: Tensor) -> None:
        # values: (B, T, n), or (B T, n) from OPT
        values_BTn = values.detach().float().reshape(*self.mask_BT.shape, -1)
        if kind == "heads":
            values_BTn = values_BTn.unflatten(-1, (self._heads, -1)).norm(dim=-1)
        counts_B1 = self.mask_BT.sum(1, keepdim=True)
        means_Bn = values_BTn.abs().masked_fill(~self.mask_BT.unsqueeze(-1), 0).sum(1) / counts_B1
        squares = means_Bn.double().square().sum(0).cpu()
        self._squares[kind, place] = self._squares.get((kind, place), torch.zeros(())) + squares

    # hooks: their last arguments are the module, its inputs and its output

    def inputs_of(self, kind: str, place: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.add(kind, place, inputs[0])

    def output_of(self, kind: str, place: int, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        self.add(kind, place, output)

    def block(self, layer: int, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        # inputs and output: (B, T, H)
        cosines = cosine_similarity(inputs[0].detach().float(), output.detach().float(), dim=-1)[self.mask_BT]
        self._cosines[layer] += cosines.double().sum().cpu()
        self._tokens[layer] += len(cosines)

    def result(self) -> Importance:
        def rows(kind: str) -> Tensor:
            return torch.stack([s for (k, _), s in sorted(self._squares.items(), key=lambda item: item[0]) if k == kind]).sqrt()

        influence = 1 - self._cosines / torch.tensor(self._tokens)
        return Importance(rows("norms").sum(0), rows("neurons"), rows("heads"), influence)


@contextmanager
def _recorded(model: PreTrainedModel, sums: _Sums) -> Iterator[None]:
    family = FAMILIES[model.config.model_type]
    with ExitStack() as hooks:
        for i, layer in enumerate(model.get_submodule(family.stack).children()):
            for j, norm in enumerate(family.norms):
                hooks.callback(layer.get_submodule(norm).register_forward_hook(partial(sums.output_of, "norms", 2 * i + j)).remove)
            for kind, name in (("neurons", family.mlp), ("heads", family.attention)):
                hooks.callback(layer.get_submodule(name).register_forward_pre_hook(partial(sums.inputs_of, kind, i)).remove)
            hooks.callback(layer.register_forward_hook(partial(sums.block, i)).remove)
        yield
