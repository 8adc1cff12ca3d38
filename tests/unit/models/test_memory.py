"""Memory arithmetic and the limits of jobs and containers."""

import pytest

from tadistill.errors import ModelError
from tadistill.models.flops_and_memory import available_memory, check_memory, weight_bytes


def test_bytes_of_weights():
    assert [weight_bytes(1000, dtype) for dtype in ("float32", "bfloat16")] == [4000, 2000]


def test_check_memory():
    needs = {"teacher": 6_000_000_000, "student": 2_000_000_000}
    check_memory(needs, 8_000_000_000, "use smaller models")
    with pytest.raises(
        ModelError, match=r"need 8\.0 GB of memory \(teacher 6\.0 \+ student 2\.0\), but only 7\.9 GB are free; use smaller"
    ):
        check_memory(needs, 7_900_000_000, "use smaller models")
    with pytest.raises(ModelError, match="GB are free"):
        check_memory({"huge": 10**18}, available_memory(), "")
    check_memory({"tiny": 1}, available_memory(), "")


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
