"""The last layer of a language model, and a teacher that is its hidden states with such a layer. Axes: H hidden, V vocabulary."""

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
