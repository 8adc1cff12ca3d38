"""Logs are followed: each line once, the newest first, and never the whole file again."""

import json
import os

import numpy as np
import pytest

from tadistill.train.checkpoint import RunLog as WrittenLog
from tadistill.watch import logs
from tadistill.watch.logs import BUCKETS, RunLog, TrainingLog


def write(path, steps, **values):
    with path.open("a") as file:
        file.write("".join(json.dumps({"step": step, "train/loss": float(step % 97), **values}) + "\n" for step in steps))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def read(log):
    log.file.forward()
    while log.file.unread:
        log.file.backward()


def test_only_new_bytes_are_read(path, monkeypatch):
    log, read = TrainingLog(path), []
    original = log.file._read
    monkeypatch.setattr(log.file, "_read", lambda start, size: read.append(start) or original(start, size))
    log.file.forward()  # there is no file yet
    write(path, range(1, 11))
    log.file.forward()
    before = path.stat().st_size
    log.file.forward()
    write(path, [11], **{"dev/rouge_l": 31.5})
    log.file.forward()
    assert read == [0, before]
    assert (log.rows, log.step, log.newest["dev/rouge_l"]) == (11, 11, 31.5)


def test_a_line_that_is_not_complete_waits(path):
    log = TrainingLog(path)
    path.write_text('{"step": 1, "train/loss": 2}\n{"step": 2, "trai')
    log.file.forward()
    assert log.rows == 1
    with path.open("a") as file:
        file.write('n/loss": 4}\n')
    log.file.forward()
    assert [point.mean for point in log.curves["train/loss"].points()] == [2.0, 4.0]
    assert log.damaged == 0


@pytest.mark.parametrize("piece", [200, 1000, 1 << 20])
def test_old_lines_are_read_in_pieces_and_the_curve_is_the_same(path, piece, monkeypatch):
    monkeypatch.setattr(logs, "_PIECE", piece)
    write(path, range(1, 1001))
    log = TrainingLog(path)
    log.file.forward()
    assert log.step == 1000
    assert bool(log.file.unread) == (piece < 1 << 20)
    read(log)
    assert (log.rows, log.damaged) == (1000, 0)
    points, steps = log.curves["train/loss"].points(), np.arange(1, 1001)
    assert len(points) <= BUCKETS
    width = log.curves["train/loss"].width
    for number, point in enumerate(points):
        inside = steps[steps // width == number]
        assert (point.low, point.high) == ((inside % 97).min(), (inside % 97).max())
        assert (point.step, point.mean) == (pytest.approx(inside.mean()), pytest.approx((inside % 97).mean()))


def test_lines_that_a_resume_took_back_leave_the_curve(path):
    write(path, range(1, 21))
    log = TrainingLog(path)
    read(log)
    WrittenLog(path, resume_step=5).write(6, {"train/loss": 50.0})
    read(log)
    assert (log.rows, log.step) == (6, 6)
    assert log.curves["train/loss"].points()[-1].mean == 50.0


def test_damaged_lines_are_counted_and_not_finite_values_are_left_out(path):
    path.write_text(
        '{"step": 1, "train/loss": NaN, "dev/rouge_l": 3}\n[]\n{"step": -1}\n{"step": true}\n\nnot JSON\n\xff\n', encoding="latin-1"
    )
    log = TrainingLog(path)
    read(log)
    assert (log.rows, log.damaged) == (1, 5)
    assert set(log.curves) == {"dev/rouge_l"}


def test_alarms_and_last_lines_of_the_run_log(path):
    path.write_text("".join(f"2026-11-27 10:00:00 7 {text}\n" for text in ("start", "alarm: s: repeats", "1/2 s", "failed: alarms")))
    log = RunLog(path)
    read(log)
    assert log.alarms == ["s: repeats (2026-11-27 10:00:00)"]
    assert log.lines[-1].endswith("failed: alarms")
    assert len(log.lines) == 4


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
