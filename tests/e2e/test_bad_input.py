"""Users' mistakes through the command line: one sentence, exit code 2, nothing started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.inprocess import Done, tadistill

RECIPE = Path(__file__).with_name("recipe.yaml")


def refused(tmp_path: Path, done: Done) -> str:
    """Return the error message of a command that refused its input."""
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.err
    assert done.err.count("error:") == 1
    assert not (tmp_path / "runs").exists()
    return done.err


def fail(tmp_path: Path, *overrides: str, recipe: Path = RECIPE) -> str:
    return refused(tmp_path, tadistill("run", str(recipe), *overrides, "--runs", str(tmp_path / "runs")))


def jsonl(tmp_path: Path, *rows: dict) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modles=1", "did you mean `models`"),
        ("arms.sft=xl > l > l", "l teaches itself, so there is nothing to learn"),
        ("data.train=missing.jsonl", "data set `missing.jsonl` does not exist"),
        ("models.s.init.from=s", "has a cycle"),
        ("arms.twin.path=xl > l > s", "needs a path of two models"),
        ("models.l.config.n_emb=3", "n_emb"),
        ("models.s.init.layers=[7]", "7"),
        ("models.s.sft.select.metric=reverse_kl", "sft has no teacher"),
        ("data.corpus=nope.jsonl", "data set `nope.jsonl` does not exist"),
        ("data.template=chat", "chat template"),
        ("data.max_prompt=1", "raise data.max_prompt"),
        ("evaluate.max_new_tokens=200", "has 128 positions"),
        ("arms.sft={path: s, optim: {lr: 1}}", "trains no model"),
        ("arms={takd: xl > s, seqkd: {path: l > s}}", "set `teacher:`"),
    ],
)
def test_mistakes(tmp_path, override, words):
    assert words in fail(tmp_path, override)


def test_a_mistake_ends_the_program_itself(tmp_path):
    """The exit code and the message are those of a real process; the other tests run the command line in theirs."""
    command = [sys.executable, "-m", "tadistill", "run", str(RECIPE), "modles=1", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "did you mean `models`" in refused(tmp_path, Done(done.returncode, done.stdout, done.stderr))


def test_a_model_that_is_not_there(tmp_path):
    other = tmp_path / "r.yaml"
    other.write_text(
        RECIPE.read_text()
        .replace("scratch:gpt2", "./nowhere")
        .replace("config: {n_embd: 28, n_layer: 2, n_head: 2, n_positions: 128}, ", "")
    )
    assert "line 6: models.l: model directory `" in fail(tmp_path, recipe=other)


def test_empty_data_set(tmp_path):
    assert "is empty" in fail(tmp_path, f"data.train={jsonl(tmp_path)}")


def test_missing_response_column(tmp_path):
    text = fail(tmp_path, f"data.train={jsonl(tmp_path, {'instruction': 'a', 'answer': 'b'})}")
    assert "no column `output`" in text


def test_tokenizers_that_differ(tmp_path):
    from tadistill.data import tinyworld

    tinyworld.tokenizer(people=30).save_pretrained(tmp_path / "other")
    text = fail(tmp_path, f"models.l.tokenizer={tmp_path / 'other'}")
    assert "tokenizer" in text
    assert "xl" in text


def test_a_model_larger_than_memory(tmp_path):
    huge = "models.xl.config={hidden_size: 200000, num_hidden_layers: 200, num_attention_heads: 2, intermediate_size: 400000}"
    other = tmp_path / "r.yaml"  # without the chain, whose assistant would be smaller than the student
    other.write_text("".join(line for line in RECIPE.read_text().splitlines(keepends=True) if "takd" not in line))
    text = fail(tmp_path, huge, recipe=other)
    assert "GB" in text
