"""The examples run as they stand, offline, and train."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tadistill.data import tinyworld

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as a program, in this process; return its output."""

    def program(example: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [example, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capsys.readouterr().out

    return program


def test_objective_in_hf_trainer(run):
    assert (EXAMPLES / "objective_in_hf_trainer.py").read_text().count("\n") <= 41
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.e-]+)", run("objective_in_hf_trainer.py", "--steps", "60"))]
    assert len(losses) == 6  # one for every ten steps
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture
def made(monkeypatch, tmp_path) -> Callable[[], tuple["hf.Trainer", PreTrainedModel]]:
    """Return a function that runs the example up to the training, and returns the Trainer and the teacher."""

    def run() -> tuple["hf.Trainer", PreTrainedModel]:
        found = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(hf.Trainer, "train", lambda self: found.append(self))
        monkeypatch.setattr(sys, "argv", ["objective_in_hf_trainer.py"])
        names = runpy.run_path(str(EXAMPLES / "objective_in_hf_trainer.py"), run_name="__main__")
        return found[0], names["teacher"]

    return run


def test_two_processes_have_the_gradient_of_one(made, monkeypatch):
    """torch averages the gradients of the processes, and Trainer counts the tokens of all of them."""
    one, _ = made()
    rows = next(iter(one.get_train_dataloader()))
    count = (rows["labels"][:, 1:] != -100).sum()
    expected = one.compute_loss(one.model, dict(rows), num_items_in_batch=count)
    assert torch.equal(one.compute_loss(one.model, dict(rows)), expected)
    monkeypatch.setattr(type(one.accelerator), "num_processes", 2)
    torch.testing.assert_close(one.compute_loss(one.model, dict(rows), num_items_in_batch=2 * count), expected)
    one.args.average_tokens_across_devices = False  # Trainer then counts the tokens of this process
    assert torch.equal(one.compute_loss(one.model, dict(rows), num_items_in_batch=count), expected)


def test_the_teacher_is_on_the_device_of_the_student(made, monkeypatch):
    own = hf.TrainingArguments.device.fget
    monkeypatch.setattr(hf.TrainingArguments, "device", property(lambda self: own(self) and torch.device("meta")))
    trainer, teacher = made()
    assert teacher.device == trainer.model.device == torch.device("meta")


# --- minimal_distillation.py --------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path) -> list[str]:
    """Arguments that name a teacher, a student and prompts; the teacher's head has more rows than the tokenizer has tokens."""
    tokenizer = tinyworld.tokenizer()
    for name, rows, seed in (("teacher", 8, 1), ("student", 0, 2)):
        torch.manual_seed(seed)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + rows, **size, **ids))
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] *= 2  # so that some responses end, and others do not
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = [row["instruction"].split() for row in tinyworld.world_rows("tinyworld", "train")[:50]]
    (tmp_path / "prompts.txt").write_text("\n  \n".join(" ".join(words[: 2 + i % 3]) for i, words in enumerate(texts)))
    return [f"--{name}={tmp_path / path}" for name, path in (("teacher", "teacher"), ("student", "student"), ("prompts", "prompts.txt"))]


def test_minimal_distillation(run, models):
    assert (EXAMPLES / "minimal_distillation.py").read_text().count("\n") <= 120
    output = run("minimal_distillation.py", *models, "--steps=40", "--new-tokens=16", "--lr=1e-2")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+) nats", output)]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_a_file_without_prompts_ends_minimal_distillation_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.setattr(sys, "argv", ["minimal_distillation.py", "--teacher=t", "--student=s", f"--prompts={tmp_path / 'empty.txt'}"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "minimal_distillation.py"), run_name="__main__")
    assert "empty.txt has no prompt; write one per line" in capsys.readouterr().err


def test_the_first_loss_of_minimal_distillation(models, tmp_path, monkeypatch):
    """It equals the reverse KL that each text, without padding and by itself, has in float64."""
    monkeypatch.setattr(sys, "argv", ["minimal_distillation.py", *models, "--steps=1", "--new-tokens=16"])
    seen = runpy.run_path(str(EXAMPLES / "minimal_distillation.py"), run_name="__main__")
    student, teacher = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("student", "teacher"))
    eos, pad, vocab = seen["tokenizer"].eos_token_id, seen["tokenizer"].pad_token_id, len(seen["tokenizer"])
    total, lengths, prompts = 0.0, [], []
    for row in seen["ids_BT"].tolist():
        prompt = [token for token in row[: seen["start"]] if token != pad]
        response = row[seen["start"] :]
        response = response[: response.index(eos) + 1] if eos in response else response
        with torch.no_grad():
            q, p = (m(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab].softmax(-1) for m in (student, teacher))
        total += float((q * (q / p).log()).sum())
        lengths.append(len(response))
        prompts.append(len(prompt))
    assert min(prompts) > 1 < len(set(prompts))  # blank lines are no prompts; some prompts have padding
    assert min(lengths) < 16 == max(lengths)  # some responses end early, others do not
    assert seen["loss"].item() == pytest.approx(total / sum(lengths), rel=1e-4)
