"""The predicted time left; and what `tadistill plan --measure` runs: a few updates or rows of every kind of stage."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from tadistill.config import load
from tadistill.plan.arms import make_plan
from tadistill.plan.inputs import Loaded, stage_of
from tadistill.plan.kinds import DistillSpec, TrainingSpec
from tadistill.runner import timing
from tadistill.runner.timing import Estimate, Workload
from tadistill.store import Store
from tadistill.terminal import Terminal


def stage(kind, *parents):
    return SimpleNamespace(kind=kind, parents=dict(enumerate(parents)))


STAGES = {"a": stage("sft"), "b": stage("sft"), "c": stage("distill", "a"), "d": stage("evaluate", "c")}
WORK = {"a": Workload("s", 100.0), "b": Workload("s", 100.0), "c": Workload("d", 200.0), "d": Workload("e", 50.0)}


def test_nothing_is_known_before_the_first_progress():
    found = Estimate(STAGES, WORK, 1)
    assert found.total_left(STAGES) is None
    found.running("a", 0.0, 5.0)
    assert found.left("a") is None


def test_a_running_stage_gives_the_speed_of_all_others():
    found = Estimate(STAGES, WORK, 1)
    found.running("a", 0.5, 100.0)  # half of its work of 100 took 100 s
    assert found.left("a") == pytest.approx(100)
    assert found.total_left(["b", "c", "d"]) == pytest.approx(2 * (50 + 100 + 200 + 50))


def test_only_the_work_of_this_run_gives_the_speed_of_a_stage_that_continues():
    found, half, three_quarters = Estimate(STAGES, WORK, 1), 0.5, 0.75
    found.begins("a", half)
    found.running("a", half, 0.0)
    assert found.left("a") is None
    found.running("a", three_quarters, 50.0)  # a quarter of its work of 100 took 50 s
    assert found.left("a") == pytest.approx(50)
    assert found.left("b") == pytest.approx(200)
    found.begins("b", half)
    assert found.left("b") == pytest.approx(100)
    found.finished("a", 100.0)
    assert found.left("b") == pytest.approx(100)


def test_the_time_before_the_work_begins_is_no_part_of_the_speed():
    found = Estimate(STAGES, WORK, 1)
    found.finished("d", 50.0)
    for seconds in (1.0, 600.0):  # the models are loaded, and a large training set is tokenised
        found.running("a", 0.0, seconds)
        assert found.left("a") == pytest.approx(100)
    found.running("a", 0.25, 650.0)  # a quarter of its work of 100 took 50 s
    assert found.left("a") == pytest.approx(150)
    found.finished("a", 800.0)
    found.running("b", 0.0, 3.0)
    found.running("b", 0.01, 5.0)
    assert found.left("b") == pytest.approx(200 - 2)
    assert found.left("c") == pytest.approx(200 * 250 / 150 + 3)  # models are loaded for 3 s


def test_the_time_that_an_api_takes_to_answer_is_no_speed_of_this_machine():
    found = Estimate({"ask": stage("ask"), "ask 2": stage("ask"), **STAGES}, {"ask": Workload("big"), "ask 2": Workload("big"), **WORK}, 1)
    found.running("ask", 0.0, 1.0)
    found.running("ask", 0.5, 1801.0)
    assert found.left("ask") == pytest.approx(1800)
    assert found.total_left(STAGES) is None
    found.finished("ask", 3601.0)
    assert found.left("a") is None
    assert found.left("ask 2") == pytest.approx(3601, abs=2)
    found.finished("a", 100.0)
    assert found.total_left(["b", "c", "d"]) == pytest.approx(350, abs=5)


def test_a_stage_without_predicted_work_gives_no_speed():
    found = Estimate({"write": stage("retokenise"), **STAGES}, {"write": Workload("w"), **WORK}, 1)
    found.finished("write", 60.0)
    assert found.total_left(STAGES) is None
    found.finished("a", 100.0)
    assert found.left("b") == pytest.approx(100)


def test_jobs_and_the_longest_chain_limit_the_time():
    found = Estimate(STAGES, WORK, 2)
    found.finished("a", 100.0)
    assert found.total_left(["b", "c", "d"]) == pytest.approx(250)  # c and then d; b runs beside them
    assert Estimate(STAGES, WORK, 2).total_left([]) == 0


def test_equal_work_says_more_than_the_same_kind_and_that_more_than_all():
    stages = STAGES | {"e": stage("evaluate"), "f": stage("evaluate")}
    found = Estimate(stages, WORK | {"e": Workload("e", 50.0), "f": Workload("other", 100.0)}, 1)
    found.finished("a", 100.0)
    found.finished("e", 5.0)
    assert found.left("d") == pytest.approx(5)
    assert found.left("f") == pytest.approx(10)
    assert found.left("b") == pytest.approx(100)
    assert found.left("c") == pytest.approx(200 * 105 / 150)


def test_dev_evaluations_come_in_steps():
    work = Workload("s", even=50.0, looks=50.0, every=0.25)
    assert work.share(0.2) == pytest.approx(10 / 100)
    assert work.share(0.25) == pytest.approx((12.5 + 12.5) / 100)
    assert work.share(1.0) == 1.0


# --- what `plan --measure` runs ------------------------------------------------------------------------------------------

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
    plan = make_plan(load(RECIPE, ["data.limit.train=null", "method.optim.steps=24"]))
    updates = {stage.label: stage.spec.steps for stage in plan.stages.values()}
    speeds = timing.time_stages(plan, 1, Terminal(quiet=True))
    assert speeds.keys() == {stage.cost.kind for stage in plan.stages.values() if stage.cost and stage.cost.parts}
    assert {task.spec.kind for task in tasks} == {"sft", "distill", "generate", "signal"}
    for at, task in enumerate(tasks):
        assert all(stage_of(model) is None for model in task.spec.models.values())
        if isinstance(task.spec, TrainingSpec):
            assert task.spec.steps == task.spec.select.every == min(20, updates[task.label])
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
    assert {20, 8} <= {task.spec.steps for task in tasks}
    # a teacher at the temperature of another model's entropy is timed as it was loaded
    assert all(isinstance(task.spec.teacher, Loaded) for task in tasks if isinstance(task.spec, DistillSpec))


def test_a_measurement_shows_how_far_it_is(monkeypatch):
    shown = []
    monkeypatch.setattr(Terminal, "working", lambda self, text: nullcontext(lambda progress: shown.append(f"{text}: {progress}")))

    def run(task, progress, **_):
        progress("3/8 loss 2.345")
        Store(Path(task.store)).begin(task.key, {})
        Store(Path(task.store)).finish(task.key, {"seconds": 2.0})

    monkeypatch.setattr(timing, "run_in_processes", run)
    timing.time_stages(make_plan(load(RECIPE)), 1, Terminal(quiet=True))
    assert shown[0].startswith("timing 1 of ")
    assert shown[0].endswith(": 3/8 loss 2.345")
