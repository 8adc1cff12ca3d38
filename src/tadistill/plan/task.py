"""What a worker process or a job is told about its stage: plain data that can be pickled. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any

from tadistill.config.resources import Resources, resources_of
from tadistill.plan.arms import Plan
from tadistill.plan.graph import Stage
from tadistill.store import Store


@dataclass(frozen=True)
class Task:
    """What a worker needs to run one stage."""

    kind: str
    key: str
    spec: dict[str, Any]
    parents: dict[str, str]
    label: str
    steps: int | None
    store: str
    study: str
    data_root: str | None
    checkpoint_seconds: float | None
    trackers: tuple[str, ...]
    resources: Resources = field(default_factory=Resources)
    """Processes, and how models lie on their devices."""


def make_task(plan: Plan, stage: Stage, store: Store) -> Task:
    """The task of a planned stage."""
    recipe = plan.recipe
    return Task(
        stage.kind,
        stage.key,
        stage.spec,
        stage.parents,
        stage.label,
        stage.steps,
        str(store.root),
        recipe.study,
        recipe.data.root,
        recipe.runtime.checkpoint_seconds,
        recipe.runtime.trackers,
        resources_of(recipe.resources, stage.kind, stage.model),
    )
