"""Reading data sets: the local layout, columns, and clear errors."""

import json

import pytest

from tadistill.config import Data
from tadistill.data import datasets
from tadistill.data.templates import encode, render
from tadistill.data.tinyworld import tokenizer as world_tokenizer
from tadistill.errors import DataError, ModelError


def write(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def data(train, **more) -> Data:
    return Data.model_validate({"train": train, "dev": train, "test": [train], **more})


def read(train, role="train", **more):
    settings = data(train, **more)
    return datasets.load(getattr(settings, role) if role != "test" else settings.test[0], role, settings)


def test_three_kinds_of_rows(tmp_path):
    rows = [
        {"instruction": "a", "input": "b", "output": "c"},
        {"instruction": "a", "outputs": ["c", "d"]},
        {"prompt": "raw", "completion": "c"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    one, many, raw, chat = read(write(tmp_path / "x.jsonl", rows))
    assert (one.instruction, one.input, one.references) == ("a", "b", ("c",))
    assert many.references == ("c", "d")
    assert raw.verbatim
    assert raw.instruction == "raw"
    assert chat.messages == ({"role": "user", "content": "hi"},)
    assert chat.references == ("yo",)


def test_named_set_under_root_and_limit(tmp_path, monkeypatch):
    write(tmp_path / "minillm_dolly" / "train.jsonl", [{"instruction": str(i), "output": "o"} for i in range(5)])
    assert [e.instruction for e in read("dolly", root=str(tmp_path), limit={"train": 2})] == ["0", "1"]
    monkeypatch.setenv("TADISTILL_DATA", str(tmp_path))
    assert len(read("dolly")) == 5


def test_columns_are_mapped(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    (row,) = read({"load": path, "columns": {"prompt": "question", "completion": "answer"}})
    assert row.references == ("a",)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty"),
        ([{"instruction": "a", "response": "b"}], r"row 1: no column `output` \(the response\); it has instruction, response"),
        ([{"text": "a"}], "no column `instruction`, `prompt` or `messages`"),
        ([{"instruction": "a", "output": 3}], "must be a string"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "end with an assistant turn"),
        ([[1]], "a list, not an object"),
    ],
)
def test_bad_rows(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        read(write(tmp_path / "x.jsonl", rows))


def test_broken_json_names_the_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"instruction": "a", "output": "b"}\n{broken\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read(str(tmp_path / "x.jsonl"))


def test_fingerprint_follows_the_content(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b"}])
    settings = data(path)
    first = datasets.fingerprint(settings.train, "train", settings)
    write(tmp_path / "x.jsonl", [{"instruction": "a", "output": "c"}])
    assert datasets.fingerprint(settings.train, "train", settings) != first


ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n"
)


def test_templates():
    tokenizer = world_tokenizer()
    assert render(datasets.Example("I", "X", ("r",)), "alpaca", tokenizer) == ALPACA
    assert render(datasets.Example("I", "X", ("r",)), "plain", tokenizer) == "I\nX\n"
    with pytest.raises(ModelError, match="chat template"):
        render(datasets.Example("I", "", ("r",)), "chat", tokenizer)


def test_encoding_ends_with_eos_and_follows_the_length_rules():
    tokenizer = world_tokenizer()
    word = next(w for w in tokenizer.get_vocab() if w.isalpha())
    rows = [datasets.Example(word, "", (f"{word} {word}",)), datasets.Example(" ".join([word] * 9), "", (word,))]
    (row,) = encode(rows, tokenizer, template="plain", max_prompt=5, max_length=8)
    assert row.row == 0
    assert row.response[-1] == tokenizer.eos_token_id
    assert len(row.response) == 3
    (cut,) = encode(rows[:1], tokenizer, template="plain", max_prompt=5, max_length=4)
    assert tokenizer.eos_token_id not in cut.response
    with pytest.raises(DataError, match=r"raise data\.max_prompt"):
        encode(rows, tokenizer, template="plain", max_prompt=1, max_length=8)
