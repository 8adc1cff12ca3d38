"""Training logs of a study as curves: per arm and per intermediate stage, each seed and the mean over seeds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tadistill.plan.specs import TRAINING
from tadistill.results.collect import Results
from tadistill.results.files import Arm, is_finished, load_metrics

METRICS = (
    *("dev/fact_accuracy", "dev/rouge_l", "dev/loss", "train/loss"),
    *("rollout/reverse_kl", "rollout/length", "rollout/entropy", "rollout/repetition"),
)
"""In the order of the panels."""
_POINTS = 120  # averaging into so many bins calms the training loss and keeps the page small

Series = tuple[list[int], list[float]]  # steps, values


@dataclass(frozen=True)
class Curve:
    """One metric of one arm's last training stage (`arm` set) or of a stage before it (`arm` None)."""

    name: str
    arm: str | None
    metric: str
    mean: Series
    seeds: Mapping[int, Series]


def learning_curves(results: Results) -> list[Curve]:
    """The curves of all finished training stages; arms first, in the plan's order."""
    groups: dict[tuple[str | None, str], dict[int, str]] = {}
    finals: set[str] = set()
    for arm in results.plan.arms:
        for seed, key in arm.final.items():
            if key is not None:
                groups.setdefault((arm.name, arm.name), {})[seed] = key
                finals.add(key)
    for stage in results.plan.stages:
        if stage.kind in TRAINING and stage.key not in finals:
            groups.setdefault((None, _without_seed(stage.label)), {})[stage.seed] = stage.key
    curves: list[Curve] = []
    for (arm_name, name), keys in groups.items():
        logs = {s: load_metrics(results.store_dir, k) for s, k in keys.items() if is_finished(results.store_dir, k)}
        for metric in METRICS:
            by_seed = {seed: log[metric] for seed, log in logs.items() if metric in log}
            if by_seed:
                seeds = {seed: _thinned(points) for seed, points in by_seed.items()}
                curves.append(Curve(name, arm_name, metric, _thinned(_mean(by_seed)), seeds))
    return curves


def last_dev_value(results: Results, arm: Arm, model: str, metric: str) -> float | None:
    """The mean over seeds of a model's last dev value on the arm's path; None where no stage logged one."""
    last: dict[int, float] = {}
    for stage in results.plan.stages:  # a model's distillation comes after its fine-tuning, and so wins
        trains_it = arm.name in stage.arms and stage.model == model and stage.kind in TRAINING
        if trains_it and is_finished(results.store_dir, stage.key):
            points = load_metrics(results.store_dir, stage.key).get(f"dev/{metric}")
            if points:
                last[stage.seed] = points[max(points)]
    return float(np.mean(list(last.values()))) if last else None


def _without_seed(label: str) -> str:
    return re.sub(r",?\s*seed \d+", "", label)


def _mean(by_seed: Mapping[int, dict[int, float]]) -> dict[int, float]:
    """Over the steps that all seeds have: a mean over changing seeds would jump."""
    common = set.intersection(*(set(points) for points in by_seed.values()))
    return {step: float(np.mean([points[step] for points in by_seed.values()])) for step in sorted(common)}


def _thinned(points: Mapping[int, float]) -> Series:
    steps, values = np.array(list(points)), np.array(list(points.values()))
    if len(steps) > _POINTS:
        edges = np.linspace(0, len(steps), _POINTS + 1).astype(int)[:-1]
        widths = np.diff([*edges, len(steps)])
        steps = np.add.reduceat(steps, edges) // widths
        values = np.add.reduceat(values, edges) / widths
    return [int(step) for step in steps], [round(float(value), 5) for value in values]
