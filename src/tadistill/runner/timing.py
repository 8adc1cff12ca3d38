"""The speed of each kind of stage that trains or prepares training on this machine: twenty updates of it, in a temporary directory.

Weights are those that a path's models start from, loaded or random: the speed of a stage does not depend on what its models know.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tadistill.models.counting.cost import spans
from tadistill.plan import costs, throughput
from tadistill.plan.arms import Plan
from tadistill.plan.graph import Graph, Stage
from tadistill.plan.task import Task
from tadistill.stages.execute import run_stage
from tadistill.store import Store

_UPDATES = 20
_ROWS = 128  # training rows of a stage that stands on a teacher's signal or answers


def measure(plan: Plan, threads: int, say: Callable[[str], None]) -> throughput.Speeds:
    """FLOP/s by span of every kind of stage in the plan whose cost is predicted."""
    torch.set_num_threads(threads)
    kinds: dict[str, Stage] = {}
    for stage in plan.stages.values():
        if stage.cost and stage.cost.parts:
            kinds.setdefault(stage.cost.kind, stage)
    found: throughput.Speeds = {}
    for number, (kind, stage) in enumerate(kinds.items(), 1):
        say(f"{number} of {len(kinds)}: {stage.label}")
        with tempfile.TemporaryDirectory() as directory:
            found[kind] = _speeds(plan, stage, _run(plan, stage, Path(directory)))
    return found


def _speeds(plan: Plan, stage: Stage, manifest: dict[str, Any]) -> dict[str, float]:
    """From the stage's ledger; of a teacher's answers and signals from the share of the rows that were run, and the whole time."""
    if "ledger" in manifest:
        return throughput.measured(manifest["ledger"])
    assert stage.cost is not None
    share = min(1.0, _ROWS / costs.Ledger(plan.recipe).rows)
    return {span: flops * share / manifest["seconds"] for span, flops in spans(stage.cost.phases()).items()}


def _run(plan: Plan, stage: Stage, directory: Path) -> dict[str, Any]:
    """The manifest of the stage's first updates."""
    spec: dict[str, Any] = stage.spec | {role: _origin(plan, stage.spec[role]) for role in ("student", "teacher") if role in stage.spec}
    if "assistants" in spec:
        spec["assistants"] = [_origin(plan, handle) for handle in spec["assistants"]]
    graph, trains = Graph(), "optim" in spec
    if trains:
        spec["optim"] = spec["optim"] | {"steps": _UPDATES}
        spec["select"] = spec["select"] | {"every": _UPDATES}
    else:
        spec["train_limit"] = min(spec["train_limit"] or _ROWS, _ROWS)
    for role in ("signal", "responses"):
        if role in spec:
            spec["train_limit"] = min(spec["train_limit"] or _ROWS, _ROWS)
            before = plan.stages[spec[role]["stage"]]
            reduced = before.spec | {"teacher": spec["teacher"], "train_limit": spec["train_limit"]}
            spec[role] = {"stage": graph.add(before.kind, reduced, before.label, before.model, before.seed, None)}
    last = graph.add(stage.kind, spec, stage.label, stage.model, stage.seed, None, _UPDATES if trains else None)
    root = plan.recipe.data.root
    for each in graph.stages.values():
        task = Task(each.kind, each.key, each.spec, each.parents, each.label, each.steps, str(directory), "measure", root, 1e9, ())
        run_stage(task, progress=lambda done, total, text: None, alarm=lambda text: None, stop=lambda: False)
    return Store(directory).manifest(last)


def _origin(plan: Plan, handle: dict[str, Any]) -> dict[str, Any]:
    """Where a model's weights come from before the study trains it."""
    if "stage" in handle:
        spec = plan.stages[handle["stage"]].spec
        return _origin(plan, spec.get("student") or spec["teacher"])  # a tempered teacher's stage has no student
    return handle | {"of": _origin(plan, handle["of"])} if "of" in handle else handle
