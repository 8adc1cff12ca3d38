"""Exports as a user meets them: the program of the model card runs as it is, on a tiny model; `--push` sends the folder to the Hub."""

import json
import re
from pathlib import Path

import pytest
import torch
from tests.byte_models import CHATML, byte_model, byte_tokenizer, save

from tadistill.data import tinyworld
from tadistill.data.prompts import render
from tadistill.data.rows import Example
from tadistill.disk import stream_jsonl
from tadistill.report.export import export
from tadistill.report.model_card import prompt_format
from tadistill.results.collect import Results

from .builder import ArmSpec, StudySpec, build_study

QUESTION = "What is the capital of France?"
PROMPTS = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nsay {index}\n\n### Response:\n",
    "plain": "say {index}\n",
    "chat": "user\nsay {index}\nassistant\n",
    "verbatim": "say {index} ->",
}


def exported(tmp_path, written: str, *, template: str, adds_bos: bool = False, **evaluate) -> tuple[Results, str]:
    """Export a tiny model of a study whose prompts have a format; return its card too."""
    prompts = {"prompt": PROMPTS[written], "template": template}
    study = build_study(tmp_path, StudySpec([ArmSpec("one", ("xl", "s"))], (10,), {"dolly": 2}, (), 1, also={}, **prompts))
    path = study.study_dir / "plan.json"
    plan = json.loads(path.read_text())
    plan["recipe"]["data"] |= {"bos": "auto"}
    plan["recipe"]["evaluate"] |= {"max_new_tokens": 5} | evaluate
    path.write_text(json.dumps(plan))
    key = plan["arms"][0]["final"]["10"]
    folder = study.store_dir / key[:2] / key
    tokenizer = byte_tokenizer(CHATML if written == "chat" else None, adds_bos=adds_bos)
    save(folder / "model", byte_model(), tokenizer)
    results = study.read()
    export(results, "one", None, tmp_path / "out")
    return results, (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def program(card: str) -> str:
    return re.findall(r"^````python\n(.*?)^````", card, flags=re.DOTALL | re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("written", "template", "adds_bos", "said"),
    [
        ("alpaca", "alpaca", False, "prompts in the Alpaca template, with a line break at the end:"),
        ("plain", "plain", True, "Every prompt begins with the BOS token"),
        ("chat", "chat", False, "conversations in the chat template of its tokenizer"),
        ("chat", "alpaca", False, "conversations in the chat template of its tokenizer"),
        ("verbatim", "plain", False, "prompts without a template"),
    ],
)
def test_the_program_of_a_card_runs_on_the_prompts_of_the_training(tmp_path, capsys, written, template, adds_bos, said):
    _, card = exported(tmp_path, written, template=template, adds_bos=adds_bos)
    assert said in card.replace("\n", " ")
    names: dict = {}
    exec(program(card), names)
    assert names["output"].shape[1] <= names["inputs"]["input_ids"].shape[1] + 5
    assert capsys.readouterr().out.endswith("\n")
    ids = names["inputs"]["input_ids"][0]
    tokenizer = names["tokenizer"]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    if written == "chat":
        assert text == tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
    else:
        prompt = render(Example(QUESTION, "", ("",), verbatim=written == "verbatim"), template, tokenizer)
        assert text == ("<bos>" if adds_bos else "") + prompt


@pytest.mark.parametrize(
    ("prompt", "row", "template", "chats", "format_"),
    [
        ("is that a a the\n\nsay it\n\n", {"instruction": "say it", "input": ""}, "alpaca", False, "alpaca"),
        ("below is an instruction\nsay it\nnow\nresponse :", {"instruction": "Say it", "input": "now"}, "alpaca", True, "alpaca"),
        ("say it... now", {"instruction": "say it… now", "input": ""}, "alpaca", False, "verbatim"),
        ("an 'elan' of fi 12, vouched", {"instruction": "an ‘élan’ of ﬁ ①②, vouched", "input": ""}, "alpaca", False, "verbatim"),
        ("say it - >", {"instruction": "Say  it ->", "input": ""}, "alpaca", True, "verbatim"),
        ("say it ->", {"instruction": "say it ->", "input": ""}, "plain", True, "verbatim"),
        ("user\nsay it\nassistant\n", {"instruction": "user: say it", "input": "", "turns": [{}]}, "plain", True, "chat"),
    ],
)
def test_the_format_is_told_from_the_row_though_the_tokenizer_changes_texts(tmp_path, prompt, row, template, chats, format_):
    save(tmp_path / "model", byte_model(), byte_tokenizer(CHATML if chats else None))
    assert told(tmp_path, prompt, row, template) == format_


@pytest.mark.parametrize("asked", ["Where does Ada live?", "Describe the structure of a healthy habitat, and that of a theatre.", "zzz"])
def test_the_format_is_told_though_the_tokenizer_does_not_know_words_of_the_row(tmp_path, asked):
    tokenizer = tinyworld.tokenizer(people=12)
    tokenizer.save_pretrained(tmp_path / "model")
    for written, verbatim in (("alpaca", False), ("verbatim", True)):
        ids = tokenizer.encode(render(Example(asked, "", ("",), verbatim=verbatim), "alpaca", tokenizer))
        prompt = tokenizer.decode(ids, skip_special_tokens=True) or "that"
        assert told(tmp_path / written, prompt, {"instruction": asked, "input": ""}, "alpaca", model=tmp_path / "model") == written


def told(tmp_path, prompt: str, row: dict, template: str, model: Path | None = None) -> str:
    """The format of prompts that a study tells from its predictions."""
    study = build_study(tmp_path, StudySpec([ArmSpec("one", ("xl", "s"))], (10,), {"dolly": 2}, (), 1, also={}, template=template))
    key = study.results.arm("one").evaluate[10]
    path = study.store_dir / key[:2] / key / "predictions.jsonl"
    rows = [json.loads(line) | {"prompt": prompt} | row for line in path.read_text().split("\n") if line]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    results = study.read()
    return prompt_format(results, results.arm("one"), model or tmp_path / "model")


def test_the_program_decodes_as_the_study_did(tmp_path):
    _, card = exported(tmp_path, "plain", template="plain", temperature=0.0, no_repeat_ngram=6)
    assert "model.generate(**inputs, do_sample=False, no_repeat_ngram_size=6, max_new_tokens=5)" in program(card)
    names: dict = {}
    exec(program(card), names)
    again: dict = {}
    exec(program(card), again)
    assert torch.equal(names["output"], again["output"])


def test_one_prediction_is_enough_to_know_the_format(tmp_path, monkeypatch):
    spec = StudySpec([ArmSpec("one", ("xl", "s"))], (10,), {"dolly": 4}, (), 1, prompt=PROMPTS["plain"], template="plain")
    results, read = build_study(tmp_path, spec).read(), []

    def counted(*given, **named):
        for row in stream_jsonl(*given, **named):
            read.append(row)
            yield row

    monkeypatch.setattr("tadistill.results.measured.stream_jsonl", counted)
    assert prompt_format(results, results.arm("one"), tmp_path) == "plain"
    assert len(read) == 1
