"""The tokens that a model's files name are those that transformers reads from them."""

import json

import pytest
from tests.byte_models import BOS, CHATML, EOS, IM_END, byte_model, byte_tokenizer, save
from transformers import AutoTokenizer

from tadistill.data.encoding import adds_bos
from tadistill.models import tokens
from tadistill.models.loading import load_model, load_tokenizer, save_model
from tadistill.models.tokens import end_tokens


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("eos", ["<eos>", "<|im_end|>"])
@pytest.mark.parametrize("adds", [False, True])
def test_files_say_what_the_tokenizer_says(tmp_path, template, eos, adds):
    save(tmp_path, byte_model([EOS, IM_END]), byte_tokenizer(template, eos=eos, adds_bos=adds))
    found = tokens.read(tmp_path, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (found.eos, found.template) == (tokenizer.eos_token_id, tokenizer.chat_template)
    assert found.bos == (BOS if adds_bos(tokenizer) else None)
    assert found.turn == (IM_END if template else None)
    assert (found.generation, found.config) == ((EOS, IM_END), (EOS,) if eos == "<eos>" else ())
    assert tokens.ends(found) == end_tokens(load_model(str(tmp_path)), tokenizer)
    assert found.texts[IM_END] == "<|im_end|>"


def test_older_files(tmp_path):
    """A tokenizer without tokenizer.json, an EOS that only the class knows, a template beside the settings, a config alone."""
    (tmp_path / "vocab.json").write_text(json.dumps({"</s>": 2, "a": 7}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": {"content": "</s>"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    found = tokens.read(tmp_path, tmp_path)
    assert (found.eos, found.bos, found.generation, found.template) == (2, 2, (9,), CHATML)
    (tmp_path / "special_tokens_map.json").unlink()
    assert tokens.read(tmp_path, tmp_path).eos == 9
    for name in ("tokenizer_config", "config", "vocab"):
        (tmp_path / f"{name}.json").write_text("[not JSON")
    assert tokens.read(tmp_path, tmp_path).all == ()


@pytest.mark.parametrize(
    ("damage", "ends"),
    [
        ({"added_tokens": [{"id": "x", "content": 3}, 5], "post_processor": {"type": "TemplateProcessing", "single": []}}, (EOS, IM_END)),
        ({"model": 3, "post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}]}}, (EOS, IM_END)),
    ],
)
def test_odd_tokenizer_files_give_what_they_have(tmp_path, damage, ends):
    save(tmp_path, byte_model([EOS, IM_END]), byte_tokenizer(None))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    assert tokens.read(tmp_path, tmp_path).all == ends


def test_the_study_closes_references_as_its_template_does():
    teacher = tokens.Tokens(EOS, (EOS, 9), turn=IM_END)
    student = tokens.Tokens(7, (7,), (8,))
    assert tokens.ends(teacher, [teacher, student], in_chat=True) == (IM_END, EOS, 9, 7, 8)
    assert tokens.ends(teacher, [teacher, student]) == (EOS, 9, IM_END, 7, 8)


def test_a_saved_model_names_every_end(tmp_path):
    """Llama 3's case: the tokenizer ends with <|im_end|>, the model's own files with EOS."""
    model, tokenizer = byte_model(EOS), byte_tokenizer(eos="<|im_end|>")
    save_model(model, tokenizer, tmp_path / "own")
    save_model(model, tokenizer, tmp_path / "study", ends=(9, 8))
    for name, ends in (("own", [IM_END, EOS]), ("study", [9, 8])):
        for file in ("generation_config.json", "config.json"):
            assert json.loads((tmp_path / name / file).read_text())["eos_token_id"] == ends
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (EOS, EOS)
    again = load_model(str(tmp_path / "own"))
    assert end_tokens(again, AutoTokenizer.from_pretrained(tmp_path / "own")) == (IM_END, EOS)


def test_one_end_stays_a_number(tmp_path):
    save_model(byte_model(EOS), byte_tokenizer(None), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == EOS


def test_an_export_of_an_older_store_names_every_end(tmp_path):
    save(tmp_path, byte_model(EOS), byte_tokenizer(eos="<|im_end|>"))
    file = tmp_path / "generation_config.json"
    tokens.name_ends(tmp_path)
    assert json.loads(file.read_text())["eos_token_id"] == [IM_END, EOS]
    before = file.read_bytes()
    tokens.name_ends(tmp_path)
    assert file.read_bytes() == before
