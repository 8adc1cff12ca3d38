"""A student learns the token with which its teacher ends an answer, and its export stops there in any program."""

import json

import pytest
import torch
import yaml
from tests.byte_models import EOS, IM_END, ROWS, byte_model, byte_tokenizer, save, teach_chat, write_rows
from tests.e2e.inprocess import tadistill
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 11.25  # of a whole answer and its end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher that ends its turns with <|im_end|> beside a base student: equal vocabularies, other ends, no chat template."""
    folder = tmp_path_factory.mktemp("ends")
    teacher = byte_model([EOS, IM_END], seed=5)
    teach_chat(teacher)
    save(folder / "instruct", teacher, byte_tokenizer())
    save(folder / "base", byte_model(EOS, seed=6), byte_tokenizer(None))
    rows = write_rows(folder / "rows.jsonl", ROWS)
    optim = {"lr": 1e-2, "steps": 80, "batch": 8}
    recipe = {
        "study": "ends",
        "seeds": [1],
        "models": {"t": {"load": str(folder / "instruct")}, "s": {"load": str(folder / "base")}},
        "data": {"train": rows, "dev": rows, "test": [rows], "template": "chat", "max_prompt": 128, "max_length": 200},
        "method": {"objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}, "optim": optim},
        "evaluate": {"seeds": [1], "max_new_tokens": 40, "temperature": 0, "also": {}},
        "arms": {
            "kd": {"path": "t > s"},
            "seqkd": {"path": "t > s", "objective": {"type": "cross_entropy"}, "sampler": {"type": "teacher", "max_new_tokens": 24}},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = tadistill("run", str(folder / "recipe.yaml"), "--runs", str(folder / "runs"))
    assert done.code == 0, done.err
    assert "s uses the tokenizer of t, because the tokenizer of s has no chat template." in done.out
    return folder


@pytest.mark.parametrize("arm", ["kd", "seqkd"])
def test_the_student_stops_where_its_teacher_does(folder, arm):
    rows = json.loads((folder / "runs/ends/results.json").read_text())["rows"]
    found = {row["metric"]: row["value"] for row in rows if row["arm"] == arm}
    assert (found["rouge_l"], found["exact_match"], found["length"]) == (100, 100, TOKENS)
    target = folder / "out" / arm
    assert tadistill("export", "ends", arm, str(target), "--runs", str(folder / "runs")).code == 0
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [IM_END, EOS]
    assert json.loads((target / "config.json").read_text())["eos_token_id"] == [IM_END, EOS]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    answers = []
    for row in ROWS:
        chat = [{"role": "user", "content": row["instruction"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            answers.append(model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :])
    assert [tokenizer.decode(a, skip_special_tokens=True) for a in answers] == [row["output"] for row in ROWS]
    assert sum(map(len, answers)) / len(answers) == TOKENS
