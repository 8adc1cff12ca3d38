"""Runs the stages of a plan on tiny models of two shapes in this process, while torch counts their FLOPs.

`ledger.py` and `tests/unit/plan/test_costs.py` share this.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from tadistill.plan.arms import Plan
from tadistill.plan.graph import Stage
from tadistill.plan.task import Task
from tadistill.rollout import decoder
from tadistill.stages.execute import run_stage
from tadistill.store import Store

FAMILIES = ("gpt2", "llama")


def shaped(family: str, width: int, layers: int) -> dict[str, Any]:
    """Return a recipe's model with random weights of this shape."""
    if family == "gpt2":
        config = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 128}
    else:
        config = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"load": f"scratch:{family}", "tokenizer": "tinyworld", "config": config}


def _attention(query, key, value, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args: Any, **kwargs: Any) -> int:
    """Return twice the FLOPs of the forward pass; the kernel also recomputes the scores, which is not counted."""
    return 2 * sdpa_flop_count(query, key, value)


def _product_added(total, left, right, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


_ADDED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _product_added,  # the fused head adds its gradient up in place
}
"""Formulas that torch's own registry lacks."""
_FORMULAS = FlopCounterMode(display=False, custom_mapping=_ADDED).flop_registry


class Counter(TorchDispatchMode):
    """Count as torch's FlopCounterMode does, without its sums for each module: they take most of the time of tiny models."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation, or its parts if it has some, and add its FLOPs."""
        if _has_parts(function):
            with self:
                return function.decompose(*args, **(kwargs or {}))
        found = function(*args, **(kwargs or {}))
        if formula := _FORMULAS.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        return found


@cache
def _has_parts(function: torch._ops.OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), torch._C.DispatchKey.CompositeImplicitAutograd)


_FIRST_RIGHT = decoder._first_right


def _uncounted(model: PreTrainedModel) -> decoder.Way:
    """Find out how the model is read, without counting: these few tokens are no part of the predicted work."""
    with _disable_current_modes():
        return _FIRST_RIGHT(model)


def counted(plan: Plan, directory: Path, kinds: tuple[str, ...] = ("sft", "distill")) -> Iterator[tuple[Stage, float, dict[str, Any]]]:
    """Yield every stage of these kinds with torch's FLOPs and its manifest, without the stages that only measure."""
    store = Store(directory)
    for stage in plan.stages.values():
        if stage.spec.measures:
            continue
        task = Task(stage.spec, stage.key, stage.label, str(directory), "t", None, 1e9)
        with Counter() as counter, mock.patch.object(decoder, "_first_right", _uncounted):
            run_stage(task, progress=lambda *_: None, alarm=lambda _: None, stop=lambda: False)
        if stage.kind in kinds:
            yield stage, float(counter.flops), store.manifest(stage.key)
