"""The predicted time left."""

from types import SimpleNamespace

import pytest

from tadistill.runner.timing import Estimate, Workload


def stage(kind, *parents):
    return SimpleNamespace(kind=kind, parents=dict(enumerate(parents)))


STAGES = {"a": stage("sft"), "b": stage("sft"), "c": stage("distill", "a"), "d": stage("evaluate", "c")}
WORK = {"a": Workload("s", 99.7), "b": Workload("s", 99.7), "c": Workload("d", 199.7), "d": Workload("e", 49.7)}


def test_nothing_is_known_before_the_first_progress():
    found = Estimate(STAGES, WORK, 1)
    assert found.total_left(STAGES) is None
    found.running("a", 0.0, 5.0)
    assert found.left("a") is None


def test_a_running_stage_gives_the_speed_of_all_others():
    found = Estimate(STAGES, WORK, 1)
    found.running("a", 49.7 / 99.7, 100.0)  # half of its work of 100 took 100 s
    assert found.left("a") == pytest.approx(100)
    assert found.total_left(["b", "c", "d"]) == pytest.approx(2 * (50 + 100 + 200 + 50))


def test_only_the_work_of_this_run_gives_the_speed_of_a_stage_that_continues():
    found, half, three_quarters = Estimate(STAGES, WORK, 1), 49.7 / 99.7, 74.7 / 99.7
    found.begins("a", half)
    found.running("a", half, 1.0)
    assert found.left("a") is None
    found.running("a", three_quarters, 50.0)  # a quarter of its work of 100 took 50 s
    assert found.left("a") == pytest.approx(50)
    assert found.left("b") == pytest.approx(200)
    found.begins("b", half)
    assert found.left("b") == pytest.approx(100)
    found.finished("a", 100.0)
    assert found.left("b") == pytest.approx(100)


def test_jobs_and_the_longest_chain_limit_the_time():
    found = Estimate(STAGES, WORK, 2)
    found.finished("a", 100.0)
    assert found.total_left(["b", "c", "d"]) == pytest.approx(250)  # c and then d; b runs beside them
    assert Estimate(STAGES, WORK, 2).total_left([]) == 0


def test_equal_work_says_more_than_the_same_kind_and_that_more_than_all():
    stages = STAGES | {"e": stage("evaluate"), "f": stage("evaluate")}
    found = Estimate(stages, WORK | {"e": Workload("e", 49.7), "f": Workload("other", 99.7)}, 1)
    found.finished("a", 100.0)
    found.finished("e", 5.0)
    assert found.left("d") == pytest.approx(5)
    assert found.left("f") == pytest.approx(10)
    assert found.left("b") == pytest.approx(100)
    assert found.left("c") == pytest.approx(200 * 105 / 150)


def test_dev_evaluations_come_in_steps():
    work = Workload("s", even=50.0, looks=49.7, every=0.25)
    assert work.share(0.2) == pytest.approx((0.3 + 10) / 100)
    assert work.share(0.25) == pytest.approx((0.3 + 12.5 + 12.425) / 100)
    assert work.share(1.0) == 1.0
