"""A stage as its processes or a cluster job receive it, with the resources that the recipe gives it. A task can be pickled."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import ValidationError

from tadistill.config import Recipe
from tadistill.config.recipe import Resources
from tadistill.errors import ConfigError
from tadistill.plan.graph import Stage
from tadistill.plan.specs import KINDS, Spec, TrainingSpec
from tadistill.store import Store

if TYPE_CHECKING:
    from tadistill.plan.arms import Plan


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


def make_task(plan: "Plan", stage: Stage, store: Store) -> Task:
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


_SEVERAL = ("processes", "nodes", "parallel")  # settings of stages that several processes share


def check_entries(recipe: Recipe) -> None:
    """Check the names in `resources`: each is `default`, a kind of stage, or a kind and a model.

    Raises:
        ConfigError: a name is none of these, or asks for several processes for a kind that uses one.
    """
    kinds = [kind for kind, spec in KINDS.items() if spec.in_recipes]
    for name, entry in recipe.resources.items():
        kind, _, model = name.partition(" ")
        if name != "default" and kind not in kinds:
            raise ConfigError(f"resources.{name} is neither `default` nor a kind of stage; the kinds are {', '.join(kinds)}")
        if model and model not in recipe.models:
            raise ConfigError(f"resources.{name} names `{model}`, which is not a model; the recipe has {', '.join(recipe.models)}")
        if kind in kinds and not KINDS[kind].trains and entry.processes > 1:
            raise ConfigError(f"resources.{name}.processes is {entry.processes}, but a stage of kind {kind} is one process; leave it out")


def resources_of(recipe: Recipe, stage: Stage) -> Resources:
    """Return what the entries `default`, KIND and `KIND MODEL` say together, the later over the earlier.

    Raises:
        ConfigError: they do not fit together.
    """
    entries = recipe.resources
    names = [name for name in ("default", stage.kind, f"{stage.kind} {stage.model}") if name in entries]
    given = {f: getattr(entries[n], f) for n in names for f in entries[n].model_fields_set}
    if not stage.trains:  # one process; `default` may ask for more, for the stages that train
        given = {f: v for f, v in given.items() if f not in _SEVERAL and (f, v) != ("teacher", "sharded")}
    try:
        return Resources.model_validate(given)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"resources of `{stage.kind} {stage.model}`, put together from {', '.join(names)}: {reason}") from error


def layout(recipe: Recipe, stage: Stage) -> Resources:
    """Return the resources of a stage.

    Raises:
        ConfigError: the processes cannot share the batch, or a model would be split that must be whole on each of them.
    """
    given, spec = resources_of(recipe, stage), stage.spec
    if not isinstance(spec, TrainingSpec):
        return given
    if spec.optim.batch % given.processes:
        raise ConfigError(
            f"{stage.label}: optim.batch {spec.optim.batch} is not a multiple of the {given.processes} processes that resources give "
            "it; change one of them"
        )
    sampler = spec.method.sampler
    if given.teacher == "sharded" and sampler.guided:
        raise ConfigError(
            f"{stage.label}: resources say teacher sharded, but sampler {sampler.type} runs the teacher token by token, each process as "
            "often as it needs, and a sharded teacher runs in all processes at once; set teacher: offloaded"
        )
    if given.parallel == "fsdp" and sampler.vllm:
        raise ConfigError(f"{stage.label}: resources say parallel fsdp, but engine vllm needs the whole student; set parallel: ddp")
    if given.parallel == "fsdp" and spec.lora:
        raise ConfigError(
            f"{stage.label}: resources say parallel fsdp, but lora merges whole weights; set parallel: ddp, adapters have few gradients"
        )
    return given
