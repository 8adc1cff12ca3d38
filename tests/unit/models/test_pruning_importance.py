"""Importances are their definitions, and what is dead is what goes."""

import dataclasses

import pytest
import torch
from tests.unit.models.test_pruning_width import KINDS, logits, tiny

from tadistill.errors import ConfigError, ModelError
from tadistill.models.prunable_parts import importance, keep_important
from tadistill.models.pruning import prune
from tadistill.models.shapes import shape_of

SEQUENCES = [[5, 9, 2, 30, 7, 11, 3], [4, 4, 8], [31, 1, 12, 13, 6], [17], [3, 2, 1, 0]]
FIELDS = ("hidden", "neurons", "heads", "layers")


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def parts(model):
    """Layers as (layer, norms, attention's last projection, MLP's last projection, MLP's first one, values)."""
    match model.config.model_type:
        case "gpt2":
            return [(b, (b.ln_1, b.ln_2), b.attn.c_proj, b.mlp.c_proj, b.mlp.c_fc, None) for b in model.transformer.h]
        case "opt":
            layers = model.model.decoder.layers
            norms = [(b.self_attn_layer_norm, b.final_layer_norm) for b in layers]
            return [(b, n, b.self_attn.out_proj, b.fc2, b.fc1, b.self_attn.v_proj) for b, n in zip(layers, norms, strict=True)]
        case _:
            layers = model.model.layers
            norms = [(b.input_layernorm, b.post_attention_layernorm) for b in layers]
            return [
                (b, n, b.self_attn.o_proj, b.mlp.down_proj, b.mlp.up_proj, b.self_attn.v_proj) for b, n in zip(layers, norms, strict=True)
            ]


def seen(model, module, ids, *, output=False):
    """What a module reads or makes of one sequence alone, (T, n)."""
    kept = []
    handle = module.register_forward_hook(lambda _, inputs, out: kept.append((out if output else inputs[0]).double()))
    logits(model, torch.tensor([ids]))
    handle.remove()
    return kept[0].reshape(len(ids), -1)


def over(model, module, *, output=False, heads=None):
    """sqrt of the sum over sequences of (mean over tokens of |x|) squared, term by term."""
    total = 0
    for ids in SEQUENCES:
        x = seen(model, module, ids, output=output)
        if heads:
            x = torch.stack([piece.square().sum(1).sqrt() for piece in x.chunk(heads, dim=1)], dim=1)
        total = total + (x.abs().sum(0) / len(ids)) ** 2
    return total**0.5


@pytest.mark.slow
def test_scores_are_their_definitions(kind):
    model = tiny(kind)
    measured, heads = importance(model, SEQUENCES, batch_size=2), shape_of(model.config).heads
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(measured.hidden, sum(over(model, n, output=True) for _, pair, *_ in parts(model) for n in pair), **close)
    for i, (layer, _, attention, mlp, *_) in enumerate(parts(model)):
        torch.testing.assert_close(measured.neurons[i], over(model, mlp), **close)
        torch.testing.assert_close(measured.heads[i], over(model, attention, heads=heads), **close)
        cosines = []
        for ids in SEQUENCES:
            before, after = seen(model, layer, ids), seen(model, layer, ids, output=True)
            cosines += [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, after, strict=True)]
        assert float(measured.layers[i]) == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-4, abs=1e-6)


def test_padding_never_counts(kind):
    model = tiny(kind)
    alone = importance(model, SEQUENCES, batch_size=1)
    for batch_size in (2, 5, 100):
        together = importance(model, SEQUENCES, batch_size=batch_size)
        for field in FIELDS:
            torch.testing.assert_close(getattr(together, field), getattr(alone, field), rtol=1e-5, atol=1e-6)
    # a long neighbour pads the others; its own share is known from a run of its own
    long = [[6] * 32]
    both, own = importance(model, SEQUENCES + long, batch_size=6), importance(model, long)
    torch.testing.assert_close(both.neurons.square(), alone.neurons.square() + own.neurons.square(), rtol=1e-4, atol=1e-6)


def test_measuring_leaves_the_model_as_it_was(kind):
    model = tiny(kind).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = importance(model, SEQUENCES), importance(model, SEQUENCES)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(getattr(first, field), getattr(second, field)) for field in FIELDS)  # no dropout


def zero(module, rows):
    with torch.no_grad():
        (module.weight.T if type(module).__name__ == "Conv1D" else module.weight)[rows] = 0
        if getattr(module, "bias", None) is not None:
            module.bias[rows] = 0


def test_dead_neurons_go_and_nothing_changes(kind):
    model = tiny(kind)
    dead = [[0, 5], [3, 4], [7, 19]]
    for (*_, first, _), neurons in zip(parts(model), dead, strict=True):
        zero(first, neurons)
    measured, have = importance(model, SEQUENCES), shape_of(model.config)
    for row, neurons in zip(measured.neurons, dead, strict=True):
        silent = (row == 0).nonzero().flatten().tolist()
        assert set(neurons) <= set(silent)
        assert silent == neurons or model.config.model_type in ("gpt2", "opt")  # GELU and ReLU silence others on these few tokens
    pruned = prune(model, dataclasses.replace(have, intermediate=have.intermediate - 2), measured)
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-4, atol=1e-4)


def test_dead_heads_are_least(kind):
    """Values of a key-value head are zero: all of its queries read nothing."""
    model = tiny(kind)
    have, dead = shape_of(model.config), [[1, 4], [0, 3], [2, 5]] if kind == "llama-mha" else [[1], [0], [2]]
    for (layer, *_, values), keys in zip(parts(model), dead, strict=True):
        for key in keys:
            rows = torch.arange(key * have.head_dim, (key + 1) * have.head_dim)
            zero(*((layer.attn.c_attn, rows + 2 * have.hidden) if values is None else (values, rows)))
    measured, each = importance(model, SEQUENCES), have.heads // have.groups
    for row, keys in zip(measured.heads, dead, strict=True):
        assert (row == 0).nonzero().flatten().tolist() == [key * each + i for key in keys for i in range(each)]
    if model.config.model_type not in ("gpt2", "opt"):  # there heads go with channels only
        less = len(dead[0])
        want = dataclasses.replace(have, heads=have.heads - less * each, kv_heads=have.groups - less)
        torch.testing.assert_close(logits(prune(model, want, measured)), logits(model), rtol=1e-4, atol=1e-4)


def test_dead_channels_are_least_and_go(kind):
    model = tiny(kind)
    for _, norms, *_ in parts(model):
        for norm in norms:
            zero(norm, [4, 9])
    measured, have = importance(model, SEQUENCES), shape_of(model.config)
    assert measured.hidden[[4, 9]].tolist() == [0, 0]
    assert (measured.hidden > 0).sum() == have.hidden - 2
    fixed = model.config.model_type in ("gpt2", "opt")
    want = dataclasses.replace(have, hidden=16, heads=2) if fixed else dataclasses.replace(have, hidden=18)
    pruned, kept = prune(model, want, measured), keep_important(want.hidden, measured.hidden)
    assert not {4, 9} & set(kept)
    norm = parts(pruned)[0][1][0]
    assert torch.equal(norm.weight, parts(model)[0][1][0].weight[list(kept)])


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "qwen3"])
def test_a_layer_that_adds_nothing_goes_and_nothing_changes(kind):
    model = tiny(kind)
    _, _, attention, mlp, *_ = parts(model)[1]
    zero(attention, slice(None))
    zero(mlp, slice(None))
    measured = importance(model, SEQUENCES)
    assert int(measured.layers.argmin()) == 1
    assert float(measured.layers[1]) == pytest.approx(0, abs=1e-6)
    pruned = prune(model, dataclasses.replace(shape_of(model.config), layers=2), measured)
    assert torch.equal(logits(pruned), logits(model))


def test_half_precision_is_measured_in_single():
    wide, half = tiny("llama"), tiny("llama").to(torch.bfloat16)
    for field in FIELDS:
        measured = getattr(importance(half, SEQUENCES), field)
        assert measured.dtype == torch.float64
        torch.testing.assert_close(measured, getattr(importance(wide, SEQUENCES), field), rtol=0.2, atol=0.05)


def test_highest_scores_in_ascending_order_and_of_equals_the_first():
    assert keep_important(3, torch.tensor([0.1, 5.0, 0.3, 4.0])) == (1, 2, 3)
    assert keep_important(2, torch.tensor([1.0, 1.0, 1.0])) == (0, 1)
    for count in (0, 4):
        with pytest.raises(ConfigError, match=f"pruning cannot keep {count} of 3 parts; write a number from 1 to 3"):
            keep_important(count, torch.ones(3))


def test_activations_that_are_not_finite():
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        importance(model, SEQUENCES)
