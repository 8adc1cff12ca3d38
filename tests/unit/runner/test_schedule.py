"""One GPU for each process of a stage, on a machine that only claims to have GPUs."""

import json
import os
import re
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from tests.unit.runner.small import small
from typer.testing import CliRunner

from tadistill.cli import app
from tadistill.config import parse
from tadistill.constants import STAGES_PER_GPU
from tadistill.errors import ConfigError, ModelError
from tadistill.objectives.tiles import free_bytes
from tadistill.plan import throughput
from tadistill.plan.arms import make_plan
from tadistill.plan.task import make_task
from tadistill.runner import preflight, processes, schedule
from tadistill.runner.schedule import Devices, Gpu
from tadistill.store import Store
from tadistill.user_code import load_function, path_without_studies

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
        self.environments, self.paths = [], []

    def Pipe(self):
        return Mock(), Mock()

    def Process(self, target, args, name):
        assert target is processes._work
        self.environments.append(args[1])
        self.paths.append(args[2])
        return SimpleNamespace(start=lambda: None, join=lambda: None, kill=lambda: None, exitcode=0)


def test_the_environment_of_a_stage_names_its_gpus(monkeypatch, tmp_path):
    """`_work` sets this environment before it uses torch."""
    context, found = Recorded(), plan()
    monkeypatch.setattr(processes, "prepare", lambda: context)
    task = make_task(found, next(iter(found.stages.values())), Store(tmp_path))
    processes.StageProcesses(task, threads=1, gpus=("3",), share=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ended = processes.StageProcesses(task, threads=1)
    assert (context.environments[0]["CUDA_VISIBLE_DEVICES"], context.environments[0][STAGES_PER_GPU]) == ("3", "2")
    assert not {"CUDA_VISIBLE_DEVICES", STAGES_PER_GPU} & context.environments[1].keys()
    ended._pipes.clear()
    assert ended.attend() == []
    assert str(ended.error) == "the stage's process ended with exit code 0, but without a result (see its output above)"


def test_a_stage_does_not_get_the_folder_of_another_study(monkeypatch, tmp_path):
    """A stage that started after another study was planned imported modules of that study in place of its own."""
    context, found, path = Recorded(), plan(), path_without_studies()
    monkeypatch.setattr("sys.path", [*path])
    monkeypatch.setattr(processes, "prepare", lambda: context)
    task = make_task(found, next(iter(found.stages.values())), Store(tmp_path))
    (tmp_path / "own_of_another.py").write_text("def f():\n    return 1\n")
    load_function("own_of_another:f", tmp_path)
    assert sys.path == [*path, str(tmp_path)]
    processes.StageProcesses(task, threads=1)
    assert context.paths == [path]


def test_stages_at_the_same_time_run_on_different_gpus(claimed, monkeypatch, tmp_path):
    started = {}

    def start(task, *, threads, gpus, share):
        started[task.key] = (gpus, share)
        return SimpleNamespace(ended=False, sources=[], end=lambda: None)

    monkeypatch.setattr(schedule, "StageProcesses", start)
    found, screen = plan(TWO, "arms={sft: s, other: l}"), SimpleNamespace(start=lambda key: None)
    schedule._Schedule(found, dict(found.stages), Store(tmp_path), screen, 2, None, None)._start()
    assert sorted(started.values()) == [(("2",), 1), (("3",), 1)]


def test_a_stage_that_shares_a_gpu_takes_its_share_of_what_is_free(monkeypatch):
    for name, value in {"mem_get_info": (60, 80), "memory_reserved": 20, "memory_allocated": 15}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 65
    monkeypatch.setenv(STAGES_PER_GPU, "3")
    assert free_bytes(torch.device("cuda")) == 25


def test_a_stage_that_does_not_fit_on_a_gpu_is_refused(claimed, monkeypatch):
    """The memory of the host has no say in what a GPU holds, and the other way round."""
    found = plan()
    free = {"gpu": 10**12, "host": 10**12}
    monkeypatch.setattr(schedule, "inspect_gpus", lambda: [Gpu("a", 10**12, 10**12), Gpu("b", free["gpu"], 10**12)])
    monkeypatch.setattr(preflight, "available_memory", lambda: free["host"])
    preflight._check_memory(found, 2)
    free["gpu"] = 1000
    with pytest.raises(ModelError, match=r"need 0\.0 GB of memory of a GPU \("):
        preflight._check_memory(found, 2)
    free |= {"gpu": 10**12, "host": 1000}
    with pytest.raises(ModelError, match=r"need 0\.0 GB of memory of this machine \("):
        preflight._check_memory(found, 2)


def test_a_machine_without_gpus_has_no_free_gpu_memory():
    assert schedule.inspect_gpus() == []


@pytest.fixture
def thread(monkeypatch):
    """The process that looks at the GPUs is a thread, so that it sees what this test claims."""

    class Process(Thread):
        kill, exitcode = Mock(), -11

    def process(target, args, name):
        return Process(target=target, args=(Connection(os.dup(args[0].fileno()), readable=False),))  # the other end is closed here

    context = SimpleNamespace(Pipe=Pipe, Process=process)
    monkeypatch.setattr(schedule, "prepare", lambda: context)


def test_gpus_are_inspected(claimed, thread, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (number, 10))
    assert schedule.inspect_gpus() == [Gpu("card 0", 0, 10), Gpu("card 1", 1, 10), Gpu("card 2", 2, 10)]


def test_a_gpu_that_cannot_be_used_is_named(claimed, thread, monkeypatch):
    """For instance in exclusive mode, while another process uses it."""
    busy = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"

    def ask(number):
        if number == 1:
            raise RuntimeError(f"{busy}\nCUDA kernel errors might be reported later")
        return 1, 2

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    with pytest.raises(ConfigError, match=rf"^GPU 3 cannot be used \({re.escape(busy)}\); .*CUDA_VISIBLE_DEVICES$"):
        schedule.inspect_gpus()


def test_gpus_without_an_answer(claimed, thread, monkeypatch):
    monkeypatch.setattr(schedule, "_tell", lambda pipe: pipe.close())  # as if the process had crashed
    with pytest.raises(ConfigError, match="the process that looks at the GPUs ended with exit code -11; look at"):
        schedule.inspect_gpus()
    monkeypatch.setattr(schedule, "_tell", lambda pipe: kept.append(pipe))
    monkeypatch.setattr(schedule, "_PATIENCE", 0.01)
    kept = []
    with pytest.raises(ConfigError, match="did not answer within"):
        schedule.inspect_gpus()


def test_no_measurement_is_lost_because_a_gpu_cannot_be_used(monkeypatch, tmp_path):
    """Nor does this process use a GPU: in exclusive mode, a stage cannot use one that another process uses."""
    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: pytest.fail("the main process used CUDA"))
    monkeypatch.setattr("tadistill.runner.timing.time_stages", lambda *_: calls.append("timed") or {})
    monkeypatch.setattr(schedule, "inspect_gpus", lambda: calls.append("asked") or [Gpu("a card", 1, 1)])
    (tmp_path / "r.yaml").write_text(small("s"))
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml"), "--measure", "--runs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert calls == ["asked", "timed"]
    assert list(json.loads((tmp_path / "store" / "throughput.json").read_text())) == ["a card"]


def test_a_plan_counts_gpus_without_torch(monkeypatch, tmp_path):
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert throughput.gpus(tmp_path / "no driver") == 0
    assert throughput.gpus(tmp_path) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert throughput.gpus(tmp_path) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert throughput.gpus(tmp_path) == 0
