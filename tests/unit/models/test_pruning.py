"""A pruned model is the hand-built model of its kept layers: forward, generation with a cache, and on disk."""

import copy
from itertools import pairwise

import pytest
import torch
from tests.unit.models.conftest import SHAPES, random_model
from transformers import AutoModelForCausalLM, MambaConfig

from tadistill.errors import ConfigError, ModelError
from tadistill.models.loading import load_model, save_model
from tadistill.models.pruning import keep_list, prune_depth

IDS = torch.tensor([[5, 9, 2, 30, 7, 11, 3]])


@pytest.mark.parametrize(
    ("layers", "total", "kept"),
    [
        (2, 12, (0, 11)),
        (3, 12, (0, 6, 11)),
        (6, 12, (0, 2, 4, 7, 9, 11)),
        (12, 12, tuple(range(12))),
        (4, 5, (0, 1, 3, 4)),
        (1, 1, (0,)),
        ([0, 5, 7], 12, (0, 5, 7)),
        ((3,), 12, (3,)),
    ],
)
def test_keep_list(layers, total, kept):
    assert keep_list(layers, total) == kept


def test_keep_list_of_a_number_has_that_many_layers_and_both_ends():
    for total in range(2, 50):
        for layers in range(2, total + 1):
            kept = keep_list(layers, total)
            assert len(set(kept)) == layers
            assert (kept[0], kept[-1]) == (0, total - 1)
            gaps = [b - a for a, b in pairwise(kept)]
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("layers", [0, 1, -2, 13])
def test_number_of_layers_out_of_range(layers):
    with pytest.raises(ConfigError, match=rf"layers is {layers}; write a number from 2 to 12"):
        keep_list(layers, 12)


@pytest.mark.parametrize("layers", [[], [0, 0], [3, 1], [-1, 4], [0, 12]])
def test_bad_list_of_layers(layers):
    with pytest.raises(ConfigError, match="write indices from 0 to 11 in ascending order"):
        keep_list(layers, 12)


@pytest.fixture(params=list(SHAPES))
def model(request):
    return random_model(request.param)


def surgery(model, keep):
    """The same model with layers taken out by hand, for a forward pass without a cache."""
    model = copy.deepcopy(model)
    base = model.transformer if model.config.model_type == "gpt2" else model.model
    base = base.decoder if model.config.model_type == "opt" else base
    name = "h" if model.config.model_type == "gpt2" else "layers"
    setattr(base, name, torch.nn.ModuleList(getattr(base, name)[i] for i in keep))
    model.config.num_hidden_layers = len(keep)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("keep", [(0, 3), (1, 2, 3), (2,), (0, 1, 2, 3)])
def test_forward_is_that_of_the_kept_layers(model, keep):
    before = logits(model)
    pruned = prune_depth(model, keep)
    assert torch.equal(logits(pruned), logits(surgery(model, keep)))
    assert pruned.config.num_hidden_layers == len(keep)
    assert not pruned.training
    assert torch.equal(logits(model), before)  # the parent is untouched
    if len(keep) < 4:
        assert not torch.equal(logits(pruned), before)


def test_weights_are_copies(model):
    pruned = prune_depth(model, (0, 3))
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for p in model.parameters())


def test_generation_with_a_cache_equals_generation_without(model):
    pruned = prune_depth(model, (1, 3))
    pruned.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    cached = pruned.generate(IDS, use_cache=True, **options)
    assert cached.shape == (1, IDS.shape[1] + 8)
    assert torch.equal(cached, pruned.generate(IDS, use_cache=False, **options))


def test_saved_and_reloaded_is_equal(model, tokenizer, tmp_path):
    pruned = prune_depth(model, (0, 2))
    save_model(pruned, tokenizer, tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(reloaded), logits(pruned))
    assert torch.equal(logits(load_model(tmp_path / "pruned")), logits(pruned))


def test_tied_heads_stay_tied(model):
    pruned = prune_depth(model, (0, 3))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight) == tied


def test_lists_with_one_entry_per_layer_follow():
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    model = random_model("qwen2", layer_types=types, use_sliding_window=True, sliding_window=3)
    pruned = prune_depth(model, (0, 2))
    assert pruned.config.layer_types == ["full_attention", "sliding_attention"]
    assert torch.equal(logits(pruned)[:, :3], logits(surgery(model, (0, 2)))[:, :3])


def test_dtype_stays():
    pruned = prune_depth(random_model("llama").to(torch.bfloat16), (0, 3))
    assert pruned.dtype == torch.bfloat16
    assert pruned.model.rotary_emb.inv_freq.dtype == torch.float32


def test_global_generator_is_left_alone():
    model = random_model("llama")
    state = torch.random.get_rng_state()
    prune_depth(model, (0, 3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_layers_that_depend_on_their_number_are_refused():
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        prune_depth(random_model("gpt2", scale_attn_by_inverse_layer_idx=True), (0, 3))


def test_a_model_without_one_stack_is_refused():
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2, state_size=4))
    model.backbone.layers.append(model.backbone.layers[0])
    with pytest.raises(ModelError, match="a mamba model has 0 stacks of 2 layers"):
        prune_depth(model, (0,))
