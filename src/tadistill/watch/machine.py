"""The load of this machine: CPU, memory and GPUs, and how much of it the processes of a run cause."""

import platform
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil

from tadistill.cluster.slurm import output_of
from tadistill.runner.local import LocalRun

_PAUSE, _CARDS_PAUSE = 1.0, 5.0
"""Seconds between two measurements, and between two calls of nvidia-smi, which takes up to a second."""
_FIELDS = "name,utilization.gpu,memory.used,memory.total,temperature.gpu"


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi describes it. A value that the GPU does not report is None."""

    name: str
    used: float | None
    """Utilisation in per cent."""
    memory: float | None
    """Memory in use, in bytes."""
    total: float | None
    """All memory, in bytes."""
    celsius: float | None


@dataclass(frozen=True)
class Use:
    """The load of a machine at one moment."""

    host: str
    cores: int
    cpu: float | None
    """CPU load of the machine, in per cent of all cores. None at the first measurement, because a load is a mean between two."""
    memory: int
    """Memory in use on the machine, in bytes."""
    total: int
    """All memory of the machine, in bytes."""
    own_processes: int
    """Number of the run's processes on this machine. If it is 0, the other values that begin with `own` are 0 too."""
    own_cpu: float | None
    """CPU time of the run's processes, in per cent of one core. None if all of them are new since the last measurement."""
    own_memory: int
    """Memory of the run's processes, in bytes."""
    gpus: tuple[Gpu, ...]
    note: str
    """A sentence about values that cannot be measured on this machine. Empty if there are none."""


class Machine:
    """Measures the load of this machine. CPU loads are means since the last measurement. Several threads may call `look`."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, float], psutil.Process] = {}
        self._gpus: tuple[float, tuple[Gpu, ...] | None] = (float("-inf"), None)
        self._lock, self._at = threading.Lock(), float("-inf")
        self._last: Use | None = None
        self._times: tuple[float, float] | None = None

    def look(self, runs: Iterable[LocalRun], *, elsewhere: bool) -> Use:
        """Return the load now, or the last measurement if it is less than a second old. `elsewhere` is True if Slurm runs stages."""
        with self._lock:
            if self._last is None or time.monotonic() - self._at >= _PAUSE:
                self._last, self._at = self._look(runs, elsewhere=elsewhere), time.monotonic()
            return self._last

    def _look(self, runs: Iterable[LocalRun], *, elsewhere: bool) -> Use:
        running = [run for run in runs if run.state == "running"]
        before = set(self._known)
        own = self._processes([run.pid for run in running if run.host == platform.node()])
        memory = psutil.virtual_memory()
        gpus, others = self._cards(), sorted({run.host for run in running} - {platform.node()})
        notes = [f"The run is on {', '.join(others)}, but the load is that of {platform.node()}."] if others else []
        notes += ["Slurm runs the stages on other machines, whose load is not shown."] if elsewhere and not others else []
        notes += ["There is no NVIDIA GPU on this machine, or no nvidia-smi."] if gpus is None else []
        cpu, used = 0.0, 0
        for process in own:
            try:
                with process.oneshot():
                    cpu, used = cpu + process.cpu_percent(), used + process.memory_info().rss
            except psutil.Error:  # it has just ended
                continue
        return Use(
            host=platform.node(),
            cores=psutil.cpu_count() or 1,
            cpu=self._cpu(),
            memory=memory.total - memory.available,
            total=memory.total,
            own_processes=len(own),
            own_cpu=cpu if not own or before & set(self._known) else None,
            own_memory=used,
            gpus=gpus or (),
            note=" ".join(notes),
        )

    def _cpu(self) -> float | None:
        # psutil.cpu_percent measures since the last call of the same thread, and each request to the page has a thread of its own
        last, self._times = self._times, _core_seconds(psutil.cpu_times())
        if last is None or self._times[1] <= last[1]:
            return None
        busy, total = (now - before for now, before in zip(self._times, last, strict=True))
        return min(max(100 * busy / total, 0.0), 100.0)

    def _processes(self, roots: Iterable[int]) -> list[psutil.Process]:
        found: dict[tuple[int, float], psutil.Process] = {}
        for pid in roots:
            try:
                root = psutil.Process(pid)
                for process in (root, *root.children(recursive=True)):
                    name = process.pid, process.create_time()
                    found[name] = self._known.get(name, process)
            except psutil.Error:
                continue
        self._known = found
        return list(found.values())

    def _cards(self) -> tuple[Gpu, ...] | None:
        if time.monotonic() - self._gpus[0] >= _CARDS_PAUSE:
            out = output_of("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits", seconds=_CARDS_PAUSE)
            self._gpus = time.monotonic(), read_gpus(out or "") or None
        return self._gpus[1]


def _core_seconds(times: Any) -> tuple[float, float]:
    """Return the seconds in which cores were busy, and all seconds of all cores, from a value of `psutil.cpu_times`."""
    spent: dict[str, float] = times._asdict()
    total = sum(seconds for name, seconds in spent.items() if name not in ("guest", "guest_nice"))  # `user` and `nice` contain them
    return total - spent["idle"] - spent.get("iowait", 0.0), total


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Parse the output of nvidia-smi. A value such as `[N/A]` becomes None."""
    found = []
    for line in text.splitlines():
        name, *rest = (part.strip() for part in line.split(","))
        values = [float(part) if part.replace(".", "", 1).isdecimal() else None for part in rest]
        if len(values) == 4:
            used, memory, total, celsius = values
            found.append(Gpu(name, used, memory and memory * 2**20, total and total * 2**20, celsius))
    return tuple(found)
