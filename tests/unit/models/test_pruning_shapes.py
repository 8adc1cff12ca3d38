"""Shapes of a config.json and of transformers' objects agree, a pruned model is counted before it is made, bad shapes are one sentence."""

import dataclasses

import pytest
import torch
from tests.unit.models.test_pruning_width import KINDS, TARGETS, scores, target, tiny
from torch import nn
from transformers import AutoConfig

from tadistill.errors import ConfigError, ModelError
from tadistill.models.parameter_counts import size_of
from tadistill.models.pruning import prune
from tadistill.models.shapes import Shape, check_shape, shape_of, with_shape

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}


@pytest.mark.parametrize("kind", list(KINDS))
def test_counted_before_it_is_made(kind):
    model = tiny(kind)
    raw = {"vocab_size": 32, "n_positions": 32, "max_position_embeddings": 32, **KINDS[kind]}
    assert shape_of(raw) == shape_of(model.config)
    want = dataclasses.replace(shape_of(raw), **TARGETS[kind], layers=2)
    check_shape(raw, want)
    pruned = prune(model, want, scores(model))
    assert shape_of(with_shape(raw, want)) == want == shape_of(pruned.config)
    assert size_of(with_shape(raw, want)) == size_of(pruned.config.to_dict())
    assert size_of(with_shape(raw, want)).total == pruned.num_parameters()


def test_real_configurations():
    assert shape_of(GPT2) == Shape(layers=12, hidden=768, intermediate=3072, heads=12, head_dim=64)
    qwen3 = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    assert shape_of({**qwen3, "num_key_value_heads": 8}) == Shape(
        layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128
    )


def test_gpt2_that_keeps_four_times_its_width_says_no_inner_size():
    narrow = dataclasses.replace(shape_of(GPT2), hidden=512, heads=8, intermediate=2048)
    assert with_shape(GPT2, narrow) == {"model_type": "gpt2", "n_embd": 512, "n_layer": 12, "n_head": 8, "n_inner": None}
    assert with_shape(GPT2, dataclasses.replace(narrow, intermediate=1024))["n_inner"] == 1024


def test_mistakes():
    with pytest.raises(ModelError, match="a mamba model cannot be pruned in width; choose a model of one of the families gpt2"):
        shape_of({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="the llama configuration has no `hidden_size`; add this field"):
        shape_of({"model_type": "llama", "num_attention_heads": 2})
    with pytest.raises(ConfigError, match="hidden_size in the llama configuration is too large; write at most 1,000,000,000"):
        shape_of({"model_type": "llama", "num_attention_heads": 2, "hidden_size": 10**300})
    with pytest.raises(ConfigError, match="in gpt2 models, hidden must be heads x head_dim"):
        check_shape(GPT2, dataclasses.replace(shape_of(GPT2), hidden=512))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"layers": 4}, "layers is 4, but the model has 3, and pruning cannot add any; write a number from 1 to 3"),
        ("llama", {"hidden": 0}, "hidden is 0, but the model has 24, .*write a number from 1 to 24"),
        ("llama", {"intermediate": 21}, "intermediate is 21, but the model has 20, .*write a number from 1 to 20"),
        ("llama", {"heads": 12}, "heads is 12, but the model has 6, .*write a number from 1 to 6"),
        ("llama", {"kv_heads": 6}, "kv_heads is 6, but the model has 3, .*write a number from 1 to 3"),
        ("llama", {"kv_heads": None, "heads": 6}, "kv_heads is 6, but the model has 3, .*write a number from 1 to 3"),
        ("llama", {"kv_heads": 0}, "kv_heads is 0, but the model has 3, .*write a number from 1 to 3"),
        ("llama", {"heads": 5}, "heads is 5, but it must be a multiple of kv_heads .3.; change `heads` or `kv_heads`"),
        (
            "llama",
            {"heads": 4, "kv_heads": 1},
            "heads is 4, but at most 2 are possible, because each of the 1 key-value heads serves at most 2 query heads; lower `heads`, "
            "or raise",
        ),
        ("llama", {"head_dim": 2}, "head_dim is 2, but pruning cannot change it; write 4"),
        ("llama", {"hidden": 20}, "hidden 20 does not fit 6 heads: in llama models, hidden must be a multiple.*write hidden 18"),
        (
            "gpt2",
            {"hidden": 16},
            "hidden 16 does not fit 3 heads: in gpt2 models, hidden must be heads x head_dim, and head_dim is 8; write `hidden` 24",
        ),
        ("opt", {"heads": 2}, "hidden 24 does not fit 2 heads: in opt models, .*write `hidden` 16, or another number of heads"),
        ("gpt2", {"kv_heads": 1}, "heads is 3, but at most 1 are possible, because"),
    ],
)
def test_a_shape_that_cannot_be_is_one_sentence(kind, fields, message):
    model = tiny(kind)
    with pytest.raises(ConfigError, match=message) as error:
        prune(model, dataclasses.replace(shape_of(model.config), **fields), scores(model))
    assert "\n" not in str(error.value)


def test_opt_whose_projections_would_vanish():
    model = tiny("opt-350m", word_embed_proj_dim=16)
    with pytest.raises(ConfigError, match=r"hidden must not be 16, because word_embed_proj_dim is 16 too"):
        prune(model, target("opt-350m", model), scores(model))


def test_other_families_and_unknown_weights_are_refused():
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(
        ModelError, match="a gpt_neox model cannot be pruned in width; choose a model of one of the families gpt2, opt, llama"
    ):
        shape_of(config)
    gemma = {"model_type": "gemma3_text", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.raises(ModelError, match="a gemma3_text model cannot be pruned in width; choose a model of one of the families gpt2"):
        check_shape(gemma, dataclasses.replace(shape_of(gemma), intermediate=8))
    model = tiny("gpt2")
    model.transformer.h[0].register_parameter("gate", nn.Parameter(torch.ones(1)))
    with pytest.raises(ModelError, match=r"gpt2 models with a weight transformer\.h\.0\.gate cannot be pruned in width"):
        prune(model, target("gpt2", model), scores(model))
