"""A plan as jobs: evaluations of one model share a job, seeds with equal requests share an array, parents come before children. Imports no
torch.

Where a stage fails, the jobs that stand on it are cancelled by Slurm (afterok), and a second submission finds them missing and the rest
finished.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from tadistill.cluster.request import Request
from tadistill.plan.graph import Stage
from tadistill.plan.specs import AnalyseSpec, EvaluateSpec


@dataclass(frozen=True)
class Job:
    """Stages that run one after the other in one job."""

    stages: tuple[Stage, ...]
    request: Request
    depth: int
    """Jobs before it on its longest way."""

    @property
    def keys(self) -> set[str]:
        """Its stages."""
        return {stage.key for stage in self.stages}

    @property
    def parents(self) -> set[str]:
        """Stages of other jobs that must be finished first."""
        return {parent for stage in self.stages for parent in stage.parents.values()} - self.keys

    @property
    def family(self) -> tuple:
        """Equal for jobs that differ in their seed alone. Depth keeps apart what stands on each other."""
        first = self.stages[0]
        return self.depth, first.kind, first.model, tuple(sorted(first.arms)), len(self.stages), self.request

    @property
    def name(self) -> str:
        """What Slurm calls it; an array goes by its first element."""
        first = self.stages[0]
        return f"{first.kind}-{first.model}-{first.key[:8]}"


def bundles(stages: Mapping[str, Stage], todo: Iterable[str]) -> list[tuple[int, tuple[Stage, ...]]]:
    """Depth and stages of each job that the stages `todo` make, parents first: all that measures one model together, every other stage by
    itself."""
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
    """What names the job: the stage, or the model that it measures."""
    if isinstance(stage.spec, AnalyseSpec):
        stage = stages[stage.spec.answers.stage]
    if isinstance(stage.spec, EvaluateSpec):
        return f"evaluate {stage.spec.model}"
    return stage.key


def families(jobs: Seq[Job]) -> list[list[Job]]:
    """Jobs that differ in their seed alone together, parents first."""
    found: dict[tuple, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.family, []).append(job)
    return sorted(found.values(), key=lambda members: members[0].depth)


@dataclass(frozen=True)
class Place:
    """Where a stage's job is in Slurm: its id, and its index where it is an element of an array."""

    job: str
    index: int | None = None

    def __str__(self) -> str:
        return self.job if self.index is None else f"{self.job}_{self.index}"


def arrays(jobs: Seq[Job], places: Mapping[str, Place]) -> list[tuple[list[Job], str | None]]:
    """Jobs of one family as arrays, each with its dependency.

    Element i of an array waits for element i of its parents' arrays alone (aftercorr), so that a seed that fails takes no other with it.
    Jobs whose parents do not lie like that share an array only if they wait for the same jobs.
    """
    waits = [{places[parent] for parent in job.parents if parent in places} for job in jobs]
    if len(jobs) > 1 and (together := _corresponding(waits)) is not None:
        return [(list(jobs), together)]
    groups: dict[str | None, list[Job]] = {}
    for job, wait in zip(jobs, waits, strict=True):
        groups.setdefault(_after(wait), []).append(job)
    return [(group, dependency) for dependency, group in groups.items()]


def _corresponding(waits: Seq[set[Place]]) -> str | None:
    """The dependency of a whole array, or None where its elements wait for different things."""

    def parts(i: int) -> set[str]:
        return {f"aftercorr:{place.job}" if place.index == i else f"afterok:{place}" for place in waits[i]}

    first = parts(0)
    return ",".join(sorted(first)) if first and all(parts(i) == first for i in range(len(waits))) else None


def _after(wait: set[Place]) -> str | None:
    return f"afterok:{':'.join(sorted(map(str, wait)))}" if wait else None
