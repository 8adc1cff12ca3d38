"""A stage's process keeps little more memory than its tensors need, and works on each part once."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tests.unit.runner.small import small
from transformers.activations import NewGELUActivation

from tadistill.config import parse
from tadistill.disk import read_json
from tadistill.plan.arms import make_plan
from tadistill.plan.task import make_task
from tadistill.stages import context
from tadistill.store import Store


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is a function of glibc")
def test_freed_memory_goes_back_to_the_system_while_a_stage_reports_progress(monkeypatch):
    said = []
    monkeypatch.setattr(context, "_TRIM_EVERY", 0.0)
    report = context.trimming(lambda *each: said.append(each))
    blocks = [torch.zeros(25_000) for _ in range(1500)]  # 150 MB in blocks that stay in the heap when they are freed
    keep = blocks[::100]
    full = resident()
    del blocks
    report(1, 2, "updates")
    assert said == [(1, 2, "updates")]
    assert full - resident() > 75e6
    assert len(keep) == 15


def test_a_saved_part_is_counted_and_not_worked_on_again(tmp_path):
    shown: list[tuple[int, int, str]] = []
    stage = SimpleNamespace(progress=lambda *now: shown.append(now), stop=lambda: False)
    for work in (lambda done: done(3) or ["a"], lambda done: pytest.fail("the part was worked on again")):
        done = context.Done(stage, 5, "answers")  # type: ignore[arg-type]
        done.save(tmp_path / "parts" / "0.json", 3, partial(work, done))
        assert read_json(tmp_path / "parts" / "0.json") == ["a"]
    assert shown == [(0, 5, "answers"), (0, 5, "answers"), (3, 5, "answers"), (0, 5, "answers")]
    done.save(tmp_path / "parts" / "1.json", 2, lambda: done(2) or ["b"])
    assert shown[-2:] == [(3, 5, "answers"), (5, 5, "answers")]  # first what an earlier attempt has done


def test_only_a_gpu_computes_gelu_in_one_kernel(tmp_path):
    """transformers starts eight kernels for it in every layer of GPT-2. On a CPU, results stay the same bit for bit."""
    plan = make_plan(parse(small("s"), [], source="small.yaml"))
    task = next(make_task(plan, stage, Store(tmp_path)) for stage in plan.stages.values() if stage.spec.kind == "sft")
    stage = context.Context(task, Store(tmp_path), tmp_path, lambda *_: None, print, lambda: False)

    def loaded() -> tuple[set[type], torch.Tensor]:
        model, _ = stage.model(task.spec.student, device=torch.device("cpu"))
        return {type(module) for module in model.modules()}, model(torch.arange(8)[None]).logits

    on_cpu, expected = loaded()
    stage.device = torch.device("cuda")
    on_gpu, found = loaded()
    assert (NewGELUActivation in on_cpu, torch.nn.GELU in on_cpu) == (True, False)
    assert (NewGELUActivation in on_gpu, torch.nn.GELU in on_gpu) == (False, True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_tokenised_rows_are_no_progress_of_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "LARGE", 0)
    plan = make_plan(parse(small("s"), [], source="small.yaml"))
    task = next(make_task(plan, stage, Store(tmp_path)) for stage in plan.stages.values() if stage.spec.kind == "sft")
    said: list[tuple[int, int, str]] = []
    stage = context.Context(task, Store(tmp_path), tmp_path, lambda *now: said.append(now), print, lambda: False)
    _, tokenizer = stage.model(task.spec.student, device=torch.device("cpu"))
    stage.split(task.spec.train, tokenizer)
    assert said[-1] == (0, task.spec.steps, "64 of 64 rows tokenised")
    assert {now[:2] for now in said} == {(0, task.spec.steps)}
