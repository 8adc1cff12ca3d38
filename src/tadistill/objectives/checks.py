"""Checks of arguments that all objectives use. Each error message names the argument, its value and the allowed range.

The checks look for NaN in the result and not in the logits. If a logit is NaN, the result is also NaN, and the result has only one value
per token. So this check takes almost no time on a CPU, and one synchronisation on a GPU. `deferred()` skips the checks of tensors' values.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from tadistill.errors import ConfigError

T = TypeVar("T")

# These are context variables and not arguments, so that the public functions have no arguments that only the fused head uses.
_deferred = ContextVar("_deferred", default=False)
_finite = ContextVar("_finite", default=False)


@contextmanager
def held(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Inside the `with` block, the variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def deferred() -> AbstractContextManager[None]:
    """Inside the `with` block, the checks that read the values of tensors are skipped. A NaN in a result then raises no error."""
    return held(_deferred, True)


def is_deferred() -> bool:
    """Return True if checks that read the values of tensors are skipped: inside `deferred()`, and in code that torch compiles."""
    return torch.compiler.is_compiling() or _deferred.get()  # in this order: torch cannot compile a context variable


def finite_logits(known: bool) -> AbstractContextManager[None]:
    """Inside the `with` block, the objectives do not replace logits of -inf, if it is `known` that there are none."""
    return held(_finite, known)


def are_finite() -> bool:
    """Return True if it is known that no logit is -inf: inside `finite_logits(True)`, but not in code that torch compiles."""
    return not torch.compiler.is_compiling() and _finite.get()


def tensor(name: str, value: Any) -> None:
    """Raise a ConfigError unless `value` is a tensor, and not the whole output of a model, for instance."""
    if not isinstance(value, Tensor):
        own = "its `logits`" if hasattr(value, "logits") else "a tensor"
        raise ConfigError(f"`{name}` is a {type(value).__name__}, but it must be a tensor; give {own}")


def number(name: str, value: Any) -> None:
    """Raise a ConfigError unless `value` is a number or a tensor with one."""
    if not hasattr(value, "__float__"):
        raise ConfigError(f"`{name}` is {value!r}; it must be a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigError(f"`{name}` is a tensor of shape {tuple(value.shape)}; it must be one number")


def choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raise a ConfigError unless `value` is one of the texts in `allowed`."""
    if value not in allowed:
        raise ConfigError(f"`{name}` is {value!r}; it must be {' or '.join(f'`{text}`' for text in allowed)}")


def booleans(name: str, value: Any) -> None:
    """Raise a ConfigError unless `value` is a tensor of booleans."""
    tensor(name, value)
    if value.dtype != torch.bool:
        raise ConfigError(f"`{name}` has dtype {value.dtype}; it must contain booleans: give `{name}.bool()`")


def of_positions(name: str, value: Tensor, shape: torch.Size) -> None:
    """Raise a ConfigError unless `value` can be broadcast to positions of this shape."""
    if not broadcasts(value.shape, shape):
        raise ConfigError(
            f"`{name}` has shape {tuple(value.shape)}, but the positions have shape {tuple(shape)}; give a shape that broadcasts to it"
        )


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Return True if torch expands a tensor of this shape to the shape `to`."""
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def weights(name: str, value: Any, student_hidden: Tensor) -> None:
    """Raise a ConfigError unless `value` is a tensor with one finite weight per token."""
    tensor(name, value)
    if value.shape != student_hidden.shape[:-1]:
        raise ConfigError(
            f"`{name}` has shape {tuple(value.shape)}, but `student_hidden` has shape {tuple(student_hidden.shape)}; give `{name}` one "
            "value per token"
        )
    if not bool(value.isfinite().all()):
        raise ConfigError(f"`{name}` contains NaN or infinity; to divide it by its sum, which may be 0, use `{name}.sum().clamp(min=1)`")


def states(name: str, value: Tensor) -> None:
    """Raise a ConfigError unless all hidden states are finite."""
    if not bool(value.isfinite().all()):
        raise ConfigError(f"`{name}` contains NaN or infinity, usually because the model has diverged; hidden states must be finite")


def no_gradient(**arguments: Any) -> None:
    """Raise a ConfigError if an argument needs a gradient, because the fused loss would give it none."""
    for name, value in arguments.items():
        if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
            raise ConfigError(
                f"`{name}` needs a gradient, but the fused loss has gradients of the student's hidden states and head only; give "
                f"`{name}.detach()`, or call the objective on logits"
            )


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
