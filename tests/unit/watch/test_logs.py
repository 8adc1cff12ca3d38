"""Logs are followed: each line once."""

import json
import os

import numpy as np
import pytest

from tadistill.train.checkpoint import RunLog as WrittenLog
from tadistill.watch.logs import POINTS, RunLog, TrainingLog, thinned


def write(path, steps, **values):
    with path.open("a") as file:
        file.write("".join(json.dumps({"step": step, "train/loss": float(step % 97), **values}) + "\n" for step in steps))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_only_new_bytes_are_read(path):
    log = TrainingLog(path)
    log.forward()  # there is no file yet
    write(path, range(1, 11))
    log.forward()
    with path.open("r+b") as file:
        file.write(b"x" * 20)  # these bytes have been read
    write(path, [11], **{"dev/rouge_l": 31.5})
    log.forward()
    assert (log.rows, log.step, log.newest["dev/rouge_l"], log.damaged) == (11, 11, 31.5, 0)


def test_a_line_that_is_not_complete_waits(path):
    log = TrainingLog(path)
    path.write_text('{"step": 1, "train/loss": 2}\n{"step": 2, "trai')
    log.forward()
    assert log.rows == 1
    with path.open("a") as file:
        file.write('n/loss": 4}\n')
    log.forward()
    assert log.curves["train/loss"] == [(1, 2.0), (2, 4.0)]
    assert log.damaged == 0


@pytest.mark.parametrize("rows", [119, 1000])
def test_a_long_curve_is_drawn_with_few_points(path, rows):
    write(path, range(1, rows + 1))
    log = TrainingLog(path)
    log.forward()
    points, steps = thinned(log.curves["train/loss"]), np.arange(1, rows + 1)
    width = 1 if rows < POINTS else 16
    assert len(points) == -(-(rows + 1) // width) - (width == 1)
    for number, point in enumerate(points, start=int(width == 1)):
        inside = steps[steps // width == number]
        assert (point.low, point.high) == ((inside % 97).min(), (inside % 97).max())
        assert (point.step, point.mean) == (pytest.approx(inside.mean()), pytest.approx((inside % 97).mean()))


def test_lines_that_a_resume_took_back_leave_the_curve(path):
    write(path, range(1, 21))
    log = TrainingLog(path)
    log.forward()
    WrittenLog(path, resume_step=5).write(6, {"train/loss": 50.0})
    log.forward()
    assert (log.rows, log.step) == (6, 6)
    assert log.curves["train/loss"][-1] == (6, 50.0)


def test_damaged_lines_are_counted_and_not_finite_values_are_left_out(path):
    path.write_text(
        '{"step": 1, "train/loss": NaN, "dev/rouge_l": 3}\n[]\n{"step": -1}\n{"step": true}\n\nnot JSON\n\xff\n', encoding="latin-1"
    )
    log = TrainingLog(path)
    log.forward()
    assert (log.rows, log.damaged) == (1, 5)
    assert set(log.curves) == {"dev/rouge_l"}


def test_alarms_and_last_lines_of_the_run_log(path):
    path.write_text("".join(f"2026-11-27 10:00:00 7 {text}\n" for text in ("start", "alarm: s: repeats", "1/2 s", "failed: alarms")))
    log = RunLog(path)
    log.forward()
    assert [*log.alarms] == ["s: repeats (2026-11-27 10:00:00)"]
    assert log.lines[-1].endswith("failed: alarms")
    assert len(log.lines) == 4


def test_a_large_log_of_a_run_is_read_near_its_end(path):
    bar = "\r".join(f"{i}/9" for i in range(9))  # a line of a progress bar has many returns
    with path.open("w") as file:
        file.write("10:00:00 alarm: old\n" + f"{bar}\n" * 100_000 + "10:00:01 alarm: new\n1/2")
    log = RunLog(path)
    log.forward()
    assert ([*log.alarms], len(log.lines), log.lines[-2]) == (["new (10:00:01)"], 200, bar)
    with path.open("a") as file:
        file.write(" of it\n")
    log.forward()
    assert log.lines[-1] == "1/2 of it"


def test_the_time_left_comes_from_the_growth_of_the_log(path):
    write(path, range(1, 11))
    os.utime(path, (1000, 1000))
    log = TrainingLog(path)
    log.forward()
    assert log.left(100) is None
    write(path, range(11, 31))
    os.utime(path, (1040, 1040))
    log.forward()
    assert log.left(100) == 140.0  # 70 updates of 2 s
