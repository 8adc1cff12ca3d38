"""Measure the speed of each kind of stage on this machine. A training makes only twenty updates, in a temporary directory.

The models are not trained first, because speed does not depend on the values of weights.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tadistill.models.counting.cost import spans
from tadistill.plan import costs, throughput
from tadistill.plan.arms import Plan
from tadistill.plan.graph import Graph, Stage
from tadistill.plan.inputs import BehindApi, FromStage, Handle, Loaded, Output
from tadistill.plan.kinds import AskSpec, DistillSpec, GenerateSpec, RetokeniseSpec, SignalSpec, Spec, TemperSpec, TrainingSpec
from tadistill.plan.spec import OnTrainingSets
from tadistill.plan.task import Task
from tadistill.runner.processes import run_in_processes
from tadistill.store import Store

_UPDATES = 20
_ROWS = 128  # training rows of a stage that writes or reads a teacher's answers or recorded outputs


def time_stages(plan: Plan, threads: int, say: Callable[[str], None]) -> throughput.Speeds:
    """Measure one stage of each kind in the plan. For each kind, return the FLOP/s of its parts, such as training or sampling."""
    kinds: dict[str, Stage] = {}
    for stage in plan.stages.values():
        if stage.cost and stage.cost.parts:
            kinds.setdefault(stage.cost.kind, stage)
    found: throughput.Speeds = {}
    for number, (kind, stage) in enumerate(kinds.items(), 1):
        say(f"{number} of {len(kinds)}: {stage.label}")
        with tempfile.TemporaryDirectory() as directory:
            found[kind] = _speeds(plan, stage, _run(plan, stage, Path(directory), threads))
    return found


def _speeds(plan: Plan, stage: Stage, manifest: dict[str, Any]) -> dict[str, float]:
    if "ledger" in manifest:
        return throughput.measured_throughput(manifest["ledger"])
    assert stage.cost is not None
    share = min(1.0, _ROWS / costs.Ledger(plan.recipe).rows)
    return {span: flops * share / manifest["seconds"] for span, flops in spans(stage.cost.phases()).items()}


def _run(plan: Plan, stage: Stage, directory: Path, threads: int) -> dict[str, Any]:
    graph = Graph()
    spec = _reduced(plan, stage.spec, graph)
    last = graph.add(spec, stage.label, stage.model, stage.seed, None)
    root = plan.recipe.data.root
    for each in graph.stages.values():
        task = Task(each.spec, each.key, each.label, str(directory), "measure", root, 1e9)
        run_in_processes(task, threads=threads)
    return Store(directory).manifest(last)


def _reduced(plan: Plan, spec: Spec, graph: Graph) -> Spec:
    if isinstance(spec, RetokeniseSpec):
        return spec.model_copy(update={**_few(spec), "answers": _reduced_output(plan, spec.answers, graph)})
    if isinstance(spec, GenerateSpec | SignalSpec):
        changes: dict[str, Any] = {"teacher": _origin(plan, spec.teacher), **_few(spec)}
        if isinstance(spec, SignalSpec) and spec.responses:
            changes["responses"] = _reduced_output(plan, spec.responses, graph)
        return spec.model_copy(update=changes)
    assert isinstance(spec, TrainingSpec)
    changes = {
        "student": _origin(plan, spec.student),
        "optim": spec.optim.model_copy(update={"steps": _UPDATES}),
        "select": spec.select.model_copy(update={"every": _UPDATES}),
    }
    if isinstance(spec, DistillSpec):
        changes["teacher"] = _origin(plan, spec.teacher)
        changes["assistants"] = tuple(_origin(plan, handle) for handle in spec.assistants)
        for role in ("signal", "responses"):
            if parent := getattr(spec, role):
                # no requests, which cost money: the references of the data set are about as long as the answers of an API
                changes |= {**_few(spec), role: None if _asks(plan, parent) else _reduced_output(plan, parent, graph)}
        for role in ("assistant_signals", "assistant_responses"):
            changes[role] = tuple(_reduced_output(plan, parent, graph) for parent in getattr(spec, role))
    return spec.model_copy(update=changes)


def _asks(plan: Plan, output: Output) -> bool:
    return any(isinstance(plan.stages[key].spec, AskSpec) for key in plan.stages[output.stage].parents.values())


def _reduced_output(plan: Plan, output: Output, graph: Graph) -> Output:
    stage = plan.stages[output.stage]
    return Output(stage=graph.add(_reduced(plan, stage.spec, graph), stage.label, stage.model, stage.seed, None))


def _few(spec: OnTrainingSets) -> dict[str, Any]:
    train, *more = (split.model_copy(update={"limit": min(split.limit or _ROWS, _ROWS)}) for split in spec.sets)
    return {"train": train, "more": tuple(more)}


def _origin(plan: Plan, handle: Handle) -> Handle:
    if isinstance(handle, Loaded | BehindApi):
        return handle
    if not isinstance(handle, FromStage):
        return handle.model_copy(update={"of": _origin(plan, handle.of)})
    spec = plan.stages[handle.stage].spec
    if isinstance(spec, TrainingSpec):
        return _origin(plan, spec.student)
    assert isinstance(spec, TemperSpec)
    return _origin(plan, spec.teacher)
