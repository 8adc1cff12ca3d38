"""The files of one training: its log, its two newest states, and for each of these two states the best weights so far.

A file is written under a temporary name, flushed to disk and renamed. So after a crash, the file is complete: it is the old or the new one.
The name of a file with best weights contains the number of the update. So newer best weights do not overwrite older ones. A training
that resumes from one of the states needs the best weights up to this state.
"""

import json
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tadistill.disk import replacing, write_text, writing
from tadistill.errors import StoreError
from tadistill.store import STATES

_SECONDS = 30.0
_ALWAYS = ("step", "model", "optimizer", "sampler")  # entries of a state; those of earlier versions may lack others
_SHARE = 20  # saving takes at most a twentieth of the time


@dataclass
class TrainState:
    """Everything that a training needs to resume exactly. Random generators are created anew for each step and need no state."""

    step: int = 0
    best_value: float | None = None
    best_step: int = 0
    misses: int = 0
    """Number of evaluations on the dev set since the best one."""
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Any] = field(default_factory=dict)
    """The weights of a teacher that is a moving average of the student."""
    alarms: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    """The counts of tokens and FLOPs, from `train.monitoring`."""
    pending: list[dict[str, float]] = field(default_factory=list)
    """The metrics of the updates since the last line of the log. The next line contains their means."""

    def release(self) -> None:
        """Drop what takes the most memory. The models, the optimizer and the sampler have their own copies of it."""
        self.model, self.optimizer, self.average, self.sampler = {}, {}, {}, {}


class Checkpoints:
    """The saved files of one training. state.pt has the newest state, state-before.pt has the state before it, and best-STEP.pt has the
    weights with the best dev value."""

    def __init__(self, directory: Path, seconds: float | None = None):
        """`seconds` is the time between two saves. None means 30 seconds or 20 times the duration of a save, whichever is longer."""
        self.directory, self.seconds = directory, seconds
        self.newest, self.before = (directory / name for name in STATES)
        self.took, self.at = 0.0, time.monotonic()
        self.sound = True
        """False if state.pt cannot be read. The next save then does not keep it as state-before.pt."""
        self.best_steps: list[int] = []
        """The `best_step` of the newest saved state, and of the state before it. The best weights of these two updates are not deleted."""

    def due(self) -> bool:
        pause = max(_SECONDS, _SHARE * self.took) if self.seconds is None else self.seconds
        return time.monotonic() - self.at > pause

    def best(self, step: int) -> Path:
        return self.directory / f"best-{step}.pt"

    def load(self, alarm: Callable[[str], None]) -> TrainState | None:
        """Return the newest state that can be read, or None if no state has been saved yet.

        If the newest state is damaged, the state before it is returned, and `alarm` is called with a message.

        Raises:
            StoreError: there are states, but none can be read.
        """
        damage = []
        for path in (self.newest, self.before):
            if not path.exists():
                continue
            try:
                state = _state(path)
                if state.best_step:
                    load(self.best(state.best_step))
            except StoreError as error:
                damage.append(error)
                continue
            self.best_steps, self.sound = [state.best_step], not damage
            if damage:
                alarm(f"{damage[0]}; the previous state, of update {state.step}, is used instead")
            return state
        if damage:
            files = self.directory / "state*.pt"
            raise StoreError(
                f"{damage[0]}, and no earlier state can be read; delete {files} and run the same command again to repeat the training"
            )
        return None

    def save(self, state: TrainState) -> None:
        """Write the state to state.pt, and keep the old state.pt as state-before.pt."""
        start = time.monotonic()
        with replacing(self.newest) as temporary:
            torch.save(vars(state), temporary)
            if self.sound and self.newest.exists():
                os.replace(self.newest, self.before)
        self.best_steps = [state.best_step, *self.best_steps[:1]]
        self.sound = True
        self._drop_other_best()
        self.at = time.monotonic()
        self.took = self.at - start

    def keep_best(self, step: int, weights: dict[str, Any]) -> None:
        save(self.best(step), weights)
        self._drop_other_best(step)

    def _drop_other_best(self, *steps: int) -> None:
        for path in self.directory.glob("best-*.pt"):
            if int(re.sub(r"\D", "", path.stem)) not in (*steps, *self.best_steps):
                path.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values to the file `path`, atomically."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load(path: Path) -> dict[str, Any]:
    """Open a file that `save` wrote, as a memory map. The whole file is checked, but a tensor takes memory only when it is used.

    Several processes that open the same file share this memory.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:  # a memory map would skip the checksums
            if damaged := file.testzip():
                raise ValueError(f"the part {damaged} has a wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # the type of the error depends on where the file is cut off
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} is damaged ({(str(error) or type(error).__name__).splitlines()[0]})") from error


def _state(path: Path) -> TrainState:
    entries = load(path)
    try:
        state, missing = TrainState(**entries), [name for name in _ALWAYS if name not in entries]
    except TypeError as error:
        raise StoreError(f"{path} is not a training state of this version of tadistill ({error})") from error
    if missing:
        raise StoreError(f"{path} is not a training state of this version of tadistill (it has no {', '.join(missing)})")
    return state


class Averages:
    """Collects the metrics of updates, for the next line of the log."""

    def __init__(self, rows: list[dict[str, float]]):
        """`rows` is the list `TrainState.pending`, so that a checkpoint contains the metrics."""
        self.rows = rows
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last update."""
        self.start = time.monotonic()

    def add(self, row: dict[str, float]) -> None:
        """Add the metrics of an update, with its number of `tokens`."""
        now = time.monotonic()
        # the seconds are in the row, so that after a resume the tokens of earlier updates are divided by the seconds that they took
        self.rows.append(row | {"seconds": now - self.start})
        self.start = now

    def pop(self) -> dict[str, float]:
        """Return the mean of each metric and the tokens per second, and begin anew."""
        rows = list(self.rows)
        self.rows.clear()
        names = dict.fromkeys(name for row in rows for name in row if name not in ("tokens", "seconds"))  # not every update is watched
        means = {name: sum(found := [r[name] for r in rows if name in r]) / len(found) for name in names}
        speed = sum(r["tokens"] for r in rows) / max(sum(r["seconds"] for r in rows), 1e-9)
        return means | {"train/tokens_per_second": speed}


class RunLog:
    """The log of one training. When a training resumes after update `resume_step`, the lines of later updates are removed."""

    def __init__(self, path: Path, *, resume_step: int = 0):
        self.path = path
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resume_step]
            write_text(path, "".join(line + "\n" for line in lines))  # atomic, so that a kill destroys no line before the checkpoint

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics. `step` is the number of updates done so far."""
        line = {"step": step, **{name: float(f"{value:.6g}") for name, value in metrics.items()}}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a kill
