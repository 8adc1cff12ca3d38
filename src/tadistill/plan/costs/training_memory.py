"""Predictions of the peak memory of one training, from the sizes of its models and its largest batch.

Weights, gradients and AdamW's moments are exact. Activations are those that autograd stores (`models.counting.activations`), for the
longest texts. benchmarks/memory.py compares the predictions with measurements.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tadistill.config.common import DTYPES
from tadistill.config.method import Optim
from tadistill.models.counting.activations import kept_by_layer
from tadistill.models.counting.memory import Memory, resident_bytes
from tadistill.models.counting.sizes import Adapters, Size, Work, tied
from tadistill.tuning import TILE_ROWS

_DRAWN = 12
"""Bytes per logit while a token is sampled: the logits, their softmax and a temporary tensor."""
_PRODUCT = 6
"""Bytes per entry of a matrix product with the head (output layer) in bfloat16 on a CPU: the result, and oneDNN's sum in float32."""


@dataclass(frozen=True)
class Described:
    """A model with its parameter counts and its configuration."""

    size: Size
    config: Mapping[str, Any]
    here: bool = True
    """False if a server runs the model. Then this process has only the model's head (output layer)."""

    @property
    def present(self) -> int:
        """Number of the model's parameters that this process holds."""
        return self.size.total if self.here else self.size.head

    @property
    def tied(self) -> bool:
        """True if the head's weights are the embeddings."""
        return tied(self.config)

    @property
    def vocab(self) -> float:
        return self.config["vocab_size"]


class TrainingMemory:
    """Adds up the memory of one training. Its methods add parts, and `total` returns the sum."""

    def __init__(self, student: Described, teachers: tuple[Described, ...], optim: Optim, adapters: Adapters | None):
        """`student.size` includes the adapters."""
        self.student, self.teachers, self.optim, self.adapters = student, teachers, optim, adapters
        self.bf16 = optim.precision == "bf16"
        self.texts, self.plain = Memory(), Memory()
        self.drawn, self.stored = 0.0, 0.0
        self.across = False
        """True if the teacher has another tokenizer."""
        self.average = False
        """True if the teacher is a moving average of the student: a float32 copy of the trained weights. All other weights are shared."""

    def batch(self, work: Work, *, heads: int, dropout: bool, corpus: bool = False) -> None:
        """Add the memory of the forward and backward pass of one micro-batch. If batches are added several times, only the largest counts.

        A micro-batch of the plain-text corpus (`corpus`) is in memory together with one of training text, so both count.

        Args:
            work: the work of the largest micro-batch.
            heads: number of teachers whose logits are computed too.
        """
        size = self.student.size
        kept = kept_by_layer(self.student.config, bf16=self.bf16, dropout=dropout)
        layer = kept.position * work.positions + kept.pair * work.pairs
        scores = max(kept.scores - kept.pair, 0) * work.pairs
        if self.optim.gradient_checkpointing:
            layers = layer + 4 * size.hidden * work.positions * size.layers
        else:
            layers, scores = layer * size.layers, scores * size.layers
        gradient = 0 if self.adapters else 4 * size.head
        # a teacher with another tokenizer has another number of logits
        row = (
            4 * (self.student.vocab + sum(t.vocab for t in self.teachers[:heads])) if self.across else 4 * self.student.vocab * (1 + heads)
        )
        found = Memory(
            layers=layers + 12 * size.hidden * work.positions + 4 * size.hidden * work.heads,
            cpu=scores + (_PRODUCT * (gradient / 4 + self.student.vocab * min(work.heads, TILE_ROWS)) if self.bf16 else 0),
            running=kept.running * work.positions,
            head=gradient + 4 * size.hidden * work.heads,
            logits=row * work.heads,
            logit_row=row,
        )
        name = "plain" if corpus else "texts"
        setattr(self, name, max(getattr(self, name), found, key=lambda memory: memory.layers))

    def sampling(self, *needs: float) -> None:
        """Add the memory of one sampling or evaluation. `needs` has the bytes of each model. All models need them at the same time.

        If this method is called several times, only the largest sum counts.
        """
        self.drawn = max(self.drawn, sum(needs))

    def rollouts(self, tokens: float) -> None:
        """Add the memory of the teachers' last hidden states at the `tokens` sampled tokens of a round."""
        self.stored = (2 if self.bf16 else 4) * tokens * sum(teacher.size.hidden for teacher in self.teachers)

    def total(self, *, runs_teachers: bool) -> Memory:
        """Return the memory of the training. With `runs_teachers`, it includes the teachers' weights, else at most their heads."""
        size, dtype = self.student.size, DTYPES[self.optim.precision]
        trained = self.adapters.trained if self.adapters else size.total
        if runs_teachers and self.average:
            frozen = 4 * trained
        elif runs_teachers:
            frozen = sum(resident_bytes(t.present, training=False, dtype=dtype) for t in self.teachers)
        else:
            read = self.texts.logit_row > 4 * self.student.vocab  # recorded hidden states come with the teacher's head
            frozen = sum((6 if self.bf16 else 4) * t.size.head for t in self.teachers) if read else 0
        copies = 2 * size.matmul if self.bf16 else 0  # autocast keeps them for the whole update
        largest = max(self.texts, self.plain, key=lambda memory: memory.logits)
        return replace(
            largest,
            weights=4 * size.total,
            gradients=4 * trained,
            moments=8 * trained,
            frozen=frozen,
            layers=copies + self.texts.layers + self.plain.layers,
            cpu=max(self.texts.cpu, self.plain.cpu),
            head=self.texts.head + self.plain.head,
            returned=0 if self.adapters else (8 if self.student.tied else 4) * size.head,
            several=self.optim.tokens is not None or (self.optim.micro_batch or self.optim.batch) < self.optim.batch,
            sampling=self.drawn,
            rollouts=self.stored,
        )


def sampling_bytes(model: Described, rows: int, prompt: float, answer: float) -> float:
    """Return the bytes of caches and temporary tensors while a model answers `rows` prompts. The caches are in float32."""
    size = model.size
    caches = 8 * rows * (prompt + answer) * size.keys * size.layers
    return caches + _DRAWN * rows * model.vocab + _running(model) * rows * prompt


def reading_bytes(model: Described, rows: int, length: float) -> float:
    """Return the bytes of temporary tensors in a forward pass on `rows` texts of `length` tokens, without gradients."""
    return _running(model) * rows * length + min(rows * length, TILE_ROWS) * 4 * model.vocab


def _running(model: Described) -> float:
    return kept_by_layer(model.config, bf16=False, dropout=False).running
