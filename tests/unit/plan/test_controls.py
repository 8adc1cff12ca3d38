"""Controls in a plan: which model teaches, what counts as compute, and what the plan says."""

import io
from typing import get_args

import pytest
from rich.console import Console
from tests.unit.plan.test_plan import recipe

from tadistill.config import validate
from tadistill.config.arm import Control, Kind
from tadistill.plan import preview
from tadistill.plan.arms import Plan, make_plan
from tadistill.plan.inputs import RandomWeights
from tadistill.plan.kinds import DistillSpec, TemperSpec
from tadistill.store import Store


@pytest.fixture(scope="module")
def plan() -> Plan:
    method = {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "max_new_tokens": 8}, "optim": {"steps": 40, "batch": 16}}
    return make_plan(validate(recipe(seeds=[1], method=method, arms={"takd": "xl > l > s"}, fair=True)))


def spec_of(plan: Plan, arm: str) -> DistillSpec:
    key = next(found for found in plan.arms if found.name == arm).final[1]
    found = plan.stages[str(key)].spec
    assert isinstance(found, DistillSpec)
    return found


def test_a_control_has_another_teacher_and_the_same_student(plan):
    direct = spec_of(plan, "takd-equal-compute")
    assert spec_of(plan, "takd-random-teacher").teacher == RandomWeights(random=1, of=direct.teacher)
    none = spec_of(plan, "takd-no-teacher")
    assert (none.objective.type, none.sampler.type) == ("no_teacher", "student")
    tempered = plan.stages[spec_of(plan, "takd-tempered").teacher.stage].spec
    assert isinstance(tempered, TemperSpec)
    assert (tempered.teacher, tempered.like) == (direct.teacher, spec_of(plan, "takd").teacher)
    assert {spec_of(plan, arm.name).student.stage for arm in plan.arms} == {direct.student.stage}


def test_a_control_has_the_compute_of_its_arm(plan):
    flops = {arm.name: arm.flops for arm in plan.arms}
    assert flops == pytest.approx(dict.fromkeys(flops, flops["takd"]), rel=0.05)
    assert spec_of(plan, "takd-no-teacher").optim.steps > spec_of(plan, "takd-equal-compute").optim.steps


def test_a_control_has_no_assistant_to_compare_it_with(plan):
    by_name = {arm.name: plan.stages[arm.analyse[1]].spec for arm in plan.arms}
    assert {name: len(spec.assistants) for name, spec in by_name.items() if spec.assistants} == {"takd": 1}


def test_the_plan_says_what_controls_cost(plan, tmp_path):
    console = Console(file=io.StringIO(), width=400)
    preview.print_plan(plan, Store(tmp_path), console)
    assert "adds no arms" not in console.file.getvalue()
    assert "Controls and equal-compute baselines (takd-equal-compute, takd-no-teacher, takd-tempered, takd-random-teacher) need" in (
        console.file.getvalue()
    )


def test_the_plan_says_who_teaches_in_a_control(plan, tmp_path):
    console = Console(file=io.StringIO(), width=400)
    preview.print_plan(plan, Store(tmp_path), console)
    text = console.file.getvalue()
    for kind in get_args(Kind):
        assert f"xl > s, {Control(kind, 'takd').words}" in text


def test_the_plan_says_that_fair_adds_nothing(tmp_path):
    console = Console(file=io.StringIO(), width=400)
    preview.print_plan(make_plan(validate(recipe(seeds=[1], arms={"direct": "xl > s"}, fair=True))), Store(tmp_path), console)
    assert "`fair: true` adds no arms, because it needs an arm with a single path through an assistant" in console.file.getvalue()
