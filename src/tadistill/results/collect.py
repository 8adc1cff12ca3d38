"""Finished evaluations of a study: rows, and summaries over training seeds.

Axes in names: S training seeds, N prompts, K decoding seeds. An arm is summarised over the training seeds that are finished.
Unfinished evaluations are listed in `Results.missing`, and every output shows them.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tadistill.errors import StoreError
from tadistill.metrics import metric_of, names_in
from tadistill.results.study import ArmRecord, Scores, StudyPlan, load_corpus, load_plan, load_scores
from tadistill.statistics import macro_interval, macro_intervals
from tadistill.store import Store

MEAN = "mean"  # the pseudo-set: the unweighted mean over the test sets that have the metric

T = TypeVar("T")
Numbers = dict[str, dict[str, float]]  # set -> metric of the whole set -> value


@dataclass(frozen=True)
class Row:
    """One value of ``results.json``. `low` and `high` bound its 95 % interval over prompts, and are None for a whole-set metric."""

    arm: str
    model: str
    parameters: int
    seed: int
    set: str
    metric: str
    value: float
    low: float | None
    high: float | None
    stage: str


@dataclass(frozen=True)
class Summary:
    """An arm's result on one test set, or averaged over all sets.

    It has the mean over the training seeds, the 95 % interval of this mean (from `low` to `high`), and the value of each seed.
    """

    mean: float
    low: float
    high: float
    per_seed: Mapping[int, float]


@dataclass(frozen=True)
class Average:
    """An arm's mean of a whole-set metric (perplexity, distinct n-grams, calibration error), which has no prompts to resample."""

    mean: float
    per_seed: Mapping[int, float]


@dataclass(frozen=True)
class Missing:
    """An evaluation of the plan that is not finished yet."""

    arm: str
    seed: int
    stage: str


@dataclass(frozen=True, eq=False)
class Results:
    """The scores of a study. Its rows, summaries and averages are computed when they are first used."""

    study_dir: Path
    plan: StudyPlan
    store: Store
    sets: tuple[str, ...]
    metrics: tuple[str, ...]
    missing: tuple[Missing, ...]
    scores: Mapping[str, Mapping[int, Scores]]
    """Arm -> training seed -> scores of the finished evaluations."""
    numbers: Mapping[str, Mapping[int, Numbers]]
    """Arm -> training seed -> values of the whole-set metrics."""
    reference_length: Mapping[str, NDArray[np.int64]]
    """Set -> number of tokens in each prompt's first reference, (N,)."""
    _kept: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return _rows(self)

    @cached_property
    def summaries(self) -> Mapping[tuple[str, str, str], Summary]:
        """Map (arm, set, metric) to a summary."""
        return _summaries(self)

    @cached_property
    def averages(self) -> Mapping[tuple[str, str, str], Average]:
        """Map (arm, set, metric) to an average, for whole-set metrics."""
        return _averages(self.sets, self.numbers)

    def arm(self, name: str) -> ArmRecord:
        return next(arm for arm in self.plan.arms if arm.name == name)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of `make()`. It is computed at the first call with this key, and stored."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[return-value]


def read_results(study_dir: Path, store: Store) -> Results:
    """Read the plan of a study and all its finished evaluations.

    Raises:
        StoreError: a file is damaged, or two evaluations scored different prompts.
    """
    plan = load_plan(study_dir)
    scores: dict[str, dict[int, Scores]] = {arm.name: {} for arm in plan.arms}
    numbers: dict[str, dict[int, Numbers]] = {arm.name: {} for arm in plan.arms}
    lengths: dict[str, NDArray[np.int64]] = {}
    missing: list[Missing] = []
    read = _Reader(store)
    for arm in plan.arms:
        for seed, key in arm.evaluate.items():
            if not all(store.finished(key) for key in arm.measured_by(seed)):
                missing.append(Missing(arm.name, seed, key))
                continue
            scores[arm.name][seed] = read.scores(arm, seed)
            found = load_corpus(store, key)
            numbers[arm.name][seed] = {name: of_set["numbers"] for name, of_set in found.items()}
            for name, of_set in found.items():
                lengths.setdefault(name, np.asarray(of_set["reference_length"], dtype=np.int64))
    all_tables = [tables for by_seed in scores.values() for tables in by_seed.values()]
    sets = tuple(dict.fromkeys(name for tables in all_tables for name in tables))
    metrics = tuple(dict.fromkeys(metric for tables in all_tables for table in tables.values() for metric in table))
    _check_prompts(read.loaded)
    return Results(study_dir, plan, store, sets, metrics, tuple(missing), scores, numbers, lengths)


class _Reader:
    def __init__(self, store: Store):
        self.store = store
        self.loaded: dict[str, Scores] = {}

    def scores(self, arm: ArmRecord, seed: int) -> Scores:
        """Return an arm's scores from all stages that measure it. Under another decoding, a metric is named METRIC@DECODING."""
        found = {name: dict(table) for name, table in self._of(arm.evaluate[seed]).items()}
        if seed in arm.analyse:
            for name, table in self._of(arm.analyse[seed]).items():
                found[name] |= table
        for decoding, keys in arm.also.items():
            for name, table in self._of(keys[seed]).items():
                found[name] |= {f"{metric}@{decoding}": values for metric, values in table.items()}
        return found

    def _of(self, key: str) -> Scores:
        if key not in self.loaded:
            self.loaded[key] = load_scores(self.store, key)
        return self.loaded[key]


def primary_metric(results: Results) -> str:
    """Return the metric that verdicts and main figures use: the first quality metric that was measured, else Rouge-L."""
    return next((name for name in names_in("quality") if name in results.metrics), "rouge_l")


def seeds_of(results: Results) -> tuple[int, ...]:
    return tuple(sorted({seed for arm in results.plan.arms for seed in arm.evaluate}))


def sets_with(results: Results, metric: str) -> tuple[str, ...]:
    """Return the test sets on which the metric was measured for at least one arm. `MEAN` is the mean over these sets."""
    tables = [table for by_seed in results.scores.values() for table in by_seed.values()]
    return tuple(name for name in results.sets if any(metric in table.get(name, {}) for table in tables))


def _rows(results: Results) -> tuple[Row, ...]:
    plan, rows = results.plan, []
    intervals = _intervals(plan, results.scores)
    for arm in plan.arms:
        for seed, tables in sorted(results.scores[arm.name].items()):
            for set_name in (name for name in results.sets if name in tables):
                found: dict[str, tuple[float, float | None, float | None]] = {}
                for metric, values_NK in tables[set_name].items():
                    found[metric] = (float(values_NK.mean()), *intervals[_stage(arm, seed, metric), set_name, metric])
                found |= {metric: (value, None, None) for metric, value in results.numbers[arm.name][seed].get(set_name, {}).items()}
                for metric, (value, low, high) in found.items():
                    rows.append(
                        Row(
                            arm=arm.name,
                            model=arm.model,
                            parameters=plan.parameters[arm.model],
                            seed=seed,
                            set=set_name,
                            metric=metric,
                            value=_rounded(value),
                            low=None if low is None else _rounded(low),
                            high=None if high is None else _rounded(high),
                            stage=_stage(arm, seed, metric),
                        )
                    )
    return tuple(rows)


def _intervals(plan: StudyPlan, scores: Mapping[str, Mapping[int, Scores]]) -> dict[tuple[str, str, str], tuple[float, float]]:
    values: dict[tuple[str, str, str], NDArray[np.float64]] = {}
    for arm in plan.arms:
        for seed, tables in scores[arm.name].items():
            for set_name, table in tables.items():
                values |= {(_stage(arm, seed, metric), set_name, metric): values_NK for metric, values_NK in table.items()}
    return dict(zip(values, macro_intervals([[values_NK[None]] for values_NK in values.values()]), strict=True))


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0


def _stage(arm: ArmRecord, seed: int, metric: str) -> str:
    if "@" in metric:
        return arm.also[metric.rpartition("@")[2]][seed]
    return arm.analyse[seed] if metric_of(metric).stage == "analyse" else arm.evaluate[seed]


def _summaries(results: Results) -> dict[tuple[str, str, str], Summary]:
    wanted: dict[tuple[str, str, str], tuple[object, ...]] = {}
    strata: dict[tuple[object, ...], list[NDArray[np.float64]]] = {}  # equal stages share a summary; `MEAN` of one set equals it
    seeds_of_address: dict[tuple[object, ...], tuple[int, ...]] = {}
    for metric in results.metrics:
        with_metric = sets_with(results, metric)
        groups = [(name, (name,)) for name in with_metric] + [(MEAN, with_metric)]
        for name, members in groups:
            for arm in results.plan.arms:
                seeds = complete_seeds(results, arm.name, members, metric)
                if not seeds:
                    continue
                address = (metric, members, seeds, *(_stage(arm, seed, metric) for seed in seeds))
                wanted[arm.name, name, metric] = address
                if address not in strata:
                    strata[address] = [stack(results, arm.name, seeds, member, metric) for member in members]
                    seeds_of_address[address] = seeds
    intervals = dict(zip(strata, macro_intervals(list(strata.values())), strict=True))
    known = {address: _summary(strata[address], seeds_of_address[address], *intervals[address]) for address in strata}
    return {name: known[address] for name, address in wanted.items()}


def summarise(strata_SNK: Sequence[NDArray[np.float64]], seeds: Sequence[int]) -> Summary:
    """Return the unweighted mean over sets with its 95 % interval. Each set has an array (S, N, K); `seeds` names its axis S."""
    return _summary(strata_SNK, seeds, *macro_interval(strata_SNK))


def _summary(strata_SNK: Sequence[NDArray[np.float64]], seeds: Sequence[int], low: float, high: float) -> Summary:
    means_S = np.mean([values.mean(axis=(1, 2)) for values in strata_SNK], axis=0)
    per_seed = {seed: float(value) for seed, value in zip(seeds, means_S, strict=True)}
    return Summary(float(means_S.mean()), low, high, per_seed)


def _averages(sets: tuple[str, ...], numbers: Mapping[str, Mapping[int, Numbers]]) -> dict[tuple[str, str, str], Average]:
    averages: dict[tuple[str, str, str], Average] = {}
    tables = [of_seed for by_seed in numbers.values() for of_seed in by_seed.values()]
    for metric in dict.fromkeys(metric for of_seed in tables for table in of_seed.values() for metric in table):
        having = [name for name in sets if any(metric in of_seed.get(name, {}) for of_seed in tables)]
        for name, members in [*((name, [name]) for name in having), (MEAN, having)]:
            for arm, by_seed in numbers.items():
                complete = {seed: n for seed, n in sorted(by_seed.items()) if all(metric in n.get(m, {}) for m in members)}
                per_seed = {seed: float(np.mean([n[m][metric] for m in members])) for seed, n in complete.items()}
                if per_seed:
                    averages[arm, name, metric] = Average(float(np.mean(list(per_seed.values()))), per_seed)
    return averages


def complete_seeds(results: Results, arm: str, sets: tuple[str, ...], metric: str) -> tuple[int, ...]:
    """Return the arm's finished seeds for which the metric was measured on all of `sets`."""
    by_seed = results.scores[arm]
    return tuple(seed for seed in sorted(by_seed) if all(metric in by_seed[seed].get(name, {}) for name in sets))


def stack(results: Results, arm: str, seeds: Sequence[int], set_name: str, metric: str) -> NDArray[np.float64]:
    """Return an arm's scores on one set, averaged over decoding seeds, with shape (S, N, 1)."""
    by_seed = results.scores[arm]
    return np.stack([by_seed[seed][set_name][metric].mean(axis=1, keepdims=True) for seed in seeds])


def _check_prompts(loaded: Mapping[str, Scores]) -> None:
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for key, tables in loaded.items():
        for set_name, table in tables.items():
            for metric, values_NK in table.items():
                count, other = first.setdefault((set_name, metric), (len(values_NK), key))
                if count != len(values_NK):
                    raise StoreError(
                        f"stages {other} and {key} scored {count} and {len(values_NK)} prompts of {set_name} "
                        f"({metric}), so their arms cannot be compared: delete the directories of both stages and run the recipe again"
                    )
