"""The teacher that is a moving average of its student: its weights, resuming, adapters, and training loops written by hand."""

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from tests.conftest import tiny_model
from tests.unit.plan.test_plan import model, plan
from tests.unit.plan.test_plan_edges import stages

from tadistill.config.method import Method
from tadistill.config.method_parts import Optim, Select
from tadistill.config.model import Lora
from tadistill.config.objective import ForwardKL
from tadistill.data.batch import Sequence
from tadistill.errors import Interrupted
from tadistill.models.modify import adapt, recompute_layers
from tadistill.models.teachers import MovingAverage, frozen_copy, teacher_of
from tadistill.plan.task import make_task
from tadistill.rollout.rounds import Rollouts
from tadistill.rollout.samplers import FixedSequences
from tadistill.stages import training
from tadistill.stages.execute import run_stage
from tadistill.store import Store
from tadistill.train.loop import Hooks, learning_rate, make_optimizer, train_stage
from tadistill.train.step import counts, make_step

ROWS = [Sequence((3 + i % 4, 9), (*tuple(range(5, 7 + i % 5)), 0)) for i in range(16)]
LORA = Lora(r=2, alpha=4, dropout=0.1)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(directory, *, lora: bool, stop=lambda: False):
    """Train GPT-2, which has dropout, with its own average as the teacher."""
    student = tiny_model("gpt2").train()
    if lora:
        adapt(student, LORA, seed=3)
    optim = Optim(steps=8, batch=4, micro_batch=2, lr=1e-2, warmup=2)
    average = MovingAverage(student, frozen_copy(student), 0.8)
    step = make_step(Method(objective=ForwardKL(kd_ratio=0.5), optim=optim), student, (average.teacher,), 31)
    directory.mkdir(exist_ok=True)
    state = train_stage(
        student,
        replace(step, average=average),
        FixedSequences(ROWS, optim, pad=0, seed=1),
        optim=optim,
        select=Select(metric="last"),
        seed=1,
        accelerator=Accelerator(gradient_accumulation_steps=1, cpu=True),
        directory=directory,
        hooks=Hooks(evaluate=dict, progress=lambda done, text: None, stop=stop),
        checkpoint_seconds=1e9,
    )
    return student, average.model, state


def test_each_update_moves_the_weights_by_the_definition():
    student = tiny_model("llama")
    average = MovingAverage(student, frozen_copy(student), 0.9)
    expected = weights(student).double()
    for update in range(20):
        with torch.no_grad():
            torch.manual_seed(update)
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        average.update()
        expected = 0.9 * expected + 0.1 * weights(student).double()
    torch.testing.assert_close(weights(average.model).double(), expected, rtol=1e-5, atol=1e-6)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in average.model.parameters())


@pytest.mark.parametrize("lora", [False, True])
def test_an_interrupted_training_resumes_to_the_bit(tmp_path, lora):
    student, teacher, whole = train(tmp_path / "whole", lora=lora)
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", lora=lora, stop=lambda: next(calls) == 5)
    student_again, teacher_again, state = train(tmp_path / "parts", lora=lora)
    assert torch.equal(weights(student_again), weights(student))
    assert torch.equal(weights(teacher_again), weights(teacher))
    assert not torch.equal(weights(teacher), weights(student))
    assert state.average == {}  # no second copy of the weights stays in memory
    assert state.ledger["parts"] == whole.ledger["parts"]


def test_frozen_weights_are_shared_and_adapters_are_not():
    student = tiny_model("llama").train()
    recompute_layers(student)
    adapt(student, LORA, seed=3)
    average = MovingAverage(student, frozen_copy(student), 0.5)
    pairs = dict(zip(dict(student.named_parameters()), zip(student.parameters(), average.model.parameters(), strict=True), strict=True))
    assert any(own.requires_grad for own, _ in pairs.values())
    for name, (own, other) in pairs.items():
        assert own is not other, name
        assert (own.data_ptr() == other.data_ptr()) == (not own.requires_grad), name
    with torch.no_grad():
        for own, _ in pairs.values():
            if own.requires_grad:
                own.fill_(1.0)
    before = {name: other.clone() for name, (_, other) in pairs.items()}
    average.update()
    for name, (own, other) in pairs.items():
        torch.testing.assert_close(other, (before[name] + 1) / 2 if own.requires_grad else own, rtol=0, atol=1e-7)


ARM = {"path": "s > s", "context": "{output} {prompt}", "objective": {"type": "reverse_kl"}, "select": {"metric": "last"}, "ema": 0.7}
ARM |= {"optim": {"steps": 5, "batch": 8, "micro_batch": 4, "lr": 1e-2, "warmup": 2, "clip": 0.5}}
CASES = {
    "dataset": {"sampler": {"type": "dataset"}, "objective": {"type": "jensen_shannon"}},
    "student": {"sampler": {"type": "student", "max_new_tokens": 5}},
    "scores": {"sampler": {"type": "student", "max_new_tokens": 5}, "objective": {"type": "sampled_kl"}},
    "lora": {"sampler": {"type": "student", "max_new_tokens": 5}, "lora": {"r": 2, "alpha": 4}},
}


def by_hand(student, batches, method: Method, vocab: int, *, decay: float):
    """A training loop as one writes it, without the package's loop. The teacher is a whole copy of the student."""
    teacher, optim = copy.deepcopy(student).eval().requires_grad_(False), method.optim
    made, optimizer = make_step(method, student, (teacher,), vocab), make_optimizer(student, optim)
    for done, update in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, done, optim.steps)
        total = counts(update)["response"]
        for batch in update:
            if "teacher" in batch.values:  # sampled before this update, with the average of this moment
                scores = teacher_of(teacher).scored(batch.of_teacher, vocab)[1]
                torch.testing.assert_close(batch.counted(batch.values["teacher"]), scores, rtol=1e-5, atol=1e-5)
            made.loss(student, batch, {"response": float(total), "corpus": 1.0}).total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
                own.lerp_(other, 1 - decay)
    return teacher


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_stage_equals_a_loop_written_by_hand(case, tmp_path):
    """On tinyworld, to the bit, with two micro-batches an update. The loop gets the batches that the stage has sampled."""
    arm = ARM | {key: value for key, value in CASES[case].items() if key != "lora"}
    models = {"s": model(8, sft=None) | {"lora": CASES[case].get("lora")}}
    data = {
        "train": "tinyworld",
        "dev": "tinyworld",
        "test": ["tinyworld"],
        "template": "plain",
        "limit": {"train": 64, "dev": 4, "test": 2},
    }
    (stage,) = stages(found := plan(seeds=[1], models=models, data=data, analyse=False, arms={"a": arm}), "a")
    kept: dict = {"batches": []}

    def train_kept(student, step, sampler, **settings):
        kept["start"], kept["teacher"] = copy.deepcopy(student), step.average.model
        state = train_stage(student, step, sampler, **settings)
        kept["student"] = student
        return state

    def keep(of):
        original = of.micro_batches

        def micro_batches(self, step):
            kept["batches"].append(original(self, step))
            return kept["batches"][-1]

        return mock.patch.object(of, "micro_batches", micro_batches)

    with mock.patch.object(training, "train_stage", train_kept), keep(FixedSequences), keep(Rollouts):
        run_stage(make_task(found, stage, Store(tmp_path)), progress=lambda *_: None, alarm=print, stop=lambda: False)
    assert len(kept["batches"]) == 5
    student = kept["start"]
    teacher = by_hand(student, kept["batches"], stage.spec.method, student.get_output_embeddings().out_features, decay=0.7)
    assert torch.equal(weights(student), weights(kept["student"]))
    assert torch.equal(weights(teacher), weights(kept["teacher"]))
    assert not torch.equal(weights(teacher), weights(student))
