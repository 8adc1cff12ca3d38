"""Shapes from a config.json and from transformers' objects agree, and a pruned model is counted before it is made."""

import dataclasses
import subprocess
import sys

import pytest
from tests.unit.models.test_pruning_width import KINDS, TARGETS, scores, tiny

from tadistill.errors import ConfigError, ModelError
from tadistill.models.pruning import prune
from tadistill.models.shapes import Shape, check_shape, shape_of, with_shape
from tadistill.models.sizes import size_of

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
    with pytest.raises(ModelError, match="a mamba model cannot be pruned in width; these can: gpt2"):
        shape_of({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="the llama configuration has no hidden_size that is a positive whole number"):
        shape_of({"model_type": "llama", "num_attention_heads": 2})
    with pytest.raises(ConfigError, match="in gpt2 models hidden is heads times head_dim"):
        check_shape(GPT2, dataclasses.replace(shape_of(GPT2), hidden=512))


def test_shapes_import_no_torch():
    code = "import sys, tadistill.models.shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
