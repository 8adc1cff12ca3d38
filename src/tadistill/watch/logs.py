"""Follow logs that grow. The newest lines are read first, then older lines in pieces, so that no call takes long.

    log = TrainingLog(folder / "metrics.jsonl")
    log.file.forward()                # the lines since the last call; the first call starts near the end of the file
    while log.file.unread: log.file.backward()
    log.curves["train/loss"].points()

Lines of a training log are not kept. A curve has at most `BUCKETS` ranges of steps, each with its lowest, mean and highest value.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tadistill.metrics import LOGS

BUCKETS = 120
"""Largest number of points in a curve."""
_PIECE = 64 << 10
_KEPT = 200  # number of alarms, and number of last lines, that are kept
_ALARM = re.compile(r"^(?P<time>[\d: -]*\d:\d\d)(?: \d+)? alarm: (?P<text>.*)$")


class Follower:
    """Reads each line of a growing file once. If the file is replaced or becomes shorter, reading starts again near its end."""

    def __init__(self, path: Path, take: Callable[[int, bytes], None], forget: Callable[[], None]):
        """Call `take` for each line, with its offset and its bytes. Call `forget` if the file was replaced or became shorter."""
        self.path, self._take, self._forget = path, take, forget
        self._file: int | None = None
        self._low = self._high = 0
        self.changed = 0.0
        """Modification time of the file; 0 if there is none."""

    @property
    def unread(self) -> int:
        """The number of bytes at the beginning of the file that have not been read yet."""
        return self._low

    @property
    def size(self) -> int:
        return self._high

    def forward(self) -> bool:
        """Read the next piece of new lines. Return True if more of them are left."""
        try:
            stat = self.path.stat()
            if stat.st_ino != self._file or stat.st_size < self._high:
                if self._file is not None:
                    self._forget()
                self._file = stat.st_ino
                self._low = self._high = max(stat.st_size - _PIECE, 0)
                if self._low:  # the piece begins inside a line, which `backward` reads
                    self._low = self._high = self._low + self._read(self._low, _PIECE).find(b"\n") + 1
            self.changed = stat.st_mtime
            if stat.st_size == self._high:
                return False
            self._high += self._lines(self._high, self._read(self._high, _PIECE))
            return stat.st_size - self._high > _PIECE
        except OSError:  # not there yet, or replaced at this moment
            return False

    def backward(self) -> None:
        """Read another piece of the file: the lines before those that have been read so far."""
        start = max(self._low - _PIECE, 0)
        try:
            piece = self._read(start, self._low - start)
        except OSError:
            return
        skipped = piece.find(b"\n") + 1 if start else 0  # the rest of a line that begins before the piece
        self._lines(start + skipped, piece[skipped:])
        self._low = start if skipped == len(piece) else start + skipped  # a line longer than a piece is left out

    def _read(self, start: int, size: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def _lines(self, at: int, piece: bytes) -> int:
        *lines, rest = piece.split(b"\n")
        start = at
        for line in lines:
            self._take(start, line)
            start += len(line) + 1
        return len(piece) if not lines and len(rest) == _PIECE else len(piece) - len(rest)


class Point(NamedTuple):
    """A point of a curve. It stands for a range of steps: the mean step, and the lowest, mean and highest value in the range."""

    step: float
    low: float
    mean: float
    high: float


class Curve:
    """A curve in at most `BUCKETS` ranges of steps. If a step is beyond the last range, all ranges become twice as wide."""

    def __init__(self) -> None:
        self.width = 1
        self._buckets: dict[int, list[float]] = {}  # lowest, highest, sum and count of the values, sum of the steps

    def add(self, step: int, value: float) -> None:
        number = step // self.width
        if number >= BUCKETS:
            self._widen()
            self.add(step, value)
        elif (there := self._buckets.get(number)) is None:
            self._buckets[number] = [value, value, value, 1, step]
        else:
            there[0], there[1] = min(there[0], value), max(there[1], value)
            there[2] += value
            there[3] += 1
            there[4] += step

    def _widen(self) -> None:
        self.width *= 2
        old, self._buckets = self._buckets, {}
        for number, found in old.items():
            there = self._buckets.setdefault(number // 2, found)
            if there is not found:
                there[0], there[1] = min(there[0], found[0]), max(there[1], found[1])
                there[2:] = [a + b for a, b in zip(there[2:], found[2:], strict=True)]

    def points(self) -> list[Point]:
        return [Point(at / n, low, total / n, high) for _, (low, high, total, n, at) in sorted(self._buckets.items())]


class TrainingLog:
    """The metrics.jsonl of one training: its curves by metric, and the newest value of every entry."""

    def __init__(self, path: Path):
        self.file = Follower(path, self._take, self._forget)
        self._forget()

    def _forget(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.step, self.rows, self.damaged = 0, 0, 0
        self.newest: dict[str, float] = {}
        self._first: tuple[float, int] | None = None

    def forward(self) -> bool:
        more = self.file.forward()
        if self._first is None and self.rows:
            self._first = self.file.changed, self.step
        return more

    def left(self, total: int) -> float | None:
        """Return the predicted seconds until update `total`, from the speed at which the log grows. Return None until the log has grown."""
        then, step = self._first or (0.0, self.step)
        seconds, updates = self.file.changed - then, self.step - step
        return (total - self.step) * seconds / updates if updates > 0 and seconds > 0 else None

    def _take(self, at: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError):
            self.damaged += bool(line.strip())
            return
        if type(step) is not int or step < 0:
            self.damaged += 1
            return
        self.rows += 1
        newest, self.step = step >= self.step, max(step, self.step)
        for name, value in row.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if newest:
                self.newest[name] = value
            curve = self.curves.get(name)
            if curve is None and (name in LOGS or name.startswith("dev/")):
                curve = self.curves[name] = Curve()
            if curve is not None:
                curve.add(step, value)


class RunLog:
    """The last lines and the alarms of a log: the run.log of a study, or the log of a Slurm job."""

    def __init__(self, path: Path):
        self.file = Follower(path, self._take, self._forget)
        self._forget()

    def _forget(self) -> None:
        self._alarms: dict[int, str] = {}
        self._last: dict[int, str] = {}

    def _take(self, at: int, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        for found in (self._last, self._alarms) if _ALARM.search(text) else (self._last,):
            found[at] = text
            if len(found) > _KEPT:
                del found[min(found)]

    @property
    def alarms(self) -> list[str]:
        """The newest 200 alarms (warnings of a training), each with its time in brackets. The oldest comes first."""
        found = (_ALARM.search(text) for _, text in sorted(self._alarms.items()))
        return [f"{alarm['text']} ({alarm['time']})" for alarm in found if alarm]

    @property
    def lines(self) -> list[str]:
        """The newest 200 lines."""
        return [text for _, text in sorted(self._last.items())]
