"""Architectures that cannot be distilled: named from their config.json, with the reason."""

import math

import pytest
from tests.families import tiny_config

from tadistill.errors import ModelError
from tadistill.models.architectures import check_config, count_parameters, scratch_config
from tadistill.models.loading import load_model
from tadistill.models.model_files import read_description
from tadistill.models.shapes import REFUSED


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_types_are_named_with_the_reason(kind):
    with pytest.raises(ModelError, match=f"^model `mine` is of type {kind}, which .*{REFUSED[kind][:20]}.*; choose a decoder-only"):
        check_config({"model_type": kind}, "mine")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "t5"}, "is of type t5, which is not a causal language model of this version of transformers"),
        ({"model_type": "bart"}, "is of type bart, which is an encoder-decoder model"),
        ({"model_type": "bert"}, 'reads text in both directions unless its config.json has "is_decoder": true'),
        ({"model_type": "xlm"}, 'unless its config.json has "causal": true'),
        ({"model_type": "llama", "hidden_size": "wide"}, "transformers cannot build model `mine` from its config.json .*hidden_size"),
        ({"model_type": "llama", "hidden_act": "none"}, "hidden_act is `none`, which transformers does not know; known values are gelu"),
        ({}, "is of type None"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "m.X"}},
            "needs Python code of its own .auto_map in config.json., which tadistill never runs",
        ),
    ],
)
def test_the_sentence_names_the_model_and_what_is_wrong(config, what):
    with pytest.raises(ModelError, match=f"`mine` .*{what}|{what}"):
        check_config(config, "mine")


@pytest.mark.parametrize("config", [{"model_type": "bert", "is_decoder": True}, {"model_type": "gpt_neox"}, {"model_type": "mamba"}])
def test_decoders_pass(config):
    check_config(config, "mine")


def test_infinity_is_read_as_transformers_writes_it(tmp_path):
    tiny_config("mamba2").save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text(encoding="utf-8")
    config = read_description(tmp_path / "config.json", "mine")
    assert config["time_step_limit"] == [0.0, math.inf]
    check_config(config, "mine")
    assert count_parameters(config) > 0


def test_loading_refuses_before_it_reads_weights(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match=r"^model `.*` is of type roberta, which counts positions from its padding token"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=r"^model `scratch:bert` is of type bert, which reads text in both directions"):
        scratch_config("bert", {}, tokenizer)
