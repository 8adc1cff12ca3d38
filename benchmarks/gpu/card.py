"""Part of the kit about the card alone: what it can give at most, without any code of tadistill."""

import time
from typing import Any

import torch
from bench import Kit


def card(kit: Kit) -> None:
    """Rates of matrix products and copies, and the costs of a launch and of a wait."""
    size = 128 if kit.tiny else 8192
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(size, size, device=kit.device).to(dtype) for _ in range(2))
        kit.note(f"{size} x {size} products in {name}: TFLOP/s", _rate(kit, a, b))
        if kit.cuda and dtype == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = True
            kit.note(f"{size} x {size} products in TF32: TFLOP/s", _rate(kit, a, b))
            torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(2**16 if kit.tiny else 2**30, dtype=torch.uint8, device=kit.device)
    target = torch.empty_like(source)
    kit.note("copies, bytes read and written: GB/s", 2 * source.numel() / kit.milliseconds(lambda: target.copy_(source)) / 1e6)
    with kit.attempt("bf16 products written as float32"):
        a, b = (torch.ones(16, 16, device=kit.device, dtype=torch.bfloat16) for _ in range(2))
        kit.note("bf16 products written as float32", str(torch.mm(a, b, out_dtype=torch.float32).dtype))
    number = torch.ones(1, device=kit.device)
    kit.note("a launch: µs", _microseconds(kit, lambda: number.add_(1), 100 if kit.tiny else 2000))
    kit.note("a wait: µs", _microseconds(kit, number.item, 100 if kit.tiny else 500))
    if kit.cuda:
        kit.note("GB of memory", torch.cuda.get_device_properties(0).total_memory / 1e9)


def _rate(kit: Kit, a: torch.Tensor, b: torch.Tensor) -> float:
    return 2 * len(a) ** 3 / kit.milliseconds(lambda: a @ b) / 1e9


def _microseconds(kit: Kit, work: Any, times: int) -> float:
    kit.wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    kit.wait()
    return 1e6 * (time.perf_counter() - start) / times
