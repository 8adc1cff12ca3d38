"""Finished evaluations of a study -> rows, summaries over seeds, and paired differences.

Axes in names: S training seeds, N prompts, K decoding seeds. An arm is summarised over the training seeds that are
finished; whatever is not finished is listed in `Results.missing` and shown by every output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tadistill.errors import StoreError
from tadistill.results.files import Arm, Plan, Scores, is_finished, load_corpus, load_plan, load_scores
from tadistill.statistics import Difference, macro_difference, macro_interval, macro_intervals

MEAN = "mean"  # the pseudo-set: the unweighted mean over the test sets that have the metric
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "forward_kl", "reverse_kl", "ece_tokens", "ece_labels", "repetition", "self_bleu"})

Numbers = dict[str, dict[str, float]]  # set -> corpus metric -> value


@dataclass(frozen=True)
class Row:
    """One number of ``results.json``: low and high are the prompt bootstrap interval within this seed, None for a number of a whole set."""

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
    """An arm's mean over training seeds on one set (or `MEAN`), its 95 % interval, and each seed's own mean."""

    mean: float
    low: float
    high: float
    per_seed: Mapping[int, float]


@dataclass(frozen=True)
class Average:
    """The same of a number that only a whole set has (perplexity, distinct n-grams, calibration error): no prompts to resample."""

    mean: float
    per_seed: Mapping[int, float]


@dataclass(frozen=True)
class Missing:
    """An evaluation that the plan has and the store has not."""

    arm: str
    seed: int
    stage: str


@dataclass(frozen=True, eq=False)  # compared by identity, so that what is derived from it can be cached
class Results:
    """Everything a report shows, except curves and samples, which it reads from the store."""

    plan: Plan
    store_dir: Path
    sets: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    summaries: Mapping[tuple[str, str, str], Summary]  # (arm, set, metric)
    missing: tuple[Missing, ...]
    scores: Mapping[str, Mapping[int, Scores]]  # arm -> training seed -> scores, finished ones only
    averages: Mapping[tuple[str, str, str], Average]  # (arm, set, metric of a whole set)
    reference_length: Mapping[str, NDArray[np.int64]]  # set -> tokens of each prompt's first reference, (N,)

    def arm(self, name: str) -> Arm:
        """The plan's arm of that name."""
        return next(arm for arm in self.plan.arms if arm.name == name)


def read_results(study_dir: Path, store_dir: Path) -> Results:
    """Reads a study: its plan, and what the store holds of it."""
    plan = load_plan(study_dir)
    scores: dict[str, dict[int, Scores]] = {arm.name: {} for arm in plan.arms}
    corpus: dict[str, dict[int, Numbers]] = {arm.name: {} for arm in plan.arms}
    lengths: dict[str, NDArray[np.int64]] = {}
    missing: list[Missing] = []
    read = _Reader(store_dir)
    for arm in plan.arms:
        for seed, key in arm.evaluate.items():
            if not all(is_finished(store_dir, key) for key in arm.measured_by(seed)):
                missing.append(Missing(arm.name, seed, key))
                continue
            scores[arm.name][seed] = read.scores(arm, seed)
            found = load_corpus(store_dir, key)
            corpus[arm.name][seed] = {name: of_set["numbers"] for name, of_set in found.items()}
            for name, of_set in found.items():
                lengths.setdefault(name, np.asarray(of_set["reference_length"], dtype=np.int64))
    all_tables = [tables for by_seed in scores.values() for tables in by_seed.values()]
    sets = tuple(dict.fromkeys(name for tables in all_tables for name in tables))
    metrics = tuple(dict.fromkeys(metric for tables in all_tables for table in tables.values() for metric in table))
    _check_prompts(read.loaded)
    rows = _rows(plan, scores, corpus, sets)
    results = Results(plan, store_dir, sets, metrics, rows, {}, tuple(missing), scores, _averages(sets, corpus), lengths)
    return replace(results, summaries=_summaries(results))


class _Reader:
    """Reads each stage once: arms may share a model, and so its evaluation."""

    def __init__(self, store_dir: Path):
        self.store_dir = store_dir
        self.loaded: dict[str, Scores] = {}

    def scores(self, arm: Arm, seed: int) -> Scores:
        """The union of an arm's stages; another decoding's metrics are named METRIC@DECODING."""
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
            self.loaded[key] = load_scores(self.store_dir, key)
        return self.loaded[key]


def primary_metric(results: Results) -> str:
    """The metric that the headline, the forest plot and the path picture speak about."""
    return "fact_accuracy" if "fact_accuracy" in results.metrics else "rouge_l"


def seeds_of(results: Results) -> tuple[int, ...]:
    """The training seeds that the plan asks for."""
    return tuple(sorted({seed for arm in results.plan.arms for seed in arm.evaluate}))


def sets_with(results: Results, metric: str) -> tuple[str, ...]:
    """The test sets on which any arm has the metric: those that `MEAN` averages."""
    tables = [table for by_seed in results.scores.values() for table in by_seed.values()]
    return tuple(name for name in results.sets if any(metric in table.get(name, {}) for table in tables))


@lru_cache(maxsize=4096)
def compare(results: Results, arm: str, other: str, metric: str, set_name: str = MEAN) -> tuple[Difference, tuple[int, ...]] | None:
    """``arm - other`` on a set or the mean over sets, paired by training seed and prompt; None without a common seed."""
    sets = sets_with(results, metric) if set_name == MEAN else (set_name,)
    common = common_seeds(results, arm, other, sets, metric)
    if not common:
        return None
    stacks = [[stack(results, name, common, member, metric) for member in sets] for name in (arm, other)]
    return macro_difference(*stacks), common


def common_seeds(results: Results, arm: str, other: str, sets: tuple[str, ...], metric: str) -> tuple[int, ...]:
    """The training seeds that both arms have the metric for on all the sets; empty where no set has it."""
    mine, theirs = (_complete_seeds(results, name, sets, metric) for name in (arm, other))
    return tuple(seed for seed in mine if seed in theirs) if sets else ()


def differences_per_seed(results: Results, arm: str, other: str, metric: str) -> dict[int, float]:
    """Each common training seed's own ``arm - other`` on the mean over sets."""
    sets = sets_with(results, metric)
    seeds = common_seeds(results, arm, other, sets, metric)
    if not seeds:
        return {}
    mine_S, theirs_S = (np.mean([stack(results, n, seeds, m, metric).mean(axis=(1, 2)) for m in sets], axis=0) for n in (arm, other))
    return {seed: float(value) for seed, value in zip(seeds, mine_S - theirs_S, strict=True)}


def difference(results: Results, arm: str, other: str, metric: str, set_name: str = MEAN) -> Difference | None:
    """``arm - other`` as in `compare`, without the seeds that it rests on."""
    compared = compare(results, arm, other, metric, set_name)
    return compared[0] if compared else None


def twin_of(results: Results, chain: Arm) -> Arm | None:
    """The direct arm that was given the chain's compute: ``compute: as CHAIN``."""
    return next((arm for arm in results.plan.arms if arm.compute == f"as {chain.name}" and arm.is_plain), None)


def direct_arm(results: Results, arm: Arm) -> Arm | None:
    """The first plain direct arm (original teacher > student, no extra compute) for the same student; for a chain or a twin of the same
    method."""
    candidates = [a for a in results.plan.arms if len(a.path) == 2 and a.is_plain and a.model == arm.model and a.compute is None]
    if len(arm.path) > 1:
        head = results.plan.teacher or arm.path[0]
        candidates = [a for a in candidates if a.path[0] == head]
    like = [a for a in candidates if a.method == arm.method] if arm.has_assistant or arm.compute else []
    return next(iter([*like, *candidates]), None)


def ladder(results: Results, arm: Arm) -> tuple[str, ...]:
    """The models of a chain's error budget, from the original teacher down to the student."""
    teacher = results.plan.teacher
    return arm.path if teacher is None or teacher in arm.path else (teacher, *arm.path)


def _rows(
    plan: Plan, scores: Mapping[str, Mapping[int, Scores]], corpus: Mapping[str, Mapping[int, Numbers]], sets: tuple[str, ...]
) -> tuple[Row, ...]:
    rows: list[Row] = []
    intervals = _intervals(plan, scores)
    for arm in plan.arms:
        for seed, tables in sorted(scores[arm.name].items()):
            for set_name in (name for name in sets if name in tables):
                found: dict[str, tuple[float, float | None, float | None]] = {}
                for metric, values_NK in tables[set_name].items():
                    found[metric] = (float(values_NK.mean()), *intervals[_stage(arm, seed, metric), set_name, metric])
                found |= {metric: (value, None, None) for metric, value in corpus[arm.name][seed].get(set_name, {}).items()}
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


def _intervals(plan: Plan, scores: Mapping[str, Mapping[int, Scores]]) -> dict[tuple[str, str, str], tuple[float, float]]:
    """(stage, set, metric) -> the interval within one seed. Arms may share a model, and so its evaluation."""
    values: dict[tuple[str, str, str], NDArray[np.float64]] = {}
    for arm in plan.arms:
        for seed, tables in scores[arm.name].items():
            for set_name, table in tables.items():
                values |= {(_stage(arm, seed, metric), set_name, metric): values_NK for metric, values_NK in table.items()}
    return dict(zip(values, macro_intervals([[values_NK[None]] for values_NK in values.values()]), strict=True))


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0


def _stage(arm: Arm, seed: int, metric: str) -> str:
    """The stage that measured a metric."""
    if "@" in metric:
        return arm.also[metric.rpartition("@")[2]][seed]
    return arm.analyse[seed] if metric in ("forward_kl", "reverse_kl") or metric.startswith("budget/") else arm.evaluate[seed]


def _summaries(results: Results) -> dict[tuple[str, str, str], Summary]:
    wanted: dict[tuple[str, str, str], tuple[object, ...]] = {}
    strata: dict[tuple[object, ...], list[NDArray[np.float64]]] = {}  # the same stages have the same summary; one set is its own mean
    seeds_of_address: dict[tuple[object, ...], tuple[int, ...]] = {}
    for metric in results.metrics:
        with_metric = sets_with(results, metric)
        groups = [(name, (name,)) for name in with_metric] + [(MEAN, with_metric)]
        for name, members in groups:
            for arm in results.plan.arms:
                seeds = _complete_seeds(results, arm.name, members, metric)
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
    """The unweighted mean of several sets' means with its interval; axis 0 runs over the seeds."""
    return _summary(strata_SNK, seeds, *macro_interval(strata_SNK))


def _summary(strata_SNK: Sequence[NDArray[np.float64]], seeds: Sequence[int], low: float, high: float) -> Summary:
    means_S = np.mean([values.mean(axis=(1, 2)) for values in strata_SNK], axis=0)
    per_seed = {seed: float(value) for seed, value in zip(seeds, means_S, strict=True)}
    return Summary(float(means_S.mean()), low, high, per_seed)


def _averages(sets: tuple[str, ...], corpus: Mapping[str, Mapping[int, Numbers]]) -> dict[tuple[str, str, str], Average]:
    """Means over training seeds, per set and over the sets that have the metric."""
    averages: dict[tuple[str, str, str], Average] = {}
    tables = [numbers for by_seed in corpus.values() for numbers in by_seed.values()]
    for metric in dict.fromkeys(metric for numbers in tables for table in numbers.values() for metric in table):
        having = [name for name in sets if any(metric in numbers.get(name, {}) for numbers in tables)]
        for name, members in [*((name, [name]) for name in having), (MEAN, having)]:
            for arm, by_seed in corpus.items():
                complete = {seed: n for seed, n in sorted(by_seed.items()) if all(metric in n.get(m, {}) for m in members)}
                per_seed = {seed: float(np.mean([n[m][metric] for m in members])) for seed, n in complete.items()}
                if per_seed:
                    averages[arm, name, metric] = Average(float(np.mean(list(per_seed.values()))), per_seed)
    return averages


def _complete_seeds(results: Results, arm: str, sets: tuple[str, ...], metric: str) -> tuple[int, ...]:
    """The arm's finished seeds that have the metric on all the sets: a mean over fewer sets would not compare."""
    by_seed = results.scores[arm]
    return tuple(seed for seed in sorted(by_seed) if all(metric in by_seed[seed].get(name, {}) for name in sets))


def stack(results: Results, arm: str, seeds: Sequence[int], set_name: str, metric: str) -> NDArray[np.float64]:
    """(S, N, 1): decoding seeds are averaged here, because arms need not have the same number of them."""
    by_seed = results.scores[arm]
    return np.stack([by_seed[seed][set_name][metric].mean(axis=1, keepdims=True) for seed in seeds])


def _check_prompts(loaded: Mapping[str, Scores]) -> None:
    """Pairing needs the same prompts everywhere; a set that changed its size between evaluations is an error."""
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for key, tables in loaded.items():
        for set_name, table in tables.items():
            for metric, values_NK in table.items():
                count, other = first.setdefault((set_name, metric), (len(values_NK), key))
                if count != len(values_NK):
                    raise StoreError(
                        f"stages {other} and {key} scored {count} and {len(values_NK)} prompts of {set_name} "
                        f"({metric}), so their arms cannot be compared: evaluate both again on the same data"
                    )
