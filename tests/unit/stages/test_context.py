"""A stage's process keeps little more memory than its tensors need."""

import sys

import pytest
import torch

from tadistill.stages import context


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
