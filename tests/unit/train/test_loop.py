"""The loop: schedule, selection, resume to the bit, NaN before the weights change."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tests.conftest import tiny_model
from tests.families import tiny

from tadistill.config.method import Method
from tadistill.config.method_parts import Optim, Select
from tadistill.config.objective import CrossEntropy, ForwardKL, ReverseKL, Taid
from tadistill.data.batch import Sequence, collate
from tadistill.errors import Interrupted, StageFailed
from tadistill.rollout.samplers import FixedSequences
from tadistill.train import checkpoint, loop
from tadistill.train.loop import Hooks, learning_rate, train_stage
from tadistill.train.step import counts, make_step

ROWS = [Sequence((3 + i % 4, 9), (*tuple(range(5, 7 + i % 5)), 0)) for i in range(16)]


def train(directory, *, kind="gpt2", steps=8, select=None, dev=None, stop=lambda: False, lr=1e-2, objective=None, teacher=None):
    """One small stage; GPT-2 has dropout, so this also shows that dropout is addressed."""
    student = tiny_model(kind).train()
    optim = Optim(steps=steps, batch=4, micro_batch=2, lr=lr, warmup=2)
    method = Method(objective=objective or CrossEntropy(), optim=optim)
    directory.mkdir(exist_ok=True)
    state = train_stage(
        student,
        make_step(method, student, () if teacher is None else (teacher,), 31),
        FixedSequences(ROWS, optim, pad=0, seed=1),
        optim=optim,
        select=select or Select(metric="last"),
        seed=1,
        accelerator=Accelerator(gradient_accumulation_steps=1, cpu=True),
        directory=directory,
        hooks=Hooks(evaluate=dev or dict, progress=lambda done, text: None, stop=stop),
        checkpoint_seconds=1e9,
    )
    return student, state


def test_the_speed_after_a_resume_counts_the_seconds_of_earlier_updates(monkeypatch):
    """10 tokens a second before and after an interruption of an hour: the first line after it says 10 a second."""
    clock = iter([0, 1, 2, 3600, 3601, 3601, 3601])
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    before = checkpoint.Averages([])
    before.add({"train/loss": 1.0, "tokens": 10})
    before.add({"train/loss": 2.0, "tokens": 10})
    after = checkpoint.Averages([dict(row) for row in before.rows])  # as a checkpoint gives them back
    after.add({"train/loss": 6.0, "tokens": 10})
    assert after.pop() == {"train/loss": 3.0, "train/tokens_per_second": 10.0}
    assert after.rows == []


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)])
def test_schedules(schedule, middle, end):
    optim = Optim(lr=1.0, lr_min=0.1, warmup=10, schedule=schedule, steps=110)
    assert learning_rate(optim, 0, 110) == pytest.approx(0.1)
    assert learning_rate(optim, 9, 110) == pytest.approx(1.0)
    assert learning_rate(optim, 60, 110) == pytest.approx(middle)
    assert learning_rate(optim, 110, 110) == pytest.approx(end)


@pytest.mark.parametrize("at", [1, 4, 7])
def test_an_interrupted_stage_resumes_to_the_bit(tmp_path, at):
    whole, of_whole = train(tmp_path / "whole")
    assert of_whole.ledger["parts"]["training/student"]["heads"] > 0
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stop=lambda: next(calls) == at)
    resumed, state = train(tmp_path / "parts")
    assert (state.step, state.model, state.optimizer) == (8, {}, {})  # no second copy of the weights stays in memory
    assert torch.equal(weights(resumed), weights(whole))
    assert {k: v for k, v in state.ledger.items() if k != "seconds"} == {k: v for k, v in of_whole.ledger.items() if k != "seconds"}
    a, b = ((tmp_path / d / "metrics.jsonl").read_text() for d in ("whole", "parts"))
    assert [line.split('"train/tokens')[0] for line in a.splitlines()] == [line.split('"train/tokens')[0] for line in b.splitlines()]


def test_taids_schedule_resumes_to_the_bit(tmp_path):
    """Its momentum and last loss are part of the training state, so t goes on where it was."""
    settings = {"objective": Taid(start=0.2, rate=0.9), "teacher": tiny_model("gpt2", seed=5).requires_grad_(False)}
    whole, _ = train(tmp_path / "whole", **settings)
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stop=lambda: next(calls) == 3, **settings)
    resumed, _ = train(tmp_path / "parts", **settings)
    assert torch.equal(weights(resumed), weights(whole))
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    ts = [line["train/taid_t"] for line in lines]
    assert ts == sorted(ts)
    assert ts == [json.loads(line)["train/taid_t"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert ts[:2] == [0.2, 0.2]  # the first two updates: t changes after an update, and the first one only stores its loss
    linear = [0.2 + 0.8 * step / 8 for step in range(2, 8)]
    assert all(at <= t < 1 for t, at in zip(ts[2:], linear, strict=True))  # t is `end` only after the last update
    assert any(t > at + 0.1 for t, at in zip(ts[1:], linear, strict=True))


def test_the_best_dev_checkpoint_is_kept(tmp_path):
    values = iter([0.5, 0.2, 0.9, 0.4])
    seen = []

    def dev():
        seen.append(None)
        return {"loss": next(values)}

    student, state = train(tmp_path / "best", select=Select(metric="loss", every=2), dev=dev)
    assert (state.best_step, state.best_value, len(seen)) == (4, 0.2, 4)
    # the weights are those of update 4 of 8, not the last ones
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        train(tmp_path / "half", stop=lambda: next(calls) == 4)
    half = torch.load(tmp_path / "half" / "state.pt", weights_only=True)["model"]
    for name, value in student.state_dict().items():
        assert torch.equal(value, half[name])


def dev_values(*values):
    """Return a dev evaluation that gives these losses in turn, and fails after the last one."""
    left = iter(values)
    return lambda: {"loss": next(left)}


def test_training_stops_when_dev_no_longer_improves(tmp_path):
    """Best at update 4; updates 6 and 8 are no better, so patience 2 ends the stage at update 8 of 20. Only these are metered."""
    _, state = train(tmp_path / "early", steps=20, select=Select(every=2, patience=2), dev=dev_values(0.5, 0.2, 0.3, 0.25))
    assert (state.step, state.best_step, state.misses) == (8, 4, 2)
    _, whole = train(tmp_path / "whole", steps=8)
    assert state.ledger["parts"] == whole.ledger["parts"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 5, 7])
def test_a_stage_that_stops_early_resumes_to_the_bit(tmp_path, at):
    """The evaluations without an improvement are part of the training state."""
    settings = {"steps": 20, "select": Select(every=2, patience=2)}
    values = [0.5, 0.2, 0.3, 0.25]
    whole, _ = train(tmp_path / "whole", **settings, dev=dev_values(*values))
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", **settings, dev=dev_values(*values), stop=lambda: next(calls) == at)
    resumed, state = train(tmp_path / "parts", **settings, dev=dev_values(*values[at // 2 :]))
    assert (state.step, state.best_step) == (8, 4)
    assert torch.equal(weights(resumed), weights(whole))


def test_nan_stops_before_the_weights_change(tmp_path):
    student = tiny_model("llama")
    with torch.no_grad():
        student.lm_head.weight[3] = math.nan
    before = weights(student).clone()
    optim = Optim(steps=1, batch=4)
    method = Method(objective=CrossEntropy(), optim=optim)
    with pytest.raises(StageFailed, match="the loss or gradient of update 1 is not finite"):
        train_stage(
            student,
            make_step(method, student, (), 31),
            FixedSequences(ROWS, optim, pad=0, seed=1),
            optim=optim,
            select=Select(metric="last"),
            seed=1,
            accelerator=Accelerator(cpu=True),
            directory=tmp_path,
            hooks=Hooks(evaluate=dict, progress=lambda done, text: None),
        )
    assert torch.equal(weights(student).nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(("kind", "unused"), [("llama", False), ("gemma3", True)])
def test_ddp_waits_for_no_unused_weights_and_copies_no_gradients(kind, unused):
    """The vision encoder of gemma3 has no part in a text."""
    ranks = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=lambda values, how: 2 * values, prepare=lambda model: model)
    loop._prepare_whole(tiny(kind), ranks)
    assert (ranks.ddp_handler.find_unused_parameters, ranks.ddp_handler.gradient_as_bucket_view) == (unused, True)


def test_an_update_without_any_gradient_stops_the_stage(tmp_path, monkeypatch):
    """As with a sharded student whose gradients are not summed: the loss is finite, but no weight would change."""
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss: None)
    with pytest.raises(StageFailed, match="no weight got a gradient in update 1"):
        train(tmp_path)


@pytest.mark.parametrize(
    "objective", [ForwardKL(), *(pytest.param(o, marks=pytest.mark.slow) for o in (ReverseKL(), ForwardKL(kd_ratio=0.5)))]
)
def test_distillation_brings_the_student_nearer(tmp_path, objective):
    teacher = tiny_model("llama", seed=5).requires_grad_(False)
    batch = collate(ROWS, pad=0)

    @torch.no_grad()
    def loss(model):
        return float(make_step(Method(objective=objective), model, (teacher,), 31).loss(model, batch, counts([batch])).total)

    student, _ = train(tmp_path / "kd", kind="llama", objective=objective, teacher=teacher, steps=30)
    assert loss(student) < 0.7 * loss(tiny_model("llama"))


def test_an_empty_mask_has_zero_loss_and_a_graph():
    model = tiny_model("llama")
    batch = collate(ROWS[:2], pad=0)
    batch.mask_BT.fill_(False)
    loss = make_step(Method(objective=CrossEntropy()), model, (), 31).loss(model, batch, {"response": 1.0})
    assert loss.total.item() == 0
    loss.total.backward()
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0 for p in model.parameters())
