"""Adapters: nothing changes before they train, merging gives the adapted model, and the head stays out of it."""

import sys

import pytest
import torch
from tests.conftest import tiny_model
from tests.families import tiny
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tadistill.config.model import Lora
from tadistill.errors import ConfigError, ModelError
from tadistill.models.modify import adapt, adapters_in, merged, plain_weights
from tadistill.models.parameter_counts import adapters_of

IDS = torch.tensor([[3, 9, 5, 7, 11]])
TARGETS = {"gpt2": "attn.c_proj", "opt": "out_proj", "llama": "o_proj", "qwen2": "o_proj"}


def moved(model, settings: Lora = Lora(r=4), seed: int = 1):
    """The tuner of a model whose adapters have trained."""
    tuner = adapt(model, settings, seed=seed)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tuner


@pytest.mark.parametrize("kind", TARGETS)
def test_merging_gives_the_adapted_model_as_an_ordinary_one(kind, tmp_path):
    model = tiny_model(kind)
    before, logits = {name: value.clone() for name, value in model.state_dict().items()}, model(IDS).logits.detach()
    tuner = moved(model, Lora(r=4, targets=(TARGETS[kind],)))
    assert isinstance(model, PreTrainedModel)
    assert tuner.model is model
    adapted = model(IDS).logits.detach()
    assert (adapted - logits).abs().max() > 0.01
    merged(tuner).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, adapted, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(IDS).logits, adapted)  # the one that trains on is left as it was
    after = loaded.state_dict()
    assert set(after) == set(before)
    moved_weights = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved_weights == {name for name in before if name.endswith(f"{TARGETS[kind]}.weight")}


@pytest.mark.parametrize("kind", [*TARGETS, "mixtral"])
def test_plain_weights_are_those_of_the_merged_model(kind):
    model = tiny(kind) if kind == "mixtral" else tiny_model(kind)
    tuner = moved(model)
    whole = merged(tuner)
    expected = revert_weight_conversion(whole, whole.state_dict())
    tied = {name for name, _ in whole.named_parameters(remove_duplicate=False)} - {name for name, _ in whole.named_parameters()}
    found = plain_weights(model)
    assert set(found) == set(expected) - tied
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name])


def test_layers_that_share_a_weight_get_no_adapters():
    """Each would have an adapter of its own, and all would be merged into the one weight."""
    with pytest.raises(ModelError, match=r"lora does not fit a zamba model: .* and .* share a weight, .*; name other layers"):
        adapt(tiny("zamba"), Lora(r=2), seed=1)
    adapt(tiny("zamba"), Lora(r=2, targets=("mamba.in_proj",)), seed=1)


def test_layers_that_do_not_work_with_adapters_are_found_at_once():
    with pytest.raises(ModelError, match=r"lora does not fit a llama4_text model; correct lora.targets \(\w*Error: "):
        adapt(tiny("llama4_text"), Lora(r=2), seed=1)


@pytest.mark.parametrize("kind", TARGETS)
def test_new_adapters_change_nothing_and_train_alone(kind):
    model = tiny_model(kind)
    logits, head = model(IDS).logits, model.get_output_embeddings()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    adapt(model, Lora(r=4), seed=1)
    assert torch.rand(1) == expected  # the global generator is as it was
    assert torch.equal(model(IDS).logits, logits)
    assert model.get_output_embeddings() is head
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in trained)
    linear = {"gpt2": 4, "opt": 6, "llama": 7, "qwen2": 7}[kind]
    assert len(trained) == 2 * linear * 2  # halves, in two layers


def test_initial_weights_follow_from_the_seed():
    drawn = []
    for seed in (1, 1, 2):
        model = tiny_model("llama")
        adapt(model, Lora(r=4), seed=seed)
        drawn.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_alpha_scales_and_dropout_follows_the_mode():
    once, twice = tiny_model("llama"), tiny_model("llama")
    moved(once, Lora(r=4, alpha=0.01, targets=("down_proj",)))
    moved(twice, Lora(r=4, alpha=0.02, targets=("down_proj",)))
    plain = tiny_model("llama")(IDS).logits
    torch.testing.assert_close(twice(IDS).logits - plain, 2 * (once(IDS).logits - plain), atol=1e-3, rtol=0.02)
    model = tiny_model("llama")
    moved(model, Lora(r=4, dropout=0.5))
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "mistral", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("partly", [False, True])
def test_counted_from_the_configuration_as_they_are(kind, partly):
    targets = ({"gpt2": "c_proj", "opt": "fc1"}.get(kind, "v_proj"),) if partly else ()
    model = tiny_model(kind, layers=3)
    counted = adapters_of(model.config.to_dict(), 4, targets)
    assert adapters_in(model) is None
    adapt(model, Lora(r=4, targets=targets), seed=1)
    assert adapters_in(model) == counted
    assert counted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_opts_projections_are_counted():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 8, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=31, max_position_embeddings=32, do_layer_norm_before=False, **sizes))
    counted = adapters_of(model.config.to_dict(), 4)
    adapt(model, Lora(r=4), seed=1)
    assert adapters_in(model) == counted
    assert counted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted.idle == 8 * 16 + 4 * 8  # project_in and the half of its adapter that reads embeddings


def test_gradients_begin_at_the_first_adapter():
    """Llama: 16 wide, 32 in between, heads 2 of 8, one of keys; two layers."""
    config = tiny_model("llama").config.to_dict()
    qkv, out, mlp = 16 * 16 + 2 * 16 * 8, 16 * 16, 2 * 16 * 32
    every, late = adapters_of(config, 4), adapters_of(config, 4, ("gate_proj",))
    assert (every.idle, every.idle_attention) == (qkv + 3 * 4 * 16, 0)
    assert (late.idle, late.idle_attention) == (qkv + out + mlp + 4 * 16, 1)


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(ConfigError, match="`c_attn` is not a linear layer of this model; choose from self_attn"):
        adapters_of(tiny_model("llama").config.to_dict(), 4, ("c_attn",))
    with pytest.raises(ModelError, match=r"lora does not fit a llama model; correct lora\.targets"):
        adapt(tiny_model("llama"), Lora(targets=("c_attn",)), seed=1)
    for target in ("lm_head", "wte", "model.embed_tokens"):
        with pytest.raises(ValueError, match="the head and the embeddings cannot have adapters"):
            Lora(targets=("q_proj", target))
    model = tiny_model("llama")
    model.renamed_head = model.lm_head
    model.get_output_embeddings = lambda: model.renamed_head
    with pytest.raises(ModelError, match="which is the head or an embedding"):
        adapt(model, Lora.model_construct(r=4, alpha=8, dropout=0.0, targets=("lm_head",)), seed=1)


def test_adapters_need_peft(monkeypatch):
    """The machine of a cluster's job may lack a package that the checks before a submission found."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"`lora`, which needs peft; run `pip install 'tadistill\[lora\]'`"):
        adapt(tiny_model("gpt2"), Lora(r=2), seed=1)
