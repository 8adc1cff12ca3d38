"""Names and axes of the weights in each model family that can be pruned in width.

Each dimension of a weight has one of these axis names:

    channels   the residual stream, H
    neurons    the inner width of the MLP, I
    queries    query heads times head_dim, head after head
    keys       key-value heads times head_dim
    fused      queries, keys and values of GPT-2, one after the other
    words      the width of the embeddings, which some OPT models project to H
    None       never pruned: vocabulary, positions, head_dim
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tadistill.models.counting.shapes import PRUNABLE

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
