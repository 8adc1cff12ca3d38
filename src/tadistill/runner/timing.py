"""Predict the remaining time of a run, and measure the speed of each kind of stage for `tadistill plan --measure`.

The remaining time is the work of the remaining stages, divided by the speed of the run so far. The work of a stage (one step of a study)
is given in seconds on an assumed machine. It is the time for the FLOPs, plus a fixed time for each call of a layer. In small models, and
when single tokens are decoded, most of the time is spent on the calls. Only the ratios between stages matter, so the assumed values need
not be exact.

To measure a speed, a training makes at most twenty updates, in a temporary directory. The models are not trained first, because speed does
not depend on the values of weights.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median_low
from typing import Any

from tadistill.config import Recipe
from tadistill.config.machine import processes_of
from tadistill.config.sampling import OnPolicy, Rounds
from tadistill.constants import GENERATION_BATCH, RECORDING_BATCH
from tadistill.data import datasets
from tadistill.data.survey import survey
from tadistill.errors import TadistillError
from tadistill.metrics import names_in
from tadistill.models.flops_and_memory import NOT_LEARNING, phase, spans
from tadistill.models.parameter_counts import Work, forward_flops
from tadistill.plan import throughput
from tadistill.plan.arms import Plan
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Graph, OnTrainingSets, Spec, Stage, longest_chains
from tadistill.plan.inputs import BehindApi, FromStage, Handle, Loaded, Output, Split
from tadistill.plan.kinds import (
    AnalyseSpec,
    AskSpec,
    DistillSpec,
    EvaluateSpec,
    GenerateSpec,
    PairSpec,
    ProbeSpec,
    RetokeniseSpec,
    SignalSpec,
    TemperSpec,
    TrainingSpec,
)
from tadistill.plan.task import Task
from tadistill.runner.processes import run_in_processes
from tadistill.store import Store
from tadistill.terminal import Terminal

_SPEED = 1e11
"""FLOP/s of the assumed machine."""
_CALL = 2e-4
"""Seconds that each call of a layer takes on the assumed machine, beside the time for its FLOPs."""
_AROUND = 4
"""Embeddings, head, loss and sampling of a forward pass are assumed to take as long as this number of layer calls."""
_START = 0.3
"""Assumed work of a stage that only loads models or reads rows, in seconds on the assumed machine."""
_ROWS, _LAYERS, _PROMPT = 1000, 12, 64
"""Assumed values: the rows of a data set on the Hub, the layers of a model of unknown size, and the tokens of a prompt."""
_EARLY = 0.05
"""A running stage is used to estimate the speed only if more than this share of its work is done."""


@dataclass(frozen=True)
class Workload:
    """The predicted work of one stage, in seconds on the assumed machine. `Estimate` scales it to the measured speed."""

    kind: str
    """A name for the work. Stages that differ only in their seed have the same name."""
    even: float = 0.0
    """Seconds of the work that grows in proportion to the stage's progress, such as the updates of a training."""
    looks: float = 0.0
    """Seconds of all dev evaluations of a training. 0 for other stages."""
    every: float = 1.0
    """The share (0 to 1) of a training's updates between two dev evaluations."""

    @property
    def total(self) -> float:
        return self.even + self.looks or _START

    def share(self, progress: float) -> float:
        """Convert `progress` (0 to 1), the finished share of updates or answers, to the finished share of all the work."""
        looked = 1.0 if progress >= 1 else progress // self.every * self.every
        return (self.even * progress + self.looks * looked) / self.total if self.even + self.looks else progress


def workloads(plan: Plan) -> dict[str, Workload]:
    """Return the predicted work of each stage by key."""
    sizes = _Sizes(plan.recipe)
    return {key: _workload(stage, sizes) for key, stage in plan.stages.items()}


class _Sizes:
    def __init__(self, recipe: Recipe):
        self.recipe, self._size = recipe, cache(Ledger(recipe).size)

    def passes(self, name: str, count: float) -> float:
        size = self._size(name)
        return count * ((size.layers if size else _LAYERS) + _AROUND) * _CALL

    def answers(self, name: str, rows: float, batch: int, tokens: int) -> float:
        return self.passes(name, -(-rows // batch) * tokens / 2) + self._flops(name, rows * (_PROMPT + tokens / 2))

    def reads(self, name: str, rows: float, batch: int, tokens: int) -> float:
        return self.passes(name, -(-rows // batch)) + self._flops(name, rows * (_PROMPT + tokens))

    def rows(self, *splits: Split) -> int:
        return sum(map(self._rows, splits))

    def _rows(self, split: Split) -> int:
        try:
            if datasets.on_hub(split.ref, split.role, self.recipe.data):
                return split.limit or _ROWS  # counting the rows would take long
            rows = survey(split.ref, split.role, self.recipe.data).rows
        except TadistillError:  # the stage that reads this split says what is wrong
            rows = _ROWS
        return min(rows, split.limit or rows)

    def _flops(self, name: str, positions: float) -> float:
        size = self._size(name)
        return forward_flops(size, Work(positions, 0.0, positions)) / _SPEED if size else 0.0


def _workload(stage: Stage, sizes: _Sizes) -> Workload:
    spec, name = stage.spec, stage.model
    kind, work = f"{stage.kind} {name}", 0.0  # other stages are assumed only to load their models
    match spec:
        case TrainingSpec():
            return _training(stage, spec, sizes)
        case TemperSpec():
            searches = 20  # forward passes over the dev set until the temperature is found
            kind, work = "temper", searches * sizes.reads(name, sizes.rows(*spec.dev.splits), spec.batch, _PROMPT)
        case GenerateSpec():
            work = sizes.answers(name, sizes.rows(*spec.sets), GENERATION_BATCH, spec.sampler.max_new_tokens)
        case SignalSpec():
            work = sizes.reads(name, sizes.rows(*spec.sets), RECORDING_BATCH, spec.data.max_length)
        case EvaluateSpec():
            how = spec.decoding
            kind = f"{kind} {how.model_dump_json()}"
            for rows in map(sizes.rows, spec.sets):
                answers = sizes.answers(name, rows, how.batch, how.max_new_tokens)
                work += len(how.seeds) * (answers + sizes.reads(name, rows, how.batch, how.max_new_tokens))
        case AnalyseSpec():
            how, models = sizes.recipe.evaluate, 2 + len(spec.assistants)
            rows = sum(map(sizes.rows, spec.sets)) * len(how.seeds)
            kind, work = f"{kind} {models}", 2 * models * sizes.reads(name, rows, spec.batch, how.max_new_tokens)
        case ProbeSpec():
            work = sizes.answers(name, sizes.rows(*spec.dev.splits), spec.decoding.batch, spec.decoding.max_new_tokens)
        case PairSpec():
            work = 4 * sizes.reads(name, sizes.rows(*spec.dev.splits), spec.batch, _PROMPT)
    return Workload(kind, work)


def _training(stage: Stage, spec: TrainingSpec, sizes: _Sizes) -> Workload:
    method, optim, name = spec.method, spec.optim, stage.model
    processes = processes_of(sizes.recipe.resources, stage.kind, name)  # they make their passes at the same time
    steps, batch = optim.steps or 1, optim.batch / processes
    micro = min(optim.micro_batch or batch, batch)
    if optim.tokens and stage.cost and (read := stage.cost.parts.get("training/student")):
        micro = min(batch, max(1, int(optim.tokens * optim.batch * steps / read.positions)))
    # passes with gradients take longer than those of sampling, so an update counts as six passes, and the optimizer as two
    even = sizes.passes(name, steps * (batch / micro * (6 + method.trains_with_teacher) + 2))
    sampler = method.sampler
    if method.samples and isinstance(sampler, OnPolicy):
        each, updates = (method.round_rollouts, method.round_updates) if isinstance(sampler, Rounds) else (optim.batch, 1)
        chunks = -(-each // (processes * sampler.chunk)) * -(-steps // updates)
        even += sizes.passes(name, chunks * sampler.max_new_tokens * (1 + sampler.guided))
    looks = 0.0
    if spec.dev and spec.decoding:
        rows, decoding = sizes.rows(*spec.dev.splits), spec.decoding
        each = sizes.reads(name, rows, decoding.batch, _PROMPT)
        if spec.select.metric in (*names_in("quality"), "reverse_kl"):
            each += sizes.answers(name, rows, decoding.batch, decoding.max_new_tokens)
        looks = each * spec.checkpoints
    if stage.cost:
        even += sum(part.flops for key, part in stage.cost.parts.items() if phase(key) not in NOT_LEARNING) / _SPEED
    kind = stage.cost.kind if stage.cost else f"{stage.kind} {name}"
    return Workload(kind, even, looks, min(1.0, spec.select.every / steps))


# --- the remaining time --------------------------------------------------------------------------------------------------


_Speeds = tuple[dict[str, float], dict[str, float]]
"""The work that was done and the seconds that it took, by the names of `_names`."""


class Estimate:
    """Predicts the remaining seconds of stages and of the whole run.

    The speed is measured on stages that do the same work with other seeds. If none of them has run yet, it is measured on stages of the
    same kind (sft, evaluate, …), or else on all stages. The speed of an API is only that of stages that ask it.
    """

    def __init__(self, stages: Mapping[str, Stage], work: Mapping[str, Workload], jobs: int):
        self.stages, self.work, self.jobs = stages, work, jobs
        self._finished: dict[str, float] = {}
        self._running: dict[str, tuple[float, float]] = {}  # share of this run's work that is done, and seconds since the start
        self._began: dict[str, float] = {}  # seconds from the start of a stage to its work: until then, it loads models and reads rows
        self._before: dict[str, float] = {}  # share of the work that earlier runs have done

    def begins(self, key: str, progress: float) -> None:
        """Record that a stage starts, and its `progress` (0 to 1), which is above 0 if an earlier run saved a state."""
        self._before[key] = min(self.work[key].share(progress), 0.999)

    def finished(self, key: str, seconds: float) -> None:
        """Record that a stage has finished in this run."""
        self._running.pop(key, None)
        self._finished[key] = seconds

    def running(self, key: str, progress: float, seconds: float) -> None:
        """Record the progress (0 to 1) of a stage, and the seconds since its start. Work begins at the last call before any progress."""
        before = self._before.get(key, 0.0)
        done = max(self.work[key].share(progress) - before, 0.0) / (1 - before)
        if done > 0:
            self._began.setdefault(key, self._running.get(key, (0.0, 0.0))[1])
        self._running[key] = done, seconds

    def dropped(self, key: str) -> None:
        """Record that a stage has failed or was stopped."""
        self._running.pop(key, None)

    def left(self, key: str) -> float | None:
        """Return the seconds from the last call of `running` to the predicted end of a stage. Return None if no speed is known."""
        return self._left(key, self._speeds())

    def total_left(self, waiting: Iterable[str]) -> float | None:
        """Return the predicted seconds until the run is finished. `waiting` has the keys of the stages that have not started."""
        speeds = self._speeds()
        takes = {key: self._left(key, speeds) for key in (*self._running, *waiting)}
        if any(value is None for value in takes.values()):
            return None
        known = {key: value or 0.0 for key, value in takes.items()}
        chains = longest_chains(self.stages, known)
        longest = max((chains[key] for key in known), default=0.0)
        return max(longest, sum(known.values()) / self.jobs)

    def _left(self, key: str, speeds: _Speeds) -> float | None:
        share, seconds = self._running.get(key, (0.0, 0.0))
        worked = seconds - self._began.get(key, seconds)
        if share > 2 * _EARLY:
            return worked / share * (1 - share)
        done, took = speeds
        name = next((name for name in self._names(key) if name in done), None)
        # the median, as one stage may tokenise the rows of all others
        loads = 0.0 if key in self._began else max(median_low(self._began.values() or [0.0]) - seconds, 0.0)
        return None if name is None else loads + max(self._work(key) * took[name] / done[name] - worked, 0.0)

    def _work(self, key: str) -> float:
        return self.work[key].total * (1 - self._before.get(key, 0.0))

    def _names(self, key: str) -> tuple[str, ...]:
        others = () if self.stages[key].kind == AskSpec.kind else ("all",)  # an API has a speed of its own
        return self.work[key].kind, f"all {self.stages[key].kind}", *others

    def _speeds(self) -> _Speeds:
        done, took = defaultdict[str, float](float), defaultdict[str, float](float)
        shares = {key: (1.0, seconds) for key, seconds in self._finished.items()}
        for key, (share, seconds) in (shares | {k: v for k, v in self._running.items() if v[0] > _EARLY}).items():
            for name in self._names(key)[: 3 if self.work[key].even else 2]:  # without predicted work, the speed is only that of its kind
                done[name] += share * self._work(key)
                took[name] += seconds - self._began.get(key, 0.0)
        return done, took


# --- the speed of this machine ------------------------------------------------------------------------------------------

_UPDATES = 20
_FEW_ROWS = 128  # training rows of a stage that writes or reads a teacher's answers or recorded outputs


def time_stages(plan: Plan, threads: int, console: Terminal) -> throughput.Speeds:
    """Measure one stage of each kind in the plan. For each kind, return the FLOP/s of its parts, such as training or sampling."""
    kinds: dict[str, Stage] = {}
    for stage in plan.stages.values():
        if stage.cost and stage.cost.parts:
            kinds.setdefault(stage.cost.kind, stage)
    found: throughput.Speeds = {}
    for number, (kind, stage) in enumerate(kinds.items(), 1):
        text = f"timing {number} of {len(kinds)}: {stage.label}"
        with console.working(text) as show, tempfile.TemporaryDirectory() as directory:
            manifest = _run(plan, stage, Path(directory), threads, show)
        if "ledger" in manifest:
            found[kind] = throughput.measured_throughput(manifest["ledger"])
        else:
            assert stage.cost is not None
            share = min(1.0, _FEW_ROWS / Ledger(plan.recipe).rows)
            found[kind] = {span: flops * share / manifest["seconds"] for span, flops in spans(stage.cost.phases()).items()}
    return found


def _run(plan: Plan, stage: Stage, directory: Path, threads: int, show: Callable[[str], None]) -> dict[str, Any]:
    graph, root = Graph(), plan.recipe.data.root
    last = graph.add(_reduced(plan, stage.spec, graph), stage.label, stage.model, stage.seed, None)
    for each in graph.stages.values():
        task = Task(each.spec, each.key, each.label, str(directory), "measure", root, 1e9)
        run_in_processes(task, threads=threads, progress=show)
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
    updates = min(_UPDATES, spec.steps or _UPDATES)
    optim, select = spec.optim.model_copy(update={"steps": updates}), spec.select.model_copy(update={"every": updates})
    changes = {"student": _origin(plan, spec.student), "optim": optim, "select": select}
    if isinstance(spec, DistillSpec):
        changes["teacher"] = _origin(plan, spec.teacher)
        changes["assistants"] = tuple(_origin(plan, handle) for handle in spec.assistants)
        for role in ("signal", "responses"):
            if parent := getattr(spec, role):
                before = plan.stages[parent.stage].parents.values()
                # no requests, which cost money: the references of the data set are about as long as the answers of an API
                asks = any(isinstance(plan.stages[key].spec, AskSpec) for key in before)
                changes |= {**_few(spec), role: None if asks else _reduced_output(plan, parent, graph)}
        for role in ("assistant_signals", "assistant_responses"):
            changes[role] = tuple(_reduced_output(plan, parent, graph) for parent in getattr(spec, role))
    return spec.model_copy(update=changes)


def _reduced_output(plan: Plan, output: Output, graph: Graph) -> Output:
    stage = plan.stages[output.stage]
    return Output(stage=graph.add(_reduced(plan, stage.spec, graph), stage.label, stage.model, stage.seed, None))


def _few(spec: OnTrainingSets) -> dict[str, Any]:
    train, *more = (split.model_copy(update={"limit": min(split.limit or _FEW_ROWS, _FEW_ROWS)}) for split in spec.sets)
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
