"""The training loop, built on accelerate. It is the same for every objective and every source of sequences.

For each update, the sampler returns the micro-batches of this process. The loop counts the loss tokens of all micro-batches on all
processes, and divides the sum of the losses by this count. It updates the weights only if loss and gradient are finite. accelerate changes
neither the loss nor the learning rate: gradient_accumulation_steps is 1, and the loop sets the learning rate.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, convert_outputs_to_fp32, gather_object
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from tadistill import rng
from tadistill.config.method_parts import Optim, Select
from tadistill.constants import LOG_POINTS, WATCH_EVERY, WATCHED_ROWS
from tadistill.data.batch import Batch
from tadistill.errors import ConfigError, Interrupted, StageFailed
from tadistill.metrics import higher_is_better, training_text
from tadistill.models import sharding
from tadistill.rollout.samplers import Sampler
from tadistill.train import checkpoint, spans
from tadistill.train.checkpoint import Averages, Checkpoints, RunLog, TrainState
from tadistill.train.monitoring import Alarms, Meter, watch
from tadistill.train.step import Step, counts


@dataclass(frozen=True)
class Hooks:
    """Callbacks that the training loop calls."""

    evaluate: Callable[[], dict[str, float]]
    """Returns the metrics of the current student on the dev set."""
    progress: Callable[[int, str], None]
    """Shows the progress: the number of updates done, and a short text."""
    alarm: Callable[[str], None] = lambda text: None
    """Shows a warning of one line, for example about sampled text that repeats itself."""
    sampled: Callable[[int, Batch], None] = lambda step, batch: None
    """Called after some updates, with the number of updates done and a few sampled sequences. Only the main process calls it."""
    stop: Callable[[], bool] = lambda: False
    """Returns True if training must save its state and end, for example after a signal."""
    kept: frozenset[int] = frozenset()
    """The updates, counted from 1, after which `keep` is called."""
    keep: Callable[[int, dict[str, torch.Tensor]], None] = lambda step, weights: None
    """Stores the student's full weights. The first argument is the number of updates done. Only the main process calls it."""


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Return the learning rate of update `step`, counted from 0. It rises linearly in the warm-up, and then follows `optim.schedule`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(steps - optim.warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[optim.schedule]
    return optim.lr_min + (optim.lr - optim.lr_min) * shape


def make_optimizer(model: PreTrainedModel, optim: Optim) -> torch.optim.AdamW:
    """Return AdamW. Weight decay acts on matrices only, not on biases and norms."""
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
    checkpoint_seconds: float | None = None,
) -> TrainState:
    """Train `student` in place for at most `optim.steps` updates. At the end, load the weights of the checkpoint that `select` chooses.

    Args:
        student: a model on the accelerator's device. It may be sharded over the processes (`sharding.shard`), and stays sharded.
        directory: the folder for metrics.jsonl and the saved states. A later run may resume with another number of processes.
        checkpoint_seconds: the time between two saves, in seconds. None means the default of `Checkpoints`.

    Raises:
        ConfigError: the batch is not a multiple of the number of processes.
        StageFailed: a loss or gradient is not finite. The weights are those before this update.
        Interrupted: `hooks.stop` returned True, and the state was saved.
    """
    assert optim.steps is not None
    if optim.batch % accelerator.num_processes:
        raise ConfigError(
            f"optim.batch is {optim.batch}, but it must be a multiple of the {accelerator.num_processes} processes; change one of the two "
            "numbers"
        )
    steps, log_every = optim.steps, max(1, optim.steps // LOG_POINTS)
    patience = math.inf if select.patience is None else select.patience
    model = _prepare_sharded(student, accelerator) if sharding.sharded(student) else _prepare_whole(student, accelerator)
    optimizer = accelerator.prepare(make_optimizer(student, optim))
    meter = Meter(student, step.models.teachers, checkpointing=optim.gradient_checkpointing)
    step = replace(step, phase=meter.phase)
    alarms = Alarms(minillm=step.clip is not None, precise=optim.precision == "fp32")
    files = Checkpoints(directory, checkpoint_seconds)
    run = _Run(student, model, step, sampler, optim, optimizer, seed, accelerator, files, alarms, meter, hooks)
    state = run.resume()
    log = RunLog(directory / "metrics.jsonl", resume_step=state.step) if accelerator.is_main_process else None
    averages = Averages(state.pending)
    hooks.progress(state.step, f"continues at update {state.step} of {steps}" if state.step else "training")
    with meter.counting():
        if sampler.wants_dev:
            sampler.observe(run.evaluate())
        while state.step < steps and state.misses < patience:
            run.save_or_stop(state)
            batches = run.sample(state.step)
            with meter.timed("watching"):
                watched = run.watch(batches, state.step) if state.step % max(log_every, WATCH_EVERY) == 0 else {}
            averages.add(run.update(batches, state.step) | watched)
            state.step += 1
            run.keep(state.step)
            selects = select.chooses and (state.step % select.every == 0 or state.step == steps)
            if selects or state.step % log_every == 0:
                metrics = averages.pop() | sampler.metrics() | {"train/lr": optimizer.param_groups[0]["lr"]}
                if selects:
                    metrics |= run.select(state, select)
                    averages.restart_clock()
                hooks.progress(state.step, training_text(metrics["train/loss"], metrics["train/tokens_per_second"]))
                if log:
                    log.write(state.step, metrics)
    if select.chooses:
        accelerator.wait_for_everyone()
        sharding.load_weights(student, checkpoint.load(files.best(state.best_step)))
    student.eval()
    state.alarms, state.ledger = alarms.state(), meter.state(partial(_gather, accelerator))
    return state


def _prepare_whole(student: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    if accelerator.num_processes > 1:
        # By default, DDP waits for the gradients of all parameters, also of those that no text uses, and has a copy of all gradients
        unused = _anywhere(accelerator, not sharding.uses_all(student))[0]
        settings = DistributedDataParallelKwargs(find_unused_parameters=unused, gradient_as_bucket_view=True)
        accelerator.ddp_handler = settings  # type: ignore[assignment]
    return accelerator.prepare(student)


def _prepare_sharded(student: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    sharding.reshard(student)  # the optimizer needs the sharded parameters
    # For a student that is not sharded, accelerate.prepare does this. All forward passes then run in bf16, also those of sampling.
    if accelerator.mixed_precision == "bf16":
        student.forward = convert_outputs_to_fp32(torch.autocast(accelerator.device.type, torch.bfloat16)(student.forward))
    return student


@dataclass
class _Run:
    student: PreTrainedModel
    model: nn.Module
    """The student, or DDP's wrapper around it."""
    step: Step
    sampler: Sampler
    optim: Optim
    optimizer: Optimizer
    seed: int
    accelerator: Accelerator
    files: Checkpoints
    alarms: Alarms
    meter: Meter
    hooks: Hooks

    def sample(self, done: int) -> list[Batch]:
        samples = self.sampler.samples(done)
        with self.meter.timed("sampling"), sharding.whole(self.student, *self.sampler.guides, when=samples):
            sampled = self.sampler.micro_batches(done)
            batches = self.step.prepare(sampled, done, lambda values: _sum(self.accelerator, values).cpu())
        self.meter.saw(batches)
        return batches

    def watch(self, batches: list[Batch], done: int) -> dict[str, float]:
        main = self.accelerator.is_main_process
        scores = main or any(map(sharding.sharded, self.step.models.here))  # sharded models need all processes
        with self.accelerator.autocast():
            fresh = self.sampler.samples(done) and not self.sampler.mixes and not self.student.training
            watched = watch(self.step, batches, fresh=fresh, scores=scores, gather=partial(_rows, self.accelerator))
        if not (main and watched):
            return {}
        apart = watched.pop("apart", None)
        for line in self.alarms.check(done, watched, apart if self.sampler.apart is None else self.sampler.apart):
            self.hooks.alarm(line)
        self.hooks.sampled(done, batches[0].first(WATCHED_ROWS))
        return watched

    def update(self, batches: list[Batch], done: int) -> dict[str, float]:
        assert self.optim.steps is not None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.optim, done, self.optim.steps)
        # runs with equal numbers of processes have equal dropout; the first process has that of a run with one process
        rank = self.accelerator.process_index
        # on a machine without a GPU, torch.manual_seed writes down the call stack three times, for devices that may still come
        seeded = torch.default_generator if self.accelerator.device.type == "cpu" else torch
        seeded.manual_seed(rng.torch_seed(self.seed, "dropout", done, *([rank] if rank else [])))
        with self.meter.timed("training"):
            row = _update(self.model, self.step, batches, self.optimizer, self.optim, self.accelerator, done)
            if self.step.average:
                self.step.average.update()
        return row

    def keep(self, done: int) -> None:
        if done in self.hooks.kept:
            whole = sharding.weights(self.student)
            if self.accelerator.is_main_process:
                self.hooks.keep(done, whole)

    def evaluate(self) -> dict[str, float]:
        with self.meter.timed("selection"), sharding.whole(self.student):
            was_training = self.student.training
            self.student.eval()
            metrics = [self.hooks.evaluate()]
            self.student.train(was_training)
            if self.accelerator.num_processes > 1:
                broadcast_object_list(metrics)
            return metrics[0]

    def select(self, state: TrainState, select: Select) -> dict[str, float]:
        self.hooks.progress(state.step, "evaluating on dev")
        dev = self.evaluate()
        value, sign = dev[select.metric], 1 if higher_is_better(select.metric) else -1
        if state.best_value is None or sign * value > sign * state.best_value:
            state.best_value, state.best_step, state.misses = value, state.step, 0
            best = sharding.weights(self.student)
            if self.accelerator.is_main_process:
                self.files.keep_best(state.step, best)
        else:
            state.misses += 1
        self.sampler.observe(dev)
        return {f"dev/{name}": value for name, value in dev.items()}

    def save_or_stop(self, state: TrainState) -> None:
        stop, due = _anywhere(self.accelerator, self.hooks.stop(), self.accelerator.is_main_process and self.files.due())
        if stop or due:
            self.save(state)
        if stop:
            self.accelerator.wait_for_everyone()  # a process that ends early would end the others before the state is saved
            raise Interrupted(f"stopped at update {state.step} of {self.optim.steps}; the state is saved")

    def save(self, state: TrainState) -> None:
        model, optimizer = sharding.weights(self.student), sharding.gathered(self.optimizer.state_dict())
        average = self.step.average.state() if self.step.average else {}
        ledger = self.meter.state(partial(_gather, self.accelerator))
        if not self.accelerator.is_main_process:
            return
        state.model, state.optimizer, state.average, state.sampler = model, optimizer, average, self.sampler.state()
        state.schedule = self.step.schedule.state() if self.step.schedule else {}
        state.alarms, state.ledger = self.alarms.state(), ledger
        self.files.save(state)
        state.release()

    def resume(self) -> TrainState:
        state = self.files.load(self.hooks.alarm)
        if state is None:
            return TrainState()
        sharding.load_weights(self.student, state.model)
        sharding.load_optimizer(self.optimizer, state.optimizer)
        self.sampler.restore(state.sampler)
        self.alarms.restore(state.alarms)
        self.meter.restore(state.ledger, counts=self.accelerator.is_main_process)
        if self.step.schedule:
            self.step.schedule.restore(state.schedule)
        if self.step.average:
            self.step.average.restore(state.average)
        state.release()
        return state


def _update(
    model: nn.Module, step: Step, batches: list[Batch], optimizer: Optimizer, optim: Optim, accelerator: Accelerator, done: int
) -> dict[str, float]:
    total = counts(batches)
    count = dict(zip(total, _sum(accelerator, torch.tensor([*total.values()])).tolist(), strict=True))
    # DDP and FSDP average gradients over the ranks, but the count already includes all ranks, so it is divided by their number
    per = {name: max(n, 1) / accelerator.num_processes for name, n in count.items()}
    logged, names = torch.zeros(0), list[str]()
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        # gradients of a sharded model are summed over the processes in every micro-batch, because whole gradients would not fit
        sync = last or sharding.sharded(model)
        with contextlib.nullcontext() if sync else accelerator.no_sync(model), accelerator.autocast():
            loss = step.loss(model, batch.to(accelerator.device), per)
            accelerator.backward(loss.total)
        values = torch.stack([loss.total.detach(), *loss.parts.values()])
        names = ["loss", *loss.parts]
        logged = values if i == 0 else logged + values
    if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
        raise StageFailed(
            f"no weight got a gradient in update {done + 1}, so the student would learn nothing; if `resources` has parallel: fsdp, set "
            "parallel: ddp"
        )
    logged = logged.cpu()  # only here the host waits for the device
    norm = sharding.number(accelerator.clip_grad_norm_(model.parameters(), optim.clip))  # type: ignore[arg-type]
    if not (torch.isfinite(logged).all() and math.isfinite(norm)):
        found = ", ".join(f"{n} {v:.4g}" for n, v in zip(names, logged.tolist(), strict=True))
        found += f", gradient norm {norm:.4g}"
        raise StageFailed(
            f"the loss or gradient of update {done + 1} is not finite ({found}), so the weights were not updated; lower optim.lr"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mean = (_sum(accelerator, logged) / accelerator.num_processes).tolist()
    row = {f"train/{n}": v for n, v in zip(names, mean, strict=True)}
    if step.schedule:
        assert optim.steps is not None
        row["train/taid_t"] = step.schedule.t
        step.schedule.update(row["train/taid"], done + 1, optim.steps)
    return row | spans.metrics(count) | {"train/grad_norm": norm, "tokens": max(count["response"], 1)}


def _sum(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    if accelerator.num_processes == 1:
        return values
    total = accelerator.reduce(values.to(accelerator.device), "sum")
    assert isinstance(total, torch.Tensor)
    return total


def _rows(accelerator: Accelerator, own: torch.Tensor) -> torch.Tensor:
    found = accelerator.gather(own)
    assert isinstance(found, torch.Tensor)
    return found


def _gather(accelerator: Accelerator, value: Any) -> list[Any]:
    return [value] if accelerator.num_processes == 1 else gather_object([value])


def _anywhere(accelerator: Accelerator, *flags: bool) -> list[bool]:
    return list(flags) if accelerator.num_processes == 1 else (_sum(accelerator, torch.tensor(flags, dtype=torch.float32)) > 0).tolist()
