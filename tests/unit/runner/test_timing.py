"""What `tadistill plan --measure` runs: a few updates or rows of every kind of stage, from weights that the study did not train."""

from pathlib import Path

import pytest

from tadistill.config import load
from tadistill.plan.arms import make_plan
from tadistill.plan.inputs import Loaded, stage_of
from tadistill.plan.kinds import DistillSpec, TrainingSpec
from tadistill.runner import timing
from tadistill.store import Store

RECIPE = Path(__file__).parents[2] / "e2e" / "interrupted.yaml"


@pytest.fixture
def tasks(monkeypatch):
    """The tasks that are run, each finished at once."""
    made = []

    def run(task, **hooks):
        made.append(task)
        Store(Path(task.store)).begin(task.key, {})
        Store(Path(task.store)).finish(task.key, {"seconds": 2.0})

    monkeypatch.setattr(timing, "run_in_processes", run)
    return made


def test_short_stages_from_untrained_weights(tasks):
    plan = make_plan(load(RECIPE, ["data.limit.train=null"]))
    speeds = timing.time_stages(plan, 1, lambda text: None)
    assert speeds.keys() == {stage.cost.kind for stage in plan.stages.values() if stage.cost and stage.cost.parts}
    assert {task.spec.kind for task in tasks} == {"sft", "distill", "generate", "signal"}
    for at, task in enumerate(tasks):
        assert all(stage_of(model) is None for model in task.spec.models.values())
        if isinstance(task.spec, TrainingSpec):
            assert (task.spec.steps, task.spec.select.every) == (20, 20)
        reads = isinstance(task.spec, DistillSpec) and (task.spec.signal or task.spec.responses)
        if reads or not isinstance(task.spec, TrainingSpec):
            assert task.spec.train.limit == 128
        if reads:  # the texts were made just before, on the same rows and in the same folder
            before = tasks[at - len(task.spec.parents) : at]
            assert sorted(task.spec.parents.values()) == sorted(other.key for other in before)
            assert all((other.store, other.spec.train) == (task.store, task.spec.train) for other in before)
            assert before[-1].spec.teacher == task.spec.teacher
            if task.spec.signal and task.spec.responses:  # the teacher reads the text that the student wrote
                assert [*before[-1].spec.parents.values()] == [before[0].key]
    assert any(isinstance(task.spec, DistillSpec) and task.spec.assistants for task in tasks)
    # a teacher at the temperature of another model's entropy is timed as it was loaded
    assert all(isinstance(task.spec.teacher, Loaded) for task in tasks if isinstance(task.spec, DistillSpec))
