"""Architectures that cannot be distilled: named from their config.json, with the reason."""

import json
import math

import pytest
from tests.families import tiny_config

from tadistill.errors import ModelError
from tadistill.models.architectures import check_config, count_parameters, read_config, scratch_config
from tadistill.models.loading import check_model, load_model, load_tokenizer
from tadistill.models.model_files import read_description
from tadistill.models.shapes import REFUSED


@pytest.fixture
def folder(tmp_path):
    """Writes a config.json, with a weight file that has no weights, and returns the folder."""
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")

    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_types_are_named_with_the_reason(kind, folder):
    with pytest.raises(ModelError, match=f"^model `mine` is of type {kind}, which .*{REFUSED[kind][:20]}.*; choose a decoder-only"):
        read_config(folder({"model_type": kind}), "mine")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "t5"}, "is of type t5, which is not a causal language model of this version of transformers"),
        ({"model_type": "bart"}, "is of type bart, which is an encoder-decoder model"),
        ({"model_type": "bert"}, 'reads text in both directions unless its config.json has "is_decoder": true'),
        ({"model_type": "xlm"}, 'unless its config.json has "causal": true'),
        ({"model_type": "llama", "hidden_size": "wide"}, "config.json of model `.*` cannot be read .*'hidden_size' expected int, got str"),
        ({"model_type": "llama", "hidden_act": "none"}, "hidden_act is `none`, which transformers does not know; known values are gelu"),
        ({"model_type": "gemma3n"}, "transformers cannot build model .*(?i:timm).*; install it"),
        ({}, "is of type None"),
        ({"model_type": "nope"}, "is of type nope, which is not a causal language model of this version of transformers"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "m.X"}},
            r"needs Python code of its own \(m.X\), which tadistill never runs",
        ),
    ],
)
def test_the_sentence_names_the_model_and_what_is_wrong(config, what, folder):
    load = str(folder(config))
    with pytest.raises(ModelError, match=what) as found:
        check_model(load)
    assert f"`{load}`" in str(found.value)


SMALL = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 8, "vocab_size": 64}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (SMALL | {"hidden_act": "silux"}, "config.json of model `.*`: hidden_act is `silux`, .*did you mean `silu`"),
        (SMALL | {"rope_scaling": {"rope_type": "yarnx"}}, "did you mean `yarn`"),
        (
            SMALL | {"hidden_size": -8},
            "cannot build model `.*` from its config.json .*negative dimension.*; correct the file$",
        ),
        (SMALL | {"pad_token_id": 100}, "transformers cannot build model .*; correct the file$"),
        ({"model_type": "gpt2", "n_embd": 33, "n_head": 4, "n_layer": 1}, "must be divisible by num_heads.*; correct the file$"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_without_its_weights(config, what, folder):
    """And in the same words when its weights are read."""
    load = str(folder(config))
    for check in (lambda: check_config(folder(config), load), lambda: check_model(load)):
        with pytest.raises(ModelError, match=what):
            check()


@pytest.mark.parametrize("config", [{"model_type": "bert", "is_decoder": True}, {"model_type": "gpt_neox"}, {"model_type": "mamba"}])
def test_decoders_pass(config, folder):
    assert read_config(folder(config), "mine").model_type == config["model_type"]


def test_infinity_is_read_as_transformers_writes_it(tmp_path):
    tiny_config("mamba2").save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text(encoding="utf-8")
    config = read_description(tmp_path / "config.json", "mine")
    assert config["time_step_limit"] == [0.0, math.inf]
    assert read_config(tmp_path, "mine").time_step_limit == [0.0, math.inf]
    assert count_parameters(config) > 0


def test_loading_refuses_before_it_reads_weights(folder, tokenizer):
    with pytest.raises(ModelError, match=r"^model `.*` is of type roberta, which counts positions from its padding token"):
        load_model(folder({"model_type": "roberta"}))
    with pytest.raises(ModelError, match=r"^model `scratch:bert` is of type bert, which reads text in both directions"):
        scratch_config("bert", {}, tokenizer)


def test_a_damaged_tokenizer_is_named_also_beside_a_model_that_cannot_be_distilled(folder):
    """The folder may serve only as `tokenizer:`."""
    load = str(folder({"model_type": "t5"}))
    (folder({"model_type": "t5"}) / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"^the tokenizer of model `.*` cannot be read \(.*\); download it again, or set `tokenizer:`"):
        load_tokenizer(load)
