"""Check the teachers behind an API before a run: whether the API answers, how many requests will be sent, and what they cost.

for sentence in announced(plan, store, missing):
    console.note(sentence)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from tadistill.config import Recipe
from tadistill.config.locations import placed
from tadistill.config.remote import Api
from tadistill.data import datasets
from tadistill.errors import ServerFailed, TadistillError
from tadistill.models.remote.endpoint import Unavailable, knock
from tadistill.models.remote.replies import peek
from tadistill.plan.arms import Plan, make_plan
from tadistill.plan.graph import Stage
from tadistill.plan.kinds import AskSpec
from tadistill.plan.remote import Estimate, wanted_of
from tadistill.plan.task import make_task
from tadistill.rollout.api_teacher import client_of, replies_file, same_model
from tadistill.runner.processes import run_in_processes
from tadistill.store import Store
from tadistill.terminal import Terminal


@dataclass
class _Left:
    # the requests that a run will send to the API of one model, and the number of its answers that the store already has
    api: Api
    cached: int = 0
    estimate: Estimate = field(default_factory=Estimate)


def announced(plan: Plan, store: Store, stages: Iterable[Stage]) -> Iterator[str]:
    """Yield a sentence for each teacher behind an API: how many requests the stages will send, and what they cost. Each API that
    the stages will use is first tested with a request that costs nothing.

    Raises:
        ConfigError: the `openai` package or an API key is missing.
        ServerFailed: an API cannot be reached, or does not accept the key.
    """
    for name, left in _left(plan, store, stages).items():
        known = f"{left.cached:,} of {left.cached + left.estimate.requests:,} answers are in the store"
        if not left.estimate.requests:
            yield f"{name} ({left.api.model}): {known}, and no request will be sent"
            continue
        _try(name, left.api)
        yield (
            f"{name} ({left.api.model}): {known}; {left.estimate.requests:,} requests will be sent to {left.api.at}: "
            f"{left.estimate.text(left.api)}"
        )


def _left(plan: Plan, store: Store, stages: Iterable[Stage]) -> dict[str, _Left]:
    found, data, seen = dict[str, _Left](), plan.recipe.data, set[str]()
    for stage in stages:
        if not isinstance(stage.spec, AskSpec):
            continue
        spec, api = stage.spec, stage.spec.teacher.api
        assert api is not None
        examples = datasets.read(spec.train.ref, spec.train.role, world=data.world, root=data.root, limit=spec.train.limit)
        kept, left = peek(replies_file(store.root, api.model)), found.setdefault(stage.model, _Left(api))
        rows = [(request.key, example) for request, example in zip(wanted_of(spec, examples), examples, strict=True)]
        new = {key: example for key, example in rows if key not in kept and key not in seen}
        left.cached += len({key for key, _ in rows if key in kept} - seen)
        seen |= {key for key, _ in rows}
        left.estimate += Estimate.of(spec, [*new.values()], len(new))
    return found


def _try(name: str, api: Api) -> tuple[str, ...]:
    client = client_of(api)
    try:
        return knock(client, api.key or "`api.key`, which is not set")
    except Unavailable as error:
        raise ServerFailed(
            f"models.{name}: the API {api.at} failed: {error}; correct `api`, or run the same command again when the API answers"
        ) from error


def examined(recipe: Recipe) -> Iterator[tuple[str, Literal["ok", "warning", "problem"], str, str]]:
    """Test each API of a recipe with a free request. Yield four texts for each: a title, a state, a description of the API or the problem,
    and a way to mend it."""
    for name, model in recipe.models.items():
        if (api := model.api) is None:
            continue
        try:
            listed = _try(name, api)
        except TadistillError as error:
            wrong, _, fix = str(error).rpartition("; ")
            yield f"teacher {name}", "problem", wrong, fix
            continue
        known = [there for there in listed if same_model(api.model, there) or same_model(there, api.model)]
        accepts = "accepts the key" if api.key else "answers"
        if listed and not known:
            shown = ", ".join(listed[:3]) + (" …" if len(listed) > 3 else "")
            yield f"teacher {name}", "warning", f"{api.at} {accepts}, but does not list {api.model} ({shown})", "correct `api.model`"
            continue
        lists = f" and lists {known[0]}" if known else ""
        yield f"teacher {name}", "ok", f"{api.at} {accepts}{lists}; an API gives text, but no probabilities", ""


@placed
def ask_now(recipe: Recipe, store: Store, console: Terminal) -> None:
    """Run the stages of a recipe that send requests to an API. All other stages then need no network.

    Raises:
        ConfigError: the `openai` package or an API key is missing.
        ServerFailed: an API does not answer, or some rows got no usable answer. All answers so far are kept.
    """
    plan = make_plan(recipe)
    stages = [stage for stage in plan.stages.values() if isinstance(stage.spec, AskSpec) and not store.finished(stage.key)]
    for sentence in announced(plan, store, stages):
        console.note(sentence)
    for stage in stages:
        with console.working(stage.label):
            run_in_processes(
                make_task(plan, stage, store),
                threads=1,
                progress=lambda done, total, text: None,
                alarm=console.note,
                stop=lambda: False,
            )
