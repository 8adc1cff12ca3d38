"""The scores of a study's finished evaluations, and summaries over training seeds.

Axes in names: S training seeds, N prompts, K decoding seeds. The summary of an arm contains all finished training seeds. `Results.missing`
has the unfinished evaluations, and every report lists them.
"""

import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from tadistill.disk import damaged
from tadistill.metrics import MEAN, metric_of, sorted_names
from tadistill.results import measured
from tadistill.results.measured import READ, Scores, StageManifest, UsedRows, load_corpus, load_manifests, load_scores, places, shared_rows
from tadistill.results.study import ArmRecord, StudyPlan, load_plan
from tadistill.statistics import macro_interval, pass_at_k
from tadistill.store import Store

_BLIND = 0.5  # if ROUGE-L ignores more than this share of the references' letters, the primary metric is ROUGE-L for all scripts

P = ParamSpec("P")
T = TypeVar("T")
Numbers = dict[str, dict[str, float]]  # set -> metric of the whole set -> value


@dataclass(frozen=True)
class Row:
    """One value in the list `rows` of ``results.json``: an arm's mean of a metric on one test set, for one training seed.

    `low` and `high` are the ends of its 95 % interval over prompts. They are None for one value per set, one prompt, or equal scores.
    """

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
    """The result of an arm (a path of models) on one test set, or the mean over all sets.

    It has the mean over the training seeds, the ends `low` and `high` of its 95 % interval, and the value of each seed. If there is no
    interval (`macro_interval`), both ends are the mean. A metric with one value per test set, such as perplexity, has none, because there
    are no values per prompt.
    """

    mean: float
    low: float
    high: float
    per_seed: Mapping[int, float]


@dataclass(frozen=True)
class Missing:
    """A planned evaluation that is not finished yet."""

    arm: str
    seed: int
    stage: str


@dataclass(frozen=True, eq=False)
class Results:
    """The scores of a study. The properties `rows` and `summaries` are computed when they are first used."""

    study_dir: Path
    plan: StudyPlan
    store: Store
    manifests: Mapping[str, StageManifest]
    """The manifests of the finished stages, by the key of the stage."""
    sets: tuple[str, ...]
    metrics: tuple[str, ...]
    missing: tuple[Missing, ...]
    scores: Mapping[str, Mapping[int, Scores]]
    """Maps an arm and a training seed to the scores of the finished evaluation."""
    numbers: Mapping[str, Mapping[int, Numbers]]
    """Maps an arm and a training seed to the values of metrics that have one value per test set."""
    reference_length: Mapping[str, NDArray[np.int64]]
    """Maps a test set to the number of tokens in each prompt's first reference, (N,)."""
    unseen: Mapping[str, float]
    """Maps a test set to the share (0-1) of the references' letters that ROUGE-L ignores. It is 0 if an earlier version evaluated it."""
    compared: Mapping[str, NDArray[np.int64]]
    """Maps a test set to the row numbers (places in the split, from 0) of the rows that all evaluations answered, (N,). The scores are in
    the same order."""
    used: tuple[UsedRows, ...]
    """Counts of the used rows, with one entry per split. If arms differ in the counts of a split, the split has several entries."""
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """The values that functions with `once` have returned."""

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return _rows(self)

    @cached_property
    def summaries(self) -> Mapping[tuple[str, str, str], Summary]:
        """The summary of each (arm, set, metric). Metrics with one value per set come last."""
        return _summaries(self) | _averages(self.sets, self.numbers)

    def arm(self, name: str) -> ArmRecord:
        return next(arm for arm in self.plan.arms if arm.name == name)


def once(make: Callable[Concatenate[Results, P], T]) -> Callable[Concatenate[Results, P], T]:
    """Wrap a function of `Results` and hashable values. A later call with the same values returns the result of the first call."""

    @wraps(make)
    def first(results: Results, /, *values: P.args, **named: P.kwargs) -> T:
        key = (make, values, *named.items())
        if key not in results.kept:
            results.kept[key] = make(results, *values, **named)
        return results.kept[key]

    return first


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # what is read has no cycles, but the collector looks through all of it again and again
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_without_garbage_collection()
def read_results(study_dir: Path, store: Store) -> Results:
    """Read the plan of a study and all its finished evaluations.

    Models with different tokenizers may leave out different long prompts. Only prompts that all arms answered are kept.

    Raises:
        StoreError: a file is damaged or has changed, or the evaluations of a set have no prompt in common.
    """
    plan = load_plan(study_dir)
    store = Store(store.root, plan.command)
    manifests = load_manifests(store, plan.stages)
    plan = measured.with_spent(plan, manifests)
    store.check(manifests, READ)
    finished, missing = list[tuple[ArmRecord, int, str]](), list[Missing]()
    for arm in plan.arms:
        for seed, key in arm.evaluate.items():
            if all(stage in manifests for stage in arm.measured_by(seed)):
                finished.append((arm, seed, key))
            else:
                missing.append(Missing(arm.name, seed, key))
    read = Reader(store)
    rows = {key: read.rows(key) for *_, key in finished}
    shared = shared_rows(rows, store)
    scores: dict[str, dict[int, Scores]] = {arm.name: {} for arm in plan.arms}
    numbers: dict[str, dict[int, Numbers]] = {arm.name: {} for arm in plan.arms}
    pass_at = plan.recipe["evaluate"].get("pass_at", ())
    for arm, seed, key in finished:
        chosen = {name: places(of_set, shared[name]) for name, of_set in rows[key].items()}
        scores[arm.name][seed] = {of: with_passes(table, pass_at) for of, table in read.scores(arm, seed, chosen).items()}
        numbers[arm.name][seed] = read.numbers[key]
    lengths = {name: of_set["reference_length"][places(rows[key][name], shared[name])] for name, (key, of_set) in read.first.items()}
    unseen = {name: float(of_set.get("unseen", 0.0)) for name, (_, of_set) in read.first.items()}
    all_tables = [tables for by_seed in scores.values() for tables in by_seed.values()]
    sets = tuple(dict.fromkeys(name for tables in all_tables for name in tables))
    metrics = tuple(dict.fromkeys(metric for tables in all_tables for table in tables.values() for metric in table))
    compared = {name: np.sort(of_set) for name, of_set in shared.items()}
    used = measured.count_rows(plan, manifests, rows, compared)
    return Results(study_dir, plan, store, manifests, sets, metrics, tuple(missing), scores, numbers, lengths, unseen, compared, used)


def with_passes(table: dict[str, NDArray[np.float64]], pass_at: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Return the scores of a test set with pass@k added, for each metric that judges an answer as right or wrong.

    The added scores are called METRIC/k. pass@1 is not added, because it is the metric itself.
    """
    verified = [name for name in table if "@" not in name and metric_of(name).right_or_wrong]
    return table | {f"{name}/{k}": 100 * pass_at_k(table[name] > 50, k) for name in verified for k in sorted(pass_at) if k > 1}


class Reader:
    def __init__(self, store: Store):
        self.store = store
        self.loaded: dict[str, Scores] = {}
        self.numbers: dict[str, Numbers] = {}
        """The values of whole test sets, by the key of an evaluation."""
        self.answered: dict[str, dict[str, int]] = {}
        """The number of answered prompts of each test set, by the key of an evaluation."""
        self.first: dict[str, tuple[str, dict[str, Any]]] = {}
        """Maps a test set to the key of the first evaluation with this set, and to its values in corpus.json."""

    def rows(self, key: str) -> dict[str, NDArray[np.int64]]:
        corpus = load_corpus(self.store, key)
        self.numbers[key] = {name: found["numbers"] for name, found in corpus.items()}
        self.answered[key] = {name: len(found["reference_length"]) for name, found in corpus.items()}
        for name, found in corpus.items():
            self.first.setdefault(name, (key, found | {"reference_length": np.asarray(found["reference_length"], dtype=np.int64)}))
        return measured.load_rows(self.store, key, corpus)

    def scores(self, arm: ArmRecord, seed: int, chosen: Mapping[str, NDArray[np.intp]]) -> Scores:
        keys = {arm.evaluate[seed]: "", **({arm.analyse[seed]: ""} if seed in arm.analyse else {})}
        keys |= {of_seed[seed]: f"@{decoding}" for decoding, of_seed in arm.also.items()}
        found: Scores = {name: {} for name in chosen}
        for key, suffix in keys.items():
            for name, table in self._of(key).items():
                answered = self.answered[arm.evaluate[seed]][name]
                for metric, values_NK in table.items():
                    if len(values_NK) != answered:
                        reason = f"{name}/{metric} has {len(values_NK)} prompts, but the evaluation answered {answered}"
                        raise damaged(self.store.folder(key) / "scores.json", reason, self.store.redo(key))
                    found[name][f"{metric}{suffix}"] = values_NK[chosen[name]]
        return found

    def _of(self, key: str) -> Scores:
        if key not in self.loaded:
            self.loaded[key] = load_scores(self.store, key)
        return self.loaded[key]


@once
def primary_metric(results: Results) -> str:
    """Return the metric for verdicts and main figures: the first quality metric that was measured, or else ROUGE-L.

    ROUGE-L uses only a-z, A-Z and 0-9. If it ignores most letters of the references, the metric is ROUGE-L for all scripts.
    """
    first = next(iter(sorted_names(results.metrics, lambda metric: metric.group == "quality")), "rouge_l")
    tables = [table for by_seed in results.scores.values() for of_set in by_seed.values() for table in of_set.values()]
    if first != "rouge_l" or not all("rouge_l_unicode" in table for table in tables):
        return first
    return "rouge_l_unicode" if float(np.mean(list(results.unseen.values()) or [0.0])) > _BLIND else first


def seeds_of(results: Results) -> tuple[int, ...]:
    return tuple(sorted({seed for arm in results.plan.arms for seed in arm.evaluate}))


@once
def sets_with(results: Results, metric: str) -> tuple[str, ...]:
    """Return the test sets on which at least one arm has a value of the metric. The mean over sets (`MEAN`) uses these sets."""
    tables = [table for by_seed in results.scores.values() for table in by_seed.values()]
    return tuple(name for name in results.sets if any(metric in table.get(name, {}) for table in tables))


def _rows(results: Results) -> tuple[Row, ...]:
    plan, rows = results.plan, []
    intervals: dict[tuple[str, str, str], tuple[float, float]] = {}  # arms with the same stage share an interval
    for arm in plan.arms:
        for seed, tables in sorted(results.scores[arm.name].items()):
            for set_name in (name for name in results.sets if name in tables):
                found: dict[str, tuple[float, float | None, float | None]] = {}
                for metric, values_NK in tables[set_name].items():
                    address = _stage(arm, seed, metric), set_name, metric
                    if address not in intervals:
                        intervals[address] = macro_interval([values_NK[None]], bounds=metric_of(metric).bounds)
                    found[metric] = (float(values_NK.mean()), *intervals[address])
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
                            value=rounded(value),
                            low=None if low is None or low == high else rounded(low),
                            high=None if high is None or low == high else rounded(high),
                            stage=_stage(arm, seed, metric),
                        )
                    )
    return tuple(rows)


def rounded(value: float) -> float:
    """Return a value as ``results.json`` has it: with 6 decimals, and without a minus sign before 0."""
    return round(float(value), 6) + 0.0


def _stage(arm: ArmRecord, seed: int, metric: str) -> str:
    if "@" in metric:
        return arm.also[metric.rpartition("@")[2]][seed]
    return arm.analyse[seed] if metric_of(metric).stage == "analyse" else arm.evaluate[seed]


def _summaries(results: Results) -> dict[tuple[str, str, str], Summary]:
    wanted: dict[tuple[str, str, str], tuple[Any, ...]] = {}
    known: dict[tuple[Any, ...], Summary] = {}  # arms with the same stages share a summary; so do `MEAN` and a single set
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
                if address not in known:
                    known[address] = summarise([stack(results, arm.name, seeds, member, metric) for member in members], seeds, metric)
    return {name: known[address] for name, address in wanted.items()}


def summarise(strata_SNK: Sequence[NDArray[np.float64]], seeds: Sequence[int], metric: str) -> Summary:
    """Return the mean of a metric over test sets, with its 95 % interval. Each set has the same weight.

    `strata_SNK` has one array per set, with the shape (training seeds, prompts, decoding seeds). `seeds` are the training seeds.
    """
    low, high = macro_interval(strata_SNK, bounds=metric_of(metric).bounds)
    means_S = np.mean([values.mean(axis=(1, 2)) for values in strata_SNK], axis=0)
    per_seed = {seed: float(value) for seed, value in zip(seeds, means_S, strict=True)}
    return Summary(float(means_S.mean()), low, high, per_seed)


def _averages(sets: tuple[str, ...], numbers: Mapping[str, Mapping[int, Numbers]]) -> dict[tuple[str, str, str], Summary]:
    averages: dict[tuple[str, str, str], Summary] = {}
    tables = [of_seed for by_seed in numbers.values() for of_seed in by_seed.values()]
    for metric in dict.fromkeys(metric for of_seed in tables for table in of_seed.values() for metric in table):
        having = [name for name in sets if any(metric in of_seed.get(name, {}) for of_seed in tables)]
        for name, members in [*((name, [name]) for name in having), (MEAN, having)]:
            for arm, by_seed in numbers.items():
                complete = {seed: n for seed, n in sorted(by_seed.items()) if all(metric in n.get(m, {}) for m in members)}
                per_seed = {seed: float(np.mean([n[m][metric] for m in members])) for seed, n in complete.items()}
                if per_seed:
                    mean = float(np.mean(list(per_seed.values())))
                    averages[arm, name, metric] = Summary(mean, mean, mean, per_seed)
    return averages


def complete_seeds(results: Results, arm: str, sets: tuple[str, ...], metric: str) -> tuple[int, ...]:
    """Return the finished training seeds of an arm for which the metric was measured on all of `sets`."""
    by_seed = results.scores[arm]
    return tuple(seed for seed in sorted(by_seed) if all(metric in by_seed[seed].get(name, {}) for name in sets))


def stack(results: Results, arm: str, seeds: Sequence[int], set_name: str, metric: str) -> NDArray[np.float64]:
    """Return an arm's scores on one set, averaged over decoding seeds, with shape (training seeds, prompts, 1)."""
    by_seed = results.scores[arm]
    return np.stack([by_seed[seed][set_name][metric].mean(axis=1, keepdims=True) for seed in seeds])
