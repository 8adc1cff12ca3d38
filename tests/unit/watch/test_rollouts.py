"""The newest rollouts of a stage: written while it trains, for people only."""

import json

import numpy as np
from accelerate import Accelerator
from tests.conftest import tiny_model

from tadistill.config.method import Method
from tadistill.config.method_parts import Optim, Select
from tadistill.config.objective import ReverseKL
from tadistill.data import tinyworld
from tadistill.data.batch import Sequence, collate
from tadistill.rollout.samplers import FixedSequences
from tadistill.stages.training import write_rollouts
from tadistill.store import ROLLOUTS, Store
from tadistill.train.loop import Hooks, train_stage
from tadistill.train.step import make_step


def sampled(prompt, response):
    return Sequence(prompt, response, {name: np.full(len(response), -2.0, np.float32) for name in ("student", "behaviour")})


def test_the_loop_shows_rollouts_of_measured_updates(tmp_path):
    student, optim = tiny_model("llama").train(), Optim(steps=21, batch=12, warmup=0)
    shown = []
    train_stage(
        student,
        make_step(Method(objective=ReverseKL(), optim=optim), student, (tiny_model("llama", seed=5),), 31),
        FixedSequences([sampled((5, 6), (7, 8, 0))] * 12, optim, pad=0, seed=1),
        optim=optim,
        select=Select(metric="last"),
        seed=1,
        accelerator=Accelerator(cpu=True),
        directory=tmp_path,
        hooks=Hooks(evaluate=dict, progress=lambda done, text: None, sampled=lambda step, batch: shown.append((step, len(batch.ids_BT)))),
    )
    assert shown == [(0, 8), (10, 8), (20, 8)]


def test_few_rows_are_written_and_replaced(tmp_path):
    tokenizer = tinyworld.tokenizer(people=20)
    words = tokenizer("which animal lives with the")["input_ids"]
    rows = [sampled((words[0],), tuple(words[1:])), sampled(tuple(words[:3]), (words[3],)), *[sampled((words[0],), (words[1],) * 3000)] * 4]
    write_rollouts(tmp_path / ROLLOUTS, 10, collate(rows, pad=0), tokenizer)
    write_rollouts(tmp_path / ROLLOUTS, 20, collate(rows, pad=0), tokenizer)
    content = json.loads((tmp_path / ROLLOUTS).read_text())
    assert content["step"] == 20
    assert content["rows"][0] == {"prompt": tokenizer.decode(words[:1]), "response": tokenizer.decode(words[1:])}
    assert content["rows"][1] == {"prompt": tokenizer.decode(words[:3]), "response": tokenizer.decode(words[3:4])}
    assert len(content["rows"]) == 4
    assert len(content["rows"][2]["response"]) == 1000
    assert [path.name for path in tmp_path.iterdir()] == [ROLLOUTS]


def test_rollouts_are_no_part_of_a_stage(tmp_path):
    store = Store(tmp_path)
    folder = store.begin("aa11", {"label": "distill"})
    (folder / ROLLOUTS).write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    store.finish("aa11", {"key": "aa11"})
    assert set(store.manifest("aa11")["files"]) == {"metrics.jsonl", "stage.json"}
    (folder / ROLLOUTS).unlink()
    assert store.finished("aa11")
