"""What a stage leaves behind in its process."""

import gc

from tests.e2e.inprocess import run_here
from tests.unit.runner.small import small
from transformers import PreTrainedModel

from tadistill.config import parse
from tadistill.plan.arms import make_plan
from tadistill.store import Store


def models() -> int:
    return sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects())


def test_no_model_is_alive_after_a_stage(tmp_path):
    """accelerate makes a cycle of a model that trains in bf16, and the collector may not run for a long time."""
    changes = [
        "models.t={load: scratch:gpt2, tokenizer: tinyworld, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}}",
        "method={objective: {type: forward_kl}, sampler: {type: dataset}, optim: {steps: 2, batch: 4, precision: bf16}}",
        "arms={kd: t > s}",
        "analyse=false",
    ]
    plan, before = make_plan(parse(small("s"), changes, source="small")), models()
    gc.disable()
    try:
        run_here(plan, Store(tmp_path), jobs=1, console=None)  # type: ignore[arg-type]
        assert models() == before
    finally:
        gc.enable()
    assert {stage.kind for stage in plan.stages.values()} == {"sft", "distill", "evaluate"}
