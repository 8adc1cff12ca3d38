"""Runs one side of `step.py` in its own process: the workload, and our trainer or TRL's on it.

    python benchmarks/step_sides.py "ours reverse_kl" 4096 10

It prints a line when it is ready and after every step, and starts a step when it reads a line on stdin. The last line is the measurement,
as JSON.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from page import reset_peak, resident

BATCH, PROMPT, NEW, PROMPTS = 16, 32, 64, 256
TEACHER = {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 688}
STUDENT = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 344}


# --- the workload -------------------------------------------------------------------------------------------------------


def tokenizer(vocab: int) -> Any:
    """Return a tokenizer of whole words w0, w1, …: a prompt of 32 words has 32 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab - 2)} | {"<eos>": vocab - 2, "<pad>": vocab - 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def prompts(vocab: int) -> list[tuple[int, ...]]:
    """Return the random prompts, the same on both sides."""
    import numpy as np

    return [tuple(row) for row in np.random.default_rng(0).integers(vocab - 2, size=(PROMPTS, PROMPT)).tolist()]


def model(shape: dict[str, int], vocab: int, *, ends: bool = True) -> Any:
    """Return a Llama with random weights. With `ends`, it has the tokenizer's <eos> and <pad>."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": vocab - 2 if ends else None, "pad_token_id": vocab - 1 if ends else None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=256, **special, **shape)).float()


# --- a process that takes turns -----------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Takes turns with the other processes: a step starts at a line on stdin and ends with a line on stdout."""

    steps: int
    rounds: list[dict[str, float]] = field(default_factory=list)
    sampling: float = 0.0
    tokens: int = 0
    before: int = 0
    since: float = 0.0
    cpu: float = 0.0
    out: Any = None

    def start(self) -> None:
        """Start the clock; called once, before the first step."""
        reset_peak()
        self.before = resident("VmRSS")
        self._wait()

    def tick(self) -> None:
        """Record the end of a step."""
        seconds = time.perf_counter() - self.since
        cpu = time.process_time() - self.cpu
        self.rounds.append({"seconds": seconds, "cpu": cpu, "sampling": self.sampling, "tokens": self.tokens})
        if len(self.rounds) < self.steps:
            self._wait()

    def timed(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `sample` so that its CPU time is added to the step's sampling."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = sample(*args, **kwargs)
            self.sampling += time.process_time() - start
            return result

        return inner

    def report(self) -> dict[str, Any]:
        """Return the peak and the rounds."""
        return {"rounds": self.rounds, "extra_mb": (resident("VmHWM") - self.before) / 2**20}

    def _wait(self) -> None:
        print("done", file=self.out, flush=True)
        sys.stdin.readline()
        self.sampling, self.tokens = 0.0, 0
        self.since, self.cpu = time.perf_counter(), time.process_time()


def run_ours(name: str, vocab: int, clock: Clock) -> None:
    """Run `train_stage` until the clock has its steps."""
    from accelerate import Accelerator

    from tadistill.config.method import Method
    from tadistill.config.method_parts import Optim, Select
    from tadistill.errors import Interrupted
    from tadistill.models.flops_and_memory import keep_freed_memory
    from tadistill.models.modify import column_major
    from tadistill.train.loop import Hooks, train_stage
    from tadistill.train.step import make_step

    keep_freed_memory()  # this, and the teacher's layout, as in `tadistill run`
    optim = Optim(lr=1e-6, steps=clock.steps + 1, batch=BATCH, schedule="constant")
    sampler = {"type": "student", "max_new_tokens": NEW}
    if name == "minillm":  # a round of one batch: 16 rollouts and one update
        sampler |= {"type": "teacher_mixed", "alpha": 0.2, "rollouts": BATCH, "inner_epochs": 1}
    method = Method.model_validate({"objective": {"type": name}, "sampler": sampler, "optim": optim, "select": Select(metric="last")})
    student, teacher = model(STUDENT, vocab).eval(), column_major(model(TEACHER, vocab).eval().requires_grad_(False))
    source = our_sampler(method, student, teacher, vocab)
    source.micro_batches = counted(clock.timed(source.micro_batches), clock)

    def stop() -> bool:
        """Return whether to stop; the loop asks before every update, also the first."""
        clock.tick() if clock.since else clock.start()
        return len(clock.rounds) == clock.steps

    hooks = Hooks(evaluate=dict, progress=lambda done, text: None, stop=stop)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Interrupted):
        train_stage(
            student,
            make_step(method, student, (teacher,), vocab),
            source,
            optim=optim,
            select=method.select,
            seed=0,
            accelerator=Accelerator(cpu=True, gradient_accumulation_steps=1),
            directory=Path(folder),
            hooks=hooks,
            checkpoint_seconds=1e9,
        )


def our_sampler(method: Any, student: Any, teacher: Any, vocab: int) -> Any:
    """Return a sampler that draws fresh rollouts for every update."""
    from tadistill.data.encoding import Encoded
    from tadistill.rollout.engine import Native
    from tadistill.rollout.rounds import Rollouts

    encoded = [Encoded(row, tokens, ()) for row, tokens in enumerate(prompts(vocab))]
    engine = Native(student, method.sampler, eos=(vocab - 2,), vocab=vocab)
    return Rollouts(encoded, method, engine=engine, teachers=(teacher,), vocab=vocab, pad=vocab - 1, seed=0)


def counted(micro_batches: Callable[[int], list[Any]], clock: Clock) -> Callable[[int], list[Any]]:
    """Wrap `micro_batches` so that it reports the response tokens to the clock."""

    def inner(step: int) -> list[Any]:
        batches = micro_batches(step)
        clock.tokens += sum(int(b.mask_BT.sum()) for b in batches)
        return batches

    return inner


def run_trl(name: str, vocab: int, clock: Clock) -> None:
    """Run `DistillationTrainer.train` for the clock's steps."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Turns(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.tick()

    class Counting(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.tokens += int(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    defaults = name.endswith("its defaults")
    texts = [" ".join(f"w{t}" for t in row) for row in prompts(vocab)]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            beta=0.5 if "0.5" in name else 1.0,
            max_completion_length=NEW,
            per_device_train_batch_size=BATCH,
            max_steps=clock.steps,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
            **({} if defaults else {"gradient_checkpointing": False, "bf16": False}),
        )
        trainer = Counting(
            model=model(STUDENT, vocab),
            teacher_model=model(TEACHER, vocab),
            args=config,
            processing_class=tokenizer(vocab),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            callbacks=[Turns()],
        )
        trainer._generate_single_turn = clock.timed(trainer._generate_single_turn)
        trainer.train()


def run_one(name: str, vocab: int, steps: int) -> None:
    """Run a child process; everything except the protocol goes to stderr."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    clock = Clock(steps, out=os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    (run_ours if name.startswith("ours") else run_trl)(name.removeprefix("ours "), vocab, clock)
    print(json.dumps(clock.report()), file=clock.out, flush=True)


if __name__ == "__main__":
    run_one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
