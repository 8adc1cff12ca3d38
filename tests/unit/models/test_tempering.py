"""Tempered models: logits divided by tau, in every family, tied or not, and the tau that matches an entropy."""

import pytest
import torch
from tests.conftest import tiny_model
from tests.families import tiny
from transformers import AutoModelForCausalLM

from tadistill.errors import ConfigError, ModelError
from tadistill.models.modify import matching_temperature, temper_head

IDS = torch.tensor([[3, 7, 1, 9, 12]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "mistral", "qwen2"])
def test_logits_are_divided_by_tau(kind, tied, tmp_path):
    model, before = (tiny_model(kind, tie_word_embeddings=tied) for _ in range(2))
    temper_head(model, 0.7)
    torch.testing.assert_close(model(IDS).logits * 0.7, before(IDS).logits, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_soft_cap_is_refused_however_wide_it_is(tied):
    model = tiny("gemma2", tie_word_embeddings=tied, final_logit_softcapping=1000.0)
    with pytest.raises(ModelError, match="models of type gemma2 cannot have a temperature"):
        temper_head(model, 0.7)


def test_the_temperature_that_matches_an_entropy():
    logits = torch.randn(40, 31, generator=torch.Generator().manual_seed(0)).double() * 3

    def entropy(tau: float) -> float:
        log_p = (logits / tau).log_softmax(-1)
        return float(-(log_p.exp() * log_p).sum(-1).mean())

    assert matching_temperature(entropy, entropy(0.6)) == pytest.approx(0.6, abs=1e-3)
    with pytest.raises(ConfigError, match=r"temperatures from 0\.05 to 20\.0 give"):
        matching_temperature(entropy, 5.0)
