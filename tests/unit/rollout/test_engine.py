"""The built-in engine on a GPU: batches from its free memory, and weights in bfloat16 while a round is sampled."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tests.conftest import tiny_model
from tests.families import tiny
from tests.unit.plan.test_plan import plan
from tests.unit.rollout.test_generate import EOS, PROMPTS, VOCAB, assert_frequencies, uniforms

from tadistill.config.common import Decoding
from tadistill.models.modify import in_bfloat16
from tadistill.rollout import engine as engines
from tadistill.rollout import static_cache
from tadistill.rollout.draw import Mixture
from tadistill.rollout.engine import Native, cache_bytes, row_bytes, sample

STEPS = 8


def respond(student, *, guide=None, prompts=PROMPTS, steps=STEPS, **settings):
    """Return the responses, and the numbers of prompts in the batches."""
    batches = []
    engine = Native(student, Decoding(), eos=EOS, vocab=VOCAB, **settings)
    return engine.respond(prompts, uniforms(len(prompts), steps), guide, batches.append), batches


def needs(models, longest: int, steps: int) -> float:
    return row_bytes(models, [cache_bytes(model) for model in models], longest, steps, VOCAB)


# --- the size of a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_a_batch_has_the_rows_that_fit_into_free_memory(guided, monkeypatch):
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=3)
    guide = Mixture(teacher, 0.3) if guided else None
    expected, batches = respond(student, guide=guide, adapts=True)
    assert batches == [8]  # a CPU keeps the chunk
    need = needs([student, teacher] if guided else [student], 7, STEPS)
    for rows, sizes in ((3.5, [3, 3, 2]), (5.1, [4, 4]), (8.1, [8]), (0.2, [1] * 8)):
        monkeypatch.setattr(engines, "free_bytes", lambda _, rows=rows: rows * need / engines._SHARE)
        found, batches = respond(student, guide=guide, chunk=2, adapts=True)
        assert batches == sizes
        assert [r.tokens for r in found] == [r.tokens for r in expected]
    assert respond(student, guide=guide, chunk=2)[1] == [2] * 4  # a recipe with a chunk keeps it


def test_a_batch_has_at_most_512_rows(monkeypatch):
    monkeypatch.setattr(engines, "free_bytes", lambda _: 2**60)
    assert respond(tiny_model("llama"), prompts=[(1,)] * 600, steps=1, adapts=True)[1] == [300, 300]


def test_the_need_of_a_row_counts_caches_of_the_models_dtype():
    """Two layers, one head of 8 for keys and for values, 4 bytes or 2; each token of the prompt and of the response has them."""
    model = tiny_model("llama")
    each = needs([model], 1, 1)
    more = needs([model], 1, 1001) - each
    repeated = 2 * 16 * 4  # of one layer, for all query heads
    assert more == 1000 * (2 * 2 * 8 * 4 + repeated)
    half = deepcopy(model).bfloat16()
    assert needs([half], 1, 1001) - needs([half], 1, 1) == more / 2
    beside = needs([model, half], 1, 1001) - needs([model, half], 1, 1)
    assert beside == 1.5 * more + 1000 * 16 * 2  # the teacher's states are kept


def test_a_model_without_such_a_cache_keeps_the_chunk(monkeypatch):
    monkeypatch.setattr(engines, "free_bytes", lambda _: 2**60)
    assert respond(tiny("openai-gpt"), chunk=4, adapts=True, steps=2)[1] == [4, 4]


def test_a_stage_knows_what_the_recipe_left_out():
    """Also after its way to another process. The stage's key does not depend on it."""
    sampler = {"type": "teacher_mixed", "rollouts": 64}
    method = {"objective": {"type": "minillm", "pt_weight": 0}, "optim": {"steps": 16, "batch": 16}}
    default = plan(method=method | {"sampler": sampler})
    given = plan(method=method | {"sampler": sampler | {"chunk": 64}}, evaluate={"batch": 32})
    assert list(default.stages) == list(given.stages)
    for found, expected in ((default, False), (given, True)):
        specs = [pickle.loads(pickle.dumps(stage.spec)) for stage in found.stages.values()]
        samplers = [spec.method.sampler for spec in specs if spec.kind == "distill"]
        assert {"chunk" in sampler.model_fields_set for sampler in samplers} == {expected}
        assert {"batch" in spec.decoding.model_fields_set for spec in specs if spec.kind == "evaluate"} == {expected}


# --- bfloat16 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared():
    """A student whose forward passes run under autocast, as the training loop prepares it."""
    AcceleratorState._reset_state(True)
    model = tiny_model("qwen2", tie_word_embeddings=True)
    yield Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model).eval()
    AcceleratorState._reset_state(True)


def in_half():
    """Return the same student with weights in bfloat16, as `from_pretrained` loads it: frequencies of positions stay in float32."""
    model = tiny_model("qwen2", tie_word_embeddings=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("in_step", [False, True])
def test_a_round_is_sampled_from_the_bfloat16_model(prepared, in_step, monkeypatch):
    monkeypatch.setattr(static_cache, "DEVICES", {"cpu"} if in_step else set())
    plain = in_half()
    found, _ = respond(prepared, half=True)
    expected, _ = respond(plain)
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.values["student"], b.values["student"])


def test_frequencies_follow_the_bfloat16_model(prepared):
    draws = 8_000
    numbers = np.random.default_rng(1).random((draws, 1))
    engine = Native(prepared, Decoding(), eos=(), vocab=VOCAB, chunk=draws, half=True)
    tokens = np.array([r.tokens[0] for r in engine.respond([(1, 2)] * draws, numbers)])
    with torch.no_grad():
        q = in_half()(torch.tensor([[1, 2]])).logits[0, -1, :VOCAB].float().softmax(-1)
    assert_frequencies(tokens, q.numpy())


def test_the_weights_come_back(prepared):
    before = dict(prepared.named_parameters())
    values = {name: value.detach().clone() for name, value in before.items()}
    forward, mode = prepared.forward, prepared.training
    loss = prepared(torch.tensor([[1, 2, 3]])).logits.square().sum()  # a graph that is still alive
    with in_bfloat16(prepared):
        assert {p.dtype for p in prepared.parameters()} == {torch.bfloat16}
        assert prepared.lm_head.weight is prepared.model.embed_tokens.weight  # tied weights are one copy
        assert prepared.model.rotary_emb.inv_freq.dtype == torch.float32
        assert prepared(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
    assert prepared.forward == forward
    assert prepared.training is mode
    after = dict(prepared.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in prepared.parameters())


def test_the_weights_come_back_after_an_error(prepared):
    with pytest.raises(KeyboardInterrupt), in_bfloat16(prepared):
        raise KeyboardInterrupt
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}
    assert prepared(torch.tensor([[1, 2]])).logits.dtype == torch.float32


def test_what_transformers_keeps_in_float32_stays_so():
    model = tiny_model("llama")
    model._keep_in_fp32_modules_strict = {"post_attention_layernorm"}
    with in_bfloat16(model):
        kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"model.layers.{i}.post_attention_layernorm.weight" for i in range(2)}


def test_guided_by_a_teacher_in_bfloat16(prepared):
    teacher = tiny_model("llama", seed=3).bfloat16()
    plain = in_half()
    found, _ = respond(prepared, guide=Mixture(teacher, 0.3), half=True)
    expected = sample(plain, PROMPTS, uniforms(8, STEPS), eos=EOS, vocab=VOCAB, guide=Mixture(teacher, 0.3))
    assert [r.tokens for r in found] == [r.tokens for r in expected]
