"""Checks of arguments that all objectives use. Each error message names the argument, its value and the allowed range.

The checks look for NaN in the result and not in the logits. If a logit is NaN, the result is also NaN, and the result has only one value
per token. So this check takes almost no time on a CPU, and one synchronisation on a GPU. `deferred()` skips the checks of tensors' values.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from tadistill.errors import ConfigError

# This is a context variable and not an argument, so that the public functions have no argument that only the fused head uses.
_deferred = ContextVar("_deferred", default=False)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the `with` block, the checks that read the values of tensors are skipped. A NaN in a result then raises no error."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def is_deferred() -> bool:
    """Return True if checks that read the values of tensors are skipped: inside `deferred()`, and in code that torch compiles."""
    return torch.compiler.is_compiling() or _deferred.get()  # in this order: torch cannot compile a context variable


def tensor(name: str, value: Any) -> None:
    """Raise a ConfigError unless `value` is a tensor, and not the whole output of a model, for instance."""
    if not isinstance(value, Tensor):
        own = "its `logits`" if hasattr(value, "logits") else "a tensor"
        raise ConfigError(f"`{name}` is a {type(value).__name__}, but it must be a tensor; give {own}")


def number(name: str, value: Any) -> None:
    """Raise a ConfigError unless `value` is a number or a tensor."""
    if not hasattr(value, "__float__"):
        raise ConfigError(f"`{name}` is {value!r}; it must be a number")


def check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise a ConfigError unless both are tensors of the same shape (..., V) with V >= 1."""
    tensor("student_logits", student_logits)
    tensor("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ConfigError(
            f"`student_logits` has shape {tuple(student_logits.shape)}, but `teacher_logits` has shape {tuple(teacher_logits.shape)}; "
            "give both for the same positions and the same vocabulary"
        )
    if student_logits.ndim == 0 or student_logits.shape[-1] == 0:
        raise ConfigError(
            f"`student_logits` has shape {tuple(student_logits.shape)}; its last axis must be the vocabulary, with a size of at least 1"
        )


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise a ConfigError unless low <= value <= high."""
    number(name, value)
    if not low <= value <= high:
        raise ConfigError(f"`{name}` is {value}; it must be in [{low:g}, {high:g}]")


def positive(name: str, value: float) -> None:
    """Raise a ConfigError unless `value` is finite and above 0."""
    number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"`{name}` is {value}; it must be a finite number above 0")


def finite(name: str, value: float) -> None:
    """Raise a ConfigError unless `value` is finite."""
    number(name, value)
    if not math.isfinite(value):
        raise ConfigError(f"`{name}` is {value}; it must be a finite number")


def not_float16(dtypes: Collection[torch.dtype | None]) -> None:
    """Raise a ConfigError if `dtypes`, in which gradients are computed or returned, contain float16.

    The fused loss computes the gradient in the forward pass. A loss scale multiplies it only later, when it has underflowed.
    """
    if torch.float16 in dtypes:
        raise ConfigError(
            "the fused loss has no gradient in float16, because small values become 0 before a loss scale can enlarge them; use bfloat16 "
            "(`bf16=True` in place of `fp16=True`), or call the objective on logits"
        )


def result(value: Tensor, **arguments: Tensor) -> Tensor:
    """Return `value` if it contains no NaN. Otherwise raise a ConfigError that names the argument with the NaN."""
    if is_deferred() or not bool(value.isnan().any()):
        return value
    for name, argument in arguments.items():
        if bool((argument.isnan() | argument.isposinf()).any()):
            raise ConfigError(f"`{name}` contains NaN or +inf, usually because the model has diverged; its values must be finite or -inf")
    raise ConfigError(
        f"the divergence of {' and '.join(arguments)} overflows; all finite values in these arguments must be between -1e15 and 1e15"
    )
