"""`evaluate.precision`: float32 keeps the keys of finished stages; bfloat16 moves only the keys of stages that only run models."""

import json

import pytest
from tests.unit.runner.small import small

from tadistill.config import parse
from tadistill.plan.arms import Plan, make_plan
from tadistill.plan.task import make_task
from tadistill.stages.execute import run_stage
from tadistill.store import Store


def plan(*overrides: str) -> Plan:
    return make_plan(parse(small("xl"), list(overrides), source="small.yaml"))


def keys(of: Plan) -> dict[str, str]:
    return {stage.label: key for key, stage in of.stages.items()}


def test_only_stages_that_only_run_models_get_other_keys():
    half, default = keys(plan("evaluate.precision=bf16")), keys(plan())
    assert keys(plan("evaluate.precision=fp32")) == default
    assert [label for label in default if half[label] != default[label]] == ["evaluate sft xl, seed 1"]


def test_an_evaluation_in_bfloat16_gives_nearly_the_same_loss(tmp_path):
    store, losses = Store(tmp_path), []
    for precision in ("fp32", "bf16"):
        of = plan(f"evaluate.precision={precision}")
        for stage in of.stages.values():
            run_stage(make_task(of, stage, store), progress=lambda *_: None, alarm=lambda _: None, stop=lambda: False)
        scores = json.loads((store.folder(keys(of)["evaluate sft xl, seed 1"]) / "scores.json").read_text())
        losses.append([row[0] for row in scores["tinyworld"]["loss"]])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
