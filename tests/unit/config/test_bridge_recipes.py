"""The recipes of bridges: they are short, they are read, and what they say about their arms is what a plan makes of them."""

from pathlib import Path

import pytest

from tadistill.config import load
from tadistill.plan.arms import make_plan

BRIDGE = Path(__file__).parents[3] / "recipes" / "bridge"


@pytest.mark.parametrize("name", ["tinyworld-bridge", "smollm2-gemma"])
def test_a_recipe_is_read_and_short(name):
    assert load(BRIDGE / f"{name}.yaml").study == name
    assert len((BRIDGE / f"{name}.yaml").read_text(encoding="utf-8").splitlines()) <= 40


def test_all_arms_have_the_compute_and_the_teacher_budget_of_direct():
    plan = make_plan(load(BRIDGE / "tinyworld-bridge.yaml").model_copy(update={"seeds": (10,)}))
    arms = {arm.name: arm for arm in plan.arms}
    of_teacher = next(stage.flops or 0.0 for stage in plan.stages.values() if stage.kind == "sft" and stage.model == "t")
    trained = [name for name in arms if name not in ("teacher", "start")]
    assert trained == ["direct", "seqkd", "bridge-spans", "bridge-text", "text-chain", "sft"]
    flops = {name: (arm.flops or 0.0) - (0 if name == "sft" else of_teacher) for name, arm in arms.items()}
    for name in trained:
        assert flops[name] == pytest.approx(flops["direct"], rel=0.03), name
        assert arms[name].asked == (0 if name == "sft" else pytest.approx(arms["direct"].asked, rel=0.03)), name


def test_the_questions_are_those_of_the_other_study():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("write", BRIDGE / "write.py")
    assert spec is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    rows = module.read(BRIDGE.parent / "takd" / "curves" / "train.jsonl")
    assert module.read(BRIDGE / "prompts.jsonl") == module.repeated(rows)
