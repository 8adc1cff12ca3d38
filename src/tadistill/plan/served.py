"""Checks of teachers that run on a server (`serve`), and notes on them.

A model with `serve` can only teach. Any other use would load the model into a process of the study.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tadistill.config import Method, Recipe
from tadistill.config.api import check_text_only
from tadistill.config.common import DTYPES, Precision
from tadistill.config.route import routed
from tadistill.config.served import Serve, check_served
from tadistill.errors import ConfigError, about
from tadistill.plan.asked import check_only_writes
from tadistill.plan.costs import Ledger
from tadistill.plan.inputs import Handle, Loaded
from tadistill.plan.specs import AnalyseSpec, DistillSpec, SignalSpec, Spec

if TYPE_CHECKING:
    from tadistill.plan.arms import Plan

_ENTRY = 70
"""Bytes of one token with its log-probability in the JSON of a server of vLLM, on average."""


def running(spec: Spec) -> tuple[Handle, ...]:
    """Return the teachers that must run during a stage to compute probabilities of tokens.

    They are the teachers of a distillation, the teacher whose outputs are recorded, or the models with which a model is compared.
    """
    if isinstance(spec, AnalyseSpec):
        return (spec.teacher, *spec.assistants)
    if isinstance(spec, SignalSpec):
        return (spec.teacher,)
    return (spec.teacher, *spec.assistants) if isinstance(spec, DistillSpec) and spec.method.runs_teacher else ()


def check_teaching(recipe: Recipe, arm: str, teachers: Iterable[str], method: Method) -> None:
    """Check that served models can teach with a method.

    Raises:
        ConfigError: the method needs an output that a server does not send.
    """
    with about(f"arms.{arm}"):
        for name in teachers:
            model = recipe.models[name]
            if model.serve:
                check_served(name, model.serve, method)
            if model.api:
                check_text_only(name, model.api, method)


def check_not_run(recipe: Recipe, arm: str, teacher: str | None) -> None:
    """Check that an arm does not run a served model, or one behind an API, in a process of the study.

    Args:
        teacher: the original teacher with which the arm's model is compared; None if nothing is compared.

    Raises:
        ConfigError: the arm trains or measures a served model; or it compares its model with a served one that sends only top-k tokens; or
            a model is a served one with another temperature.
    """
    check_only_writes(recipe, arm)
    served, path = {name for name, model in recipe.models.items() if model.serve}, recipe.arms[arm]
    for name, model in recipe.models.items():
        if model.temper and model.temper.of in served:
            raise ConfigError(
                f"models.{name}.temper is of `{model.temper.of}`, which is served, so its logits cannot be changed here; remove `serve` of "
                f"`{model.temper.of}`"
            )
    if own := served.intersection((*path.learners, *(path.last if len(path.last) == 1 else ()))):
        what = "trains" if own & {*path.learners} else "measures"
        raise ConfigError(
            f"arms.{arm} {what} `{min(own)}`, but this model is served, and a served model can only teach; remove its `serve`, or this arm"
        )
    if teacher and recipe.data.test:
        _check_analysed(recipe, (teacher, *(() if routed(path.path) else path.last[:-1])))


def _check_analysed(recipe: Recipe, models: Iterable[str]) -> None:
    for name in models:
        if (serve := recipe.models[name].serve) and serve.gives != "hidden":
            raise ConfigError(
                f"`analyse` needs the whole distribution of `{name}`, but models.{name}.serve gives only `{serve.gives}`; use `gives: "
                "hidden`, or set `analyse: false`"
            )


def check_measured(recipe: Recipe, models: Iterable[str]) -> None:
    """Check that none of the models that `tadistill advise` measures is served. Raises ConfigError if one of them is served."""
    for name in models:
        if recipe.models[name].serve:
            raise ConfigError(
                f"models.{name} is served, but `tadistill advise` samples answers of every model; remove `serve`, or use "
                "another recipe in which the model has no `serve`"
            )


def served_notes(plan: "Plan") -> Iterator[str]:
    """Yield a sentence for each served teacher. It says where the teacher runs, and how many bytes a server sends for each token."""
    ledger = Ledger(plan.recipe)
    for name, model in plan.recipe.models.items():
        if model.serve is None:
            continue
        specs = [stage.spec for stage in plan.stages.values()]
        taught = [spec for spec in specs if any(_is(handle, model.serve, model.load) for handle in running(spec))]
        if not taught:
            continue
        where, config = ", ".join(model.serve.at), ledger.config(name) or {}
        width = config.get("hidden_size", config.get("n_embd"))
        precisions: list[Precision] = [*dict.fromkeys(_precision(spec) for spec in taught)]
        yield f"Teacher {name} runs on {where}. For each token that it reads, a server sends {_bytes(model.serve, width, precisions)}."
        if name == plan.teacher and any(isinstance(spec, AnalyseSpec) for spec in specs):
            yield f"The exposure bias is not measured, because the server of {name} writes no answers."


def _precision(spec: Spec) -> Precision:
    assert isinstance(spec, SignalSpec | DistillSpec | AnalyseSpec)
    return spec.optim.precision if isinstance(spec, DistillSpec) else spec.precision


def _is(handle: Handle, serve: Serve | None, load: str | None) -> bool:
    return isinstance(handle, Loaded) and handle.serve is not None and (handle.serve, handle.source) == (serve, load)


def _bytes(serve: Serve, width: int | None, precisions: Sequence[Precision]) -> str:
    if serve.gives == "top_k":
        return f"the {serve.k} most probable tokens as JSON, about {_ENTRY * (serve.k + 1):,} bytes"
    if width is None:
        return "the hidden state"
    each = {"float32": 4 * width, "bfloat16": 2 * width}
    return f"the hidden state, {' or '.join(f'{each[DTYPES[name]]:,} bytes ({DTYPES[name]})' for name in precisions)}"
