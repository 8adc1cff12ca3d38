"""Gradient checkpointing without training mode: the same losses, gradients and samples, and layers that run again."""

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from tadistill.config.common import Decoding
from tadistill.data.batch import Sequence, collate
from tadistill.errors import ModelError
from tadistill.models import modify
from tadistill.models.forward import Reader
from tadistill.models.modify import recompute_layers
from tadistill.rollout.decoder import way_of
from tadistill.rollout.engine import sample

BATCH = collate([Sequence((3, 9), (5, 6, 7, 0)), Sequence((4,), (8, 0))], pad=0)


def gradients(model) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)  # of dropout, in training mode
    loss = Reader(model).hidden(model, BATCH).square().mean()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_same_loss_and_gradients(kind, training):
    plain, again = (tiny_model(kind).train(training) for _ in range(2))
    calls = []
    again.get_input_embeddings().register_forward_hook(lambda *_: calls.append("model"))
    layer = again.get_decoder().layers[0] if kind != "gpt2" else again.transformer.h[0]
    next(m for m in layer.modules() if "Norm" in type(m).__name__).register_forward_hook(lambda *_: calls.append("layer"))
    recompute_layers(again)
    for expected, found in zip(gradients(plain), gradients(again), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    checks = 1  # the reader's own call takes no gradient
    assert calls.count("layer") - calls.count("model") == 1, "one layer runs once more than the model"
    assert calls.count("model") == checks + 1
    assert again.training == training


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sampling_keeps_its_caches(kind, monkeypatch):
    """The same tokens, one new position at a time, without a call of the checkpoint."""
    plain, again = (tiny_model(kind) for _ in range(2))
    recompute_layers(again)
    monkeypatch.setattr(modify, "checkpoint", None)
    way_of(again)  # its trial of a few tokens is no sampling
    widths = []
    again.get_input_embeddings().register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    uniforms = np.random.default_rng(0).random((2, 6))
    arguments = {"eos": (30,), "vocab": 31, "decoding": Decoding(max_new_tokens=6)}
    found, expected = ([r.tokens for r in sample(m, [(3, 9), (4,)], uniforms, **arguments)] for m in (again, plain))
    assert found == expected
    assert widths == [2, *[1] * (max(map(len, found)) - 1)]


def test_a_model_without_layers_that_can_is_one_sentence():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=0, n_head=1, n_positions=8))
    with pytest.raises(ModelError, match="has no gradient checkpointing for models of type"):
        recompute_layers(model)
