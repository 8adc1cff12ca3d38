"""Tiny random models of every architecture that transformers has: `tiny(kind)` shrinks the kind's default configuration.

`assert_agrees(model)` compares sampling and training with plain forward passes.
"""

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tadistill import rng
from tadistill.data.batch import Sequence, collate
from tadistill.models.forward import Reader
from tadistill.rollout.draw import draw
from tadistill.rollout.engine import sample

VOCAB = 64
SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model_base", "word_embed_proj_dim", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "embedding_dim", "attention_hidden_size", "lru_width"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size", "adapter_out_dim"), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim", "dff", "dim_ff", "d_inner", "ffn_hidden_size"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "dense_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "linear_num_value_heads"), 2
    ),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "d_head"), 8),
    **dict.fromkeys(("linear_value_head_dim", "linear_head_dim", "swa_head_dim", "index_head_dim", "kv_channels", "dim_head"), 8),
    **dict.fromkeys(("attention_head_size", "mamba_d_head", "mamba_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "laurel_rank"), 4),
    **dict.fromkeys(("rotary_dim", "adapter_rank", "gated_norm_rank", "hc_lowrank", "router_hidden_size", "d_rel"), 4),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups", "n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_layers_per_stack"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_k"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length", "keep_window_size"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "local_attention", "sliding_window_size"), 4),
    **dict.fromkeys(("attention_chunk_size", "chunk_size", "mamba_chunk_size", "local_attention_window_len"), 4),
    **dict.fromkeys(("index_n_heads", "index_topk"), 16),
    **dict.fromkeys(("attn_layer_period", "attn_layer_offset"), 2),
    "mamba_d_ssm": 64,
}
"""Field -> value. Widths agree with each other: 4 heads of 8 make 32."""
ALWAYS = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
"""Fields that are small even where the default is None."""
LAYERS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
"""Fields that name the type of every layer."""
PER_LAYER = (
    *(*LAYERS, "no_rope_layers", "layer_rope_theta", "num_attention_heads_per_layer", "activation_sparsity_pattern"),
    *("intermediate_size", "indexer_types"),
)
"""Fields that have, or can have, one entry per layer."""
NOT_DEEPER = ("hrm_text", "longcat_flash", "xlstm", "gemma3n_text")
"""Kinds whose number of layers follows from several fields."""
BOTH = ["linear_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 4, "swa_kv_lora_rank": 4},
        **{"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 32,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": BOTH},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "jamba": {"attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64, "shape_embed_dim": 16, "pronunciation_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"chunk_size": 16, "num_heads": 2, "hidden_size": 128, "embedding_dim": 128},
}
"""What the general rule cannot know of some kinds."""


def tiny_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """Return the kind's default configuration with few and narrow layers, of each type one."""
    default = AutoConfig.for_model(kind)
    return AutoConfig.for_model(kind, **_small(default) | OWN.get(kind, {}) | changes)


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    given = vars(config)
    names = {field.name for field in dataclasses.fields(config)}

    def current(n: str) -> Any:
        return given[n] if n in given else getattr(config, n, None)

    found: dict[str, Any] = {n: value for n, value in SMALL.items() if n in names and (n in ALWAYS or current(n))}
    if "kv_lora_rank" in names:
        found["num_key_value_heads"] = 4  # keys of latent attention belong to all heads
    found |= {n: 1 for n in ("bos_token_id", "eos_token_id") if n in names} | {"pad_token_id": 0}
    # the decoder of an encoder-decoder, and an encoder that reads in one direction
    found |= {
        n: value
        for n, value in (("is_decoder", True), ("causal", True), ("is_encoder_decoder", False))
        if n in names or n == "is_encoder_decoder"
    }
    types = [current(n) for n in LAYERS]
    types = [t for t in types if isinstance(t, (list, tuple))]
    if types:
        depth = len(types[0])
        first = {kind: i for i, kind in reversed(list(enumerate(zip(*(t for t in types if len(t) == depth), strict=True))))}
        kept = sorted(first.values()) * (2 if len(first) == 1 else 1)
        found["num_hidden_layers"] = len(kept)
        lists = {n: v for n, v in given.items() if n in names and isinstance(v, (list, tuple)) and len(v) == depth}
        found |= {n: [v[i] for i in kept] for n, v in lists.items()}
    for n in type(config).sub_configs:
        if given.get(n) is not None:
            found[n] = {"model_type": given[n].model_type, **_small(given[n]), **OWN.get(given[n].model_type, {})}
    return found


def deeper(kind: str) -> dict[str, Any]:
    """Return the changes that repeat the layers of `tiny_config(kind)`. Empty if the kind has no single number of layers."""
    config = tiny_config(kind)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or kind in NOT_DEEPER:
        return {}
    names = {field.name for field in dataclasses.fields(config)} & {*PER_LAYER}
    lists = {n: v for n in names if isinstance(v := getattr(config, n, None), (list, tuple)) and len(v) == layers}
    own = {"gpt_neo": {"attention_types": [[["global", "local"], 2]]}, "bamba": {"attn_layer_indices": [1, 3]}}.get(kind, {})
    if kind in ("qwen2_moe", "qwen3_moe", "qwen3_next"):
        own = {"mlp_only_layers": [1]}
    number = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {number: 2 * layers} | {n: 2 * list(v) for n, v in lists.items()} | own


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    """Return a random model, in eval mode, whose logits depend clearly on all of the text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    return model


@torch.no_grad()
def assert_agrees(model: PreTrainedModel, *, leaves: bool = True) -> None:
    """Assert that sampling (prompts of unequal length, rows that end early) and training see the logits of a plain forward pass.

    `leaves` also asserts that the rows end at different steps."""
    prompts = [tuple(range(10, 10 + n)) for n in (3, 9, 17, 5, 9)]
    uniforms = rng.uniforms(range(len(prompts)), 12, 1, "test")
    rollouts = sample(model, prompts, uniforms, eos=tuple(range(0, VOCAB, 7)), vocab=VOCAB)
    batch = collate([Sequence(prompt, r.tokens) for prompt, r in zip(prompts, rollouts, strict=True)], pad=0)
    reader = Reader(model)
    trained = reader.head.logits(reader.hidden(model, batch)).log_softmax(-1).split([len(r.tokens) for r in rollouts])
    lengths = set()
    for row, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):
        text = torch.tensor([[*prompt, *rollout.tokens]])
        expected = model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1, :VOCAB].float()
        tokens = torch.tensor(rollout.tokens)
        assert draw(expected.softmax(-1), torch.from_numpy(uniforms[row, : len(tokens)])).tolist() == tokens.tolist()
        log_p = expected.log_softmax(-1)
        at_tokens = log_p.gather(1, tokens.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.from_numpy(rollout.values["student"]), at_tokens, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(trained[row][:, :VOCAB], log_p, atol=2e-3, rtol=1e-3)
        lengths.add(len(tokens))
    assert len(lengths) > 1 or not leaves  # rows have left the batch
