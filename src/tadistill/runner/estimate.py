"""The time that a run still needs: the work of its stages, divided by the speed that the run has shown so far."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tadistill.plan.graph import Stage
from tadistill.runner.workload import Workload

_EARLY = 0.05
"""Below this share of its work, a running stage says nothing about the speed."""


@dataclass
class _Measured:
    work: float = 0.0
    seconds: float = 0.0

    def add(self, work: float, seconds: float) -> None:
        self.work, self.seconds = self.work + work, self.seconds + seconds


class Estimate:
    """Predicts the remaining seconds of stages and of the whole run.

    The speed comes from stages that do the same work, else from stages of the same kind (sft, evaluate, …), else from all stages.
    """

    def __init__(self, stages: Mapping[str, Stage], work: Mapping[str, Workload], jobs: int):
        self.stages, self.work, self.jobs = stages, work, jobs
        self._finished: dict[str, float] = {}
        self._running: dict[str, tuple[float, float]] = {}  # share of the work that is done, seconds

    def finished(self, key: str, seconds: float) -> None:
        """Record that a stage has finished in this run."""
        self._running.pop(key, None)
        self._finished[key] = seconds

    def running(self, key: str, progress: float, seconds: float) -> None:
        """Note the progress (0 to 1) of a stage, and the seconds since its start."""
        self._running[key] = (self.work[key].share(progress) if progress > 0 else 0.0, seconds)

    def dropped(self, key: str) -> None:
        """Note that a stage has failed or was stopped."""
        self._running.pop(key, None)

    def left(self, key: str) -> float | None:
        """Return the predicted seconds until a stage is finished, counted from its last note; None if no speed is known."""
        return self._left(key, self._speeds())

    def total_left(self, waiting: Iterable[str]) -> float | None:
        """Return the predicted seconds until the run is finished, given the keys of the stages that have not started."""
        speeds = self._speeds()
        takes = {key: self._left(key, speeds) for key in (*self._running, *waiting)}
        if any(value is None for value in takes.values()):
            return None
        known = {key: value or 0.0 for key, value in takes.items()}
        behind: dict[str, float] = {}  # seconds until a stage and everything that waits for it is finished
        for key in reversed(list(self.stages)):
            behind[key] = behind.get(key, 0.0) + known.get(key, 0.0)
            for parent in self.stages[key].parents.values():
                behind[parent] = max(behind.get(parent, 0.0), behind[key])
        longest = max((behind[key] for key in known), default=0.0)
        return max(longest, sum(known.values()) / self.jobs)

    def _left(self, key: str, speeds: Mapping[str, _Measured]) -> float | None:
        share, seconds = self._running.get(key, (0.0, 0.0))
        if share > 2 * _EARLY:
            return seconds / share * (1 - share)
        found = next((speeds[name] for name in self._names(key) if name in speeds), None)
        if found is None:
            return None
        return max(self.work[key].total * found.seconds / found.work - seconds, 0.0)

    def _names(self, key: str) -> tuple[str, str, str]:
        return self.work[key].kind, f"all {self.stages[key].kind}", "all"

    def _speeds(self) -> dict[str, _Measured]:
        speeds: dict[str, _Measured] = {}
        shares = {key: (1.0, seconds) for key, seconds in self._finished.items()}
        for key, (share, seconds) in (shares | {k: v for k, v in self._running.items() if v[0] > _EARLY}).items():
            for name in self._names(key):
                speeds.setdefault(name, _Measured()).add(share * self.work[key].total, seconds)
        return speeds
