"""A teacher that follows its student: the exponential moving average (EMA) of the student's weights.

    average = MovingAverage(student, frozen_copy(student), 0.99)
    average.update()                            # after each update of the student

The teacher begins with the weights of the student. With adapters (LoRA), the teacher shares the frozen weights and has its own adapters.
Then the matrices A and B of an adapter are averaged, as in TRL, and not their product. Self-distillation uses such a teacher: SDFT
(Shenfeld et al. 2026, arXiv 2601.19897), and before it the mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780).
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel

from tadistill.models.teachers import teacher_of
from tadistill.train.sharding import load_weights, reshard, weights


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy of a model, in eval mode. Weights that are frozen in the model are not copied: both models share their memory.

    The model must not be sharded.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


class MovingAverage:
    """Moves a teacher's weights towards those of its student: teacher = decay x teacher + (1 - decay) x student.

    The models have the same parameters. Either both are sharded, or none is.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, decay: float):
        self.student, self.model, self._average = student, teacher, get_ema_multi_avg_fn(decay)
        self.teacher = teacher_of(teacher)

    def update(self) -> None:
        """Move the teacher's weights by one step. Call it after an update of the student."""
        reshard(self.model)  # frees gathered weights, which the update of the shards would not change
        pairs = zip(self.model.parameters(), self.student.parameters(), strict=True)
        old, new = zip(*((own, other) for own, other in pairs if other.requires_grad), strict=True)
        self._average(list(old), list(new), None)

    def state(self) -> dict[str, Tensor]:
        """Return the teacher's weights for a checkpoint. All processes must call this function."""
        return weights(self.model)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved `state`."""
        reshard(self.model)
        load_weights(self.model, state)
