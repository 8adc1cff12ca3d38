"""The jobs of a plan: which stages share a job, which jobs share an array, and the record of the job that each stage was given.

Evaluations of one model share a job, seeds with equal requests share an array, and parents come before children. If a stage fails, Slurm
cancels the jobs that depend on it (afterok); a second submission finds them missing and the rest finished. The record is job.json in the
stage's folder, so that studies with one store know each other's jobs.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path

from tadistill.cluster.queue import Entry
from tadistill.cluster.sbatch import Request
from tadistill.disk import write_json
from tadistill.plan.graph import Stage
from tadistill.plan.specs import AnalyseSpec, EvaluateSpec
from tadistill.store import RECORD, Store, key_of


@dataclass(frozen=True)
class Job:
    """Stages that run one after the other in one job."""

    stages: tuple[Stage, ...]
    request: Request
    depth: int
    """Length of the longest chain of jobs before it."""

    @property
    def keys(self) -> set[str]:
        """Return the keys of its stages."""
        return {stage.key for stage in self.stages}

    @property
    def parents(self) -> set[str]:
        """Return the stages of other jobs that must be finished first."""
        return {parent for stage in self.stages for parent in stage.parents.values()} - self.keys

    @property
    def family(self) -> tuple:
        """Return a value that is equal for jobs that differ only in their seed."""
        first = self.stages[0]
        # depth keeps a job apart from one that depends on it
        return self.depth, first.kind, first.model, tuple(sorted(first.arms)), len(self.stages), self.request

    @property
    def name(self) -> str:
        """Return its name in Slurm; an array has the name of its first element."""
        first = self.stages[0]
        return f"{first.kind}-{first.model}-{first.key[:8]}"


def bundles(stages: Mapping[str, Stage], todo: Iterable[str]) -> list[tuple[int, tuple[Stage, ...]]]:
    """Return depth and stages of each job for the stages `todo`, parents first.

    All stages that measure one model share a job; every other stage has a job of its own.
    """
    found: dict[str, list[Stage]] = {}
    for key in todo:
        found.setdefault(_home(stages, stages[key]), []).append(stages[key])
    home = {stage.key: name for name, members in found.items() for stage in members}
    depths: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in depths:
            above = {home[p] for stage in found[name] for p in stage.parents.values() if p in home} - {name}
            depths[name] = 1 + max(map(depth, above), default=-1)
        return depths[name]

    return [(depth(name), tuple(found[name])) for name in sorted(found, key=depth)]


def _home(stages: Mapping[str, Stage], stage: Stage) -> str:
    """Return what identifies the stage's job: the stage itself, or the model that it measures."""
    if isinstance(stage.spec, AnalyseSpec):
        stage = stages[stage.spec.answers.stage]
    if isinstance(stage.spec, EvaluateSpec):
        return f"evaluate {stage.spec.model}"
    return stage.key


def families(jobs: Seq[Job]) -> list[list[Job]]:
    """Group jobs that differ only in their seed, parents first."""
    found: dict[tuple, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.family, []).append(job)
    return sorted(found.values(), key=lambda members: members[0].depth)


@dataclass(frozen=True)
class Place:
    """A stage's job in Slurm: its id, and its index if it is an element of an array."""

    job: str
    index: int | None = None

    def __str__(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"


def arrays(jobs: Seq[Job], places: Mapping[str, Place]) -> list[tuple[list[Job], str | None]]:
    """Group the jobs of one family into arrays, each with its dependency.

    Element i of an array waits only for element i of its parents' arrays (aftercorr), so that a seed that fails does not cancel others.
    Jobs whose parents are not arranged like that share an array only if they wait for the same jobs.
    """
    waits = [{places[parent] for parent in job.parents if parent in places} for job in jobs]
    if len(jobs) > 1 and (together := _corresponding(waits)) is not None:
        return [(list(jobs), together)]
    groups: dict[str | None, list[Job]] = {}
    for job, wait in zip(jobs, waits, strict=True):
        groups.setdefault(_after(wait), []).append(job)
    return [(group, dependency) for dependency, group in groups.items()]


def _corresponding(waits: Seq[set[Place]]) -> str | None:
    """Return the dependency of a whole array, or None if its elements wait for different things."""

    def parts(i: int) -> set[str]:
        return {f"aftercorr:{place.job}" if place.index == i else f"afterok:{place}" for place in waits[i]}

    first = parts(0)
    return ",".join(sorted(first)) if first and all(parts(i) == first for i in range(len(waits))) else None


def _after(wait: set[Place]) -> str | None:
    return f"afterok:{':'.join(sorted(map(str, wait)))}" if wait else None


# --- records ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The job that a stage was given, and the study that submitted it."""

    job: str
    index: int | None
    name: str
    study: str

    @property
    def place(self) -> Place:
        """Return the job's id and index."""
        return Place(self.job, self.index)

    def write(self, store: Store, key: str) -> None:
        """Write it into a stage's folder."""
        write_json(store.folder(key) / RECORD, asdict(self))

    def entries(self, queue: Mapping[str, Entry]) -> list[Entry]:
        """Return the queue's entries of the job: the job, an element of an array, or what is left of a chain, the running segment first."""
        here = str(self.place)
        segments = [e for i, e in queue.items() if i.startswith(f"{here}_")] if self.index is None else []
        found = [queue[here]] if here in queue else sorted(segments, key=lambda e: e.state != "RUNNING")
        # Slurm gives ids again: a job of another name is another job, and the record is stale
        return [e for e in found if e.name == self.name]

    def live(self, queue: Mapping[str, Entry]) -> Entry | None:
        """Return the queue's entry of the job if it runs or will run."""
        return next((e for e in self.entries(queue) if not e.hopeless), None)


def read_record(store: Store, key: str) -> Record | None:
    """Return the record of a stage. A damaged one counts as none: at worst one job too many starts and finds the stage finished."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads((store.folder(key) / RECORD).read_text(encoding="utf-8"))
        return Record(found["job"], found["index"], found["name"], found["study"])
    return None


def jobs_folder(study: Path) -> Path:
    """Return the folder with the scripts, pickles and logs of a study's jobs."""
    return study.resolve() / "jobs"


def report_name(study: Path) -> str:
    """Return Slurm's name of the job that writes a study's report; two studies of one name in two folders differ."""
    return f"report-{study.name}-{key_of(str(study.resolve()))[:6]}"
