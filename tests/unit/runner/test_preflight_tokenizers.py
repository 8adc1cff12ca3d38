"""Studies with several tokenizers before they start: each tokenizer reads the data, and what one of them cannot read is one sentence."""

import json

import pytest
from tests.byte_models import CHATML, bpe_tokenizer, byte_tokenizer
from tests.unit.models.conftest import word_tokenizer

from tadistill.config import validate
from tadistill.errors import DataError, ModelError
from tadistill.plan.arms import make_plan
from tadistill.runner.preflight import check_inputs

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
ROW = {"instruction": "say w1", "output": "w2 w3"}


@pytest.fixture
def checked(tmp_path, capsys):
    """A function that checks a study in which `t` teaches `s`, and returns the notes that it prints."""
    from tadistill.terminal import Terminal

    def check(t, s, rows=(ROW,) * 4, method="seqkd", more=None, **data) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        models = {}
        for name, tokenizer, layers in (("t", t, 4), ("s", s, 1)):
            tokenizer.save_pretrained(tmp_path / name)
            config = SHAPE | ({"hidden_size": 32} if name == "t" else {}) | {"num_hidden_layers": layers, "max_position_embeddings": 512}
            models[name] = {"load": "scratch:llama", "tokenizer": str(tmp_path / name), "config": config}
        recipe = {
            "study": "x",
            "seeds": [1],
            "models": models,
            "data": {"train": str(file), "dev": str(file), "test": [str(file)], "template": "plain", "max_prompt": 40, "max_length": 60}
            | data,
            "method": {"name": method, "optim": {"steps": 2, "batch": 2}},
            "evaluate": {"max_new_tokens": 8},
            "arms": {"x": "t > s"},
        }
        check_inputs(make_plan(validate(recipe | (more or {}))), Terminal(width=300))
        return capsys.readouterr().out

    return check


def test_rows_that_one_tokenizer_leaves_out_are_said_and_the_others_stay(checked):
    """A row of 40 letters is short as words, and too long as bytes. Rows are the same examples for both models."""
    long = {"instruction": " ".join(["w1"] * 14), "output": "w2"}
    said = checked(word_tokenizer(), byte_tokenizer(None), rows=[ROW, long, ROW])
    assert "rows (train, s): 2 of 3 rows; 1 longer than data.max_prompt (40)" in said
    assert "rows (test): the models are compared on the 2 rows that are short enough for all of them" in said


def test_a_tokenizer_without_the_characters_of_the_text_is_refused(checked):
    rows = [{"instruction": "скажи это слово", "output": "да"}] * 4
    with pytest.raises(DataError, match=r"models.s: its tokenizer cannot read rows \(train\): 12 of 12 tokens of the prompts are unknown"):
        checked(byte_tokenizer(None), word_tokenizer(), rows=rows)


def test_a_model_without_a_chat_template_is_named(checked):
    with pytest.raises(ModelError, match=r"models.s: data.template is chat, but the tokenizer of s has no chat template"):
        checked(byte_tokenizer(), bpe_tokenizer(["a"], 260), template="chat")


def test_a_template_that_refuses_a_row_is_named_with_its_model(checked):
    strict = bpe_tokenizer(["a"], 260)
    strict.chat_template = CHATML.replace("{% for", "{{ raise_exception('no system role') if messages[0]['role'] == 'system' }}{% for", 1)
    rows = [{"messages": [{"role": who, "content": "w1"} for who in ("system", "user", "assistant")]}] * 4
    with pytest.raises(DataError, match=r"models.s: data set `rows` \(train\), line 1: .*no system role"):
        checked(byte_tokenizer(), strict, rows=rows, max_prompt=300, max_length=400)


def test_a_token_that_only_the_teacher_has_must_not_be_in_a_text(checked):
    more = byte_tokenizer(None)
    more.add_tokens(["<tool>"])
    checked(more, byte_tokenizer(None), method="kd")
    with pytest.raises(
        ModelError, match=r"data set `rows` \(train\) contains the token '<tool>' \(262\), but some models of the path have only"
    ):
        checked(more, byte_tokenizer(None), rows=[ROW | {"output": "a <tool> b"}] * 4, method="kd")


def test_a_teacher_that_no_arm_uses_and_nothing_is_compared_with(checked):
    more = {"teacher": "t", "analyse": False, "arms": {"x": {"path": "s", "method": "sft"}}}
    assert checked(byte_tokenizer(None), bpe_tokenizer(["a"], 260), more=more) == ""
