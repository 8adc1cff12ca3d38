"""Read finished studies for the predictor: arms with the measures of their models, and chains with their equal-compute baselines (twins).

Only dev values are read and never test sets, because advice must not be tuned on the sets that a later report tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from math import isfinite, log, prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from tadistill.config import ModelConfig
from tadistill.config.arm import direct_arm, path_text
from tadistill.disk import read_json
from tadistill.errors import ConfigError, StoreError, TadistillError
from tadistill.metrics import NOT_COMPARABLE, higher_is_better
from tadistill.results.study import ArmRecord, StudyPlan, load_plan
from tadistill.store import Store, store_of


@dataclass(frozen=True)
class EdgeMeasures:
    """Measures of one (teacher, learner) pair. A measure is None if it was not taken. KLs are in nats per token."""

    size_ratio: float | None = None
    """Parameters of the teacher / parameters of the learner."""
    reverse_kl: float | None = None
    """KL(learner || teacher) on the learner's samples, before distillation."""
    forward_kl: float | None = None
    """KL(teacher || learner) on references."""
    overlap: float | None = None
    """Share of the k most likely tokens that both models have in common, on the learner's prefixes."""
    mass: float | None = None
    """Total probability that the learner gives to the teacher's k most likely tokens."""
    entropy_gap: float | None = None
    """H(teacher) - H(learner), on the learner's prefixes."""
    loss_ratio: float | None = None
    """Loss of the teacher / loss of the learner, on references."""
    advantage: float | None = None
    """E[log p_teacher - log p_learner] on references, per token."""
    bias: float | None = None
    """E[log p_teacher - log p_original] on the student's samples: what this teacher adds to the chain's error budget."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not isfinite(value):
                raise ConfigError(f"measure {name} is {value}; give a finite number, or None if it was not measured")
        for name in ("size_ratio", "loss_ratio"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"measure {name} is {value}; give a positive ratio")


@dataclass(frozen=True)
class Edge:
    """A teacher and its learner."""

    teacher: str
    learner: str
    measures: EdgeMeasures = field(default_factory=EdgeMeasures)


@dataclass(frozen=True)
class Candidate:
    """A path that may be run. `cost` is its training compute divided by the training compute of the direct path."""

    path: tuple[str, ...]
    cost: float
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        check_path(self.path, self.edges)
        if not (isfinite(self.cost) and self.cost > 0):
            raise ConfigError(f"the cost of {path_text(self.path)} is {self.cost}; give a positive multiple of the direct path's cost")


@dataclass(frozen=True)
class Observation:
    """One finished arm of an earlier study with one training seed. It contains dev values only."""

    family: str
    """The teacher, data and method. Runs that share them are not independent evidence (`family_of`)."""
    path: tuple[str, ...]
    seed: int
    edges: tuple[Edge, ...]
    cost: float
    """Training compute divided by the training compute of the family's direct path."""
    quality: float
    """The dev metric of the selected checkpoint, higher is better."""
    scale: str
    """The metric that `quality` is measured in."""
    study: str = ""

    def __post_init__(self) -> None:
        check_path(self.path, self.edges)
        if not (isfinite(self.cost) and self.cost > 0 and isfinite(self.quality)):
            raise ConfigError(
                f"an observation of {path_text(self.path)} has cost {self.cost} and quality {self.quality}; both must be finite"
            )


def check_path(path: tuple[str, ...], edges: tuple[Edge, ...]) -> None:
    """Raise a ConfigError if the edges are not the hops of the path."""
    if len(path) < 2 or [(e.teacher, e.learner) for e in edges] != list(pairwise(path)):
        raise ConfigError(f"path {path_text(path)} needs at least two models, and its edges must be its hops, in order")


def measures_from(values: Mapping[str, float | None]) -> EdgeMeasures:
    """Read measures from stored data. Unknown names are ignored, because a later version may have written them."""
    known = {f.name for f in fields(EdgeMeasures)}
    return EdgeMeasures(**{name: value for name, value in values.items() if name in known})


# --- reading studies ----------------------------------------------------------------------------------------------------

MEASURES = "advice.json"
"""File beside a study's plan.json: {"edges": [{"teacher", "learner", "measures": {name: value}}]}, as `edge_record` writes them."""


@dataclass(frozen=True)
class History:
    """Finished arms, and the reasons why other arms could not be used."""

    observations: tuple[Observation, ...]
    left_out: tuple[str, ...]
    """One sentence for each study or arm that could not be used."""

    def on(self, scale: str) -> tuple[Observation, ...]:
        """Return the observations whose metric is `scale`."""
        return tuple(o for o in self.observations if o.scale == scale)


def history(runs: Path) -> History:
    """Read every finished distillation arm of the studies in RUNS/STUDY, one observation for each training seed.

    A stage that two studies share counts once. `left_out` names what cannot be used. Raises StoreError if `runs` is not a directory.
    """
    if not runs.is_dir():
        raise StoreError(f"{runs} is not a directory; give the --runs directory of earlier studies")
    found: dict[str, Observation] = {}
    left_out: list[str] = []
    for path in sorted(runs.glob("*/plan.json")):
        try:
            plan = load_plan(path.parent)
            models = _models(plan)
            measures = load_measures(path.parent)
        except TadistillError as error:
            left_out.append(str(error))
            continue
        for arm in plan.arms:
            if len(arm.path) > 1:
                _read_arm(plan, arm, models, measures, store_of(runs), found, left_out)
    return History(tuple(found.values()), tuple(left_out))


def family_of(models: Mapping[str, ModelConfig], parameters: Mapping[str, int], teacher: str, train: str, method: str) -> str:
    """Return the name that runs of one family share: the teacher, the training data and the method of the last hop.

    All students of one teacher are one family, because what they have in common must not count as independent evidence.

    Args:
        models: the recipe's models.
        parameters: number of parameters by model.
        teacher: the first model of the path.
        train: the source of the training data (`data.train.load`).
        method: the arm's method, such as ``minillm (teacher_mixed)``.
    """
    return f"{_origin(models, teacher)} ({parameters[teacher]:,} parameters); {train}; {method}"


def _origin(models: Mapping[str, ModelConfig], name: str) -> str:
    """Say where a model's weights come from. The text has no model names, because names differ between recipes."""
    model = models[name]
    if model.parent is None:
        return str(model.load)
    source = _origin(models, model.parent)
    if model.checkpoint:
        return f"{source} after {model.checkpoint.step} updates"
    if model.temper:
        return f"{source} tempered {'like ' + model.temper.like if model.temper.like else f'by {model.temper.tau:g}'}"
    return f"{source} pruned"


def edge_record(edge: Edge) -> dict[str, Any]:
    """Return an edge as plain data for `MEASURES`; `load_measures` reads it back."""
    return {"teacher": edge.teacher, "learner": edge.learner, "measures": asdict(edge.measures)}


def load_measures(study_dir: Path) -> dict[tuple[str, str], EdgeMeasures]:
    """Return (teacher, learner) -> measures of a study. The result is empty if nothing was measured."""
    path = study_dir / MEASURES
    if not path.is_file():
        return {}
    content = read_json(path)
    try:
        return {(e["teacher"], e["learner"]): measures_from(e["measures"]) for e in content["edges"]}
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}); run `tadistill advise RECIPE` to write it again") from error


def path_edges(path: tuple[str, ...], parameters: Mapping[str, int], measures: Mapping[tuple[str, str], EdgeMeasures]) -> tuple[Edge, ...]:
    """Return the hops of a path with their measures; the size ratio is always known."""
    return tuple(
        Edge(a, b, replace(measures.get((a, b), EdgeMeasures()), size_ratio=parameters[a] / parameters[b])) for a, b in pairwise(path)
    )


def _models(plan: StudyPlan) -> dict[str, ModelConfig]:
    try:
        return {name: ModelConfig.model_validate(model) for name, model in plan.recipe["models"].items()}
    except ValidationError as error:
        raise StoreError(
            f"{plan.study}: models cannot be read ({error.error_count()} problems); run `tadistill run RECIPE` to write plan.json again"
        ) from error


def _read_arm(
    plan: StudyPlan,
    arm: ArmRecord,
    models: Mapping[str, ModelConfig],
    measures: Mapping[tuple[str, str], EdgeMeasures],
    store: Store,
    found: dict[str, Observation],
    left_out: list[str],
) -> None:
    name = f"{plan.study}: arm {arm.name}"
    if not arm.is_plain:
        left_out.append(f"{name} is `{arm.path_text}`; only a plain path, in which each model teaches the next one, can be used")
        return
    direct = direct_arm(plan.arms, arm.path[0], arm.path[-1], arm.method)
    if direct is None or direct.flops is None or arm.flops is None:
        left_out.append(f"{name} has no direct arm of the same models and method with known FLOPs, so its relative cost is unknown")
        return
    edges = path_edges(arm.path, plan.parameters, measures)
    family = family_of(models, plan.parameters, arm.path[0], plan.recipe["data"]["train"]["load"], arm.method)
    for seed, key in arm.final.items():
        if key is None or not store.finished(key):
            left_out.append(f"{name}, seed {seed}, is not finished")
            continue
        try:
            metric, value = _dev_value(store, key)
        except StoreError as error:
            left_out.append(str(error))
            continue
        if metric in NOT_COMPARABLE or value is None:
            left_out.append(f"{name}, seed {seed}, was selected by `{metric}`, which cannot compare students of different teachers")
            continue
        quality = value if higher_is_better(metric) else -value
        found.setdefault(key, Observation(family, arm.path, seed, edges, arm.flops / direct.flops, quality, metric, plan.study))


def _dev_value(store: Store, key: str) -> tuple[str, float | None]:
    folder = store.folder(key)
    try:
        metric = read_json(folder / "stage.json")["spec"]["select"]["metric"]
        value = read_json(folder / "manifest.json")["best_value"]
        return str(metric), None if value is None else float(value)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder} is damaged ({type(error).__name__}: {error}): delete it and run the recipe again") from error


# --- chains with their twins --------------------------------------------------------------------------------------------

EQUAL = 0.05
"""Two costs are treated as equal if their relative difference is at most this value."""


@dataclass(frozen=True)
class TwinPair:
    """One chain of one family with its equal-compute baseline (the twin), and one difference for each seed."""

    family: str
    path: tuple[str, ...]
    edges: tuple[Edge, ...]
    direct: Edge
    cost: float
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    """Quality of the chain minus quality of the twin."""
    twin: tuple[float, ...]
    """Costs of the direct runs behind the twin: one run, or the two runs between which the twin is interpolated."""

    @cached_property
    def mean(self) -> float:
        return float(np.mean(self.differences))


def pair_up(observations: Sequence[Observation]) -> list[TwinPair]:
    """Pair every chain with its twin: a direct run of the same family and seed at the chain's cost (within 5 %).

    Without such a run the twin is interpolated, in the log of the cost, between a cheaper and a more expensive direct run. Chains without
    such runs are left out. They are never compared with a cheaper direct run.
    """
    directs: dict[tuple[str, str, str, str, int], dict[float, Observation]] = {}
    for o in observations:
        if len(o.path) == 2:
            directs.setdefault(_ends(o), {})[o.cost] = o
    found: dict[tuple[tuple[str, ...], tuple[str, ...], float, tuple[float, ...]], list[tuple[Observation, Edge, float]]] = {}
    for o in observations:
        beside = directs.get(_ends(o), {})
        twin = _twin(o.cost, {cost: d.quality for cost, d in beside.items()}) if len(o.path) > 2 else None
        if twin is not None:
            costs, quality = twin
            found.setdefault((_ends(o)[:-1], o.path, o.cost, costs), []).append((o, beside[costs[0]].edges[0], o.quality - quality))
    return [_pair(rows, costs) for (*_, costs), rows in found.items()]


def _pair(rows: Sequence[tuple[Observation, Edge, float]], twin: tuple[float, ...]) -> TwinPair:
    first, direct, _ = rows[0]
    seeds, differences = tuple(o.seed for o, *_ in rows), tuple(difference for *_, difference in rows)
    return TwinPair(first.family, first.path, first.edges, direct, first.cost, seeds, differences, twin)


def _ends(o: Observation) -> tuple[str, str, str, str, int]:
    """Return the key that a chain and its twin share. Its size ratio separates students that have the same name in two studies."""
    ratio = prod(e.measures.size_ratio or 1.0 for e in o.edges)
    return o.family, o.path[0], o.path[-1], f"{ratio:.6g}", o.seed


def _twin(cost: float, directs: dict[float, float]) -> tuple[tuple[float, ...], float] | None:
    nearest = min(directs, key=lambda c: abs(log(c / cost)), default=None)
    if nearest is None:
        return None
    if abs(nearest / cost - 1) <= EQUAL:
        return (nearest,), directs[nearest]
    below, above = [c for c in directs if c < cost], [c for c in directs if c > cost]
    if not (below and above):
        return None
    low, high = max(below), min(above)
    share = log(cost / low) / log(high / low)
    return (low, high), (1 - share) * directs[low] + share * directs[high]
