"""One GPU for each process of a stage, on a machine that only claims to have GPUs."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tests.unit.runner.small import small

from tadistill.config import parse
from tadistill.errors import ModelError
from tadistill.plan import throughput
from tadistill.plan.arms import make_plan
from tadistill.plan.task import make_task
from tadistill.runner import preflight, processes, schedule
from tadistill.runner.schedule import Devices
from tadistill.store import Store

TWO = "models.l={load: scratch:gpt2, tokenizer: tinyworld, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}}"


@pytest.fixture
def claimed(monkeypatch):
    """A machine with four GPUs, of which this process may use three."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,GPU-7c")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def plan(*changes: str):
    return make_plan(parse(small("s"), changes, source="small"))


def test_stages_get_the_gpus_that_no_other_stage_uses(claimed):
    gpus = Devices.visible(jobs=3)
    assert gpus.take("a", 1) == ("2",)
    assert gpus.take("b", 1) == ("3",)
    assert gpus.take("both", 2) is None
    gpus.free("a")
    assert gpus.take("both", 2) == ("2", "GPU-7c")
    assert gpus.take("c", 1) is None
    gpus.free("both")
    gpus.free("b")
    assert gpus.take("too many", 8) == ("2", "3", "GPU-7c")  # its processes say that there are too few


def test_more_jobs_than_gpus_share_them(claimed):
    gpus = Devices.visible(jobs=6)
    assert [gpus.take(str(i), 1) for i in range(7)] == [(name,) for name in ("2", "3", "GPU-7c") * 2] + [None]


def test_without_gpus_no_stage_waits():
    assert [Devices([], 4).take(key, 2) for key in "ab"] == [(), ()]


def test_a_run_uses_all_gpus(claimed):
    assert preflight._default_jobs() == 3


class Recorded:
    """A context of multiprocessing that starts no process."""

    def __init__(self):
        self.environments = []

    def Pipe(self):
        return Mock(), Mock()

    def Process(self, target, args, name):
        assert target is processes._work
        self.environments.append(args[1])
        return SimpleNamespace(start=lambda: None, join=lambda: None, kill=lambda: None, exitcode=0)


def test_the_environment_of_a_stage_names_its_gpus(monkeypatch, tmp_path):
    """`_work` sets this environment before it uses torch."""
    context, found = Recorded(), plan()
    monkeypatch.setattr(processes, "prepare", lambda: context)
    task = make_task(found, next(iter(found.stages.values())), Store(tmp_path))
    processes.StageProcesses(task, threads=1, gpus=("3",))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ended = processes.StageProcesses(task, threads=1)
    assert context.environments[0]["CUDA_VISIBLE_DEVICES"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in context.environments[1]
    ended._pipes.clear()
    assert ended.attend() == []
    assert str(ended.error) == "the stage's process ended with exit code 0, but without a result (see its output above)"


def test_stages_at_the_same_time_run_on_different_gpus(claimed, monkeypatch, tmp_path):
    started = {}

    def start(task, *, threads, gpus):
        started[task.key] = gpus
        return SimpleNamespace(ended=False, sources=[], end=lambda: None)

    monkeypatch.setattr(schedule, "StageProcesses", start)
    found, screen = plan(TWO, "arms={sft: s, other: l}"), SimpleNamespace(start=lambda key: None)
    schedule._Schedule(found, dict(found.stages), Store(tmp_path), screen, 2, None, None)._start()
    assert sorted(started.values()) == [("2",), ("3",)]


def test_a_stage_that_does_not_fit_on_a_gpu_is_refused(claimed, monkeypatch):
    """The memory of the host has no say in what a GPU holds, and the other way round."""
    found = plan()
    free = {"gpu": 10**12, "host": 10**12}
    monkeypatch.setattr(schedule, "free_memory", lambda: [10**12, free["gpu"]])
    monkeypatch.setattr(preflight, "available_memory", lambda: free["host"])
    preflight._check_memory(found, 2)
    free["gpu"] = 1000
    with pytest.raises(ModelError, match=r"need 0\.0 GB of memory of a GPU \("):
        preflight._check_memory(found, 2)
    free |= {"gpu": 10**12, "host": 1000}
    with pytest.raises(ModelError, match=r"need 0\.0 GB of memory of this machine \("):
        preflight._check_memory(found, 2)


def test_a_machine_without_gpus_has_no_free_gpu_memory():
    assert schedule.free_memory() == []


def test_a_plan_counts_gpus_without_torch(monkeypatch, tmp_path):
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert throughput.gpus(tmp_path / "no driver") == 0
    assert throughput.gpus(tmp_path) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert throughput.gpus(tmp_path) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert throughput.gpus(tmp_path) == 0
