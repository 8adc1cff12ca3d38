"""Signals to `tadistill run`: those of Slurm and of a shutdown, sent to all processes or to one, end it as Ctrl-C does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.e2e import forked
from tests.e2e.inprocess import ended

RECIPE = """
study: long
seeds: [1]
models:
  a: &model
    load: scratch:gpt2
    tokenizer: tinyworld
    config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}
    sft: {optim: {steps: 8000, batch: 4}, select: {metric: last}}
  b: {<<: *model, seed: 2}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, max_length: 40, limit: {train: 64, dev: 4, test: 4}}
evaluate: {seeds: [1], max_new_tokens: 8, also: {}}
runtime: {checkpoint_seconds: 1000, jobs: 2}
arms: {a: a, b: b}
"""


def start(runs: Path) -> subprocess.Popen:
    """Start a study in a process group of its own. Its first two stages take much longer than the test waits."""
    recipe = runs.with_suffix(".yaml")
    recipe.write_text(RECIPE)
    return forked.start("run", str(recipe), "--runs", str(runs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_updates(runs: Path, after: list[int]) -> None:
    """Wait until both logs have a line past these updates."""
    for _ in range(600):
        logs = [path.read_text().splitlines() for path in sorted(runs.glob("store/*/*/metrics.jsonl"))]
        last = [json.loads(lines[-1])["step"] if lines else 0 for lines in logs]
        if len(last) == 2 and all(now > before for now, before in zip(last, after, strict=True)):
            return
        time.sleep(0.1)
    raise AssertionError("no update")


def steps(runs: Path) -> list[int]:
    """Return the step of each saved state."""
    return [torch.load(path, weights_only=True)["step"] for path in sorted(runs.glob("store/*/*/state.pt"))]


def children(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def worker_of(process: subprocess.Popen) -> int:
    """Return the id of a process that trains. The server forked it, and the server is a child of the command."""
    return next(worker for child in children(process.pid) for worker in children(child))


@pytest.mark.skipif(sys.platform != "linux", reason="process groups are looked at through /proc")
def test_any_signal_to_stop_saves_and_ends_with_its_code(tmp_path):
    last = [0, 0]
    for how, whom, code in ((signal.SIGUSR2, "all", 140), (signal.SIGTERM, "the worker", 143)):
        process = start(tmp_path)
        wait_for_updates(tmp_path, last)
        if whom == "the worker":
            os.kill(worker_of(process), how)
        else:
            os.killpg(process.pid, how)
            time.sleep(0.01)
            os.killpg(process.pid, signal.SIGTERM)  # a second one, while the state is saved
        text, _ = process.communicate(timeout=60)
        assert process.returncode == code, (whom, how, text)
        assert "the running stages save their state" in text
        assert "interrupted; run the same command again to continue" in text
        assert "Traceback" not in text, text[-4000:]
        assert "resource_tracker" not in text
        assert ended(process.pid)
        assert all(now > before for now, before in zip(steps(tmp_path), last, strict=True))
        last = steps(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at through /proc")
def test_a_killed_process_fails_its_own_stage_at_once_and_the_others_work_on(tmp_path):
    process = start(tmp_path)
    assert process.stdout is not None
    wait_for_updates(tmp_path, [0, 0])
    os.kill(worker_of(process), signal.SIGKILL)
    for line in process.stdout:  # the other stage takes minutes
        if "the stage's process was killed by SIGKILL (out of memory?)" in " ".join(line.split()):
            break
    else:
        raise AssertionError("the command ended")
    logs = sorted(tmp_path.glob("store/*/*/metrics.jsonl"))
    sizes = [log.stat().st_size for log in logs]
    for _ in range(1200):
        if sum(now := [log.stat().st_size for log in logs]) > sum(sizes):
            break
        time.sleep(0.1)
    assert sorted(new > old for new, old in zip(now, sizes, strict=True)) == [False, True]
    os.killpg(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 143, text
    assert ended(process.pid)
    assert len(steps(tmp_path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at through /proc")
def test_processes_end_with_a_command_that_is_killed(tmp_path):
    process = start(tmp_path)
    wait_for_updates(tmp_path, [0, 0])
    process.kill()
    process.communicate(timeout=60)
    assert ended(process.pid)
