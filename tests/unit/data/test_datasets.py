"""Reading data sets: the local layout, columns, and clear errors."""

import gzip
import json
import logging

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from pydantic import ValidationError
from tests.byte_models import bpe_tokenizer

from tadistill.config import Data, DataRef
from tadistill.data import datasets
from tadistill.data.encoding import encode
from tadistill.data.encoding_rules import Counts, Rules
from tadistill.data.prompts import render
from tadistill.data.survey import survey
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


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ["train.json", "other.jsonl", "notes.txt"],
            "no file train.jsonl .it contains notes.txt, other.jsonl, train.json.; set `split`",
        ),
        (["a.jsonl", "b.jsonl"], "set `split` of this data set to a or b, or rename a file"),
        (["rows.csv"], r"it contains rows.csv.; write this file, for instance in Python: pandas.read_csv\('rows.csv'\).to_json\('train"),
        (["a.csv", "train-0.csv"], r"pandas.read_csv\('train-0.csv'\)"),
        (["state.json"], r"write this file, .*: datasets.load_from_disk\('mine'\).to_json\('train.jsonl'\)"),
        (["dataset_dict.json"], r"write this file, .*: datasets.load_from_disk\('mine'\)\['train'\].to_json\('train.jsonl'\)"),
        (["notes.txt"], "it contains notes.txt.; write the rows to this file"),
        ([f"{i}.jsonl" for i in range(20)], "14.jsonl, 15.jsonl and 12 more.; set"),
        ([], "it is empty.; write the rows to this file"),
        (["maths/train.jsonl"], "it contains maths/.; write the rows to this file"),
        (
            ["minillm_dolly/train.jsonl"],
            "it contains minillm_dolly/.; to use .*, set data.root: .*mine, and write their names, such as dolly",
        ),
    ],
)
def test_a_folder_without_the_split_says_what_it_holds(tmp_path, monkeypatch, files, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in files:
        (tmp_path / "mine" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("{}\n", encoding="utf-8")
    for load in ("mine", "./mine"):
        with pytest.raises(DataError, match=f"data set `{load}` is the folder .*mine, .*{words}"):
            read(load)
    with pytest.raises(DataError, match=r"is the folder .*, which has no file"):
        read("mine", root=str(tmp_path))


def test_a_folder_without_rows_does_not_hide_a_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "README.md").write_text("x", encoding="utf-8")
    assert datasets.on_hub(DataRef(load="org/name"), "train", data("org/name")) == ("org/name", None)
    (tmp_path / "dolly").mkdir()
    assert datasets.on_hub(DataRef(load="dolly"), "train", data("dolly")) == ("MiniLLM/dolly", "raw.jsonl")


@pytest.mark.parametrize("file", ["train.parquet", "data/train-00000.parquet", "train/data.arrow", "rows.json"])
def test_a_folder_with_data_is_no_set_of_the_hub(tmp_path, monkeypatch, file):
    """`datasets` would read it under the name of a set on the Hub, whose key does not depend on the content."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name" / file).parent.mkdir(parents=True)
    (tmp_path / "org" / "name" / file).write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"`org/name` is the folder .*, which has no file train.jsonl"):
        datasets.on_hub(DataRef(load="org/name"), "train", data("org/name"))


def test_a_folder_of_the_working_directory_is_not_read_in_place_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "set").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets.hub, "download", lambda repository, revision: tmp_path / "snapshot")
    read_at = []
    monkeypatch.setattr("datasets.load_dataset", lambda path, **rest: read_at.append(path) or [{"instruction": "a", "output": "b"}])
    assert len(read("org/set")) == 1
    assert read_at == [str(tmp_path / "snapshot")]


def test_columns_are_mapped(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    (row,) = read({"load": path, "columns": {"prompt": "question", "completion": "answer"}})
    assert row.references == ("a",)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "is empty"),
        (
            [{"instruction": "a", "response": "b"}],
            r"line 1 has no column `output` \(the response\); its columns are instruction, response. Name .* for instance columns: {",
        ),
        ([{"text": "a"}], "no column `instruction`, `prompt` or `messages`"),
        ([{"instruction": "a", "output": 3}], "must be a string"),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "must be a list of at least two messages"),
        ([{"messages": "hi"}], "must be a list of at least two messages"),
        ([{"messages": [{"role": "user", "content": "hi"}] * 2}], "has no turn of the role assistant, so there is nothing to learn"),
        ([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant"}]}], "line 1: the response is null"),
        ([{"instruction": "a", "output": None}], "line 1: the response is null; give a string .it may be empty., or delete the row"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a", "outputs": []}], "line 2: the response is an empty list"),
        ([{"instruction": "a", "outputs": ["b", None]}], "the response is None; it must be a string"),
        ([{"instruction": "a", "output": True}], r"the response is True; .* list all labels in `choices` of this data set"),
        ([[1]], r"is a JSON array \(`jq -c .*; every line must be one JSON object"),
    ],
)
def test_bad_rows(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        read(write(tmp_path / "x.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "output": "b", "choices": ["b"]}, "line 1: choices are b; give at least two"),
        ({"instruction": "a", "output": "b", "choices": []}, "choices are an empty list"),
        ({"instruction": "a", "output": "b", "choices": ["b", "b"]}, "at least two different choices"),
        ({"instruction": "a", "output": "b", "choices": {"text": ["b"]}}, "write a list of strings"),
        ({"instruction": "a", "output": "b", "choices": ["b", ""]}, "none of them empty"),
        ({"instruction": "a", "output": "c", "choices": ["a", "b"]}, "reference `c` is not one of the choices; the choices are a, b"),
        ({"instruction": "a", "output": 2, "choices": ["a", "b"]}, "label 2 is outside 0 to 1; the choices are a, b"),
        (
            {"instruction": "a", "output": -1, "choices": ["a", "b"]},
            "label -1 is outside 0 to 1.*Correct the label. Some test sets write -1",
        ),
        ({"instruction": "a", "output": 1.0, "choices": ["a", "b"]}, "the response is 1.0; it must be a string"),
    ],
)
def test_bad_choices(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        read({"load": write(tmp_path / "x.jsonl", [row]), "columns": {"choices": "choices"}})


def test_an_empty_string_is_a_reference(tmp_path):
    (row,) = read(write(tmp_path / "x.jsonl", [{"instruction": "a", "output": ""}]))
    assert row.references == ("",)
    tokenizer = world_tokenizer()
    (encoded,) = encode([row], tokenizer, Rules(5, 8, template="plain"))[0]
    assert encoded.response == (tokenizer.eos_token_id,)


def test_rows_carry_their_choices(tmp_path):
    rows = [
        {"instruction": "a", "output": "y", "choices": ["x", "y"]},
        {"instruction": "a", "output": 1, "choices": ["x", "y", "z"]},
        {"instruction": "a", "outputs": ["x", "y"], "choices": None},
        {"prompt": "a", "completion": "x", "choices": ["x", "y"]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}], "choices": ["x", "y"]},
    ]
    found = read({"load": write(tmp_path / "x.jsonl", rows), "columns": {"choices": "choices"}})
    assert [e.choices for e in found] == [("x", "y"), ("x", "y", "z"), (), ("x", "y"), ("x", "y")]
    assert [e.references for e in found] == [("y",), ("y",), ("x", "y"), ("x",), ("x",)]


def test_labels_are_indices_into_the_choices_of_the_set(tmp_path):
    """SST-2 as the hub has it, and BoolQ's booleans."""
    reviews = write(tmp_path / "sst2.jsonl", [{"sentence": "a joy", "label": 1, "idx": 0}, {"sentence": "dull", "label": 0, "idx": 1}])
    ref = {
        "instruction": "Is the review positive?",
        "columns": {"input": "sentence", "output": "label"},
        "choices": ["negative", "positive"],
    }
    joy, dull = read({"load": reviews, **ref})
    assert (joy.instruction, joy.input, joy.references) == ("Is the review positive?", "a joy", ("positive",))
    assert dull.references == ("negative",)
    assert dull.choices == ("negative", "positive")
    questions = write(tmp_path / "boolq.jsonl", [{"question": "is ice cold", "passage": "…", "answer": True}])
    columns = {"instruction": "question", "input": "passage", "output": "answer"}
    (row,) = read({"load": questions, "columns": columns, "choices": ["no", "yes"]})
    assert (row.instruction, row.references) == ("is ice cold", ("yes",))


def test_choices_under_another_name(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "a", "output": "y", "options": ["x", "y"]}])
    (row,) = read({"load": path, "columns": {"choices": "options"}})
    assert row.choices == ("x", "y")
    with pytest.raises(DataError, match=r"no column `option` \(the choices\); its columns are instruction, output, options"):
        read({"load": path, "columns": {"choices": "option"}})


def test_an_instruction_for_every_row_does_not_fit_conversations(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]}]
    with pytest.raises(DataError, match="contain their own instructions"):
        read({"load": write(tmp_path / "x.jsonl", rows), "instruction": "do"})


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ({"choices": ["yes"]}, "at least two"),
        ({"choices": ["yes", "yes"]}, "all different"),
        ({"choices": ["yes", ""]}, "none of them empty"),
        ({"choices": ["no", "yes"], "columns": {"choices": "options"}}, "remove `choices`, or remove it from `columns`"),
        ({"instruction": "do", "columns": {"instruction": "question"}}, "remove `instruction`, or remove it from `columns`"),
        ({"instruction": ""}, "`instruction` is empty"),
    ],
)
def test_settings_of_a_set_that_make_no_sense(ref, words):
    with pytest.raises(ValidationError, match=words):
        DataRef.model_validate({"load": "x.jsonl", **ref})


def test_a_set_is_the_same_after_it_was_stored():
    ref = DataRef(load="x", choices=("no", "yes"), instruction="do")
    assert DataRef.model_validate(ref.model_dump()) == ref
    assert DataRef.model_validate_json(ref.model_dump_json()) == ref


def test_length_buckets_lie_beside_the_longest(tmp_path):
    for folder in ("sinst_11", "sinst_0_2", "uinst_6_10"):
        write(tmp_path / f"minillm_{folder}" / "test.jsonl", [{"instruction": folder, "outputs": ["o"]}])
    for name, folder in {"sinst": "sinst_11", "sinst/0_2": "sinst_0_2", "uinst/6_10": "uinst_6_10"}.items():
        (row,) = read(name, "test", root=str(tmp_path))
        assert row.instruction == folder
    assert [DataRef(load=name).name for name in ("sinst", "sinst/0_2", "uinst/0_2", "org/set")] == [
        "sinst",
        "sinst_0_2",
        "uinst_0_2",
        "set",
    ]


def test_buckets_on_the_hub(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", [{"instruction": "a", "outputs": ["o"]}] * 10_001)
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, **_: asked.append(names) or path)
    sizes = [len(read(name, "test", root=str(tmp_path / "none"))) for name in ("sinst", "sinst/3_5", "uinst", "uinst/0_2")]
    assert sizes == [10_001, 10_001, 10_000, 10_001]  # MiniLLM uses the first 10,000 of uinst's longest bucket
    assert asked == [
        ("MiniLLM/sinst", "11_/valid.jsonl"),
        ("MiniLLM/sinst", "3_5/valid.jsonl"),
        ("MiniLLM/uinst", "11_/valid.jsonl"),
        ("MiniLLM/uinst", "0_2/valid.jsonl"),
    ]


@pytest.mark.parametrize("reachable", [False, True])
@pytest.mark.parametrize(("name", "caller"), [("dolly", "huggingface_hub.hf_hub_download"), ("org/set", "datasets.load_dataset")])
def test_retries_are_shown_only_if_the_hub_answers(monkeypatch, caplog, reachable, name, caller):
    """Without network, the sentence of the error says it all; a pause that a server asks for is shown."""

    def fails(*names, **options):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise LocalEntryNotFoundError("no")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.hub, "reachable", lambda: reachable)
    monkeypatch.setattr(caller, fails)
    with pytest.raises(DataError, match=r"cannot be (down)?loaded"):
        read(name, "test")
    assert [record.message for record in caplog.records] == ["Retrying in 1s [Retry 1/5]."] * reachable


@pytest.mark.parametrize(("verbosity", "shown"), [(logging.WARNING, ["other"]), (logging.DEBUG, ["retry", "other"])])
def test_only_retries_of_an_unreachable_hub_are_hidden(monkeypatch, caplog, verbosity, shown):
    """With HF_HUB_VERBOSITY=debug, a user looks for the reason, so nothing is hidden."""
    monkeypatch.setattr(datasets.hub, "reachable", lambda: False)
    caplog.set_level(verbosity, "huggingface_hub")
    with datasets.hub.without_retries_shown():
        logging.getLogger("huggingface_hub.utils._http").warning("retry")
        logging.getLogger("huggingface_hub.file_download").warning("other")
    assert [record.message for record in caplog.records] == shown


def test_broken_json_names_the_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"instruction": "a", "output": "b"}\n{broken\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read(str(tmp_path / "x.jsonl"))


def test_all_wrong_rows_are_named_with_their_lines(tmp_path):
    right = '{"instruction": "a", "output": "b"}'
    lines = [right, "", '{"instruction": "a"}', '{"instruction": "a", "output": 5}', "{broken", right, '{"instruction": "a"}', "5"]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = data(str(tmp_path / "x.jsonl"))
    with pytest.raises(DataError) as error:
        survey(settings.train, "train", settings)
    head, column, number, broken, no_object = error.value.problems
    assert head.endswith("x.jsonl` has 5 wrong rows among 7; they are:")
    assert "line 3 has no column `output`" in column
    assert column.endswith("(also line 7)")
    assert "line 4: the response is 5" in number
    assert "line 5 is not JSON" in broken
    assert "line 8 is a int" in no_object
    with pytest.raises(DataError, match="line 3 has no column") as first:  # as a stage reads it
        read(str(tmp_path / "x.jsonl"))
    assert len(first.value.problems) == 1


def test_the_first_20_wrong_rows_are_named(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "a", "output": i % 2} for i in range(30)])
    settings = data(path)
    with pytest.raises(DataError) as error:
        survey(settings.train, "train", settings)
    head, even, odd = error.value.problems
    assert head.endswith("has 30 wrong rows among 30; the first 20 are:")
    assert even.endswith("(also lines 3, 5, 7, 9, 11, 13, 15, 17 and 19)")
    assert odd.endswith("(also lines 4, 6, 8, 10, 12, 14, 16, 18 and 20)")


@pytest.mark.parametrize("text", ['[\n{"a": 1},\n{"a": 2}\n]', '{\n"a": 1\n}\n{\n"a": 2\n}', '[{"a": 1}]\n[{"a": 2}]'])
def test_a_file_that_is_not_json_lines_is_one_problem(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text, encoding="utf-8")
    settings = data(str(tmp_path / "x.jsonl"))
    with pytest.raises(DataError, match=r"line 1 is .*jq -c") as error:
        survey(settings.train, "train", settings)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("row", "marked"),
    [
        ({"instruction": "a", "output": "b<|end|>"}, 1),
        ({"instruction": "a<|end|>", "output": "b"}, 1),
        ({"prompt": "<|end|>a", "completion": "b"}, 0),  # a whole prompt may have its own special tokens
        ({"prompt": "a", "completion": "b<|end|>"}, 1),
        ({"instruction": "a", "output": "b"}, 0),
    ],
)
def test_rows_with_the_text_of_a_special_token_are_counted(tmp_path, row, marked):
    rows = read(write(tmp_path / "x.jsonl", [row, {"instruction": "a", "output": ""}]))
    encoded, counts = encode(rows, bpe_tokenizer(["a b"], 260), Rules(200, 300))
    assert (len(encoded), counts.marked, counts.silent) == (2, marked, 1)
    what = "1 with the text of a special token (such as an end token), which the model reads as this token"
    assert counts.text == "; ".join(["2 of 2 rows", "1 with an empty answer", *[what] * marked])


def test_compressed_files_say_how_to_unpack_them(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "a", "output": "b"}\n'))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz is compressed with gzip; unpack it: `gunzip x\.jsonl\.gz`"):
        read(str(tmp_path / "x.jsonl.gz"))


def test_fingerprint_follows_the_content(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b"}])
    settings = data(path)
    rows = datasets.SplitRows.of(settings.train, "train", settings)
    first = rows.fingerprint()
    write(tmp_path / "x.jsonl", [{"instruction": "a", "output": "c"}])
    assert rows.fingerprint() != first


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
    (row,) = encode(rows, tokenizer, Rules(5, 8, template="plain"))[0]
    assert row.row == 0
    assert row.response[-1] == tokenizer.eos_token_id
    assert len(row.response) == 3
    (cut,) = encode(rows[:1], tokenizer, Rules(5, 4, template="plain"))[0]
    assert tokenizer.eos_token_id not in cut.response
    with pytest.raises(DataError, match=r"raise data\.max_prompt"):
        encode(rows, tokenizer, Rules(1, 8, template="plain"))


def lengths_of(tokenizer, *prompts: int, response: int = 1) -> list[datasets.Example]:
    """Rows whose prompts have this many tokens in the template plain, with its line break."""
    word = next(w for w in tokenizer.get_vocab() if w.isalpha())
    return [datasets.Example(" ".join([word] * (n - 1)), "", (" ".join([word] * response),), verbatim=n == 0) for n in prompts]


def test_rows_that_are_left_out_are_counted():
    tokenizer = world_tokenizer()
    rows = lengths_of(tokenizer, 3, 9, 0, 9, 2)
    encoded, counts = encode(rows, tokenizer, Rules(5, 20, template="plain"))
    assert [e.row for e in encoded] == [0, 4]
    assert counts == Counts(rows=5, long=2, empty=1, limit=5, max_length=20)
    assert counts.text == "2 of 5 rows; 2 longer than data.max_prompt (5); 1 with an empty prompt"


def test_tokens_that_the_tokenizer_cannot_read_are_counted():
    tokenizer = world_tokenizer()
    rows = [datasets.Example(text, "", ("x",)) for text in ("красное слово", "where")]
    encoded, counts = encode(rows, tokenizer, Rules(9, 20, template="plain"))
    assert (counts.unknown, counts.tokens) == (2, sum(len(e.prompt) for e in encoded))
    assert counts.unknown_text == f"2 of {counts.tokens} tokens of the prompts are unknown to the tokenizer"
    tokenizer.unk_token = tokenizer.eos_token  # as in GPT-2, whose tokens are bytes
    assert encode(rows, tokenizer, Rules(9, 20, template="plain"))[1].unknown_text == ""


def test_rows_that_are_cut_are_counted():
    """As MiniLLM's PromptDataset does: the first max_prompt tokens are kept, and the whole reference."""
    tokenizer = world_tokenizer()
    rows = lengths_of(tokenizer, 3, 9)
    encoded, counts = encode(rows, tokenizer, Rules(5, 20, "cut", template="plain"))
    whole = encode(rows, tokenizer, Rules(9, 20, template="plain"))[0]
    assert [e.prompt for e in encoded] == [whole[0].prompt, whole[1].prompt[:5]]
    assert [e.response for e in encoded] == [e.response for e in whole]
    assert counts.text == "2 of 2 rows; 1 with a prompt cut at data.max_prompt (5)"
    _, counts = encode(lengths_of(tokenizer, 3, response=4), tokenizer, Rules(5, 6, template="plain"))
    assert counts.text == "1 of 1 row; 1 with a reference cut at data.max_length (6)"
    _, counts = encode(lengths_of(tokenizer, 3, 6), tokenizer, Rules(256, 6, template="plain"))
    assert counts.text == "1 of 2 rows; 1 longer than data.max_length (6)"
    _, counts = encode(lengths_of(tokenizer, 3), tokenizer, Rules(5, 20, template="plain"))
    assert counts.text == ""


@pytest.mark.parametrize(
    ("prompts", "max_length", "words"),
    [
        ((9, 7), 20, r"at most 5 tokens \(the shortest has 7\); raise data\.max_prompt, or"),
        ((9, 7), 4, r"the shortest has 7\); raise data\.max_length"),
        ((0, 0), 20, "every row of data has an empty prompt"),
    ],
)
def test_no_row_left_names_the_rule(prompts, max_length, words):
    tokenizer = world_tokenizer()
    with pytest.raises(DataError, match=words):
        encode(lengths_of(tokenizer, *prompts), tokenizer, Rules(5, max_length, template="plain"))


def test_choices_are_encoded_as_responses_are():
    tokenizer = world_tokenizer()
    a, b, c = [w for w in tokenizer.get_vocab() if w.isalpha()][:3]
    example = datasets.Example(a, "", (f"{b} {c}",), choices=(b, f"{b} {c}"))
    (row,) = encode([example], tokenizer, Rules(5, 8, template="plain"))[0]
    assert row.choices == (row.response[:1], row.response[:2])
    assert encode([datasets.Example(a, "", (b,))], tokenizer, Rules(5, 8, template="plain"))[0][0].choices == ()


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (("cat", "nosuchword cat"), "leaves room for 1 to 1"),
        (("nosuchword", "norsuchone"), "same tokens as another"),
        (("cat", " "), "has 0 tokens"),
    ],
)
def test_choices_that_no_model_can_answer(choices, words):
    example = datasets.Example("name", "", (choices[0],), choices=choices)
    with pytest.raises(DataError, match=rf"sst2, row 1: choice .*{words}"):
        encode([example], world_tokenizer(), Rules(5, 3, template="plain"), name="sst2")
