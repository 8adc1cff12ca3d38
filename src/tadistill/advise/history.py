"""What earlier studies found, as the predictor reads it: their plans, the dev values of their selected checkpoints, their measures.

Test sets are never read here: the advice must not be tuned on what a later report tests.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tadistill.advise.edges import Edge, EdgeMeasures, Observation, measures_from
from tadistill.config.method import HIGHER_IS_BETTER, NOT_COMPARABLE
from tadistill.disk import read_json
from tadistill.errors import ConfigError, StoreError, TadistillError
from tadistill.results.files import Arm, Plan, is_finished, load_plan, stage_dir
from tadistill.store import store_of

MEASURES = "advice.json"
"""Beside a study's plan.json: {"edges": [{"teacher", "learner", "measures": {name: value}}]}, as `edge_record` writes them."""


@dataclass(frozen=True)
class History:
    """Finished arms, and why others could not be used."""

    observations: tuple[Observation, ...]
    left_out: tuple[str, ...]
    """One sentence for each study or arm."""

    def on(self, scale: str) -> tuple[Observation, ...]:
        """The observations on one metric."""
        return tuple(o for o in self.observations if o.scale == scale)


def history(runs: Path) -> History:
    """Every finished distillation arm of the studies in RUNS/STUDY, one observation a training seed.

    Two studies that share a stage count it once. What cannot be used is named in `left_out`, so that a hole in history is seen.

    Raises:
        StoreError: `runs` is not a directory.
    """
    if not runs.is_dir():
        raise StoreError(f"{runs} is not a directory; give the --runs directory of earlier studies")
    found: dict[str, Observation] = {}
    left_out: list[str] = []
    for path in sorted(runs.glob("*/plan.json")):
        try:
            plan = load_plan(path.parent)
            measures = load_measures(path.parent)
        except TadistillError as error:
            left_out.append(str(error))
            continue
        for arm in plan.arms:
            if len(arm.path) > 1:
                _read_arm(plan, arm, measures, store_of(runs).root, found, left_out)
    return History(tuple(found.values()), tuple(left_out))


def family_of(recipe: Mapping[str, Any], parameters: Mapping[str, int], path: tuple[str, ...], method: str) -> str:
    """The name that runs of one family share: the teacher, the training data and the method of the last hop.

    Students of one teacher are one family, because what they have in common must not count as independent evidence.

    Args:
        recipe: the resolved recipe as plain data (plan.json's `recipe`).
        parameters: number of parameters by model.
        path: any path of the family.
        method: the arm's `method`, such as ``minillm (teacher_mixed)``.
    """
    teacher = path[0]
    return f"{_origin(recipe['models'][teacher])} ({parameters[teacher]:,} parameters); {recipe['data']['train']['load']}; {method}"


def _origin(model: Mapping[str, Any]) -> str:
    init = model["init"]
    return model["load"] if init is None else f"{init['from']} pruned"


def edge_record(edge: Edge) -> dict[str, Any]:
    """An edge as plain data for `MEASURES`, to be read back by `load_measures`."""
    return {"teacher": edge.teacher, "learner": edge.learner, "measures": asdict(edge.measures)}


def load_measures(study_dir: Path) -> dict[tuple[str, str], EdgeMeasures]:
    """Measures that were taken for a study, by teacher and learner; empty where none were."""
    path = study_dir / MEASURES
    if not path.is_file():
        return {}
    content = read_json(path)
    try:
        return {(e["teacher"], e["learner"]): measures_from(e["measures"]) for e in content["edges"]}
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error}): `tadistill advise RECIPE` rewrites it") from error


def path_edges(path: tuple[str, ...], parameters: Mapping[str, int], measures: Mapping[tuple[str, str], EdgeMeasures]) -> tuple[Edge, ...]:
    """The hops of a path with what was measured of them; the size ratio is always known."""
    return tuple(
        Edge(a, b, replace(measures.get((a, b), EdgeMeasures()), size_ratio=parameters[a] / parameters[b])) for a, b in pairwise(path)
    )


def _read_arm(
    plan: Plan,
    arm: Arm,
    measures: Mapping[tuple[str, str], EdgeMeasures],
    store: Path,
    found: dict[str, Observation],
    left_out: list[str],
) -> None:
    """Adds the arm's finished seeds to `found`, by the key of their last stage."""
    name = f"{plan.study}: arm {arm.name}"
    if not arm.is_plain:
        left_out.append(f"{name} is `{arm.path_text}`, which is more than a path along which each model teaches the next")
        return
    direct = _direct_flops(plan, arm)
    if direct is None or arm.flops is None:
        left_out.append(f"{name} has no direct arm of the same ends and method with known FLOPs, so its cost is no multiple of one")
        return
    edges = path_edges(arm.path, plan.parameters, measures)
    family = family_of(plan.recipe, plan.parameters, arm.path, arm.method)
    for seed, key in arm.final.items():
        if key is None or not is_finished(store, key):
            left_out.append(f"{name}, seed {seed}, is not finished")
            continue
        try:
            metric, value = _dev_value(store, key)
        except StoreError as error:
            left_out.append(str(error))
            continue
        if metric in NOT_COMPARABLE or value is None:
            left_out.append(f"{name}, seed {seed}, was selected by `{metric}`, which does not compare students of different teachers")
            continue
        quality = value if metric in HIGHER_IS_BETTER else -value
        found.setdefault(key, Observation(family, arm.path, seed, edges, arm.flops / direct, quality, metric, plan.study))


def _direct_flops(plan: Plan, arm: Arm) -> float | None:
    """Training FLOPs of the direct arm that an arm's cost is a multiple of."""
    ends, plain = (arm.path[0], arm.path[-1]), [a for a in plan.arms if a.compute is None and a.is_plain and a.method == arm.method]
    return next((a.flops for a in plain if a.path == ends), None)


def _dev_value(store: Path, key: str) -> tuple[str, float | None]:
    """The metric that a training stage selected by, and the selected checkpoint's value of it on dev."""
    folder = stage_dir(store, key)
    try:
        metric = read_json(folder / "stage.json")["spec"]["select"]["metric"]
        value = read_json(folder / "manifest.json")["best_value"]
        return str(metric), None if value is None else float(value)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder} is damaged ({type(error).__name__}: {error}): delete it and run the recipe again") from error
