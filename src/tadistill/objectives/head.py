"""The last layer of a language model, and a teacher that is its hidden states with such a layer. Axes: H hidden, V vocabulary."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """softcap(scale * (hidden @ weight.T + bias)), with softcap(z) = cap tanh(z / cap): the last layer of a language model."""

    weight: Tensor
    """(V, H); the embedding's own weight where they are tied."""
    bias: Tensor | None = None
    """(V,)"""
    scale: float = 1.0
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing comes after the matrix product and the bias."""
        return self.scale == 1.0 and self.softcap is None

    def shape(self, logits: Tensor) -> Tensor:
        """What comes after the matrix product and the bias."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits, (..., V): the plain form."""
        return self.shape(torch.nn.functional.linear(hidden, self.weight, self.bias))


@dataclass(frozen=True)
class Hidden:
    """A teacher's last hidden states (..., H) and its head."""

    states: Tensor
    head: Head

    def to(self, device: torch.device) -> "Hidden":
        """The states on another device; the head stays where it is."""
        return Hidden(self.states.to(device), self.head)


Watcher = Callable[[Head, int, int, bool], None]
_watcher: ContextVar[Watcher | None] = ContextVar("what hears of every head", default=None)


@contextmanager
def heads_watched(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of every head in `fused_head`: the head, tokens, how much of the vocabulary, and whether gradients are made."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def report_heads(student: Head, teachers: Iterable[Head], tokens: int, width: int) -> None:
    """Called by `fused_head` before it works."""
    if (watcher := _watcher.get()) is not None:
        watcher(student, tokens, width, torch.is_grad_enabled())
        for head in teachers:
            watcher(head, tokens, width, False)
