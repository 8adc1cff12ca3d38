"""Parts of the kit about the fused head: its numbers at a vocabulary of 151,936, and its time beside Liger's kernel and TRL's."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench import Kit, relative
from torch import Tensor
from torch.nn import functional

from tadistill import objectives
from tadistill.objectives import Head, Hidden, fused_divergence
from tadistill.objectives.checks import deferred

Divergence = Callable[..., Tensor]
VOCAB = 151936
"""Qwen2.5's vocabulary."""


@dataclass
class Inputs:
    """Hidden states and heads of a student and a teacher. The student's are leaves with gradients."""

    hidden: Tensor
    weight: Tensor
    states: Tensor
    teacher: Tensor

    @classmethod
    def random(cls, device: torch.device, tokens: int, vocab: int, width: int, teacher_width: int) -> "Inputs":
        draw = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int, spread: float) -> Tensor:
            return torch.randn(rows, columns, device=device, generator=draw) * spread

        hidden, weight = normal(tokens, width, 1), normal(vocab, width, 3 / math.sqrt(width))
        states, teacher = normal(tokens, teacher_width, 1), normal(vocab, teacher_width, 3 / math.sqrt(teacher_width))
        return cls(hidden.requires_grad_(), weight.requires_grad_(), states, teacher)

    def to(self, dtype: torch.dtype) -> "Inputs":
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight))
        return Inputs(hidden, weight, self.states.to(dtype), self.teacher.to(dtype))

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def ours(inputs: Inputs, divergence: Divergence, half: bool, **settings: Any) -> Tensor:
    """Return the mean loss of the fused head, with gradients."""
    inputs.clear()
    share = torch.full((len(inputs.hidden),), 1 / len(inputs.hidden), device=inputs.hidden.device)
    with torch.autocast(inputs.hidden.device.type, torch.bfloat16, enabled=half):
        target = Hidden(inputs.states, Head(inputs.teacher))
        total, _ = fused_divergence(divergence, inputs.hidden, Head(inputs.weight), target, mask=share, **settings)
    total.backward()
    return total.detach()


def plain(inputs: Inputs, divergence: Divergence, half: bool, rows: int | None = None) -> Tensor:
    """Return the mean loss on whole logits, with gradients. `rows` tokens are computed at a time."""
    inputs.clear()
    size, total = rows or len(inputs.hidden), torch.zeros((), device=inputs.hidden.device, dtype=torch.float64)
    for at in range(0, len(inputs.hidden), size):
        here = slice(at, at + size)
        with torch.autocast(inputs.hidden.device.type, torch.bfloat16, enabled=half):
            z, t = functional.linear(inputs.hidden[here], inputs.weight), functional.linear(inputs.states[here], inputs.teacher)
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        with deferred():
            part = divergence(z.to(wide), t.to(wide)).sum() / len(inputs.hidden)
        part.backward()
        total += part.detach()
    return total


@contextmanager
def tf32() -> Iterator[None]:
    """Let CUDA round the float32 inputs of products to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# --- numbers ------------------------------------------------------------------------------------------------------------


def head(kit: Kit) -> None:
    """The fused head against whole logits in float64, in float32 and in bf16."""
    sizes = (12, 331, 16, 24) if kit.tiny else (192, VOCAB, 896, 1024)
    inputs = Inputs.random(kit.device, *sizes)
    for name in ("forward_kl", "reverse_kl", "jensen_shannon"):
        divergence = getattr(objectives, name)
        exact = inputs.to(torch.float64)
        expected = plain(exact, divergence, half=False)

        def errors(got: Tensor, expected: Tensor = expected, exact: Inputs = exact) -> tuple[float, float, float]:
            gradients = relative(inputs.hidden.grad, exact.hidden.grad), relative(inputs.weight.grad, exact.weight.grad)  # type: ignore[arg-type]
            return abs(float(got) - float(expected)) / abs(float(expected)), *gradients

        value, hidden, weight = errors(ours(inputs, divergence, half=False))
        kit.at_most(f"{name}, float32: loss", value, 1e-4)
        kit.at_most(f"{name}, float32: gradient of hidden states", hidden, 1e-3)
        kit.at_most(f"{name}, float32: gradient of the head", weight, 1e-3)
        _, whole_hidden, whole_weight = errors(plain(inputs, divergence, half=True))
        _, hidden, weight = errors(ours(inputs, divergence, half=True))
        kit.at_most(f"{name}, bf16: gradient of hidden states, as a part of the error on whole logits", hidden / whole_hidden, 1.1)
        kit.at_most(f"{name}, bf16: gradient of the head, as a part of the error on whole logits", weight / whole_weight, 1.1)
        if kit.cuda:
            with tf32():
                kit.note(f"{name}, float32 with TF32: loss", errors(ours(inputs, divergence, half=False))[0])
        del exact
        kit.free()


# --- time and memory ----------------------------------------------------------------------------------------------------


def head_speed(kit: Kit) -> None:
    """Milliseconds and peak memory of loss and gradients: the fused head, whole logits, TRL's kernel, Liger's."""
    for tokens in (32,) if kit.tiny else (4096, 16384):
        kit.free()
        _head_speed(kit, *((tokens, 331, 16, 24) if kit.tiny else (tokens, VOCAB, 896, 3584)))


def _head_speed(kit: Kit, tokens: int, vocab: int, width: int, teacher_width: int) -> None:
    inputs, title = Inputs.random(kit.device, tokens, vocab, width, teacher_width), f"N = {tokens:,}, V = {vocab:,}"
    flops = 2 * tokens * vocab * (3 * width + teacher_width)
    kit.note(f"{title}: GFLOP of the products", flops / 1e9)
    found: dict[str, tuple[float, float | None]] = {}

    def measured(name: str, work: Callable[[], Any]) -> None:
        with kit.attempt(f"{title}, {name}"):
            inputs.clear()
            kit.free()
            before = kit.allocated()  # with the inputs in bf16 that only Liger's kernel has
            taken = kit.milliseconds(work)
            found[name] = taken, None if before is None else (kit.peak() or 0) - before
            kit.note(f"{title}, {name}: ms", taken)
            kit.note(f"{title}, {name}: TFLOP/s", flops / taken / 1e9)
            if before is not None:
                kit.note(f"{title}, {name}: GB above the inputs", found[name][1])

    measured("ours, reverse KL, bf16", lambda: ours(inputs, objectives.reverse_kl, half=True))
    measured("ours, JSD, bf16", lambda: ours(inputs, objectives.jensen_shannon, half=True, beta=0.5))
    # torch's compiler makes a few kernels of the objective's many; on a CPU, these lines run without compiling, which takes a minute
    backend = "inductor" if kit.cuda else "eager"
    reverse_kl, jsd = (torch.compile(f, dynamic=True, backend=backend) for f in (objectives.reverse_kl, objectives.jensen_shannon))
    measured("ours, compiled objective, reverse KL, bf16", lambda: ours(inputs, reverse_kl, half=True))
    measured("ours, compiled objective, JSD, bf16", lambda: ours(inputs, jsd, half=True, beta=0.5))
    measured("ours, reverse KL, float32", lambda: ours(inputs, objectives.reverse_kl, half=False))
    measured("whole logits, 1,024 tokens at a time, reverse KL, bf16", lambda: plain(inputs, objectives.reverse_kl, True, 1024))
    for name, beta in (("reverse KL", 1.0), ("JSD", 0.5)):
        if importlib.util.find_spec("trl"):
            measured(f"TRL, {name}, bf16", partial(by_trl, inputs, beta))
        if importlib.util.find_spec("liger_kernel") and kit.cuda:
            half = inputs.to(torch.bfloat16)  # Liger's kernel takes bf16 tensors; making them is not timed
            measured(f"Liger, {name}, bf16", partial(by_liger, half, beta))
            del half
        for peer in ("TRL", "Liger"):
            theirs, mine = found.get(f"{peer}, {name}, bf16"), found.get(f"ours, {name}, bf16")
            if theirs and mine and not kit.tiny:
                kit.at_most(f"{title}, {name}: time as a part of {peer}'s", mine[0] / theirs[0], 1.0)
                if mine[1] and theirs[1]:
                    kit.at_most(f"{title}, {name}: memory above the inputs as a part of {peer}'s", mine[1] / theirs[1], 1.0)


def by_trl(inputs: Inputs, beta: float) -> Tensor:
    """Run the kernel of TRL's distillation trainer. Under autocast it computes in bf16, as ours does."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    inputs.clear()
    with torch.autocast(inputs.hidden.device.type, torch.bfloat16):
        values, _ = ChunkedDivergenceFunction.apply(inputs.hidden, inputs.weight, None, inputs.states, inputs.teacher, None, beta)
    loss = values.mean()
    loss.backward()
    return loss.detach()


def by_liger(half: Inputs, beta: float) -> Tensor:
    """Run Liger's kernel on bf16 tensors, with a float32 sum of the head's gradient, as ours has."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    half.clear()
    loss = LigerFusedLinearJSD(jsd_beta=beta, accum_dtype=torch.float32)(half.hidden, half.weight, half.states, half.teacher, None)
    loss.backward()
    return loss.detach()
