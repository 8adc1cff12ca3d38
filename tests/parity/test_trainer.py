"""Our cross-entropy stage against stock `transformers.Trainer`: loss and gradient, for accumulation 1, 2 and 4."""

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from tests.conftest import tiny_model

from tadistill.config.method import Method
from tadistill.config.method_parts import Optim
from tadistill.config.objective import CrossEntropy
from tadistill.data.batch import Sequence
from tadistill.rollout.samplers import FixedSequences
from tadistill.train.loop import _update, make_optimizer
from tadistill.train.step import counts, make_step

# response lengths differ on purpose: a mean of per-micro-batch means would be wrong by more than 10 %
SEQUENCES = [Sequence((3, 4, 5)[: 1 + i % 3], tuple(range(6, 6 + n))) for i, n in enumerate((2, 5, 9, 14, 3, 11, 1, 8))]


def stock(model, accumulation: int, directory) -> tuple[float, float]:
    """Loss and gradient norm that Trainer logs for one update over all sequences."""
    width = max(len(s.prompt) + len(s.response) for s in SEQUENCES)
    rows = []
    for s in SEQUENCES:
        ids, pad = [*s.prompt, *s.response], width - len(s.prompt) - len(s.response)
        rows.append({
            "input_ids": torch.tensor(ids + [0] * pad),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * pad),
            "labels": torch.tensor([-100] * len(s.prompt) + list(s.response) + [-100] * pad),
        })  # fmt: skip
    arguments = hf.TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=len(rows) // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=1, logging_steps=1, learning_rate=0.0, max_grad_norm=1e9, report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    entry = trainer.state.log_history[0]
    return entry["loss"], entry["grad_norm"]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_loss_and_gradient_equal_stock_trainer(accumulation, tmp_path):
    optim = Optim(steps=1, batch=8, micro_batch=8 // accumulation, clip=1e9)
    method = Method(objective=CrossEntropy(), optim=optim)
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=True)
    model = tiny_model("llama")
    sampler = FixedSequences(SEQUENCES, optim, pad=0, seed=0)
    ours = _update(model, make_step(method, model, (), 31), sampler.micro_batches(0), make_optimizer(model, optim), optim, accelerator, 0)
    loss, norm = stock(tiny_model("llama"), accumulation, tmp_path)
    assert ours["train/loss"] == pytest.approx(loss, rel=1e-6, abs=1e-5)  # Trainer's log keeps four decimals
    assert ours["train/grad_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_gradient(accumulation, kind):
    gradients = []
    for micro in (8, 8 // accumulation):
        optim = Optim(steps=1, batch=8, micro_batch=micro)
        model = tiny_model(kind)
        step = make_step(Method(objective=CrossEntropy(), optim=optim), model, (), 31)
        batches = FixedSequences(SEQUENCES, optim, pad=0, seed=0).micro_batches(0)
        for batch in batches:
            step.loss(model, batch, counts(batches)).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)
