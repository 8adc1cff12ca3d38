"""Measures an optimizer step on one CPU core, from sampling to AdamW, and compares it with TRL's distillation trainer.

    python benchmarks/step.py [--json PATH] [--markdown PATH] [--quick] [--vocab 4096 49152] [--allocator default|raised|both]

Workload: teacher Llama of 8 layers x 256, student of 2 x 128, random weights, 16 prompts of 32 tokens a step, up to 64 new tokens each
(1,024 response tokens unless one ends early), float32, one thread. Ours is `train_stage` with a sampler of `tadistill.rollout`; TRL's is
`DistillationTrainer.train` with gradient checkpointing and bf16 off, and once with its own defaults.

Every configuration is a fresh process. The processes of a group run side by side and take turns, one step each, round after round, so
other load on the machine affects all of them. A ratio is the median of the rounds' ratios. A step is everything between two
updates. The first rounds are dropped. If other work shares the core, CPU seconds are more reliable than wall seconds.

Memory is VmHWM after writing 5 to /proc/self/clear_refs, minus the resident set before the first step. It includes gradients and the
optimizer's state on both sides. Megabytes are 2^20 bytes. The floor is the matrix products' FLOPs over the machine's best sgemm rate.
`raised` repeats the run with glibc set to keep large blocks (on both sides), which saves both the page faults of every step.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import page
from step_sides import BATCH, NEW, PROMPT, STUDENT, TEACHER

WARM_UP = 2
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
REACHED = """
## What two bounds at V = 4,096 allow

`ours minillm` has a bound of 1.0, and `ours reverse_kl` has one of 0.65 with the raised allocator. To see what a faster program could gain,
the matrix products and the attention of one step were run again alone, with the same shapes. They take this share of the step's CPU time:

| step | products and attention | of the step | operations in all |
|---|---:|---:|---:|
| ours minillm | 0.67 s | 64 % | 40,000 |
| ours reverse_kl, raised | 0.45 s | 74 % | 14,600 |
| trl beta=1, raised | 0.51 s | 65 % | 14,200 |

These seconds were measured on cores with other load, so only their ratios count.

- **Reverse KL with the raised allocator** cannot meet its bound with the layers of transformers. Products and attention alone take 0.56 of
  TRL's step. The bound leaves 0.09 of it, 5 microseconds each, for more than 13,000 other operations and for Python. They take 0.19 today.
  Our step keeps freed memory in both settings, so only TRL's step becomes faster with the raised allocator.
- **MiniLLM** takes about as long as TRL's step. The teacher helps to sample: it reads prompts and responses in 28 calls, where TRL's
  teacher reads them in one. So products and attention take 0.16 s more than TRL's. A step calls the student 72 times. If the teacher
  waited for 75 % or all of the rows, in place of 50 %, there would be 23 or 20 calls of the teacher but 101 or 144 of the student, and
  sampling would take 8 or 26 % longer.
- The products run at 85 to 100 GFLOP/s from 32 rows on. Weights stored column by column, or packed by MKL, are not faster. Products by
  oneDNN are up to 25 % faster, but they round differently, so all numbers would change.
""".strip().splitlines()
"""What the page says about two bounds that are hard to meet, or cannot be met."""
COLUMNS = ["step", "s", "CPU s", "sampling CPU s", "tokens", "extra MB", "time ratio", "bound", "CPU ratio", "memory ratio", "over floor"]


# --- the floor ----------------------------------------------------------------------------------------------------------


def flops(vocab: int) -> float:
    """Return the FLOPs of a step's matrix products: the student's rollout, the teacher's forward, the student's forward and backward."""
    tokens, response = BATCH * (PROMPT + NEW), BATCH * NEW

    def body(s: dict[str, int]) -> float:
        h, f = s["hidden_size"], s["intermediate_size"]
        return s["num_hidden_layers"] * (2 * tokens * (4 * h * h + 3 * h * f) + 2 * tokens * (PROMPT + NEW) * h)

    def head(s: dict[str, int]) -> float:
        return 2 * response * s["hidden_size"] * vocab

    return body(TEACHER) + head(TEACHER) + 4 * (body(STUDENT) + head(STUDENT))


def sgemm_peak() -> float:
    """Return the best FLOP/s of several square products."""
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


# --- all sides ----------------------------------------------------------------------------------------------------------


def run_group(names: list[str], vocab: int, allocator: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the measured rounds of processes that take turns."""
    environment = os.environ | QUIET | (RAISED if allocator == "raised" else {})
    children, found = {}, {}
    with contextlib.ExitStack() as files:
        for name in names:
            command = [sys.executable, str(Path(__file__).with_name("step_sides.py")), name, str(vocab), str(rounds + WARM_UP)]
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
    """Return the child's next line."""
    assert child.stdout is not None
    said = child.stdout.readline()
    if not said:
        log.seek(0)
        raise SystemExit(f"{name} ended early:\n{log.read()[-4000:]}")
    return said


def rows(found: dict[str, dict[str, Any]], vocab: int, allocator: str, floor: float) -> list[dict[str, Any]]:
    """Return a table's rows: medians, and the ratio to TRL round by round."""
    table = []
    for name, result in found.items():
        seconds = [r["seconds"] for r in result["rounds"]]
        row: dict[str, Any] = {"step": name, "vocab": vocab, "allocator": allocator, "seconds": statistics.median(seconds)}
        row["cpu"] = statistics.median(r["cpu"] for r in result["rounds"])
        row["sampling"] = statistics.median(r["sampling"] for r in result["rounds"])
        row["tokens"] = statistics.mean(r["tokens"] for r in result["rounds"])
        row |= {"extra_mb": result["extra_mb"], "over_floor": row["seconds"] / floor}
        if (name, allocator) in BOUNDS:
            other, bounds = BOUNDS[name, allocator]
            theirs = found[other]
            row["time_ratio"] = statistics.median(a / b["seconds"] for a, b in zip(seconds, theirs["rounds"], strict=True))
            row["cpu_ratio"] = statistics.median(a["cpu"] / b["cpu"] for a, b in zip(result["rounds"], theirs["rounds"], strict=True))
            row["time_bound"] = bounds.get(vocab)
            row["memory_ratio"] = result["extra_mb"] / theirs["extra_mb"]
        table.append(row)
    return table


# --- report -------------------------------------------------------------------------------------------------------------


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text, in the order of its columns."""

    def number(key: str, digits: int) -> str:
        return f"{row[key]:,.{digits}f}" if row.get(key) is not None else ""

    bound = number("time_bound", 2)
    if bound:
        bound += " yes" if row["time_ratio"] <= row["time_bound"] else " NO"
    numbers = [number("seconds", 3), number("cpu", 3), number("sampling", 3), number("tokens", 0), number("extra_mb", 0)]
    memory = number("memory_ratio", 2)
    if memory and row["allocator"] == "default":
        memory += " yes" if row["memory_ratio"] <= MEMORY_BOUND else " NO"
    return [row["step"], *numbers, number("time_ratio", 2), bound, number("cpu_ratio", 2), memory, number("over_floor", 1)]


def tables(result: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (title, rows) by allocator and vocabulary."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        title = f"V = {row['vocab']:,}, {row['allocator']} allocator, floor {result['floor_s'][str(row['vocab'])]:.2f} s"
        found.setdefault(title, []).append(row)
    return list(found.items())


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = ["# A step: time and memory", ""]
    lines += ["This page shows time and memory of a whole optimizer step, compared with TRL's `DistillationTrainer`.", ""]
    lines += [f"```\n{result['command']}\n```", ""]
    lines += [f"{versions}; one thread; float32; sgemm at best {result['sgemm_gflops']:.0f} GFLOP/s."]
    for title, group in tables(result):
        lines += ["", f"## {title}", "", page.table(COLUMNS, [cells(row) for row in group])]
    return "\n".join([*lines, "", *REACHED, "", "`benchmarks/step.py` says what is measured, and how.", ""])


def main() -> None:
    parser = page.parser("Time and memory of an optimizer step.", "a vocabulary of 1,024 and two rounds")
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 49152])
    parser.add_argument("--allocator", choices=["default", "raised", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=8, help=f"measured rounds after {WARM_UP} that are dropped")
    options = parser.parse_args()
    vocabularies, rounds = ([1024], 2) if options.quick else (options.vocab, options.rounds)
    peak = sgemm_peak()
    result: dict[str, Any] = {
        "command": page.command(),
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
                    print(f"V {vocab}, {allocator}: {', '.join(c for c in cells(row) if c)}", file=sys.stderr)
                page.keep(options, result)
    page.write(options, result, markdown)


if __name__ == "__main__":
    main()
