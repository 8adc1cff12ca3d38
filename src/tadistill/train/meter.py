"""Count the tokens and FLOPs of one training, separately for each part of the work, such as sampling (`models.cost`).

    meter = Meter(student, (teacher,))
    with meter.counting():
        with meter.timed("sampling"):
            ...                                 # counts every call of a model and every fused head
    meter.state()                               # plain numbers, for a checkpoint and for the manifest

Counting uses only the shapes of tensors, so it never waits for the GPU. Two things are counted: matrix products with weights, and
attention. Norms, softmax, rotary tables, the optimizer and vLLM are not counted. A backward pass counts as two forward passes or, with LoRA
adapters, as `models.sizes` says. The FLOPs of a teacher on a server are computed from the tokens that it processes.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tadistill.data.batch import Batch
from tadistill.models.cost import CostPart
from tadistill.models.forward import is_packed
from tadistill.models.modify import adapters_in
from tadistill.models.sizes import Size, Work, forward_flops, size_of, training_flops, with_adapters
from tadistill.models.teachers import Teacher, nothing
from tadistill.objectives import Head
from tadistill.objectives.fused import heads_watched


class _Side:
    def __init__(self, name: str, model: PreTrainedModel):
        self.name, self.model, self.adapters = name, model, adapters_in(model)
        size = size_of(model.config.get_text_config().to_dict())
        self.size = None if size is None else with_adapters(size, self.adapters)
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        self.head = head


class Meter:
    """A counter for the tokens and FLOPs of a student and its teachers."""

    def __init__(self, student: PreTrainedModel, teachers: tuple[PreTrainedModel | Teacher, ...], *, checkpointing: bool = False):
        """If `checkpointing` is True (gradient checkpointing), the backward pass computes the student's layers again, which is counted."""
        self._again = checkpointing
        self._phase = "training"
        here = [teacher.model if isinstance(teacher, Teacher) else teacher for teacher in teachers]
        self._sides = [_Side("student", student), *(_Side("teacher", model) for model in here if model is not None)]
        self._elsewhere = [teacher for teacher in teachers if isinstance(teacher, Teacher) and teacher.model is None]
        self._parts: dict[str, CostPart] = {}
        self._seconds: dict[str, float] = {}
        self._padding = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside the `with` block, every call of a model or of the fused head is counted."""
        handles = [side.model.register_forward_pre_hook(self._body(side), with_kwargs=True) for side in self._sides]
        handles += [side.head.register_forward_hook(self._logits(side)) for side in self._sides]
        for teacher in self._elsewhere:
            teacher.passed = self._remote(size_of(teacher.config))
        try:
            with heads_watched(self._fused):
                yield
        finally:
            for teacher in self._elsewhere:
                teacher.passed = nothing
            for handle in handles:
                handle.remove()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the `with` block, all calls are counted for the phase `name`.

        The phase `sampling` has two counts: `rollout` for calls in inference mode, and `scoring` for all other calls.
        """
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Do the same as `phase`, and also add up the seconds that the `with` block takes."""
        # Each phase copies numbers from the device near its end, and so waits for the work before. Only the optimizer's update comes later.
        start = time.perf_counter()
        try:
            with self.phase(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def saw(self, batches: list[Batch]) -> None:
        """Count the padding tokens in an update's batches."""
        for batch in () if is_packed(self._sides[0].model) else batches:
            self._padding += batch.attention_BT.numel() - int(batch.attention_BT.sum())

    def state(self, processes: int = 1) -> dict[str, Any]:
        """Return counts and seconds as plain numbers. A process counts only its own work, so counts are multiplied by `processes`."""
        parts = {
            name: {key: value * processes for key, value in vars(part).items()}
            for name, part in sorted(self._parts.items())
            if part.positions or part.heads
        }
        return {"parts": parts, "seconds": dict(self._seconds), "padding": self._padding * processes}

    def restore(self, state: Mapping[str, Any], processes: int = 1) -> None:
        """Continue from a saved `state`. An empty state sets all counts to zero."""
        self._parts = {
            name: CostPart(**{key: value // processes if isinstance(value, int) else value / processes for key, value in part.items()})
            for name, part in state.get("parts", {}).items()
        }
        self._seconds, self._padding = dict(state.get("seconds", {})), state.get("padding", 0) // processes

    # --- the hooks ------------------------------------------------------------------------------------------------------

    def _add(self, who: str, flops: float, positions: int, heads: int) -> None:
        at = self._phase
        if at == "sampling":
            at = "rollout" if torch.is_inference_mode_enabled() else "scoring"
        name = f"{at}/{who}"
        self._parts[name] = self._parts.get(name, CostPart()) + CostPart(flops, positions, heads)

    def _body(self, side: _Side) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids, mask, cache = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("past_key_values")
            rows, width = ids.shape
            if packed := kwargs.get("rows"):
                pairs = sum(length**2 for length in packed)
            elif mask is not None and mask.ndim == 4:  # in `rollout.fast_mixture` and `rollout.fixed_shapes`: (B, 1, new tokens, columns)
                pairs = mask.shape[0] * mask.shape[2] * mask.shape[3]
            else:
                pairs = rows * width * (width + (cache.get_seq_length() if cache is not None else 0))
            work, backward = Work(rows * width, pairs), side.name == "student" and torch.is_grad_enabled()
            self._add(side.name, _flops(side, work, backward, self._again), rows * width, 0)

        return count

    def _remote(self, size: Size | None) -> Callable[[Work], None]:
        def count(work: Work) -> None:
            self._add("teacher", float("nan") if size is None else forward_flops(size, work), int(work.positions), int(work.heads))

        return count

    def _logits(self, side: _Side) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            rows = output.numel() // output.shape[-1] if output.numel() else 0
            if rows:
                self._add(side.name, 2 * rows * output.shape[-1] * args[0].shape[-1], 0, rows)

        return count

    def _fused(self, head: Head, rows: int, width: int, grad: bool) -> None:
        student = head.weight is self._sides[0].head._parameters["weight"]
        backward = (2 if head.weight.requires_grad else 1) if student and grad else 0
        flops = 2 * rows * width * head.weight.shape[1] * (1 + backward)
        self._add("student" if student else "teacher", flops, 0, rows)


def _flops(side: _Side, work: Work, backward: bool, again: bool) -> float:
    if side.size is None:
        return float("nan")
    if backward and side.adapters:
        return training_flops(side.size, side.adapters, work, again=again)
    return forward_flops(side.size, work) * ((4 if again else 3) if backward else 1)
