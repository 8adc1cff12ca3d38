"""Counts are exactly those of the models that transformers builds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from tadistill.errors import ConfigError
from tadistill.models.parameter_counts import Work, forward_flops, read_config, size_of, with_layers

BASE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 20, "vocab_size": 50}
OPT = {"hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 20, "vocab_size": 50}

CASES = [
    ("gpt2", GPT2),
    ("gpt2", GPT2 | {"n_inner": 30, "tie_word_embeddings": False}),
    ("opt", OPT),
    ("opt", OPT | {"word_embed_proj_dim": 8}),
    ("opt", OPT | {"do_layer_norm_before": False, "tie_word_embeddings": False}),
    ("opt", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("llama", BASE),
    ("llama", BASE | {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True}),
    ("llama", BASE | {"num_key_value_heads": None, "head_dim": None}),
    ("llama", BASE | {"attention_bias": True, "mlp_bias": True}),
    ("mistral", BASE | {"num_key_value_heads": 2}),
    ("qwen2", BASE | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("qwen3", BASE | {"num_key_value_heads": 2}),
    ("qwen3", BASE | {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "tie_word_embeddings": True}),
    ("gemma3_text", BASE | {"num_key_value_heads": 1, "head_dim": 10, "sliding_window": 4}),
    ("gemma3_text", BASE | {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "tie_word_embeddings": False}),
]


def build(kind, fields):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_counts_equal_the_model(kind, fields):
    model = build(kind, fields)
    size = size_of({"model_type": kind, **fields})
    assert size.total == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight
    matrices = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))
    }
    assert size.matmul == sum(matrices.values()) + head.numel()
    assert size.layers == 3


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_counts_from_a_saved_configuration(kind, fields):
    """What save_pretrained writes gives the same counts as the few fields a recipe names."""
    written = AutoConfig.for_model(kind, **fields).to_dict()
    assert size_of(written) == size_of({"model_type": kind, **fields})


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_flops_equal_those_that_torch_counts(kind, fields):
    """Also behind a sliding window of 4 tokens: the products of masked pairs are computed."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), attn_implementation="eager")
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.arange(24).reshape(2, 12))
    assert forward_flops(size_of({"model_type": kind, **fields}), Work(24, 2 * 12**2, 24)) == counted.get_total_flops()


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma3_text"])
def test_missing_fields_have_the_defaults_of_transformers(kind):
    fields = BASE | {"num_attention_heads": 64, "hidden_size": 128}
    assert size_of({"model_type": kind, **fields}).total == sum(p.numel() for p in build(kind, fields).parameters())


@pytest.mark.parametrize(("kind", "fields"), [("gpt2", GPT2), ("opt", OPT), ("opt", OPT | {"word_embed_proj_dim": 8})])
def test_counts_do_not_need_the_number_of_heads_if_it_changes_nothing(kind, fields):
    """transformers has a default for it, so the config.json of a teacher may lack it."""
    less = {name: value for name, value in fields.items() if name not in ("n_head", "num_attention_heads")}
    assert size_of({"model_type": kind, **less}) == size_of({"model_type": kind, **fields})


def test_gpt2_small_is_124_million():
    config = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12}
    size = size_of(config)
    assert size.total == 124_439_808
    assert size.matmul == 123_532_032  # 12 x 12 x 768^2 = 84,934,656 in the blocks, 50257 x 768 = 38,597,376 in the head
    assert (size.head, size.hidden, size.keys) == (38_597_376, 768, 768)
    # a sequence of 512: 2 x 84,934,656 a position, 4 x 12 x 768 a pair, and 2 x 38,597,376 where there are logits, here on 100
    work = Work(positions=512, pairs=512**2, heads=100)
    assert forward_flops(size, work) == 512 * 169_869_312 + 512**2 * 36_864 + 100 * 77_194_752


def test_gemma_3_270m_has_268_million():
    config = {"model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048}
    size = size_of(config | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256})
    assert size.total == 268_098_176  # 167,772,160 embeddings, which are also the head, and 100,326,016 in the layers and the last norm
    assert (size.head, size.attention, size.keys) == (167_772_160, 1024, 256)


def test_attention_width_is_that_of_the_queries():
    assert size_of({"model_type": "llama", **BASE, "head_dim": 10}).attention == 40


def test_unknown_family_is_none():
    assert size_of({"model_type": "mamba", "vocab_size": 5}) is None
    assert size_of({}) is None


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_size_is_named(missing):
    with pytest.raises(ConfigError, match=f"llama configuration has no `{missing}`; add this field"):
        size_of({k: v for k, v in BASE.items() if k != missing} | {"model_type": "llama"})


@pytest.mark.parametrize("bad", [0, -1, 1.5, "16", True])
def test_bad_size_is_named(bad):
    with pytest.raises(ConfigError, match="hidden_size in the llama configuration is"):
        size_of({"model_type": "llama", **BASE, "hidden_size": bad})


def test_a_size_without_a_float_is_refused():
    with pytest.raises(ConfigError, match="num_key_value_heads in the llama configuration is too large; write at most 1,000,000,000"):
        size_of({"model_type": "llama"} | BASE | {"num_key_value_heads": 10**300})


@pytest.mark.parametrize(("kind", "fields"), [("gpt2", GPT2), ("llama", BASE)])
def test_with_layers_counts_a_pruned_model(kind, fields):
    pruned = with_layers({"model_type": kind, **fields}, 2)
    assert size_of(pruned).layers == 2
    layers = {"n_layer" if kind == "gpt2" else "num_hidden_layers": 2}
    assert size_of(pruned).total == sum(p.numel() for p in build(kind, fields | layers).parameters())


def test_read_config(model_directory):
    assert read_config(str(model_directory))["num_hidden_layers"] == 4
    assert read_config("scratch:llama", config={"hidden_size": 8}, vocab_size=9) == {
        "model_type": "llama",
        "hidden_size": 8,
        "vocab_size": 9,
    }
    assert read_config("scratch:llama", config={"hidden_size": 8}) is None
    (model_directory / "config.json").unlink()
    assert read_config(str(model_directory)) is None
    assert read_config("wheel://tiny-models==1.0/tiny.gguf") is None
