"""Body and head taken apart: the same logits for families that bias, scale or cap theirs, and an error for those not known."""

from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tests.conftest import tiny_model
from tests.families import tiny
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from tadistill.config.model import Lora
from tadistill.data.batch import Sequence, collate
from tadistill.errors import ModelError
from tadistill.models import forward
from tadistill.models.forward import Reader, check_reading, rounded
from tadistill.models.modify import adapt
from tadistill.models.teachers import teacher_of
from tadistill.rollout.decoder import way_of

SHAPE = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
WIDE = {"intermediate_size": 32, "num_key_value_heads": 1}
BATCH = collate([Sequence((5, 6, 7), (8, 9, 0)), Sequence((4,), (3, 2, 1, 11, 0)), Sequence((12, 13), (18, 0))], pad=0)

FAMILIES = {
    "gpt2": lambda: tiny_model("gpt2"),
    "llama": lambda: tiny_model("llama"),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=32, word_embed_proj_dim=8)),
    "phi (bias)": lambda: PhiForCausalLM(PhiConfig(**SHAPE, intermediate_size=32)),
    "gemma2 (soft cap)": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, **WIDE, head_dim=8, final_logit_softcapping=0.5)),
    "cohere (multiplies)": lambda: CohereForCausalLM(CohereConfig(**SHAPE, **WIDE, logit_scale=0.0625)),
    "granite (divides)": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, **WIDE, logits_scaling=8.0)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_hidden_states_is_the_models_logits(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    if family.startswith("phi"):
        torch.nn.init.normal_(model.lm_head.bias)
    reader = Reader(model)
    logits = reader.head.logits(reader.hidden(model, BATCH))
    whole = model(input_ids=BATCH.ids_BT, attention_mask=BATCH.attention_BT, position_ids=BATCH.positions_BT).logits
    torch.testing.assert_close(logits, whole[BATCH.mask_BT], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_gpu_needs_no_mask_and_may_choose_flash_attention(family, monkeypatch):
    """Without a mask, attention is causal by a flag, as flash kernels need it; loss and gradients stay the same."""
    torch.manual_seed(0)
    model, found, calls = FAMILIES[family]().eval(), [], []
    attention = torch.nn.functional.scaled_dot_product_attention

    def seen(*args, **settings):
        calls.append((settings["attn_mask"] is None, settings["is_causal"]))
        return attention(*args, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    for unmasked in (set(), {"cpu"}):
        monkeypatch.setattr(forward, "_UNMASKED", unmasked)
        check_reading(model)
        hidden = Reader(model).hidden(model, BATCH)
        model.zero_grad()
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).mean().backward()
        found.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert calls[-1] == ((True, True) if unmasked else (False, False))
    for with_mask, without in zip(*found, strict=True):
        torch.testing.assert_close(without, with_mask, atol=1e-5, rtol=1e-5)


def test_a_gpu_gives_every_row_its_positions_where_a_family_needs_them(monkeypatch):
    monkeypatch.setattr(forward, "_UNMASKED", {"cpu"})
    model = tiny("xlm")
    check_reading(model)
    assert Reader(model).hidden(model, BATCH).shape == (10, 32)


def test_an_error_of_the_first_pass_names_type_and_number_format():
    """Some families mix number formats in half precision."""
    model = tiny_model("llama").to(torch.bfloat16)
    model.model.layers[0].mlp.float()
    for look in (check_reading, way_of):
        with pytest.raises(ModelError, match=r"^models of type llama cannot process text in bfloat16 \(.*; choose another `precision` or"):
            look(model)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")])
def test_full_memory_is_no_error_of_the_model(error, monkeypatch):
    """Another precision does not help, and the stage says which keys do."""
    model = tiny_model("llama")
    monkeypatch.setattr(type(model.model.layers[0]), "forward", Mock(side_effect=error))
    for look in (check_reading, way_of, lambda model: adapt(model, Lora(r=2), seed=1)):
        with pytest.raises(type(error)) as found:
            look(model)
        assert found.value is error


def test_no_logits_are_made():
    model = tiny_model("llama")
    made = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.numel()))
    reader = Reader(model)
    made.clear()
    reader.hidden(model, BATCH)
    assert made == [0]


def test_an_unknown_change_after_the_head_is_refused():
    class Tripled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    with pytest.raises(ModelError, match="type llama change their logits after the head"):
        Reader(Tripled(tiny_model("llama").config))


@pytest.mark.parametrize("obeys", [True, False])
def test_a_wrapper_that_accepts_every_argument(obeys):
    """The hidden states tell if the wrapped model has kept only the columns of the loss."""
    model = tiny_model("llama")

    class Wrapped(LlamaForCausalLM):
        def forward(self, **kwargs):
            return super().forward(**{name: value for name, value in kwargs.items() if obeys or name != "logits_to_keep"})

    wrapped = Wrapped(model.config)
    wrapped.load_state_dict(model.state_dict())
    for batch in (BATCH, collate([Sequence((5,), (3, 2, 1, 11, 0))], pad=0)):
        assert torch.equal(Reader(wrapped).hidden(wrapped, batch), Reader(model).hidden(model, batch))


def test_adapters_of_peft():
    plain = tiny_model("llama")
    lora = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], r=2))
    assert torch.equal(Reader(lora).hidden(lora, BATCH), Reader(plain).hidden(plain, BATCH))
    prompt = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ModelError, match="returns logits of 5 positions for 2 tokens, as with the virtual tokens of prompt tuning"):
        Reader(prompt)


def test_the_gradient_reaches_body_and_head():
    model = tiny_model("llama")
    reader = Reader(model)
    reader.head.logits(reader.hidden(model, BATCH)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_target_has_no_graph():
    model = tiny_model("llama")
    assert not teacher_of(model).target(BATCH).states.requires_grad


@pytest.mark.parametrize(("where", "eps"), [("plain", 2**-23), ("weights", 2**-7), ("autocast", 2**-7), ("accelerate", 2**-7)])
def test_the_rounding_is_that_of_the_products(where, eps):
    """Training in bf16 keeps float32 weights, and only its products are in bf16."""
    model = tiny_model("llama")
    if where == "weights":
        model = model.to(torch.bfloat16)
    elif where == "accelerate":
        Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"), rounded(model) as rounding:
        model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert rounding.eps == eps
    assert rounding.precise == (where == "plain")
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
        Reader(model)  # the tighter check of float32 would refuse bf16's rounding
    assert not model.get_output_embeddings()._forward_hooks
