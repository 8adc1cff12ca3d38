"""A width-pruned model is the hand-built model: each weight cut here by explicit slicing, family by family."""

import copy
import dataclasses

import pytest
import torch
from tests.unit.models.conftest import with_random_weights, word_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from tadistill.models.loading import load_model, save_model
from tadistill.models.parameter_counts import size_of
from tadistill.models.prunable_parts import Importance
from tadistill.models.pruning import prune, prune_depth
from tadistill.models.shapes import shape_of

IDS = torch.tensor([[5, 9, 2, 30, 7, 11, 3]])
ROTARY = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
KINDS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 32},
    "opt": {"model_type": "opt", "hidden_size": 24, "num_hidden_layers": 3, "ffn_dim": 20, "num_attention_heads": 3},
    "opt-350m": {
        "model_type": "opt",
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "ffn_dim": 20,
        "num_attention_heads": 3,
        "word_embed_proj_dim": 10,
        "do_layer_norm_before": False,
    },
    "llama": {"model_type": "llama", **ROTARY, "attention_bias": True, "mlp_bias": True},
    "llama-mha": {"model_type": "llama", **ROTARY, "num_key_value_heads": 6, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **ROTARY},
    "qwen2": {"model_type": "qwen2", **ROTARY, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **ROTARY, "head_dim": 8},
}
TARGETS = {
    "gpt2": {"hidden": 16, "intermediate": 11, "heads": 2},
    "opt": {"hidden": 16, "intermediate": 11, "heads": 2},
    "opt-350m": {"hidden": 16, "intermediate": 11, "heads": 2},
    "llama": {"hidden": 16, "intermediate": 11, "heads": 4, "kv_heads": 2},
    "llama-mha": {"hidden": 16, "intermediate": 11, "heads": 4, "kv_heads": 4},
    "mistral": {"hidden": 13, "intermediate": 11, "heads": 2, "kv_heads": 2},  # half of each group's queries go
    "qwen2": {"hidden": 13, "intermediate": 11, "heads": 4, "kv_heads": 2},
    "qwen3": {"hidden": 13, "intermediate": 11, "heads": 3, "kv_heads": 3},
}


def tiny(kind, **changes):
    special = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 32}
    if kind == "gpt2":
        del special["max_position_embeddings"]
    return with_random_weights(**{**special, **KINDS[kind], **changes})


def scores(model, seed=1):
    """Random importances, so that every layer keeps other neurons and heads."""
    shape, draw = shape_of(model.config), torch.Generator().manual_seed(seed)
    sizes = [(shape.hidden,), (shape.layers, shape.intermediate), (shape.layers, shape.heads), (shape.layers,)]
    return Importance(*(torch.rand(size, generator=draw, dtype=torch.float64) for size in sizes))


def target(kind, model, **changes):
    return dataclasses.replace(shape_of(model.config), **{**TARGETS[kind], **changes})


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def best(row, count):
    return sorted(sorted(range(len(row)), key=lambda i: -float(row[i]))[:count])


def best_heads(row, have, want):
    """(queries, keys) kept of one layer's scores: the key-value heads whose best queries sum to most."""
    size, keep = have.heads // have.groups, want.heads // want.groups
    total = {key: sum(sorted((float(s) for s in row[key * size : (key + 1) * size]), reverse=True)[:keep]) for key in range(have.groups)}
    keys = sorted(sorted(total, key=lambda key: -total[key])[: want.groups])
    return [key * size + i for key in keys for i in best(row[key * size : (key + 1) * size], keep)], keys


def rows(heads, size):
    return [head * size + i for head in heads for i in range(size)]


def put(module, weight, bias=None):
    """The module with these values in place of its own."""
    with torch.no_grad():
        module.weight = nn.Parameter(weight.clone())
        if module.__dict__["_parameters"].get("bias") is not None:
            module.bias = nn.Parameter(bias.clone())


def cut_norm(norm, c):
    put(norm, norm.weight[c], norm.bias[c] if isinstance(norm, nn.LayerNorm) else None)
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (len(c),)


def cut_linear(linear, out, inputs):
    put(linear, linear.weight[out][:, inputs], None if linear.bias is None else linear.bias[out])


def cut_table(table, c):
    put(table, table.weight[:, c])


def built_gpt2(model, want, by, keep):
    body, size, c = model.transformer, 8, best(by.hidden, want.hidden)
    body.h = nn.ModuleList(body.h[i] for i in keep)
    for i, block in zip(keep, body.h, strict=True):
        q = rows(best(by.heads[i], want.heads), size)
        n = best(by.neurons[i], want.intermediate)
        cut_norm(block.ln_1, c)
        cut_norm(block.ln_2, c)
        fused, bias = block.attn.c_attn.weight[c], block.attn.c_attn.bias
        put(
            block.attn.c_attn,
            torch.cat([fused[:, :24][:, q], fused[:, 24:48][:, q], fused[:, 48:][:, q]], 1),
            torch.cat([bias[:24][q], bias[24:48][q], bias[48:][q]]),
        )
        block.attn.c_attn.nf = 3 * len(q)
        put(block.attn.c_proj, block.attn.c_proj.weight[q][:, c], block.attn.c_proj.bias[c])
        block.attn.c_proj.nf = len(c)
        block.attn.num_heads, block.attn.split_size, block.attn.embed_dim = want.heads, len(q), len(q)
        put(block.mlp.c_fc, block.mlp.c_fc.weight[c][:, n], block.mlp.c_fc.bias[n])
        block.mlp.c_fc.nf = len(n)
        put(block.mlp.c_proj, block.mlp.c_proj.weight[n][:, c], block.mlp.c_proj.bias[c])
        block.mlp.c_proj.nf = len(c)
    cut_table(body.wpe, c)
    cut_norm(body.ln_f, c)
    cut_table(body.wte, c)
    model.lm_head.weight = body.wte.weight


def built_opt(model, want, by, keep):
    body, size, c = model.model.decoder, 8, best(by.hidden, want.hidden)
    body.layers = nn.ModuleList(body.layers[i] for i in keep)
    for i, layer in zip(keep, body.layers, strict=True):
        q = rows(best(by.heads[i], want.heads), size)
        n = best(by.neurons[i], want.intermediate)
        for name in ("q_proj", "k_proj", "v_proj"):
            cut_linear(getattr(layer.self_attn, name), q, c)
        cut_linear(layer.self_attn.out_proj, c, q)
        layer.self_attn.num_heads = want.heads
        cut_norm(layer.self_attn_layer_norm, c)
        cut_norm(layer.final_layer_norm, c)
        cut_linear(layer.fc1, n, c)
        cut_linear(layer.fc2, c, n)
    cut_table(body.embed_positions, c)
    if body.final_layer_norm is not None:
        cut_norm(body.final_layer_norm, c)
    if body.project_in is None:
        cut_table(body.embed_tokens, c)
        model.lm_head.weight = body.embed_tokens.weight
    else:
        cut_linear(body.project_in, c, list(range(10)))
        cut_linear(body.project_out, list(range(10)), c)


def built_rotary(model, want, by, keep):
    body, have, c = model.model, shape_of(model.config), best(by.hidden, want.hidden)
    tied = model.lm_head.weight is body.embed_tokens.weight
    body.layers = nn.ModuleList(body.layers[i] for i in keep)
    for i, layer in zip(keep, body.layers, strict=True):
        queries, keys = best_heads(by.heads[i], have, want)
        q, k, n = rows(queries, have.head_dim), rows(keys, have.head_dim), best(by.neurons[i], want.intermediate)
        attention = layer.self_attn
        cut_linear(attention.q_proj, q, c)
        cut_linear(attention.k_proj, k, c)
        cut_linear(attention.v_proj, k, c)
        cut_linear(attention.o_proj, c, q)
        attention.num_key_value_groups = want.heads // want.groups
        cut_norm(layer.input_layernorm, c)
        cut_norm(layer.post_attention_layernorm, c)
        cut_linear(layer.mlp.gate_proj, n, c)
        cut_linear(layer.mlp.up_proj, n, c)
        cut_linear(layer.mlp.down_proj, c, n)
    cut_norm(body.norm, c)
    cut_table(body.embed_tokens, c)
    if tied:
        model.lm_head.weight = body.embed_tokens.weight
    else:
        cut_table(model.lm_head, c)


def built(model, want, by, keep):
    """A copy of the model, cut by hand."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        {"gpt2": built_gpt2, "opt": built_opt}.get(model.config.model_type, built_rotary)(model, want, by, keep)
    model.config.num_hidden_layers = len(keep)
    return model


@pytest.mark.parametrize("keep", [(0, 2), (1,), (0, 1, 2)])
def test_forward_is_that_of_the_hand_built_model(kind, keep):
    model = tiny(kind)
    before, by, want = logits(model), scores(model), target(kind, model, layers=len(keep))
    pruned = prune(model, want, by, keep)
    torch.testing.assert_close(logits(pruned), logits(built(model, want, by, keep)), rtol=1e-5, atol=1e-5)
    assert shape_of(pruned.config) == want
    assert torch.equal(logits(model), before)  # the parent is untouched
    assert not pruned.training
    assert size_of(pruned.config.to_dict()).total == pruned.num_parameters()


@pytest.mark.slow
def test_one_dimension_at_a_time(kind):
    model = tiny(kind)
    by, have = scores(model), shape_of(model.config)
    options = [{"layers": 2}, {"intermediate": 7}]
    if model.config.model_type not in ("gpt2", "opt"):
        options += [{"hidden": 18}, {"heads": have.groups, "kv_heads": have.groups}, {"heads": have.heads // have.groups, "kv_heads": 1}]
    for fields in options:
        want = dataclasses.replace(have, **fields)
        keep = best(by.layers, want.layers)
        torch.testing.assert_close(logits(prune(model, want, by)), logits(built(model, want, by, keep)), rtol=1e-5, atol=1e-5)


def test_the_full_shape_is_the_same_model(kind):
    model = tiny(kind)
    pruned = prune(model, shape_of(model.config), scores(model))
    assert {**pruned.config.to_dict(), "dtype": None} == {**model.config.to_dict(), "dtype": None}
    assert all(torch.equal(a, b) for a, b in zip(pruned.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(logits(pruned), logits(model))
    assert not {p.data_ptr() for p in pruned.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_layers_are_the_most_important_or_those_asked_for(kind):
    model = tiny(kind)
    by = dataclasses.replace(scores(model), layers=torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64))
    want = dataclasses.replace(shape_of(model.config), layers=2)
    for layers, kept in ((None, (1, 2)), ((0, 1), (0, 1))):
        assert torch.equal(logits(prune(model, want, by, layers)), logits(prune_depth(model, kept)))


def test_ties_stay(kind):
    model = tiny(kind)
    pruned = prune(model, target(kind, model), scores(model))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight) == tied


def test_untied_gpt2():
    model = tiny("gpt2", tie_word_embeddings=False)
    want, by = target("gpt2", model), scores(model)
    hand = built(model, want, by, (0, 1, 2))
    hand.lm_head.weight = nn.Parameter(model.lm_head.weight[:, best(by.hidden, 16)])
    torch.testing.assert_close(logits(prune(model, want, by)), logits(hand), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_saves_loads_generates_and_trains(kind, tmp_path):
    pruned = prune(tiny(kind), target(kind, tiny(kind), layers=2), scores(tiny(kind)))
    save_model(pruned, word_tokenizer(), tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(reloaded), logits(pruned))
    assert torch.equal(logits(load_model(tmp_path / "pruned")), logits(pruned))
    assert shape_of(reloaded.config) == shape_of(pruned.config)

    reloaded.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    cached = reloaded.generate(IDS, use_cache=True, **options)
    assert cached.shape == (1, IDS.shape[1] + 8)
    assert torch.equal(cached, reloaded.generate(IDS, use_cache=False, **options))

    before = reloaded(IDS, labels=IDS).loss
    before.backward()
    with torch.no_grad():
        for parameter in reloaded.parameters():
            assert parameter.grad is not None
            parameter -= 1e-4 * parameter.grad
    assert reloaded(IDS, labels=IDS).loss < before


def test_dtype_stays():
    pruned = prune(tiny("llama").to(torch.bfloat16), target("llama", tiny("llama")), scores(tiny("llama")))
    assert pruned.dtype == torch.bfloat16
    assert pruned.model.rotary_emb.inv_freq.dtype == torch.float32


def test_lists_with_one_entry_per_layer_follow():
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny("qwen3", layer_types=types, use_sliding_window=True, sliding_window=3)
    by, want = scores(model), target("qwen3", model, layers=2)
    pruned = prune(model, want, by, (1, 2))
    assert pruned.config.layer_types == ["sliding_attention", "full_attention"]
    assert pruned.model.layers[0].self_attn.sliding_window == 3


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kept"),
    [(1, 1, [0]), (2, 1, [2, 3]), (2, 2, [0, 3]), (3, 3, [0, 3, 4]), (4, 2, [0, 1, 2, 3])],
)
def test_a_group_counts_by_the_queries_it_would_keep(heads, kv_heads, kept):
    """Scores by hand: the first group has the best query, the second the best pair."""
    model = tiny("llama")
    row = torch.tensor([1.0, 0.0, 0.6, 0.7, 0.2, 0.1], dtype=torch.float64)
    by = dataclasses.replace(scores(model), heads=row.repeat(3, 1))
    pruned = prune(model, dataclasses.replace(shape_of(model.config), heads=heads, kv_heads=kv_heads), by)
    for before, after in zip(model.model.layers, pruned.model.layers, strict=True):
        assert torch.equal(after.self_attn.q_proj.weight, before.self_attn.q_proj.weight[rows(kept, 4)])
        assert torch.equal(after.self_attn.v_proj.weight, before.self_attn.v_proj.weight[rows(sorted({head // 2 for head in kept}), 4)])
