"""The one training loop, on accelerate, blind to the objective and to where sequences come from.

Each update: draw this rank's micro-batches (which may roll out), count the tokens that matter over all micro-batches and
ranks, forward and backward on SUMS divided by that count, check that everything is finite, step. Accelerator is used with
gradient_accumulation_steps=1 and the schedule is a function of the step, which avoids accelerate's own rescaling.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from tadistill import rng
from tadistill.config.method import Optim, Select
from tadistill.data.batch import Batch
from tadistill.errors import StageFailed
from tadistill.log import RunLog
from tadistill.rollout.samplers import Sampler
from tadistill.train import checkpoint
from tadistill.train.checkpoint import TrainState
from tadistill.train.step import Step, counts

HIGHER_IS_BETTER = {"rouge_l", "fact_accuracy"}
_LOG_POINTS = 100


class Interrupted(Exception):
    """The run was asked to stop; the state is saved and the same command goes on from it."""


@dataclass(frozen=True)
class Hooks:
    """What the loop asks of its surroundings."""

    evaluate: Callable[[], dict[str, float]]
    """Dev metrics of the student as it is now."""
    progress: Callable[[int, str], None]
    """(updates done, short text)."""
    stop: Callable[[], bool] = lambda: False
    """True when the run should save and end (a signal came)."""


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of update `step` (from 0): linear warm-up, then cosine, linear or constant down to `lr_min`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(steps - optim.warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[optim.schedule]
    return optim.lr_min + (optim.lr - optim.lr_min) * shape


def make_optimizer(model: PreTrainedModel, optim: Optim) -> torch.optim.AdamW:
    """AdamW; weight decay only on matrices (biases and norms are left alone)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def train_stage(
    student: PreTrainedModel,
    step: Step,
    sampler: Sampler,
    *,
    optim: Optim,
    select: Select,
    seed: int,
    accelerator: Accelerator,
    directory: Path,
    hooks: Hooks,
    checkpoint_seconds: float = 30.0,
    track: Callable[[dict, int], None] | None = None,
) -> TrainState:
    """Train `student` in place for `optim.steps` updates and leave it with the selected checkpoint's weights.

    Args:
        directory: holds state.pt and best.pt while training, and metrics.jsonl; an existing state.pt is resumed.

    Raises:
        StageFailed: a loss or gradient is not finite (before it touches the weights).
        Interrupted: `hooks.stop` said so; the state is saved.
    """
    assert optim.steps is not None
    steps, every = optim.steps, max(1, optim.steps // _LOG_POINTS)
    optimizer = make_optimizer(student, optim)
    model, optimizer = accelerator.prepare(student, optimizer)
    state = _resume(directory, accelerator.unwrap_model(model), optimizer, sampler, step)
    log = RunLog(directory / "metrics.jsonl", resume_step=state.step, track=track)
    saved, since = time.monotonic(), _Averages()
    while state.step < steps:
        if hooks.stop():
            _save(directory, state, student, optimizer, sampler, step)
            raise Interrupted(f"stopped at update {state.step} of {steps}")
        if time.monotonic() - saved > checkpoint_seconds:
            _save(directory, state, student, optimizer, sampler, step)
            saved = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, state.step, steps)
        batches = sampler.micro_batches(state.step)
        torch.manual_seed(rng.torch_seed(seed, "dropout", state.step))
        since.add(_update(model, step, batches, optimizer, optim, accelerator, state.step))
        state.step += 1
        chosen = select.metric != "last" and (state.step % select.every == 0 or state.step == steps)
        if state.step % every == 0 or chosen:
            metrics = since.pop() | {"train/lr": optimizer.param_groups[0]["lr"]}
            hooks.progress(state.step, f"loss {metrics['train/loss']:.3f}, {metrics['train/tokens_per_second']:,.0f} tokens/s")
            if chosen:
                metrics |= _evaluate(student, hooks, select, state, directory)
                since.restart()
            log.write(state.step, metrics)
    if select.metric != "last":
        student.load_state_dict(checkpoint.load(directory / "best.pt"))
    student.eval()
    return state


def _update(
    model: torch.nn.Module,
    step: Step,
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    optim: Optim,
    accelerator: Accelerator,
    done: int,
) -> dict[str, float]:
    """One optimizer update, the one after `done` others; returns its row for the log."""
    total = counts(batches)
    tokens = torch.tensor([*total.values()], device=accelerator.device)
    count = dict(zip(total, _sum(accelerator, tokens).clamp(min=1).tolist(), strict=True))
    # DDP and FSDP average gradients over ranks; the count is global already
    per = {name: n / accelerator.num_processes for name, n in count.items()}
    logged = torch.zeros(0)
    names: list[str] = []
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model), accelerator.autocast():
            loss = step.loss(model, batch.to(accelerator.device), per)
            accelerator.backward(loss.total)
        values = torch.stack([loss.total.detach(), *loss.parts.values()]).cpu()
        names = ["loss", *loss.parts]
        logged = values if i == 0 else logged + values
    norm = float(accelerator.clip_grad_norm_(model.parameters(), optim.clip))  # type: ignore[arg-type]
    if not (torch.isfinite(logged).all() and math.isfinite(norm)):
        found = ", ".join(f"{n} {v:.4g}" for n, v in zip(names, logged.tolist(), strict=True))
        raise StageFailed(
            f"update {done + 1} is not finite ({found}, gradient norm {norm:.4g}); the weights were not changed. Lower optim.lr"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mean = (_sum(accelerator, logged.to(accelerator.device)) / accelerator.num_processes).tolist()
    row = {f"train/{n}": v for n, v in zip(names, mean, strict=True)}
    if step.schedule:
        assert optim.steps is not None
        step.schedule.update(row["train/taid"], done + 1, optim.steps)
        row["train/taid_t"] = step.schedule.t
    return row | {"train/grad_norm": norm, "tokens": count["response"]} | _rollout_metrics(batches)


def _sum(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    total = accelerator.reduce(values, "sum")
    assert isinstance(total, torch.Tensor)
    return total


def _rollout_metrics(batches: list[Batch]) -> dict[str, float]:
    """Length and reward of the sampled sequences in this rank's batch, when they are rollouts."""
    if not batches or "teacher" not in batches[0].values:
        return {}
    rows = sum(len(b.ids_BT) for b in batches)
    tokens = sum(float(b.mask_BT.sum()) for b in batches)
    reward = sum(float((b.values["teacher"] - b.values["student"]).sum()) for b in batches)
    return {"rollout/length": tokens / rows, "rollout/reward": reward / rows}


class _Averages:
    """Means of what was added since the last line of the log."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.start = time.monotonic()

    def restart(self) -> None:
        """Start the clock again, after time that was not training."""
        self.start = time.monotonic()

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def pop(self) -> dict[str, float]:
        rows, seconds = self.rows, time.monotonic() - self.start
        means = {name: sum(r[name] for r in rows) / len(rows) for name in rows[0] if name != "tokens"}
        speed = sum(r["tokens"] for r in rows) / max(seconds, 1e-9)
        self.rows, self.start = [], time.monotonic()
        return means | {"train/tokens_per_second": speed}


def _evaluate(student: PreTrainedModel, hooks: Hooks, select: Select, state: TrainState, directory: Path) -> dict[str, float]:
    """Dev metrics; keeps the weights when they are the best so far."""
    was_training = student.training
    student.eval()
    metrics = hooks.evaluate()
    student.train(was_training)
    value = metrics[select.metric]
    sign = 1 if select.metric in HIGHER_IS_BETTER else -1
    if state.best_value is None or sign * value > sign * state.best_value:
        state.best_value, state.best_step = value, state.step
        checkpoint.save(directory / "best.pt", student.state_dict())
    return {f"dev/{name}": v for name, v in metrics.items()}


def _save(
    directory: Path, state: TrainState, student: PreTrainedModel, optimizer: torch.optim.Optimizer, sampler: Sampler, step: Step
) -> None:
    state.model, state.optimizer, state.sampler = student.state_dict(), optimizer.state_dict(), sampler.state()
    state.schedule = step.schedule.state() if step.schedule else {}
    checkpoint.save(directory / "state.pt", vars(state))


def _resume(directory: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer, sampler: Sampler, step: Step) -> TrainState:
    path = directory / "state.pt"
    if not path.exists():
        return TrainState()
    state = TrainState(**checkpoint.load(path))
    student.load_state_dict(state.model)
    optimizer.load_state_dict(state.optimizer)
    sampler.restore(state.sampler)
    if step.schedule:
        step.schedule.restore(state.schedule)
    return state
