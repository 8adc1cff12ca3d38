"""A pruned model is the hand-built model of its kept layers: forward, generation with a cache, and on disk."""

import copy
from itertools import pairwise

import pytest
import torch
from tests.unit.models.conftest import SHAPES, random_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, MambaConfig

from tadistill.errors import ConfigError, ModelError
from tadistill.models.loading import load_model, save_model
from tadistill.models.pruning import check_depth, depth, keep_list, prune_depth

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


SMALL = {"num_hidden_layers": 4, "hidden_size": 16, "vocab_size": 32}
ATTENTION = SMALL | {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}


def config(kind, **fields):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    return AutoConfig.for_model(kind, **fields)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "recurrent_gemma"])
def test_a_list_that_the_family_computes_is_left_alone(kind):
    own = {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1} if kind.startswith("mamba") else {"lru_width": 16}
    fields = (ATTENTION if kind == "recurrent_gemma" else SMALL) | own
    of = config(kind, **fields, **({"block_types": ["recurrent", "attention"]} if kind == "recurrent_gemma" else {}))
    assert check_depth(of, [0, 1]).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("kind", "fields", "attribute"),
    [
        ("diffllama", ATTENTION, "self_attn.lambda_init"),
        ("minicpm3", ATTENTION | LATENT, "residual_scale"),
    ],
)
def test_a_layer_that_would_compute_something_else_is_refused(kind, fields, attribute):
    with pytest.raises(ModelError, match=rf"this {kind} model .*layer \d would become layer \d, and its {attribute} .* instead of"):
        check_depth(config(kind, **fields), [0, 3])


def test_entries_of_layers_follow():
    of = config("laguna", **ATTENTION, num_attention_heads_per_layer=[2, 4, 2, 4], num_experts=2, num_experts_per_tok=1)
    assert check_depth(of, [1, 2]).num_attention_heads_per_layer == [4, 2]
    thetas = config("granite_swa", **ATTENTION, layer_rope_theta=[1e4, 5e4, 1e4, 7e4])
    assert check_depth(thetas, [1, 3]).layer_rope_theta == [5e4, 7e4]


def test_a_configuration_that_could_not_be_loaded_is_refused():
    of = config("gemma4_text", **ATTENTION, num_global_key_value_heads=1, layer_types=["sliding_attention", "full_attention"] * 2)
    with pytest.raises(ModelError, match="this gemma4_text model cannot be pruned to these layers"):
        check_depth(of, [0, 1])


def test_a_configuration_without_one_number_of_layers_is_refused():
    with pytest.raises(ModelError, match="a gemma3 model has no single stack of layers"):
        depth(config("gemma3"))


def test_lists_of_layers_follow():
    of = config("qwen2_moe", **ATTENTION, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, mlp_only_layers=[0, 2])
    assert check_depth(of, [1, 2, 3]).mlp_only_layers == [1]
    hybrid = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_d_state": 4, "adapter_rank": 2}
    assert check_depth(config("zamba2", **ATTENTION, **hybrid), [1, 2, 3]).hybrid_layer_ids == [0, 2]


def test_what_a_forward_pass_changes_in_the_modules_is_not_compared():
    model = AutoModelForCausalLM.from_config(config("big_bird", **ATTENTION, is_decoder=True, max_position_embeddings=32)).eval()
    logits(model)  # short texts turn the sparse attention off, in every layer
    assert prune_depth(model, [0, 3]).config.num_hidden_layers == 2


def test_a_model_that_has_no_initial_weights_is_refused_before_work():
    with pytest.raises(ModelError, match=r"this rwkv model cannot be pruned to these layers; .*division by zero"):
        check_depth(config("rwkv", num_hidden_layers=4, hidden_size=16, attention_hidden_size=16, vocab_size=32), [0])
