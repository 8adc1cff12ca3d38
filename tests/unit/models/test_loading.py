"""Loading, saving and comparing models and tokenizers."""

import json
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.models.conftest import SHAPES, random_model, word_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from tadistill.errors import ConfigError, ModelError
from tadistill.models import shapes
from tadistill.models.architectures import scratch_config
from tadistill.models.loading import load_model, load_tokenizer, save_model
from tadistill.models.tokens import check_same_tokenizer, shared_vocabulary, vocabulary

IDS = torch.tensor([[5, 9, 2, 30, 7]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- scratch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(SHAPES))
def test_scratch_is_a_function_of_its_seed(kind, tokenizer):
    state = torch.random.get_rng_state()
    first, again, other = (load_model(f"scratch:{kind}", config=SHAPES[kind], seed=seed, tokenizer=tokenizer) for seed in (3, 3, 4))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    assert first.config.vocab_size == len(tokenizer) == 32
    assert (first.config.eos_token_id, first.config.pad_token_id) == (1, 0)


def test_scratch_in_half_precision_draws_the_same_weights(tokenizer):
    full, half = (
        load_model("scratch:llama", config=SHAPES["llama"], seed=1, dtype=d, tokenizer=tokenizer) for d in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(weights(half), weights(full).bfloat16())


@pytest.mark.parametrize(
    ("load", "config", "message"),
    [
        ("scratch:lama", {}, "scratch:lama: transformers has no causal language model of this type; did you mean `llama`"),
        ("scratch:vit", {}, "scratch:vit: transformers has no causal language model of this type"),
        ("scratch:llama", {"hiden_size": 8}, "config.hiden_size is not a field of scratch:llama; did you mean `hidden_size`"),
        ("scratch:llama", {"vocab_size": 8}, "config.vocab_size of scratch:llama is set by the tokenizer; remove this field"),
        ("scratch:llama", {"hidden_size": "big"}, "`config` of scratch:llama is not valid: .*hidden_size.* expected int"),
        ("scratch:llama", {"hidden_size": 10, "num_attention_heads": 3}, r"hidden_size of .* is 10, .* of num_attention_heads \(3\)"),
        ("scratch:gpt2", {"attn_pdrop": 1.0}, "config.attn_pdrop of scratch:gpt2 is 1.0; write a dropout of at least 0 and less than 1"),
        ("scratch:gpt2", {"n_embd": 10, "n_head": 3}, r"config.n_embd of scratch:gpt2 is 10, but it must be a multiple of n_head \(3\)"),
        ("scratch:mistral", {"num_attention_heads": 4}, r"num_attention_heads of .* is 4, .* a multiple of num_key_value_heads \(8\)"),
        ("scratch:gpt2", {"activation_function": "gelo"}, "transformers cannot build scratch:gpt2 from `config`: .*did you mean `gelu`"),
    ],
)
def test_bad_scratch_configurations(load, config, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        load_model(load, config=config, tokenizer=tokenizer)


def test_the_types_of_models_are_known_without_transformers():
    assert shapes._causal_types() == [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def test_scratch_without_a_tokenizer():
    with pytest.raises(ConfigError, match="`scratch:llama` needs a tokenizer; set `tokenizer:`"):
        load_model("scratch:llama")
    with pytest.raises(ModelError, match="`scratch:llama` has random weights, so no files and no tokenizer; set `tokenizer:`"):
        load_tokenizer("scratch:llama")


# --- directories --------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_an_ordinary_directory(tokenizer, tmp_path):
    model = random_model("qwen2")
    model.generation_config = GenerationConfig(temperature=0.3, eos_token_id=[1, 2])  # not valid without do_sample
    save_model(model, tokenizer, tmp_path / "m")
    assert model.generation_config.temperature == 0.3
    loaded, words = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert torch.equal(logits(loaded), logits(model))
    assert words.get_vocab() == tokenizer.get_vocab()
    written = json.loads((tmp_path / "m" / "generation_config.json").read_text(encoding="utf-8"))
    assert written["eos_token_id"] == [1, 2]
    assert written["pad_token_id"] == 0
    assert not {"temperature", "top_p", "top_k", "do_sample", "repetition_penalty"} & written.keys()
    assert str(tmp_path) not in "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "m").glob("*.json"))


def test_a_saved_tokenizer_splits_text_as_before(tmp_path):
    """AutoTokenizer takes the class of qwen2 models for it, which splits words in another way."""
    world = load_tokenizer("tinyworld", world={"seed": 0, "people": 20})
    save_model(load_model("scratch:qwen2", config=SHAPES["qwen2"], tokenizer=world), world, tmp_path)
    text = "Who is the brother of Bopa? The answer is 12."
    assert load_tokenizer(tmp_path)(text)["input_ids"] == world(text)["input_ids"]


def test_load_model(model_directory):
    model = load_model(model_directory)
    assert not model.training
    assert model.dtype == torch.float32
    assert load_model(str(model_directory), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_lacking_weights_are_an_error(model_directory):
    file = model_directory / "model.safetensors"
    state = load_file(file)
    del state["model.layers.2.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weight of this architecture is missing .* \(model.layers.2.mlp.up_proj.weight\)"):
        load_model(model_directory)


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all"])
def test_damaged_weights_are_one_sentence(model_directory, content):
    (model_directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=f"model `{model_directory}` (cannot be loaded|is empty)"):
        load_model(model_directory)


def test_full_memory_is_no_damage(model_directory, monkeypatch):
    full = RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", Mock(side_effect=full))
    with pytest.raises(RuntimeError) as found:
        load_model(str(model_directory))
    assert found.value is full


def test_not_a_causal_language_model(model_directory):
    (model_directory / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(ModelError, match="is of type vit, which is not a causal language model"):
        load_model(model_directory)


def test_loading_is_silent_and_restores_the_users_settings(model_directory, capfd):
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        load_model(model_directory)
        load_tokenizer(model_directory)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_pad_gets_eos(tmp_path):
    word_tokenizer(pad_token=None).save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_a_tokenizer_directory_needs_no_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    word_tokenizer(eos_token=None).save_pretrained(tmp_path / "t")
    with pytest.raises(ModelError, match="has no EOS token"):
        load_tokenizer(tmp_path / "t")


def test_a_directory_without_a_tokenizer(tmp_path):
    random_model("llama").save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="set `tokenizer:`"):
        load_tokenizer(tmp_path / "m")


def test_tinyworld():
    small, same = (load_tokenizer("tinyworld", world={"seed": 0, "people": 20}) for _ in range(2))
    check_same_tokenizer({"a": small, "b": same})
    assert len(load_tokenizer("tinyworld", world={"seed": 0, "people": 40})) > len(small)
    model = load_model("scratch:gpt2", config=SHAPES["gpt2"], tokenizer=small)
    assert shared_vocabulary(small, model) == len(small) == model.config.vocab_size


def test_same_tokenizers_pass(tokenizer):
    check_same_tokenizer({"teacher": tokenizer, "student": word_tokenizer(), "other": tokenizer})
    check_same_tokenizer({"one": tokenizer})
    check_same_tokenizer({})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            word_tokenizer(28),
            r"models `t` and `s` have different tokenizers \(32 and 31 tokens\): token 31 is 'w28' in the first and absent in the second;",
        ),
        (
            word_tokenizer(eos_token="w3", pad_token="w3"),
            r"EOS is '<eos>' \(1\) in the first and 'w3' \(6\) in the second; set `tokenizer:` of `s` to that of `t`",
        ),
    ],
)
def test_different_tokenizers_are_refused(tokenizer, other, message):
    with pytest.raises(ModelError, match=message):
        check_same_tokenizer({"t": tokenizer, "s": other})


def test_shared_vocabulary_is_the_least_width(tokenizer):
    wide, wider = random_model("qwen2", vocab_size=40), random_model("llama", vocab_size=48)
    assert shared_vocabulary(tokenizer, wide, wider) == 32
    assert shared_vocabulary(word_tokenizer(60), wide, wider) == 40
    assert shared_vocabulary(tokenizer) == 32


def test_ids_with_gaps_are_all_in_the_vocabulary():
    """EOS has the largest id, 40, and there are 4 tokens: no token may be cut off."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<eos>": 40}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")
    assert (len(tokenizer), vocabulary(tokenizer).size, shared_vocabulary(tokenizer)) == (4, 41, 41)
    assert scratch_config("gpt2", SHAPES["gpt2"], tokenizer).vocab_size == 41
    tokenizer.add_tokens(["<added>"])
    assert shared_vocabulary(tokenizer) == vocabulary(tokenizer).size == max(tokenizer.get_vocab().values()) + 1


def test_ids_without_gaps_are_as_many_as_tokens(tokenizer):
    assert vocabulary(tokenizer).size == len(tokenizer)
    tokenizer.add_tokens(["<more>", "w3"])  # w3 is a word already
    assert vocabulary(tokenizer).size == len(tokenizer) == 33


def test_a_forward_pass_does_not_change_the_weights_of_rwkv(tokenizer, tmp_path):
    """RWKV of transformers halves the weights of later layers in eval mode; they were saved and pruned so, and read as whole ones."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 16, "rescale_every": 2}
    model = load_model("scratch:rwkv", config=sizes, tokenizer=tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    before = logits(model)
    save_model(model, tokenizer, tmp_path / "saved")
    torch.testing.assert_close(logits(load_model(tmp_path / "saved")), before)
