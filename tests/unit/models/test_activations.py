"""Predicted activations beside the tensors that autograd stores."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from tadistill.models.architectures import fuse_gelu
from tadistill.models.flops_and_memory import kept_by_layer

ROWS, TOKENS = 3, 16
LLAMA = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_inner": 96, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 96, "num_attention_heads": 4},
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": LLAMA | {"sliding_window": 4},
}
CASES = [*FAMILIES.items(), *((family, FAMILIES[family] | {"num_key_value_heads": 1}) for family in ("llama", "gemma3_text"))]


def stored(family: str, fields: dict, layers: int, *, bf16: bool, dropout: bool, fused: bool = False) -> int:
    """Return the bytes that autograd stores in one forward pass, without weights and their copies in bfloat16."""
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    config = AutoConfig.for_model(family, vocab_size=50, max_position_embeddings=64, **fields, **{name: layers})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train(dropout)
    if fused:
        fuse_gelu(model)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2} | {tuple(p.t().shape) for p in model.parameters() if p.ndim == 2}
    found = {}

    def store(tensor: torch.Tensor) -> torch.Tensor:
        place, copied = tensor.untyped_storage().data_ptr(), tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if place not in known and not copied and tensor.ndim > 1:  # gemma3_text keeps 1 + weight of its norms
            found[place] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 50
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    with saved_tensors_hooks(store, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "fields"), CASES)
def test_a_layer_keeps_the_predicted_bytes(family, fields, bf16):
    kept = kept_by_layer({"model_type": family, **fields} | {"num_hidden_layers": 2, "n_layer": 2}, bf16=bf16, dropout=False)
    for fused, position in ((False, kept.position + kept.on_cpu), (True, kept.position)):  # on a CPU, and on a GPU
        few, many = (stored(family, fields, layers, bf16=bf16, dropout=False, fused=fused) for layers in (1, 3))
        assert (many - few) / 2 == position * ROWS * TOKENS + kept.pair * ROWS * TOKENS**2


def test_dropout_in_attention_keeps_the_scores_of_a_cpu():
    fields = FAMILIES["gpt2"]
    kept = kept_by_layer({"model_type": "gpt2", "n_layer": 2, **fields}, bf16=False, dropout=True)
    found = (stored("gpt2", fields, 3, bf16=False, dropout=True) - stored("gpt2", fields, 1, bf16=False, dropout=True)) / 2
    fused = 4 * 4 * ROWS * TOKENS  # the numbers of the fused kernel, which does not run here
    assert found == (kept.position + kept.on_cpu) * ROWS * TOKENS + kept.scores * ROWS * TOKENS**2 - fused
