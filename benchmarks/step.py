"""What an optimizer step costs on one CPU core, from sampling to AdamW, beside TRL's distillation trainer.

    python benchmarks/step.py [--json PATH] [--markdown PATH] [--quick] [--vocab 4096 49152] [--allocator default|raised|both]

Workload: teacher Llama of 8 layers x 256, student of 2 x 128, random weights, 16 prompts of 32 tokens a step, up to 64 new tokens each
(1,024 response tokens unless one ends early), float32, one thread. Ours is `train_stage` with a sampler of `tadistill.rollout`; TRL's is
`DistillationTrainer.train` with gradient checkpointing and bf16 off, and once with its own defaults.

Every configuration is a fresh process. The processes of a group live side by side and take turns, one step each, round after round, so
that a disturbance from outside hits all of them; a ratio is the median of the rounds' ratios. A step is everything between two
updates. The first rounds are dropped.

Memory is VmHWM after writing 5 to /proc/self/clear_refs, less the resident set then, before the first step: it holds gradients and the
optimizer's state on both sides. Megabytes are 2^20 bytes. The floor is the matrix products' FLOPs over the machine's best sgemm rate.
`raised` repeats the run with glibc told to keep large blocks (both sides alike), which spares both the page faults of every step.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BATCH, PROMPT, NEW, PROMPTS = 16, 32, 64, 256
WARM_UP = 2
TEACHER = {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 688}
STUDENT = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 344}
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}
QUIET = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
}

GROUPS = [["ours reverse_kl", "ours minillm", "trl beta=1"], ["ours jensen_shannon", "trl beta=0.5"]]
TRL_DEFAULTS = "trl beta=1, its defaults"
BOUNDS = {
    ("ours reverse_kl", "default"): ("trl beta=1", {4096: 0.65, 49152: 0.4}),
    ("ours jensen_shannon", "default"): ("trl beta=0.5", {4096: 0.6, 49152: 0.3}),
    ("ours minillm", "default"): ("trl beta=1", {4096: 1.0, 49152: 0.8}),
    ("ours reverse_kl", "raised"): ("trl beta=1", {4096: 0.65, 49152: 0.65}),
    ("ours jensen_shannon", "raised"): ("trl beta=0.5", {}),
    ("ours minillm", "raised"): ("trl beta=1", {}),
}
"""(ours, allocator): TRL's side, and the largest ratio of step times by vocabulary."""
MEMORY_BOUND = 1 / 3
COLUMNS = ["step", "s", "sampling s", "tokens", "extra MB", "time ratio", "bound", "memory ratio", "over floor"]


# --- the workload -------------------------------------------------------------------------------------------------------


def tokenizer(vocab: int) -> Any:
    """Whole words w0, w1, …: a prompt of 32 words has 32 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab - 2)} | {"<eos>": vocab - 2, "<pad>": vocab - 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def prompts(vocab: int) -> list[tuple[int, ...]]:
    """The same random tokens for everyone."""
    import numpy as np

    return [tuple(row) for row in np.random.default_rng(0).integers(vocab - 2, size=(PROMPTS, PROMPT)).tolist()]


def model(shape: dict[str, int], vocab: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": vocab - 2, "pad_token_id": vocab - 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=256, **special, **shape)).float()


def flops(vocab: int) -> float:
    """Of a step's matrix products: the student's rollout, the teacher's forward, the student's forward and backward."""
    tokens, response = BATCH * (PROMPT + NEW), BATCH * NEW

    def body(s: dict[str, int]) -> float:
        h, f = s["hidden_size"], s["intermediate_size"]
        return s["num_hidden_layers"] * (2 * tokens * (4 * h * h + 3 * h * f) + 2 * tokens * (PROMPT + NEW) * h)

    def head(s: dict[str, int]) -> float:
        return 2 * response * s["hidden_size"] * vocab

    return body(TEACHER) + head(TEACHER) + 4 * (body(STUDENT) + head(STUDENT))


def sgemm_peak() -> float:
    """FLOP/s of the best of several square products."""
    import torch

    torch.set_num_threads(1)
    best = 0.0
    for n in (1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


# --- one side, in a process of its own ----------------------------------------------------------------------------------


@dataclass
class Clock:
    """Takes turns with the other processes: a step starts at a line on stdin and ends with a line on stdout."""

    steps: int
    rounds: list[dict[str, float]] = field(default_factory=list)
    sampling: float = 0.0
    tokens: int = 0
    before: int = 0
    since: float = 0.0
    out: Any = None

    def start(self) -> None:
        """Called once, before the first step."""
        Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")
        self._wait()

    def tick(self) -> None:
        """A step is over."""
        seconds = time.perf_counter() - self.since
        self.rounds.append({"seconds": seconds, "sampling": self.sampling, "tokens": self.tokens})
        if len(self.rounds) < self.steps:
            self._wait()

    def timed(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        """`sample`, with its time added to the step's sampling."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = sample(*args, **kwargs)
            self.sampling += time.perf_counter() - start
            return result

        return inner

    def report(self) -> dict[str, Any]:
        """Peak and rounds."""
        return {"rounds": self.rounds, "extra_mb": (resident("VmHWM") - self.before) / 2**20}

    def _wait(self) -> None:
        print("done", file=self.out, flush=True)
        sys.stdin.readline()
        self.sampling, self.tokens, self.since = 0.0, 0, time.perf_counter()


def resident(name: str) -> int:
    """Bytes of this process, from Linux's status file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run_ours(name: str, vocab: int, clock: Clock) -> None:
    """`train_stage` until the clock has its steps."""
    from accelerate import Accelerator

    from tadistill.config.method import Method, Optim, Select
    from tadistill.train.loop import Hooks, Interrupted, train_stage
    from tadistill.train.step import make_step

    optim = Optim(lr=1e-6, steps=clock.steps + 1, batch=BATCH, schedule="constant")
    method = Method.model_validate({"objective": {"type": name}, "optim": optim, "select": Select(metric="last")})
    student, teacher = model(STUDENT, vocab).eval(), model(TEACHER, vocab).eval().requires_grad_(False)
    sampler = our_sampler(name, method, student, teacher, vocab)
    sampler.micro_batches = counted(clock.timed(sampler.micro_batches), clock)

    def stop() -> bool:
        """The loop asks before every update, the first one too."""
        clock.tick() if clock.since else clock.start()
        return len(clock.rounds) == clock.steps

    hooks = Hooks(evaluate=dict, progress=lambda done, text: None, stop=stop)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Interrupted):
        train_stage(
            student,
            make_step(method, student, teacher, vocab),
            sampler,
            optim=optim,
            select=method.select,
            seed=0,
            accelerator=Accelerator(cpu=True, gradient_accumulation_steps=1),
            directory=Path(folder),
            hooks=hooks,
            checkpoint_seconds=1e9,
        )


def our_sampler(name: str, method: Any, student: Any, teacher: Any, vocab: int) -> Any:
    """Fresh rollouts for every update: mixed with the teacher for MiniLLM, the student's own for the divergences."""
    from tadistill.config.method import TeacherMixedSampler
    from tadistill.data.templates import Encoded
    from tadistill.rollout.samplers import TeacherMixedRollouts

    encoded = [Encoded(row, tokens, ()) for row, tokens in enumerate(prompts(vocab))]
    config = TeacherMixedSampler(alpha=0.2 if name == "minillm" else 0.0, rollouts=BATCH, inner_epochs=1, max_new_tokens=NEW)
    special = {"eos": vocab - 2, "pad": vocab - 1}
    if name == "minillm":
        return TeacherMixedRollouts(encoded, config, method.optim, student=student, teacher=teacher, vocab=vocab, seed=0, **special)
    return StudentRollouts(encoded, student, vocab, **special)


class StudentRollouts:
    """Prompts in order, answered by the student."""

    def __init__(self, encoded: list[Any], student: Any, vocab: int, *, eos: int, pad: int):
        self.prompts, self.student, self.vocab, self.eos, self.pad = [e.prompt for e in encoded], student, vocab, eos, pad

    def micro_batches(self, step: int) -> list[Any]:
        from tadistill import rng
        from tadistill.data.batch import Sequence, collate
        from tadistill.rollout.generate import sample

        chosen = [self.prompts[i % PROMPTS] for i in range(step * BATCH, (step + 1) * BATCH)]
        found = sample(self.student, chosen, rng.uniforms(range(BATCH), NEW, 0, "rollout", step), eos=self.eos, vocab=self.vocab)
        return [collate([Sequence(p, r.tokens) for p, r in zip(chosen, found, strict=True)], pad=self.pad)]

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def counted(micro_batches: Callable[[int], list[Any]], clock: Clock) -> Callable[[int], list[Any]]:
    """`micro_batches`, with the response tokens told to the clock."""

    def inner(step: int) -> list[Any]:
        batches = micro_batches(step)
        clock.tokens += sum(int(b.mask_BT.sum()) for b in batches)
        return batches

    return inner


def run_trl(name: str, vocab: int, clock: Clock) -> None:
    """`DistillationTrainer.train` for the clock's steps."""
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
    """A child: everything but the protocol goes to stderr."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    clock = Clock(steps, out=os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    (run_ours if name.startswith("ours") else run_trl)(name.removeprefix("ours "), vocab, clock)
    print(json.dumps(clock.report()), file=clock.out, flush=True)


# --- all sides ----------------------------------------------------------------------------------------------------------


def run_group(names: list[str], vocab: int, allocator: str, rounds: int) -> dict[str, dict[str, Any]]:
    """The measured rounds of processes that take turns."""
    environment = os.environ | QUIET | (RAISED if allocator == "raised" else {})
    children, found = {}, {}
    with contextlib.ExitStack() as files:
        for name in names:
            command = [sys.executable, __file__, "--one", json.dumps([name, vocab, rounds + WARM_UP])]
            log = files.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
            children[name] = child, log
            answer(name, child, log)
        for turn in range(rounds + WARM_UP):
            for name, (child, log) in children.items():
                assert child.stdin is not None
                child.stdin.write("go\n")
                child.stdin.flush()
                said = answer(name, child, log)
                if turn == rounds + WARM_UP - 1:
                    found[name] = json.loads(said)
                    child.wait()
    for result in found.values():
        result["rounds"] = result["rounds"][WARM_UP:]
    return found


def answer(name: str, child: subprocess.Popen, log: Any) -> str:
    """The child's next line."""
    assert child.stdout is not None
    said = child.stdout.readline()
    if not said:
        log.seek(0)
        raise SystemExit(f"{name} ended early:\n{log.read()[-4000:]}")
    return said


def rows(found: dict[str, dict[str, Any]], vocab: int, allocator: str, floor: float) -> list[dict[str, Any]]:
    """A table's rows: medians, and ours over TRL's round by round."""
    table = []
    for name, result in found.items():
        seconds = [r["seconds"] for r in result["rounds"]]
        row: dict[str, Any] = {"step": name, "vocab": vocab, "allocator": allocator, "seconds": statistics.median(seconds)}
        row["sampling"] = statistics.median(r["sampling"] for r in result["rounds"])
        row["tokens"] = statistics.mean(r["tokens"] for r in result["rounds"])
        row |= {"extra_mb": result["extra_mb"], "over_floor": row["seconds"] / floor}
        if (name, allocator) in BOUNDS:
            other, bounds = BOUNDS[name, allocator]
            theirs = found[other]
            row["time_ratio"] = statistics.median(a / b["seconds"] for a, b in zip(seconds, theirs["rounds"], strict=True))
            row["time_bound"] = bounds.get(vocab)
            row["memory_ratio"] = result["extra_mb"] / theirs["extra_mb"]
        table.append(row)
    return table


# --- report -------------------------------------------------------------------------------------------------------------


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of its columns."""

    def number(key: str, digits: int) -> str:
        return f"{row[key]:,.{digits}f}" if row.get(key) is not None else ""

    bound = number("time_bound", 2)
    if bound:
        bound += " yes" if row["time_ratio"] <= row["time_bound"] else " NO"
    numbers = [number("seconds", 3), number("sampling", 3), number("tokens", 0), number("extra_mb", 0)]
    memory = number("memory_ratio", 2)
    if memory and row["allocator"] == "default":
        memory += " yes" if row["memory_ratio"] <= MEMORY_BOUND else " NO"
    return [row["step"], *numbers, number("time_ratio", 2), bound, memory, number("over_floor", 1)]


def tables(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) by allocator and vocabulary."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        title = f"V = {row['vocab']:,}, {row['allocator']} allocator, floor {result['floor_s'][str(row['vocab'])]:.2f} s"
        found.setdefault(title, []).append(row)
    return list(found.items())


def show(console: Console, result: dict[str, Any]) -> None:
    """Tables on the terminal."""
    for title, group in tables(result):
        table = Table(*COLUMNS, title=title)
        for row in group:
            table.add_row(*cells(row))
        console.print(table)


def markdown(result: dict[str, Any]) -> str:
    """The same as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = ["# A step: time and memory", "", f"```\n{result['command']}\n```", ""]
    lines += [f"{versions}; one thread; float32; sgemm at best {result['sgemm_gflops']:.0f} GFLOP/s."]
    for title, group in tables(result):
        lines += ["", f"## {title}", "", "| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in group]
    return "\n".join([*lines, "", "What is measured, and how, is said in `benchmarks/step.py`.", ""])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of an optimizer step.")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    parser.add_argument("--quick", action="store_true", help="a vocabulary of 1,024 and two rounds: says that it runs, not how fast")
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 49152])
    parser.add_argument("--allocator", choices=["default", "raised", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=8, help=f"measured rounds after {WARM_UP} that are dropped")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # what a fresh process measures
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.one:
        run_one(*options.one)
        return
    from importlib.metadata import version

    vocabularies, rounds = ([1024], 2) if options.quick else (options.vocab, options.rounds)
    peak = sgemm_peak()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "sgemm_gflops": peak / 1e9,
        "floor_s": {str(v): flops(v) / peak for v in vocabularies},
        "rows": [],
    }
    for allocator in ["default", "raised"] if options.allocator == "both" else [options.allocator]:
        for vocab in vocabularies:
            for group in GROUPS:
                names = [*group, TRL_DEFAULTS] if group is GROUPS[0] and allocator == "default" else group
                found = run_group(names, vocab, allocator, rounds)
                result["rows"] += rows(found, vocab, allocator, result["floor_s"][str(vocab)])
                for row in result["rows"][-len(found) :]:
                    Console(stderr=True).print(f"V {vocab}, {allocator}: {', '.join(c for c in cells(row) if c)}")
                if options.json:
                    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(Console(), result)
    if options.markdown:
        options.markdown.write_text(markdown(result))


if __name__ == "__main__":
    main()
