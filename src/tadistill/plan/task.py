"""A stage as its processes or a cluster job receive it: data that can be pickled."""

from dataclasses import dataclass, field

from tadistill.config.recipe import Resources
from tadistill.plan.arms import Plan
from tadistill.plan.graph import Stage
from tadistill.plan.layout import resources_of
from tadistill.plan.specs import Spec
from tadistill.store import Store


@dataclass(frozen=True)
class Task:
    """Everything that a process needs to run one stage."""

    spec: Spec
    key: str
    label: str
    store: str
    study: str
    data_root: str | None
    checkpoint_seconds: float | None
    trackers: tuple[str, ...]
    resources: Resources = field(default_factory=Resources)
    """Processes, and how models lie on their devices."""


def make_task(plan: Plan, stage: Stage, store: Store) -> Task:
    """Return the task of a planned stage."""
    recipe = plan.recipe
    return Task(
        spec=stage.spec,
        key=stage.key,
        label=stage.label,
        store=str(store.root),
        study=recipe.study,
        data_root=recipe.data.root,
        checkpoint_seconds=recipe.runtime.checkpoint_seconds,
        trackers=recipe.runtime.trackers,
        resources=resources_of(recipe, stage),
    )
