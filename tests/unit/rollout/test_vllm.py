"""The vLLM engine through its protocol: a stand-in with the same calls, which samples with transformers.

It shows that weights are handed over before every call, how settings are translated, and what comes back. CUDA is not needed.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import tiny_model
from transformers import AutoModelForCausalLM

from tadistill import rng
from tadistill.config.common import Decoding
from tadistill.errors import ConfigError
from tadistill.rollout.engine import Vllm

EOS = (0, 3)
PROMPTS = [(5, 6, 7), (9,), (11, 12)]


@dataclass
class SamplingParams:
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_tokens: int
    stop_token_ids: list[int]
    seed: int
    logprobs: int
    detokenize: bool
    allowed_token_ids: list[int] | None


class LLM:
    """A stand-in for vLLM's: loads a directory, takes weights through `apply_model`, returns outputs in the order of the prompts."""

    def __init__(self, *, model: str, skip_tokenizer_init: bool, dtype: str, **engine: Any):
        assert skip_tokenizer_init
        assert engine["logprobs_mode"] == "processed_logprobs"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.seen: list[SamplingParams] = []

    def apply_model(self, function):
        parameters = dict(self.model.named_parameters())

        def load_weights(weights):
            for name, value in weights:
                parameters[name].data.copy_(value)

        return [function(SimpleNamespace(load_weights=load_weights))]

    @torch.no_grad()
    def generate(self, prompts, *, sampling_params, use_tqdm):
        self.seen = sampling_params
        return [SimpleNamespace(outputs=[self._answer(p["prompt_token_ids"], s)]) for p, s in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt, settings):
        generator = torch.Generator().manual_seed(settings.seed)
        ids, tokens, logprobs = list(prompt), [], []
        for _ in range(settings.max_tokens):
            log_q = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            if settings.allowed_token_ids is not None:
                log_q = log_q[settings.allowed_token_ids].log_softmax(-1)
            token = int(torch.multinomial(log_q.exp(), 1, generator=generator))
            ids.append(token)
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(log_q[token]))})
            if token in settings.stop_token_ids:
                break
        return SimpleNamespace(token_ids=tokens, logprobs=logprobs)


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def uniforms(length=12):
    return rng.uniforms(range(len(PROMPTS)), length, 1, "test")


def test_responses_are_the_present_students(vllm):
    student = tiny_model("llama")
    engine = Vllm(student, Decoding(), eos=EOS, vocab=31)
    for _ in range(2):
        for prompt, rollout in zip(PROMPTS, engine.respond(PROMPTS, uniforms()), strict=True):
            with torch.no_grad():
                log_q = student(torch.tensor([prompt + rollout.tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_q.gather(1, torch.tensor(rollout.tokens).unsqueeze(1)).squeeze(1).numpy()
            np.testing.assert_allclose(rollout.values["student"], expected, atol=1e-5)
            np.testing.assert_array_equal(rollout.values["student"], rollout.values["behaviour"])
            assert not set(rollout.tokens[:-1]) & set(EOS)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1)  # as an update would; the second round must see it


def test_the_same_numbers_give_the_same_text(vllm):
    engine = Vllm(tiny_model("llama"), Decoding(), eos=EOS, vocab=31)
    first, second = engine.respond(PROMPTS, uniforms()), engine.respond(PROMPTS[::-1], uniforms()[::-1])
    assert [r.tokens for r in first] == [r.tokens for r in second[::-1]]


def test_settings_are_translated(vllm):
    decoding = Decoding(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    engine = Vllm(tiny_model("llama"), decoding, eos=EOS, vocab=29)
    (first, *_) = engine.respond(PROMPTS, uniforms(4))
    assert first.values == {}  # of a changed distribution its log-probabilities are not the model's
    seen = engine._llm.seen[0]
    assert (seen.temperature, seen.top_k, seen.top_p, seen.min_p, seen.max_tokens) == (0.7, 5, 0.9, 0.1, 4)
    assert seen.stop_token_ids == [0, 3]
    assert seen.allowed_token_ids == list(range(29))
    assert len({s.seed for s in engine._llm.seen}) == len(PROMPTS)
    Vllm(tiny_model("llama"), Decoding(), eos=EOS, vocab=31)


def test_without_vllm_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install 'tadistill"):
        Vllm(tiny_model("llama"), Decoding(), eos=EOS, vocab=31)
