"""Teachers: frozen models whose outputs (hidden states or top-k log-probabilities) are the targets of a student's loss.

    teacher = teacher_of(model)                     # a model in this process: whole, sharded or offloaded
    teacher.target(batch)                           # its outputs at the N tokens of the loss, for `objectives.fused`
    teacher.scored(batch, vocab)                    # these outputs, and the log-probability of the token after each of the N tokens

`models.remote.served` has the teachers that run on a server. All other code treats all teachers in the same way.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tadistill.data.batch import Batch
from tadistill.models.counting.sizes import Work
from tadistill.models.forward import Reader
from tadistill.objectives import Head, Hidden, TopK, fused_head, token_log_probs


def nothing(work: Work) -> None:
    """Ignore the amount of work of a forward pass. This is the default of `Teacher.passed`."""


class Teacher:
    """Base class of all teachers, in this process or on a server."""

    device: torch.device
    """The device of the teacher's outputs."""
    width: int
    """Number of logits of the teacher's output head."""
    model: PreTrainedModel | None = None
    """The model itself, or None if it runs outside of this process. Samplers that need the teacher's logits for each new token need a model
    in this process."""
    config: Mapping[str, Any] = {}
    """The model's text configuration, if the model runs outside of this process."""
    passed: Callable[[Work], None] = staticmethod(nothing)
    """Function that gets the amount of work of every forward pass outside of this process. `train.meter` sets it, to count FLOPs."""
    gives_hidden: bool = True
    """True if the outputs are hidden states, from which every loss can be computed exactly."""

    def target(self, batch: Batch) -> Hidden | TopK:
        """Return the outputs at the N positions where the batch's mask is True, in row-major order. No gradient flows to them."""
        raise NotImplementedError

    def scored(self, batch: Batch, vocab: int) -> tuple[Hidden | TopK, Tensor]:
        """Return the outputs of `target`, and the log-probability (N,) of the token that follows each position.

        `vocab` is the number of tokens over which the probabilities are normalised.
        """
        raise NotImplementedError


class HiddenTeacher(Teacher):
    """Base class of the teachers whose outputs are their last hidden states. This process applies the output head to these states."""

    @property
    def head(self) -> Head:
        raise NotImplementedError

    def hidden(self, batch: Batch) -> Tensor:
        """Return the inputs of the output head, of shape (N, H)."""
        raise NotImplementedError

    def target(self, batch: Batch) -> Hidden:
        with torch.no_grad():
            return Hidden(self.hidden(batch), self.head)

    def scored(self, batch: Batch, vocab: int) -> tuple[Hidden, Tensor]:
        target, tokens = self.target(batch), batch.counted(batch.targets_BT)

        def values(logits: Tensor, _: tuple, rows: slice) -> Tensor:
            return token_log_probs(logits, tokens[rows]).unsqueeze(0)

        with torch.no_grad():
            weights = torch.ones(1, 1, device=target.states.device)
            return target, fused_head(target.states, target.head, values, weights, vocab=vocab)[1][0].float()


class InProcess(HiddenTeacher):
    """A model in this process, which `train.sharding` may have sharded or offloaded."""

    def __init__(self, model: PreTrainedModel):
        self.model, self._model = model, model
        self.reader = Reader(model)
        self.width = self.head.weight.shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._model.device

    @property
    def head(self) -> Head:
        return self.reader.head

    def hidden(self, batch: Batch) -> Tensor:
        return self.reader.hidden(self._model, batch)


def teacher_of(model: PreTrainedModel | Teacher) -> Teacher:
    """Return a teacher unchanged. Wrap a transformers model in a teacher that runs in this process."""
    return model if isinstance(model, Teacher) else InProcess(model)
