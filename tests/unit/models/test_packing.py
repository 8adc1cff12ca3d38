"""Packed rows against padded rows: the same hidden states, losses and gradients. Models that cannot be packed are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_model
from tests.families import tiny
from torch.nn.functional import scaled_dot_product_attention

from tadistill import rng
from tadistill.config.method import Method
from tadistill.data.batch import Sequence, collate
from tadistill.errors import ModelError
from tadistill.models.forward import PACKABLE, ROWS, Reader, check_packing, is_packed, pack_rows
from tadistill.models.modify import recompute_layers
from tadistill.rollout import teacher_mixed_fast
from tadistill.rollout.engine import sample
from tadistill.train.monitoring import Meter
from tadistill.train.step import make_step

EOS = 1
BATCH = collate(
    [
        Sequence((5, 6, EOS, 7), (8, 9, EOS, 4, 3, 2, 9, EOS)),  # longer than the window of the tiny models
        Sequence((4,), (EOS,)),  # one token is read
        Sequence((), (5,)),  # nothing is predicted
        Sequence((12, 13, 14, 15, 16), (18, EOS)),
    ],
    pad=EOS,
)


def both(build):
    """A model that reads padded rows, and the same model on packed rows."""
    padded, packed = build(), build()
    packed.load_state_dict(padded.state_dict())
    pack_rows(packed)
    assert (is_packed(padded), is_packed(packed)) == (False, True)
    return padded, packed


def assert_same_gradients(got, expected):
    for (name, a), b in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_hidden_states_and_gradients_are_those_of_padded_rows(kind):
    found, models = [], both(lambda: tiny(kind))
    for model in models:
        hidden = Reader(model).hidden(model, BATCH)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).mean().backward()
        found.append(hidden.detach())
    assert found[0].shape[0] == int(BATCH.mask_BT.sum())
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert_same_gradients(*reversed(models))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma", "opt"])
@pytest.mark.parametrize("objective", ["cross_entropy", "reverse_kl", "forward_kl"])
def test_losses_and_gradients_are_those_of_padded_rows(kind, objective):
    method, found = Method.model_validate({"objective": {"type": objective}}), []
    students, teachers = both(lambda: tiny(kind)), both(lambda: tiny("llama", num_hidden_layers=1))
    for student, teacher in zip(students, teachers, strict=True):
        step = make_step(method, student, (teacher.requires_grad_(False),) if objective != "cross_entropy" else (), 64)
        loss = step.loss(student, BATCH, {"response": 11.0}).total
        loss.backward()
        found.append(loss.detach())
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    assert_same_gradients(*reversed(students))


def test_a_batch_without_a_loss_has_a_gradient_of_zero():
    _, model = both(lambda: tiny("llama"))
    hidden = Reader(model).hidden(model, collate([Sequence((), (5,)), Sequence((), (6,))], pad=EOS))
    hidden.sum().backward()
    assert hidden.shape == (0, 32)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_layers_that_are_computed_again_see_the_same_rows():
    found = []
    for again in (False, True):
        _, model = both(lambda: tiny("llama"))
        if again:
            recompute_layers(model)
        Reader(model).hidden(model, BATCH).square().sum().backward()
        found.append(model)
    assert_same_gradients(*found)


def test_attention_of_a_row_has_no_mask_and_no_other_row(monkeypatch):
    calls = []

    def seen(query, key, value, **settings):
        calls.append((query.shape[2], key.shape[2], settings["attn_mask"], settings["is_causal"]))
        return scaled_dot_product_attention(query, key, value, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    _, model = both(lambda: tiny("llama"))
    Reader(model).hidden(model, BATCH)
    assert calls[-3:] == [(11, 11, None, True), (1, 1, None, False), (6, 6, None, True)]


def test_other_passes_do_not_change(tmp_path):
    padded, packed = both(lambda: tiny_model("llama"))
    inputs = {"input_ids": BATCH.ids_BT, "attention_mask": BATCH.attention_BT, "position_ids": BATCH.positions_BT}
    with torch.no_grad():
        assert torch.equal(packed(**inputs).logits, padded(**inputs).logits)
    assert teacher_mixed_fast.possible(packed, 8)
    uniforms = rng.uniforms(range(2), 6, 1, "test")
    tokens = [[r.tokens for r in sample(m, [(3, 4), (5,)], uniforms, eos=(0,), vocab=31)] for m in (padded, packed)]
    assert tokens[0] == tokens[1]
    packed.save_pretrained(tmp_path)
    assert ROWS not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_the_meter_counts_no_padding():
    _, model = both(lambda: tiny_model("llama"))
    meter = Meter(model, ())
    with meter.counting(), meter.timed("training"), torch.no_grad():
        meter.saw([BATCH])
        Reader(model).hidden(model, BATCH)
    state = meter.state()
    assert state["padding"] == 0
    assert state["parts"]["training/student"]["positions"] == 2 + 11 + 1 + 6  # two tokens are those of the check of the reader


def test_models_that_cannot_be_packed_are_refused():
    with pytest.raises(ModelError, match=r"model `big` is of type bloom, which cannot train on packed rows; remove `optim.packed`, or use"):
        check_packing("bloom", "big")
    with pytest.raises(ModelError, match="of type mamba, which cannot train on packed rows"):
        pack_rows(tiny("mamba"))
    eager = tiny("llama")
    eager.config._attn_implementation = "eager"
    with pytest.raises(ModelError, match="uses the attention implementation `eager`, but packed rows need `sdpa`"):
        pack_rows(eager)


def test_a_model_that_loses_the_rows_is_refused(monkeypatch):
    model = tiny("llama")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda rows=None, **inputs: forward(**inputs))
    with pytest.raises(ModelError, match="packed rows change each other's logits in a llama model"):
        pack_rows(model)


def test_the_documentation_names_all_types():
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "out-of-memory.md").read_text(encoding="utf-8")
    assert [kind for kind in PACKABLE if f"`{kind}`" not in page] == []
