"""What a job does when it is told to stop, and when its stage fails."""

import os
import signal

import pytest
from tests.unit.plan.fakes import spec

from tadistill.cluster import job
from tadistill.cluster.job import StageJob
from tadistill.errors import Interrupted, StageFailed
from tadistill.plan.task import Task
from tadistill.store import FAILURE, Store


@pytest.fixture
def work(monkeypatch, tmp_path):
    """Sets what running a stage does; the signals' handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    for name in ("SLURM_NTASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    made = Task(spec("sft"), "ab12", "sft s", str(tmp_path), "study", None, None)

    def make(run, *, chain: bool = False) -> StageJob:
        monkeypatch.setattr("tadistill.stages.execute.run_stage", lambda task, **hooks: run(**hooks))
        return StageJob((made,), chain)

    yield make
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stopped_by(number: signal.Signals):
    def run(*, stop, **_) -> None:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        raise Interrupted("stopped at update 3 of 9")

    return run


def test_the_scheduler_is_asked_only_after_the_state_is_saved(work):
    seen = []
    signal.signal(signal.SIGUSR2, lambda *_: seen.append("requeue"))  # where submitit has its handler
    with pytest.raises(SystemExit):
        work(stopped_by(signal.SIGUSR2))()
    assert seen == ["requeue"]


def test_a_cancelled_job_is_not_queued_again(work):
    signal.signal(signal.SIGUSR2, lambda *_: pytest.fail("asked for a requeue"))
    with pytest.raises(SystemExit) as ended:
        work(stopped_by(signal.SIGTERM))()
    assert ended.value.code == 143


def test_segments_of_a_chain(work, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "2")
    with pytest.raises(SystemExit) as ended:
        work(stopped_by(signal.SIGUSR2), chain=True)()
    assert ended.value.code == 0
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(StageFailed, match="the last job of this stage ended before the stage was finished"):
        work(stopped_by(signal.SIGUSR2), chain=True)()

    def broken(**_) -> None:
        raise ValueError("no such number")

    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    with pytest.raises(ValueError, match="no such number"):
        work(broken, chain=True)()
    assert (Store(tmp_path).folder("ab12") / FAILURE).read_text() == "ValueError: no such number\n"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with pytest.raises(StageFailed, match="an earlier job of this stage failed: ValueError: no such number"):
        work(lambda **_: pytest.fail("ran"), chain=True)()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")  # submitted anew
    work(lambda **_: None, chain=True)()
    assert not (Store(tmp_path).folder("ab12") / FAILURE).exists()


def test_a_job_whose_stage_is_finished_has_nothing_to_do(work, tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.begin("ab12", {"label": "sft s"})
    store.finish("ab12", {})
    work(lambda **_: pytest.fail("ran"), chain=True)()
    monkeypatch.setenv("WORLD_SIZE", "2")  # ranks ask rank 0
    monkeypatch.setattr("os._exit", lambda code: None)
    ran = []
    work(lambda **_: ran.append(1))()
    assert ran == [1]


def test_ranks_are_told_of_each_other(monkeypatch):
    for name, value in {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    job._name_ranks()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["3", "1", "4"]
