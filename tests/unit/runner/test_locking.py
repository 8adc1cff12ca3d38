"""A stage that two processes run at the same time: the second waits, and finds it finished; or gives up when it is asked to stop. And what
a stage sets for the whole process."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tadistill.config import DataRef
from tadistill.config.data import World
from tadistill.disk import write_json
from tadistill.errors import Interrupted, StageFailed
from tadistill.plan.inputs import Encoding, Loaded, Split
from tadistill.plan.kinds import TemperSpec
from tadistill.plan.task import Task
from tadistill.stages import execute
from tadistill.store import Store

MODEL = Loaded(load="scratch:gpt2", revision="main", config={}, tokenizer="tinyworld", fingerprint="f")
SPEC = TemperSpec(
    data=Encoding(template="plain", max_prompt=8, max_length=16, world=World()),
    teacher=MODEL,
    like=MODEL,
    dev=Split(ref=DataRef(load="tinyworld"), fingerprint="f", role="dev", limit=None),
    batch=4,
)


def task(root) -> Task:
    return Task(SPEC, "ab" + "0" * 14, "temper x", str(root), "t", None, 30.0)


def run(root, heard: list[str], stop=lambda: False) -> None:
    execute.run_stage(task(root), progress=lambda done, total, text: heard.append(text), alarm=print, stop=stop)


@pytest.fixture
def work(monkeypatch):
    """A slow stage in place of training; how often it was done."""
    started, done = threading.Event(), []

    def slow(context):
        started.set()
        time.sleep(1.5)
        write_json(context.folder / "result.json", len(done))
        done.append(1)
        return {}

    monkeypatch.setattr("tadistill.stages.teacher.temper", slow)
    return started, done


def test_a_stage_whose_code_ends_the_process_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("tadistill.stages.teacher.temper", lambda context: sys.exit(0))
    with pytest.raises(StageFailed, match=r"test_locking.py, line \d+ ends the process \(SystemExit: 0\); change this line"):
        run(tmp_path, [])


@pytest.mark.slow
def test_the_second_waits_and_trains_nothing(tmp_path, work):
    started, done = work
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, tmp_path, [])
        started.wait(5)
        heard: list[str] = []
        pool.submit(run, tmp_path, heard).result(20)
        first.result(20)
    assert done == [1]
    assert "another process is running this stage" in heard
    assert Store(tmp_path).finished(task(tmp_path).key)


@pytest.mark.slow
def test_a_waiting_process_can_be_stopped(tmp_path, work):
    started, done = work
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, tmp_path, [])
        started.wait(5)
        with pytest.raises(Interrupted, match="another process"):
            run(tmp_path, [], stop=lambda: True)
        first.result(20)
    assert done == [1]


def test_a_stage_does_not_use_the_attention_of_cudnn(monkeypatch, tmp_path):
    seen: list[bool] = []
    monkeypatch.setattr("tadistill.stages.teacher.temper", lambda _: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or {})
    run(tmp_path, [])
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as before
