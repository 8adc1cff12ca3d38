"""The state of a study at one moment, for a page that requests it every few seconds. Nothing is written.

study = Watched(directory, store)
moment = study.look()             # reads what has changed since the last call; at most once a second
moment.state, moment.stages, moment.left
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tadistill.cluster.job import jobs_folder
from tadistill.cluster.status import BAD, StatusRow, job_rows, local_rows, newest, read_plan, study_state, unfinished
from tadistill.disk import damaged
from tadistill.errors import ConfigError
from tadistill.plan.graph import distinct_labels
from tadistill.plan.kinds import KINDS, TRAINING
from tadistill.runner.local import LOG, LocalRun, local_runs
from tadistill.store import MANIFEST, ROLLOUTS, Store
from tadistill.watch.logs import RunLog, TrainingLog

_PAUSE = 1.0
_SLURM_PAUSE = 15.0
"""Seconds between two queries to Slurm. All users of a cluster share Slurm, so queries must be rare."""


@dataclass(frozen=True)
class StageState:
    """One stage of the plan and its present state."""

    key: str
    kind: str
    label: str
    model: str
    seed: int
    parents: Mapping[str, str]
    total: int
    """The amount of work: updates of a training, rows of another stage, or 1 if the stage's progress is not counted."""
    state: str = "waiting"
    """As in `StatusRow`."""
    note: str = ""
    """The newest numbers, or the reason why the stage failed or waits."""
    done: int = 0
    """How much of `total` is done."""
    seconds: float | None = None
    """Run time so far, or of the whole stage if it is finished. None if not known."""
    elapsed: str = ""
    """Run time of the stage's Slurm job, as Slurm prints it."""
    left: float | None = None
    """Predicted seconds until the stage is finished. None if not known."""

    @property
    def trains(self) -> bool:
        return self.kind in TRAINING

    @property
    def updates(self) -> int | None:
        """The number of updates of a training, and None for other stages."""
        return self.total if self.trains else None

    @property
    def measures(self) -> bool:
        """True if the stage only measures models. It does not change them."""
        return self.kind in KINDS and KINDS[self.kind].measures


@dataclass(frozen=True)
class Rollouts:
    """The text that the student of one training has sampled most recently."""

    step: int
    rows: tuple[tuple[str, str], ...]
    """Pairs of prompt and response."""
    changed: float


@dataclass(frozen=True)
class Moment:
    """The state of a study at one moment."""

    name: str
    at: float
    """Time of the moment, in seconds since 1970."""
    state: str
    """As `study_state` returns it."""
    stages: tuple[StageState, ...]
    runs: tuple[LocalRun, ...]
    left: float | None
    """Predicted seconds until the study is finished. None if not known."""
    logs: Mapping[str, TrainingLog]
    """Stage key -> log of the training."""
    rollouts: Mapping[str, Rollouts]
    """Stage key -> newest sampled text of the training."""
    alarms: tuple[str, ...]
    """The warnings of all trainings."""
    lines: tuple[str, ...]
    """The last lines of run.log, the log of the study."""
    damaged: int
    """The number of lines of training logs that cannot be parsed."""
    problems: tuple[str, ...] = ()
    """Sentences about what is not known, such as an error of Slurm."""

    @property
    def counts(self) -> Counter[str]:
        return Counter(stage.state for stage in self.stages)

    @property
    def run(self) -> LocalRun | None:
        """The newest run without Slurm, or None."""
        return self.runs[-1] if self.runs else None


@dataclass
class _Slurm:
    rows: dict[str, StatusRow] = field(default_factory=dict)
    problem: str = ""
    at: float = float("-inf")


class Watched:
    """A study whose files are read again when they change. Several threads may call `look`."""

    def __init__(self, study: Path, store: Store):
        self.study, self.store = study, store
        self._lock = threading.Lock()
        self._moment: Moment | None = None
        self._plan: tuple[float, tuple[StageState, ...]] = (0.0, ())
        self._manifests: dict[str, tuple[int, dict[str, Any]]] = {}
        self._logs: dict[str, TrainingLog] = {}
        self._rollouts: dict[str, Rollouts] = {}
        self._slurm = _Slurm()
        self._run_log = RunLog(study / LOG)
        self._job_logs: dict[Path, RunLog] = {}

    def look(self) -> Moment:
        """Return the state now, or the last result if it is less than a second old. Raises StoreError if plan.json cannot be read."""
        with self._lock:
            if self._moment is None or not 0 <= time.time() - self._moment.at < _PAUSE:
                self._moment = self._look()
            return self._moment

    def _look(self) -> Moment:
        planned, runs = self._planned(), local_runs(self.study)
        stages = _ready(tuple(self._states(planned, runs)))
        self._follow(stages)
        stages = tuple(_progress(stage, self._logs.get(stage.key)) for stage in stages)
        self._sample(stages)
        state = study_state((stage.state for stage in stages), runs)
        alarms = (*self._recorded(stages), *self._run_log.alarms, *(line for log in self._job_logs.values() for line in log.alarms))
        return Moment(
            name=self.study.resolve().name,
            at=time.time(),
            state=state,
            stages=stages,
            runs=tuple(runs),
            left=_left(runs) if state == "running" else None,
            logs={key: log for key, log in self._logs.items() if log.rows},
            rollouts=dict(self._rollouts),
            alarms=tuple(dict.fromkeys(alarms)),
            lines=tuple(self._run_log.lines),
            damaged=sum(log.damaged for log in self._logs.values()),
            problems=(self._slurm.problem,) if self._slurm.problem else (),
        )

    def _planned(self) -> tuple[StageState, ...]:
        path = self.study / "plan.json"
        changed = path.stat().st_mtime if path.is_file() else 0.0
        if changed != self._plan[0] or not changed:
            self._plan = changed, _read_plan(path)
        return self._plan[1]

    def _states(self, planned: Iterable[StageState], runs: list[LocalRun]) -> Iterable[StageState]:
        here, manifests = local_rows(runs), {stage.key: self._manifest(stage.key) for stage in planned}
        jobs = self._jobs([key for key, manifest in manifests.items() if manifest is None], here)
        for stage in planned:
            if (manifest := manifests[stage.key]) is not None:
                yield replace(stage, state="done", done=manifest.get("steps") or stage.total, seconds=manifest.get("seconds"))
                continue
            row = unfinished(self.store, stage.key, stage.updates, newest(here.get(stage.key), jobs.get(stage.key)))
            names = ("done", "total", "seconds", "left")
            known = {name: getattr(row.progress, name) for name in names} if row.progress else {"elapsed": row.elapsed}
            note = "; ".join(filter(None, (row.progress.note if row.progress else row.last, row.where)))
            saved = self.store.saved_update(stage.key) if row.where and stage.updates else None
            yield replace(stage, state=row.state, note=note, **known | ({"done": saved} if saved else {}))

    def _manifest(self, key: str) -> dict[str, Any] | None:
        path = self.store.folder(key) / MANIFEST
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            self._manifests.pop(key, None)
            return None
        if key not in self._manifests or self._manifests[key][0] != changed:
            if not self.store.finished(key):
                return None
            content = self.store.manifest(key)
            self._manifests[key] = changed, {name: content.get(name) for name in ("seconds", "steps", "alarms")}
        return self._manifests[key][1]

    def _jobs(self, keys: list[str], here: dict[str, StatusRow]) -> dict[str, StatusRow]:
        if time.monotonic() - self._slurm.at >= _SLURM_PAUSE:
            try:
                self._slurm = _Slurm(job_rows(self.store, keys, here), "", time.monotonic())
            except ConfigError as error:
                self._slurm = replace(self._slurm, problem=str(error), at=time.monotonic())
            running = {row.job for row in self._slurm.rows.values() if row.state == "running"}
            paths = [path for job in running for path in jobs_folder(self.study).glob(f"{job}_*log.out")]
            self._job_logs = {path: self._job_logs.get(path) or RunLog(path) for path in paths}
            if not self._slurm.rows and not self._slurm.problem:
                self._slurm.at = float("-inf")  # no job was submitted, so Slurm was not queried
        return self._slurm.rows

    # --- logs and samples -----------------------------------------------------------------------------------------------

    def _follow(self, stages: Iterable[StageState]) -> None:
        for stage in (stage for stage in stages if stage.trains):
            self._logs.setdefault(stage.key, TrainingLog(self.store.folder(stage.key) / "metrics.jsonl")).forward()
        for log in (self._run_log, *self._job_logs.values()):
            log.forward()

    def _sample(self, stages: Iterable[StageState]) -> None:
        for stage in (stage for stage in stages if stage.trains):
            path = self.store.folder(stage.key) / ROLLOUTS
            try:
                changed = path.stat().st_mtime
                if stage.key not in self._rollouts or self._rollouts[stage.key].changed != changed:
                    content = json.loads(path.read_text(encoding="utf-8"))
                    rows = tuple((str(row["prompt"]), str(row["response"])) for row in content["rows"])
                    self._rollouts[stage.key] = Rollouts(int(content["step"]), rows, changed)
            except (OSError, ValueError, KeyError, TypeError):  # no sample yet, or a damaged file: the page works without samples
                continue

    def _recorded(self, stages: Iterable[StageState]) -> Iterable[str]:
        for stage in stages:
            if stage.state == "done":
                yield from (f"{stage.label}: {text}" for text in self._manifests[stage.key][1].get("alarms") or ())


def _read_plan(path: Path) -> tuple[StageState, ...]:
    found = read_plan(path.parent)["stages"]
    try:
        labels = distinct_labels((s["key"], s["label"], s.get("arms", ())) for s in found)
        return tuple(
            StageState(s["key"], s["kind"], labels[s["key"]], s["model"], s["seed"], dict(s["parents"]), s.get("steps") or 1) for s in found
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fix = "run or submit the recipe again, which writes the file again"
        raise damaged(path, f"{type(error).__name__}: {error}", fix) from error


def _ready(stages: tuple[StageState, ...]) -> tuple[StageState, ...]:
    """Note at each stage that waits which stage above it needs attention."""
    behind = {stage.key: stage.label for stage in stages if stage.state in BAD}
    found: list[StageState] = []
    for stage in stages:  # parents come before children
        label = next((behind[key] for key in stage.parents.values() if key in behind), "")
        if label and stage.state != "done":
            behind[stage.key] = label
        waits = label and stage.state in ("waiting", "queued")
        found.append(replace(stage, note=f"waits for {label}") if waits else stage)
    return tuple(found)


def _progress(stage: StageState, log: TrainingLog | None) -> StageState:
    if stage.state == "done" or log is None or not log.rows or stage.done:
        return stage
    forms = {"train/loss": "loss {:.3f}", "train/tokens_per_second": "{:,.0f} tokens/s"}
    texts = [form.format(log.newest[name]) for name, form in forms.items() if name in log.newest]
    left = log.left(stage.total) if stage.state == "running" else None
    return replace(stage, done=min(log.step, stage.total), note=stage.note or ", ".join(texts), left=left)


def _left(runs: list[LocalRun]) -> float | None:
    for run in reversed(runs):
        if run.state == "running" and run.left is not None:
            return max(run.left - (time.time() - run.seen), 0.0)
    return None
