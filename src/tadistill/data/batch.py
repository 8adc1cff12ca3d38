"""`Sequence`s of token ids and the padded `Batch` made of them: the only place that shifts predictions to targets.

Axes: B sequences, T positions. `mask_BT[b, t]` is True iff the prediction made AT t, of token t + 1, counts. Values that
belong to a response token stand at the position that predicts it.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tadistill.data.templates import Encoded
from tadistill.objectives import Hidden, TargetMixture, TopK
from tadistill.objectives.targets import select


@dataclass(frozen=True)
class Sequence:
    """A prompt and a response; `values` holds one number per response token and name (log-probabilities of a rollout)."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    values: dict[str, np.ndarray] = field(default_factory=dict)
    states: tuple[Tensor, ...] = ()
    """(len(response), H) per teacher: its last hidden states at the positions that predict the response."""


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, ready for a forward pass and a loss."""

    ids_BT: Tensor
    attention_BT: Tensor
    """1 at real tokens; by length, never by token id."""
    mask_BT: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    """Per-token float32 values (B, T), zero where the mask is False."""
    corpus: "Batch | None" = None
    """Plain text that rides along for a language-modelling term."""
    targets: tuple[Hidden | TopK, ...] = ()
    """The teachers at the positions where the mask is True, in row-major order, when they were computed beforehand."""
    mixture: TargetMixture | None = None
    """What several teachers make together in this update."""

    @property
    def targets_BT(self) -> Tensor:
        """The token predicted at each position (meaningless where the mask is False)."""
        return self.ids_BT.roll(-1, dims=1)

    @property
    def positions_BT(self) -> Tensor:
        """Position ids, always passed to the model."""
        return (self.attention_BT.cumsum(1) - 1).clamp(min=0)

    def first(self, rows: int) -> "Batch":
        """The first rows, without the plain text."""
        mask = self.mask_BT[:rows]
        targets: Any = tuple(select(t, slice(0, int(mask.sum()))) for t in self.targets)
        values = {k: v[:rows] for k, v in self.values.items()}
        return Batch(self.ids_BT[:rows], self.attention_BT[:rows], mask, values, None, targets, self.mixture)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            self.ids_BT.to(device),
            self.attention_BT.to(device),
            self.mask_BT.to(device),
            {k: v.to(device) for k, v in self.values.items()},
            self.corpus.to(device) if self.corpus else None,
            tuple(t.to(device) for t in self.targets),
            self.mixture,
        )


def references(encoded: Seq[Encoded]) -> list[Sequence]:
    """Return every encoded prompt with its first reference as a sequence."""
    return [Sequence(e.prompt, e.response) for e in encoded]


def by_length(sequences: Seq[Sequence], size: int) -> list[list[int]]:
    """Indices in batches of `size`, short sequences first: neighbours of like length waste least padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prompt) + len(sequences[i].response))
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(sequences: Seq[Sequence], *, pad: int, corpus: Batch | None = None, targets: tuple[Hidden | TopK, ...] = ()) -> Batch:
    """Pad sequences on the right. A sequence without a prompt counts from its second token on."""
    rows, width = len(sequences), max(len(s.prompt) + len(s.response) for s in sequences)
    ids = np.full((rows, width), pad, np.int64)
    attention = np.zeros((rows, width), np.int64)
    mask = np.zeros((rows, width), bool)
    values = {name: np.zeros((rows, width), np.float32) for name in sequences[0].values}
    for b, s in enumerate(sequences):
        n, end = len(s.prompt), len(s.prompt) + len(s.response)
        ids[b, :end] = (*s.prompt, *s.response)
        attention[b, :end] = 1
        mask[b, max(n - 1, 0) : end - 1] = True
        for name, array in values.items():
            array[b, n - 1 : end - 1] = s.values[name]
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(attention),
        torch.from_numpy(mask),
        {k: torch.from_numpy(v) for k, v in values.items()},
        corpus,
        targets,
    )
