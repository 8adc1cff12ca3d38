"""Rows as people's files have them: columns of their own, parts of messages, half characters, other encodings."""

import json

import pytest
from tests.byte_models import BOS, EOS, byte_tokenizer

from tadistill.config import Data, DataRef
from tadistill.data import datasets, survey
from tadistill.data.batch import chunks
from tadistill.data.prompts import for_people, split_thought, task_of
from tadistill.data.rows import Example
from tadistill.errors import DataError

OK = {"instruction": "Say hi", "output": "hi there"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


@pytest.fixture
def read(tmp_path):
    def read(*rows, raw: bytes | None = None, **settings):
        path = tmp_path / "x.jsonl"
        path.write_bytes(raw if raw is not None else "".join(json.dumps(row) + "\n" for row in rows).encode())
        return datasets.SplitRows(DataRef(load=str(path), **settings), "test").read()

    return read


@pytest.mark.parametrize(
    ("name", "content", "reader"),
    [
        ("x.parquet", b"PAR1\x00\xff", "read_parquet"),
        ("x.csv", b"instruction,output\n", "read_csv"),
        ("x.tsv", b"instruction\toutput\n", "read_table"),
        ("x.xlsx", b"PK\xff", "read_excel"),
    ],
)
def test_a_table_of_another_kind_says_how_to_convert_it(tmp_path, name, content, reader):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is not a JSON Lines file; convert it, .*pandas.{reader}\('{name}'\).to_json\('x.jsonl'"):
        datasets.SplitRows(DataRef(load=str(tmp_path / name)), "test").read()
    (tmp_path / name).write_text(json.dumps(OK), encoding="utf-8")  # the name does not matter where the rows can be read
    assert datasets.SplitRows(DataRef(load=str(tmp_path / name)), "test").read()


def test_conversations_of_sharegpt_say_what_to_write(read):
    with pytest.raises(DataError, match=r"its columns are conversations. Write the turns as messages: \[{"):
        read({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})


def test_a_missing_column_that_the_recipe_names(read):
    with pytest.raises(DataError, match=r"line 1 has no column `question` \(the instruction\); its columns are instruction, output"):
        read(OK, columns={"instruction": "question"})


@pytest.mark.parametrize("name", ["facts", "choices"])
@pytest.mark.parametrize("value", [None, 5, "true", [], [1], ["Paris is in France"], [["a", 5]], [["a", ["b"], "c"]], {"a": 1}, ["a", "b"]])
def test_columns_of_the_users_own_are_ignored(read, name, value):
    (row,) = read(OK | {name: value})
    assert (row.facts, row.choices, row.references) == ((), (), ("hi there",))


def test_columns_are_read_when_they_are_asked_for(read):
    (row,) = read(OK | {"known": [["hi", ["no"]]], "options": ["hi there", "no"]}, columns={"facts": "known", "choices": "options"})
    assert (row.facts, row.choices) == ((("hi", ("no",)),), ("hi there", "no"))
    (row,) = read({"messages": [USER, ASSISTANT], "facts": [["yo", []]]}, columns={"facts": "facts"})
    assert row.facts == (("yo", ()),)
    with pytest.raises(DataError, match="line 1 has no column `known`"):
        read(OK, columns={"facts": "known"})


@pytest.mark.parametrize("value", [5, "ab", [1], [None], [["a"]], [["a", "b"]], [["a", [1]]], [["a", ["b"], "c"]], {"a": 1}])
def test_facts_that_are_asked_for_must_be_facts(read, value):
    with pytest.raises(DataError, match=r"line 2: the column of facts contains .*; write each fact as \[value, \[wrong values\]\]"):
        read(OK | {"facts": [["hi", []]]}, OK | {"facts": value}, columns={"facts": "facts"})


@pytest.mark.parametrize("messages", [3, "hello", {"a": 1}, [], ["a thread"]])
def test_a_column_messages_beside_an_instruction(read, messages):
    (row,) = read(OK | {"messages": messages, "prompt": 5})
    assert row.instruction == "Say hi"


def test_parts_of_a_message_are_joined(read):
    parts = [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]
    (row,) = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]})
    assert (row.messages, row.references) == (({"role": "user", "content": "hi there"},), ("hi there",))
    (row,) = read({"messages": [USER, {"role": "assistant", "content": None}, {"role": "tool"}, ASSISTANT]})
    assert task_of(row)[0].endswith("assistant: \n\ntool: ")


def test_messages_for_people():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Malmö"}}}
    messages = [
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "I look it up.",
            "tool_calls": [call, {"name": "f", "arguments": "{}"}],
        },
        {"role": "assistant", "content": "<think>\nCold.\n</think>\n\nIt is cold."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert [*map(for_people, messages)] == [
        {"role": "assistant", "text": 'Wait.\ncalls weather({"city": "Malmö"})\ncalls f({})', "thinking": "I look it up."},
        {"role": "assistant", "text": "It is cold.", "thinking": "Cold."},
        {"role": "assistant", "text": 'calls weather({"city": "Malmö"})'},
    ]
    row = Example("", "", ("x",), messages=tuple(messages))
    assert task_of(row)[0].splitlines()[:2] == ["assistant: Wait.", 'calls weather({"city": "Malmö"})']


@pytest.mark.parametrize(
    ("text", "prompt", "thinking", "rest"),
    [
        ("<think>a</think>\n\nb <think>", "", "a", "b <think>"),
        ("a </think> b", "<|assistant|><think>\n", "a", "b"),
        ("a </think> b", "<|assistant|>", "", "a </think> b"),
        (" <think>\na", "", "a", ""),
        ("b", "", "", "b"),
    ],
)
def test_thinking_is_split_off(text, prompt, thinking, rest):
    assert split_thought(text, prompt) == (thinking, rest)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "the content of turn 1 of messages has the part"),
        ({"role": "user", "content": ["hi"]}, "has the part 'hi', but every part must be text"),
        ({"role": "user", "content": 5}, "the content of turn 1 of messages is 5"),
        ({"role": "user", "content": "hi \ud83d"}, "turn 1 of messages has half of a surrogate pair"),
        ({"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}, "half of a surrogate pair"),
        ({"role": "user", "content": None}, "turn 1 of `messages` has no content"),
        ({"role": "user"}, "turn 1 of `messages` has no content"),
        ({"content": "hi"}, "turn 1 of messages has the role None"),
        ({"role": ["user"], "content": "hi"}, "turn 1 of messages has the role"),
        *(
            (
                ASSISTANT | {"tool_calls": calls},
                "`tool_calls` of turn 1 of messages is .*; write a list of calls, as in .*, or delete the row",
            )
            for calls in ("add", ["add"], {"name": "add"}, [{"function": "add"}], [{"name": 3}])
        ),
        *(
            (ASSISTANT | {"reasoning_content": text}, "`reasoning_content` of turn 1 of messages is .*; write a string")
            for text in (3, ["a"])
        ),
    ],
)
def test_bad_turns(read, turn, words):
    with pytest.raises(DataError, match=f"line 2: .*{words}"):
        read({"messages": [USER, ASSISTANT]}, {"messages": [turn, ASSISTANT]})


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"instruction": "hi \ud83d", "output": "x"}, {}),
        ({"instruction": "hi", "input": "\udfff", "output": "x"}, {}),
        ({"instruction": "hi", "output": "\ud83d"}, {}),
        ({"instruction": "hi", "outputs": ["x", "\ud83d"]}, {}),
        ({"prompt": "\ud83d", "completion": "x"}, {}),
        ({"prompt": "hi", "completion": "\ud83d"}, {}),
        ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, {}),
        (OK | {"choices": ["hi there", "\ud83d"]}, {"columns": {"choices": "choices"}}),
        (OK | {"facts": [["\ud83d", []]]}, {"columns": {"facts": "facts"}}),
    ],
)
def test_half_characters_are_refused_in_every_column(read, row, settings):
    with pytest.raises(DataError, match=r"line 1: .* has half of a surrogate pair \(\\u(d83d|dfff) at character \d+\)"):
        read(row, **settings)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"instruction":"a","output":"b"}\n{"instruction":"caf\xe9","output":"b"}\n', "line 2: byte 0xe9 at character 20 is not UTF-8"),
        (json.dumps(OK).encode("utf-16"), "line 1: byte 0xff at character 1 is not UTF-8"),
        (b'{"instruction":"x","output":' + b"9" * 5000 + b"}\n", "line 1 cannot be read .a number in it has too many digits"),
        (b'{"instruction":"x","output":' + b"[" * 100000 + b"]" * 100000 + b"}\n", "line 1 cannot be read .it is nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "line 1 is part of a pointer of Git LFS"),
        (json.dumps([OK]).encode(), "line 1 is a JSON array .`jq -c"),
        (b"instruction,output\na,b\n", 'line 1 is not JSON .write a row as {"instruction"'),
        (b'{"instruction": "a" "output"}', "line 1 is not JSON .Expecting ',' delimiter at character 21"),
        (b'"text"', "line 1 is a str; every line must be one JSON object"),
        (json.dumps([OK], indent=1).encode(), "line 1 is the start of a JSON array"),
        (json.dumps(OK, indent=1).encode(), "line 1 is a JSON object that does not end on this line"),
    ],
)
def test_files_that_are_no_json_lines(read, raw, words):
    with pytest.raises(DataError, match=f"x.jsonl, {words}"):
        read(raw=raw)


@pytest.mark.parametrize(
    "raw", [b"\xef\xbb\xbf" + json.dumps(OK).encode(), json.dumps(OK).encode() + b"\r\n", json.dumps(OK).encode() + b"\n\xef\xbb\xbf\n"]
)
def test_files_of_other_programs(read, raw):
    assert [row.instruction for row in read(raw=raw)] == ["Say hi"]


def test_home_and_close_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "chat.jsonl").write_text(json.dumps(OK) + "\n")
    assert len(datasets.SplitRows(DataRef(load="~/chat.jsonl"), "test").read()) == 1
    with pytest.raises(DataError, match=r"there is no `chta.jsonl` in .*; did you mean `chat.jsonl`\?"):
        datasets.SplitRows(DataRef(load="~/chta.jsonl"), "test").read()
    with pytest.raises(DataError, match=r"did you mean `dolly`\?"):
        datasets.SplitRows(DataRef(load="doly"), "test").read()


# --- the corpus --------------------------------------------------------------------------------------------------------


def corpus(tmp_path, *texts) -> DataRef:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataRef(load=str(path))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("hello", None), "line 2: column `text` of the corpus is None; it must be a string"),
        (("hello", 3), "line 2: column `text` of the corpus is 3"),
        (("hello", "\ud83d"), "line 2: column `text` of the corpus has half of a surrogate pair"),
        (("", " "), "contains no text"),
    ],
)
def test_a_corpus_is_read_before_any_work(tmp_path, texts, words):
    data = Data.model_validate({"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"]})
    with pytest.raises(DataError, match=words):
        survey.check_corpus(corpus(tmp_path, *texts), data)


def test_the_fix_of_a_wrong_corpus_leads_to_a_right_one(tmp_path):
    data = Data.model_validate({"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"]})
    path = tmp_path / "corpus.jsonl"
    path.write_text("A document.\n")
    with pytest.raises(DataError, match=r'a document of a corpus as \{"text": "…"\}'):
        survey.check_corpus(DataRef(load=str(path)), data)
    path.write_text('{"conversations": [], "body": "A document."}\n')  # the advice was to write turns as messages
    with pytest.raises(DataError, match=r"no column `text` \(the text of a document\).* for instance columns: \{text: body\}"):
        survey.check_corpus(DataRef(load=str(path)), data)
    survey.check_corpus(DataRef(load=str(path), columns={"text": "body"}), data)


def test_every_sequence_of_a_corpus_begins_with_bos_once():
    tokenizer = byte_tokenizer(adds_bos=True)
    plain, with_bos = (chunks(["abcdef", "<bos>gh", "ijklm"], tokenizer, 5, 9, bos=bos) for bos in (False, True))
    assert [s.response[0] for s in plain] != [BOS] * len(plain)
    assert all(s.response[0] == BOS and len(s.response) <= 5 for s in with_bos)
    text = [token for s in with_bos for token in s.response if token not in (BOS, EOS)]
    assert tokenizer.decode(text) == "abcdefghijklm"[: len(text)]
