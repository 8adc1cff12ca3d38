"""Read the curves of a study: training logs, exposure bias by position, and calibration by confidence."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from tadistill.disk import read_json, stream_jsonl
from tadistill.metrics import in_order
from tadistill.plan.graph import without_seed
from tadistill.plan.kinds import TRAINING
from tadistill.results.collect import Results, once
from tadistill.results.measured import load_corpus
from tadistill.store import Store

_POINTS = 60  # a longer curve is averaged in this number of bins, which smooths the training loss and keeps the page small

FEW = 10  # a mean over fewer answers than this is drawn as a dotted line
_LONGEST = 256  # number of positions that are drawn

Array = NDArray[np.float64]
Series = tuple[list[int], list[float]]  # steps, values
Log = tuple[NDArray[np.int64], Array]  # steps in ascending order, values


@dataclass(frozen=True)
class Curve:
    """The learning curve of one metric in one training: the mean over training seeds, and the curve of each seed.

    `arm` is the arm whose final model comes from this training. It is None if the model is not an arm's final model.
    """

    name: str
    arm: str | None
    metric: str
    mean: Series
    seeds: Mapping[int, Series]


def load_metrics(store: Store, key: str) -> dict[str, Log]:
    """Read the values on dev and the learning curves from the log of one training. If a step has two lines, the later line counts."""
    read: dict[str, tuple[array[int], array[float]]] = {}
    wanted: dict[str, bool] = {}
    for _, line in stream_jsonl(store.artifact(key, "metrics.jsonl"), fix=store.redo(key)):
        for name, value in line.items():
            if name not in wanted:
                wanted[name] = name.startswith("dev/") or bool(in_order([name]))
            if wanted[name] and isinstance(value, int | float):
                steps, values = read.setdefault(name, (array("q"), array("d")))
                steps.append(line["step"])
                values.append(value)
    logs: dict[str, Log] = {}
    for name, (all_steps, all_values) in read.items():
        steps_T, last = np.unique(np.array(all_steps)[::-1], return_index=True)
        logs[name] = steps_T, np.array(all_values)[::-1][last]
    return logs


@once
def learning_curves(results: Results) -> list[Curve]:
    """Return the learning curves of all finished trainings. Trainings of the arms' final models come first, in the plan's order."""
    groups: dict[tuple[str | None, str], dict[int, str]] = {}
    finals: set[str] = set()
    for arm in results.plan.arms:
        for seed, key in arm.final.items():
            if key is not None:
                groups.setdefault((arm.name, arm.name), {})[seed] = key
                finals.add(key)
    for stage in results.plan.stages:
        if stage.kind in TRAINING and stage.key not in finals:
            groups.setdefault((None, without_seed(stage.label)), {})[stage.seed] = stage.key
    curves: list[Curve] = []
    for (arm_name, name), keys in groups.items():
        logs = {s: _log(results, k) for s, k in keys.items() if results.store.finished(k)}
        for metric in in_order(name for log in logs.values() for name in log):
            by_seed = {seed: log[metric] for seed, log in logs.items() if metric in log}
            if by_seed:
                seeds = {seed: _thinned(log) for seed, log in by_seed.items()}
                curves.append(Curve(name, arm_name, metric, _thinned(_mean([*by_seed.values()])), seeds))
    return curves


@once
def last_dev_value(results: Results, arm: str, model: str, metric: str) -> float | None:
    """Return the last dev value of one model of the arm, averaged over seeds. Return None if no training logged the metric."""
    last: dict[int, float] = {}
    for stage in results.plan.stages:  # a model's distillation comes after its fine-tuning, so its value is kept
        trains_it = arm in stage.arms and stage.model == model and stage.kind in TRAINING
        if trains_it and (values := values_on_dev(results, stage.key, metric)):
            last[stage.seed] = values[-1]
    return float(np.mean(list(last.values()))) if last else None


def values_on_dev(results: Results, key: str, metric: str) -> list[float]:
    """Return the values of a metric on dev in the log of a training, from the first step to the last. It is empty without a value, and if
    the training is not finished."""
    logged = _log(results, key).get(f"dev/{metric}") if results.store.finished(key) else None
    return logged[1].tolist() if logged else []


@once  # values on dev are wanted for each pair of arms
def _log(results: Results, key: str) -> dict[str, Log]:
    return load_metrics(results.store, key)


def _mean(logs: Sequence[Log]) -> Log:
    common = reduce(np.intersect1d, [steps for steps, _ in logs])
    return common, np.stack([values[np.searchsorted(steps, common)] for steps, values in logs], axis=-1).mean(axis=-1)


def _thinned(log: Log) -> Series:
    steps, values = log
    if len(steps) > _POINTS:
        edges = np.linspace(0, len(steps), _POINTS + 1).astype(int)[:-1]
        widths = np.diff([*edges, len(steps)])
        steps = np.add.reduceat(steps, edges) // widths
        values = np.add.reduceat(values, edges) / widths
    return [int(step) for step in steps], [round(float(value), 5) for value in values]


# --- exposure bias ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExposureBias:
    """Exposure bias (ExAccErr, in per cent) at each position of the answer, from position 1. `seeds` has one curve per training seed.

    Few answers are long, so the values at late positions are uncertain. `solid` is the last position that at least `FEW`
    answers of every seed reach.
    """

    mean: Array
    seeds: Mapping[int, Array]
    solid: int


def load_exposure(store: Store, key: str) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Read two curves for each test set. One has KL(teacher ‖ student) at each position in answers of the student, the other in answers of
    the teacher.

    The result maps a set to the curves `student` and `teacher`. In a curve, `kl` has the values, and `count` has the number of answers that
    reach each position. A set is left out if exposure bias is not measured on it.
    """
    content = read_json(store.artifact(key, "exposure.json"), fix=store.redo(key))
    return {name: sides for name, sides in content.items() if sides is not None}


@once
def exposures(results: Results) -> Mapping[str, ExposureBias]:
    """Return the exposure bias of each arm over all test sets. At each position, a set is weighted by its number of answers."""
    found: dict[str, ExposureBias] = {}
    for arm in results.plan.arms:
        by_seed: dict[int, Array] = {}
        solid: list[int] = []
        for seed in (seed for seed in sorted(results.scores[arm.name]) if seed in arm.analyse):
            if not (by_set := load_exposure(results.store, arm.analyse[seed])):
                continue
            (student, n_student), (teacher, n_teacher) = (
                _pooled([entry[who] for entry in by_set.values()]) for who in ("student", "teacher")
            )
            length = min(len(student), len(teacher), _LONGEST)
            by_seed[seed] = accumulated_error(student[:length], teacher[:length])
            solid.append(int(np.argmin(np.append(np.minimum(n_student[:length], n_teacher[:length]), 0) >= FEW)))
        length = min(map(len, by_seed.values()), default=0)
        if length:
            mean = np.mean([values[:length] for values in by_seed.values()], axis=0)
            found[arm.name] = ExposureBias(mean, by_seed, min(*solid, length))
    return found


def accumulated_error(student_L: Array, teacher_L: Array) -> Array:
    """Return ExAccErr(l) = 100 (R(l) - E(l)) / E(l) for each position l (MiniLLM, section 3.6).

    R(l) is the sum of `student_L`, the KL in answers of the student, up to position l. E(l) is the same sum of `teacher_L`, the KL in
    answers of the teacher. The result is NaN if E(l) is not positive.
    """
    risk, expected = np.cumsum(student_L), np.cumsum(teacher_L)
    positive = expected > 0
    return np.where(positive, 100 * (risk - expected) / np.where(positive, expected, 1.0), np.nan)


def _pooled(entries: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Array, Array]:
    length = max(len(entry["kl"]) for entry in entries)
    total, count = np.zeros(length), np.zeros(length)
    for entry in entries:
        n = np.asarray(entry["count"], dtype=np.float64)
        total[: len(n)] += n * np.asarray(entry["kl"], dtype=np.float64)
        count[: len(n)] += n
    reached = int(np.argmin(np.append(count, 0) > 0))
    return total[:reached] / count[:reached], count[:reached]


# --- calibration ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reliability:
    """The calibration of an arm over all test sets and seeds. Each bin has a mean confidence and a share of correct predictions, in per
    cent.
    """

    confidence: Array
    correct: Array
    count: Array


@once
def reliabilities(results: Results, what: str) -> Mapping[str, Reliability]:
    """Return each arm's calibration bins.

    `what` is ``tokens`` for predictions of the references' next tokens, or ``labels`` for chosen answers.
    """
    found: dict[str, Reliability] = {}
    for arm in results.plan.arms:
        tables = [
            of_set["calibration"][what]
            for seed in sorted(results.scores[arm.name])
            for of_set in load_corpus(results.store, arm.evaluate[seed]).values()
            if what in of_set.get("calibration", {})
        ]
        if not tables:
            continue
        count, confidence, correct = (
            np.array([table[part] for table in tables], dtype=np.float64) for part in ("count", "confidence", "correct")
        )
        total = count.sum(axis=0)
        held = total > 0
        sure, right = (100 * (count * part).sum(axis=0)[held] / total[held] for part in (confidence, correct))
        found[arm.name] = Reliability(sure, right, total[held])
    return found
