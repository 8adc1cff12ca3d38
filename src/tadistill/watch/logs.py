"""Follow logs that grow: the metrics.jsonl of a training, and run.log. Each call of `forward` reads the lines since the last call.

log = TrainingLog(folder / "metrics.jsonl")
log.forward()
log.curves["train/loss"]          # pairs of step and value
thinned(log.curves["train/loss"])
"""

import json
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tadistill.metrics import LOGS

POINTS = 120
"""Largest number of points in a drawn curve."""
_KEPT = 200  # number of alarms, and number of last lines, that are kept
_LARGEST = 1 << 20  # of more new bytes in run.log, only the last are read
_ALARM = re.compile(r"^(?P<time>[\d: -]*\d:\d\d)(?: \d+)? alarm: (?P<text>.*)$")


class _Log:
    """A growing file. If it is replaced or becomes shorter, it is read again."""

    most = math.inf
    """Largest number of new bytes that are read at a time. If there are more, the first of them are left out."""

    def __init__(self, path: Path):
        self.path, self._file, self._read = path, 0, 0
        self.changed = 0.0
        """Modification time of the file; 0 if there is none."""
        self._forget()

    def forward(self) -> None:
        """Read the new lines."""
        try:
            stat = self.path.stat()
            if stat.st_ino != self._file or stat.st_size < self._read:
                self._forget()
                self._file, self._read = stat.st_ino, 0
            self.changed = stat.st_mtime
            lines = self._new_lines() if stat.st_size > self._read else []
        except OSError:  # not there yet, or replaced at this moment
            return
        for line in lines:
            self._take(line.decode(errors="replace").strip())

    def _new_lines(self) -> list[bytes]:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size - self._read > self.most:
                file.seek(int(size - self.most))
                file.readline()  # the rest of a line
                self._read = file.tell()
            file.seek(self._read)
            *lines, _ = file.read().split(b"\n")  # the last line may be incomplete
        self._read += sum(len(line) + 1 for line in lines)
        return lines

    def _forget(self) -> None:
        raise NotImplementedError

    def _take(self, line: str) -> None:
        raise NotImplementedError


class TrainingLog(_Log):
    """The metrics.jsonl of one training: its curves by metric, as pairs of step and value, and the newest value of every entry."""

    def forward(self) -> None:
        super().forward()
        if self._first is None and self.rows:
            self._first = self.changed, self.step

    def left(self, total: int) -> float | None:
        """Return the predicted seconds until update `total`, from the speed at which the log grows. Return None until the log has grown."""
        then, step = self._first or (0.0, self.step)
        seconds, updates = self.changed - then, self.step - step
        return (total - self.step) * seconds / updates if updates > 0 and seconds > 0 else None

    def _forget(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.step, self.rows, self.damaged = 0, 0, 0
        self.newest: dict[str, float] = {}
        self._first: tuple[float, int] | None = None

    def _take(self, line: str) -> None:
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError):
            self.damaged += bool(line)
            return
        if type(step) is not int or step < 0:
            self.damaged += 1
            return
        self.rows, self.step = self.rows + 1, step
        for name, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self.newest[name] = value
                if name in LOGS or name.startswith("dev/"):
                    self.curves.setdefault(name, []).append((step, value))


class RunLog(_Log):
    """The newest lines and alarms of a log: the run.log of a study, or the log of a Slurm job. An alarm has its time in brackets."""

    most = _LARGEST

    def _forget(self) -> None:
        self.alarms, self.lines = deque[str](maxlen=_KEPT), deque[str](maxlen=_KEPT)

    def _take(self, line: str) -> None:
        self.lines.append(line)
        if alarm := _ALARM.search(line):
            self.alarms.append(f"{alarm['text']} ({alarm['time']})")


class Point(NamedTuple):
    """A point of a curve. It stands for a range of steps: the mean step, and the lowest, mean and highest value in the range."""

    step: float
    low: float
    mean: float
    high: float


def thinned(curve: Sequence[tuple[int, float]]) -> list[Point]:
    """Return at most `POINTS` points. Each stands for an equal range of steps."""
    width = 1 << (max((step for step, _ in curve), default=0) // POINTS).bit_length()  # it rarely changes while the curve grows
    ranges: dict[int, list[tuple[int, float]]] = {}
    for step, value in curve:
        ranges.setdefault(step // width, []).append((step, value))
    return [_point(*zip(*found, strict=True)) for _, found in sorted(ranges.items())]


def _point(steps: Iterable[int], values: Sequence[float]) -> Point:
    return Point(fmean(steps), min(values), fmean(values), max(values))
