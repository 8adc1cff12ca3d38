"""Checks shared by the objectives: one sentence that names the argument, its value and the range.

A NaN is looked for in the result (one value per token), never in the logits, so the check costs nothing on a CPU and one
synchronisation on a GPU. `deferred()` leaves it to the caller, who then looks once for many tiles.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from tadistill.errors import ConfigError

_deferred = ContextVar("_deferred", default=False)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, checks that read tensors are left out: a NaN is passed on instead of raised."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def is_deferred() -> bool:
    """Whether checks that read tensors are left to the caller, who has made them."""
    return _deferred.get() or torch.compiler.is_compiling()


def pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise unless both are of one shape (..., V) with V >= 1."""
    if student_logits.shape != teacher_logits.shape:
        raise ConfigError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} differ in shape; "
            "cut both to the shared vocabulary and the same positions"
        )
    if student_logits.ndim == 0 or student_logits.shape[-1] == 0:
        raise ConfigError(f"student_logits has shape {tuple(student_logits.shape)}; the last axis is the vocabulary, at least 1 wide")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise unless low <= value <= high."""
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must be in [{low:g}, {high:g}]")


def positive(name: str, value: float) -> None:
    """Raise unless value is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}; it must be a finite number above 0")


def finite(name: str, value: float) -> None:
    """Raise unless value is finite."""
    if not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number")


def result(value: Tensor, **arguments: Tensor) -> Tensor:
    """`value`, unless it has a NaN: then raise, naming the argument that brought it in."""
    if is_deferred() or not bool(value.isnan().any()):
        return value
    for name, argument in arguments.items():
        if bool((argument.isnan() | argument.isposinf()).any()):
            raise ConfigError(f"{name} has NaN or +inf values; they must be numbers in [-inf, inf) (the model has diverged, or overflowed)")
    raise ConfigError(f"the divergence of {' and '.join(arguments)} overflowed; their finite values must stay within +-1e15")
