"""Memory arithmetic and the limits of jobs and containers."""

import pytest
import torch

from tadistill.errors import ConfigError, ModelError
from tadistill.models.cost import available_memory, check_memory, resident_bytes


def test_resident_bytes():
    assert resident_bytes(1000, training=False) == 4000
    assert resident_bytes(1000, training=False, dtype="bfloat16") == 2000
    assert resident_bytes(1000, training=True) == 16000  # weights 4, gradients 4, two moments 8
    assert resident_bytes(1000, training=True, dtype="bfloat16") == 18000
    assert resident_bytes(1000, training=True, adapters=10) == 4 * 1000 + 12 * 10
    assert resident_bytes(1000, training=True, dtype="bfloat16", adapters=10) == 4 * 1000 + 14 * 10
    assert resident_bytes(1000, training=False, dtype=str(torch.float16)) == 2000
    with pytest.raises(ConfigError, match="dtype is `int8`; use one of float32, bfloat16, float16"):
        resident_bytes(1, training=False, dtype="int8")


def test_check_memory():
    needs = {"teacher": 6_000_000_000, "student": 2_000_000_000}
    check_memory(needs, 8_000_000_000)
    with pytest.raises(
        ModelError, match=r"need 8\.0 GB of memory \(teacher 6\.0 \+ student 2\.0\), but only 7\.9 GB are free; use smaller"
    ):
        check_memory(needs, 7_900_000_000)
    with pytest.raises(ModelError, match="GB are free"):
        check_memory({"huge": 10**18})
    check_memory({"tiny": 1})


def test_limits_of_all_enclosing_groups_count(tmp_path):
    """A Slurm step has no limit of its own; its job has."""
    own, job = tmp_path / "cgroup", tmp_path / "root" / "job"
    own.write_text("0::/job/step\n", encoding="utf-8")
    (job / "step").mkdir(parents=True)
    for folder, limit, used in [(job / "step", "max", "10"), (job, "1000", "700")]:
        (folder / "memory.max").write_text(limit + "\n", encoding="utf-8")
        (folder / "memory.current").write_text(used + "\n", encoding="utf-8")
    assert available_memory(tmp_path / "root", own) == 300
    (job / "memory.stat").write_text("anon 600\ninactive_file 50\n", encoding="utf-8")
    assert available_memory(tmp_path / "root", own) == 350
    (job / "memory.current").write_text("5000\n", encoding="utf-8")
    assert available_memory(tmp_path / "root", own) == 0


def test_without_groups_the_machine_counts(tmp_path):
    assert available_memory(tmp_path, tmp_path / "absent") > 10**6
    (tmp_path / "v1").write_text("4:memory:/job\n", encoding="utf-8")
    assert available_memory(tmp_path, tmp_path / "v1") > 10**6
