"""A study whose models have two tokenizers: words, and byte-level BPE. Text passes between them, and everything else stays in a family."""

import json
import re

import pytest
import yaml
from tests.e2e.inprocess import tadistill

from tadistill.config import load
from tadistill.data.tinyworld import TOKENIZERS, tokenizer
from tadistill.disk import read_jsonl
from tadistill.plan.arms import make_plan
from tadistill.store import Store

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
SFT = {"sft": {"optim": {"lr": 3e-3, "steps": 4, "batch": 8}, "select": {"metric": "last"}}}
OPTIM = {"lr": 1e-3, "steps": 2, "batch": 4}


def recipe(**changes) -> dict:
    def model(words: bool, layers: int) -> dict:
        config = SMALL | {"num_hidden_layers": layers} | ({} if words else {"hidden_size": 8, "intermediate_size": 16})
        return {"load": "scratch:llama", "tokenizer": "tinyworld" if words else "tinyworld-bpe", "config": config}

    return {
        "study": "two-tokenizers",
        "seeds": [1],
        "models": {"t": model(True, 3) | SFT, "a": model(True, 2), "s": model(False, 1)},
        "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "template": "plain", "world": {"people": 20}}
        | {"limit": {"train": 16, "dev": 4, "test": 4}, "max_prompt": 120, "max_length": 160},
        "method": {"name": "seqkd", "optim": OPTIM, "sampler": {"max_new_tokens": 8}},
        "evaluate": {"max_new_tokens": 4, "seeds": [1], "batch": 4},
        "arms": {"direct": "t > s", "chain": "t > a > s", "kd": {"path": "t > a", "method": "kd"}},
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The finished study: its output, its store and its recipe."""
    folder = tmp_path_factory.mktemp("two")
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(recipe()))
    return tadistill("run", str(file), "--runs", str(folder / "runs")), folder


def test_it_runs_to_the_report(study):
    done, folder = study
    assert done.code == 0, done.err
    assert (folder / "runs" / "two-tokenizers" / "report.html").is_file()


def test_students_learn_what_their_teacher_wrote(study):
    """Each answer is behind the prompt of its own row, in the student's own tokens, and ends if the teacher has ended it."""
    _, folder = study
    recipe, store = load(folder / "two.yaml"), Store(folder / "runs" / "store")
    plan = make_plan(recipe)
    words, student = (tokenizer(source, seed=0, people=20) for source in TOKENIZERS)
    retokenised = [stage for stage in plan.stages.values() if stage.kind == "retokenise"]
    assert len(retokenised) == 2  # of t and of a
    for stage in retokenised:
        sampled = read_jsonl(store.folder(stage.parents["answers"]) / "responses.jsonl")
        texts, read = (read_jsonl(store.folder(stage.key) / name) for name in ("texts.jsonl", "responses.jsonl"))
        assert [text["row"] for text in texts] == list(range(16))
        for theirs, text, mine in zip(sampled, texts, read, strict=True):
            assert words.decode(theirs["prompt"]).split() == student.decode(mine["prompt"]).split()
            ids = theirs["response"][: len(theirs["response"]) - text["ended"]]
            stop = next((k for k, i in enumerate(ids) if i in words.all_special_ids), len(ids))
            assert text["text"] == words.decode(ids[:stop])
            assert text["ended"] == (stop == len(ids) and theirs["response"][-1] == words.eos_token_id)
            assert student.decode(mine["response"]) == text["text"] + "<eos>" * text["ended"]


def test_what_is_not_defined_is_left_out_and_said(study):
    """The divergence exists for the student of the teacher's family only. Tokens are not compared between families."""
    _, folder = study
    runs = folder / "runs" / "two-tokenizers"
    text = (runs / "report.md").read_text()
    undefined = "The divergence from t, the error budget and the exposure bias are not defined across vocabularies, so they are left out"
    assert f"{undefined} for chain and direct. The bits per byte of their answers are reported instead." in text
    assert "They can be compared only among models that share a tokenizer: (a), (s)." in text
    assert re.search(r"answers of t, retokenised for s, seed 1: of 16 answers, \d+ stops? before a special token that does not end", text)
    (divergence,) = re.findall(r"\|  \| KL.*?</details>", text, re.DOTALL)
    cells = {
        line.split(" | ")[0].strip("| "): line.count("–") for line in divergence.splitlines() if re.match(r"\| (kd|chain|direct) ", line)
    }
    assert cells["kd"] > 0
    assert cells["chain"] == cells["direct"] > 0


def test_models_read_each_others_answers(study):
    _, folder = study
    rows = [row for row in json.loads((folder / "runs" / "two-tokenizers" / "results.json").read_text())["rows"] if row["arm"] == "direct"]
    found = {row["metric"]: row["value"] for row in rows}
    assert {"bits_per_byte", "teacher_text", "own_text", "forward_bits", "reverse_bits"} <= set(found)
    assert 0 < found["forward_bits"] < found["teacher_text"]
    assert all(0 < found[name] < 40 for name in ("bits_per_byte", "teacher_text", "own_text"))
