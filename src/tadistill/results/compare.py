"""Paired differences between arms (paths of models): overall, per training seed, by the length of the reference, and at equal entropy.

Differences are paired by training seed and prompt.

Sharpening means that a student scores higher but does not know more. Training with reverse KL lowers the entropy of a student, and answers
that are sampled at temperature 1 then score higher. Two controls test for this. One decodes both arms greedily. The other decodes each arm
at the temperature that gives both arms the same entropy. If a gain is only sharpening, it vanishes in both controls.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tadistill.config.added_arms import at_budget, budget_of
from tadistill.config.arm import direct_arm, read_compute
from tadistill.constants import misses_budget
from tadistill.metrics import MEAN, metric_of
from tadistill.results.collect import Results, Summary, complete_seeds, once, sets_with, stack, summarise
from tadistill.results.study import ArmRecord
from tadistill.statistics import Difference, macro_difference

Bucket = tuple[int, int | None]
_Stacked = tuple[list[NDArray[np.float64]], NDArray[np.float64]]  # the scores on each set, and each seed's mean over the sets

BUCKETS: tuple[Bucket, ...] = ((0, 5), (6, 10), (11, None))
"""The smallest and the largest reference length of each bucket, in tokens. None means no limit."""
BY_LENGTH = "rouge_l"
"""The metric that reports show by the length of the reference."""

# --- differences ------------------------------------------------------------------------------------------------------------


@once
def compare(results: Results, arm: str, other: str, metric: str, set_name: str = MEAN) -> tuple[Difference, tuple[int, ...]] | None:
    """Return the paired difference ``arm - other`` and the training seeds that both arms have. Return None if there is no such seed."""
    sets = sets_with(results, metric) if set_name == MEAN else (set_name,)
    common = common_seeds(results, arm, other, sets, metric)
    if not common:
        return None
    mine, theirs = (_stacked(results, name, common, sets, metric)[0] for name in (arm, other))
    return macro_difference(mine, theirs, bounds=metric_of(metric).bounds), common


@once
def _stacked(results: Results, arm: str, seeds: tuple[int, ...], sets: tuple[str, ...], metric: str) -> _Stacked:
    strata = [stack(results, arm, seeds, member, metric) for member in sets]
    return strata, np.mean([values.mean(axis=(1, 2)) for values in strata], axis=0)


def common_seeds(results: Results, arm: str, other: str, sets: tuple[str, ...], metric: str) -> tuple[int, ...]:
    """Return the training seeds for which both arms have a value of the metric on all of `sets`. Empty if `sets` is empty."""
    mine, theirs = (complete_seeds(results, name, sets, metric) for name in (arm, other))
    return tuple(seed for seed in mine if seed in theirs) if sets else ()


def differences_per_seed(results: Results, arm: str, other: str, metric: str) -> dict[int, float]:
    """Return the difference ``arm - other`` for each training seed that both arms have finished, as a mean over the test sets."""
    sets = sets_with(results, metric)
    seeds = common_seeds(results, arm, other, sets, metric)
    if not seeds:
        return {}
    mine_S, theirs_S = (_stacked(results, name, seeds, sets, metric)[1] for name in (arm, other))
    return {seed: float(value) for seed, value in zip(seeds, mine_S - theirs_S, strict=True)}


def difference(results: Results, arm: str, other: str, metric: str, set_name: str = MEAN) -> Difference | None:
    """Return the paired difference ``arm - other``. Return None if the arms have no finished training seed in common."""
    compared = compare(results, arm, other, metric, set_name)
    return compared[0] if compared else None


# --- the arms to compare with ---------------------------------------------------------------------------------------------------


def teacher_of(results: Results, arm: ArmRecord) -> str:
    """Return the original teacher of an arm. It is that of the study, or else the model (or the route) with which the arm begins."""
    return results.plan.teacher or (arm.path[0] if arm.is_routed else arm.models[0])


def twin_of(results: Results, chain: ArmRecord) -> ArmRecord | None:
    """Return the equal-compute baseline of a chain (path with assistants). It is direct distillation of the same student with the same
    budget, such as ``compute: as CHAIN``.

    The teacher is the original one, or the model at the start of the chain. If there are several such arms, the original teacher comes
    first, then the chain's method, then a budget that is met, then the reference arm of a study with `budgets`.
    """
    teacher, start = teacher_of(results, chain), chain.path[0]
    teachers = {teacher, start} if start == chain.models[0] else {teacher}  # not if an earlier path of the chain trains the start
    reference = reference_at(results, chain)

    def order(arm: ArmRecord) -> tuple[bool, ...]:
        return arm.path[0] != teacher, arm.method != chain.method, not at_equal_compute(chain, arm), arm is not reference

    arms = [arm for arm in results.plan.arms if len(arm.path) == 2 and arm.path[0] in teachers and arm.model == chain.model]
    return min((arm for arm in arms if arm.is_plain and arm is not chain and relative_compute(chain, arm)), key=order, default=None)


def relative_compute(arm: ArmRecord, other: ArmRecord) -> float | None:
    """Return the FLOPs of one arm divided by those of another that should have the same, without the original teacher's own training.

    Return None if the key `compute` of neither arm says that they have the same FLOPs.
    """
    common = _budgets(arm) & _budgets(other)
    if not common:
        return None
    _, reference = min(common)
    mine, theirs = (1.0 if each.name == reference else each.of_budget or 1.0 for each in (arm, other))
    return mine / theirs


def at_equal_compute(arm: ArmRecord, other: ArmRecord) -> bool:
    """Return True if two arms have the same budget, and FLOPs that differ by at most 10 %."""
    ratio = relative_compute(arm, other)
    return ratio is not None and not misses_budget(ratio)


def _budgets(arm: ArmRecord) -> set[tuple[float, str]]:
    # the FLOPs of an arm, as factor and arm: 1x itself, and what its `compute` says
    times, like = read_compute(arm.compute or "") or (None, arm.name)
    return {(1.0, arm.name), (times or 1.0, like)}


def reference_at(results: Results, arm: ArmRecord) -> ArmRecord | None:
    """Return the arm with which `arm` is compared: the reference arm, trained with the same budget.

    Return None if `arm` has no budget, or is the reference arm itself.
    """
    made = budget_of(arm.name, arm.compute)
    if made is None or made.arm == made.reference:
        return None
    name = made.reference if made.times == 1 else at_budget(made.reference, made.times)
    return next((other for other in results.plan.arms if other.name == name), None)


def direct_of(results: Results, arm: ArmRecord) -> ArmRecord | None:
    """Return the direct arm, in which the original teacher teaches the student of `arm` without assistants.

    If there are several direct arms, one with the preferred method is returned. For a chain (path with assistants) or an arm with the key
    `compute`, this is the arm's own method. For all other arms, it is the method of the first chain with the same student, so that these
    arms have one direct arm in common.
    """
    teacher = teacher_of(results, arm) if len(arm.path) > 1 else None
    teacher = None if teacher == arm.model else teacher  # a student that teaches itself has no original teacher
    chain = next((other for other in results.plan.arms if other.has_assistant and other.model == arm.model), None)
    like = arm if arm.has_assistant or arm.compute else chain
    method = like.method if like else None
    return direct_arm(results.plan.arms, teacher, arm.model, method, any_method=True)


def budget_models(results: Results, arm: ArmRecord) -> tuple[str, ...]:
    """Return the models of a chain (a path with assistants), from the original teacher to the student."""
    teacher = teacher_of(results, arm)
    return arm.path if teacher in arm.path else (teacher, *arm.path)


def added_by_steps(results: Results, arm: ArmRecord) -> Summary | None:
    """Return how much the steps between the original teacher and the last assistant add to KL(student ‖ teacher), in nats/token.

    It is the sum of all parts of the error budget but the first. Return None if a part was not measured.
    """
    terms = [f"budget/{j}" for j in range(len(budget_models(results, arm)) - 1)]
    if not all((arm.name, MEAN, metric) in results.summaries for metric in ("reverse_kl", *terms)):
        return None
    seeds, sets = sorted(results.summaries[arm.name, MEAN, terms[0]].per_seed), sets_with(results, terms[0])
    return summarise([np.sum([stack(results, arm.name, seeds, name, t) for t in terms[1:]], axis=0) for name in sets], seeds, terms[1])


# --- by length of the reference ---------------------------------------------------------------------------------------------


def bucket_title(bucket: Bucket) -> str:
    """Return a range of reference lengths as text: ``[6, 10]`` or ``[11, ∞)``."""
    first, last = bucket
    return f"[{first}, ∞)" if last is None else f"[{first}, {last}]"


def bucket_sizes(results: Results) -> dict[Bucket, int]:
    """Map each range of `BUCKETS` to its number of prompts. Ranges without prompts are left out."""
    sizes = {bucket: sum(len(rows) for _, rows in _rows(results, bucket)) for bucket in BUCKETS}
    return {bucket: size for bucket, size in sizes.items() if size}


@once
def bucket_summary(results: Results, arm: str, bucket: Bucket) -> Summary | None:
    """Return an arm's mean over the prompts whose reference length is in the range `bucket`. Return None if there are no scores."""
    seeds = common_seeds(results, arm, arm, sets_with(results, BY_LENGTH), BY_LENGTH)
    values_SNK = _pooled(results, arm, seeds, bucket)
    return None if values_SNK is None else summarise([values_SNK], seeds, BY_LENGTH)


def bucket_difference(results: Results, arm: str, other: str, bucket: Bucket) -> Difference | None:
    """Return the paired difference ``arm - other`` over the prompts whose reference length is in `bucket`. None without scores."""
    seeds = common_seeds(results, arm, other, sets_with(results, BY_LENGTH), BY_LENGTH)
    mine, theirs = (_pooled(results, name, seeds, bucket) for name in (arm, other))
    return None if mine is None or theirs is None else macro_difference([mine], [theirs], bounds=metric_of(BY_LENGTH).bounds)


def _rows(results: Results, bucket: Bucket) -> list[tuple[str, NDArray[np.intp]]]:
    first, last = bucket
    found: list[tuple[str, NDArray[np.intp]]] = []
    for name in sets_with(results, BY_LENGTH):
        length_N = results.reference_length.get(name, np.zeros(0, dtype=np.int64))
        rows = np.flatnonzero((length_N >= first) & (True if last is None else length_N <= last))
        if len(rows):
            found.append((name, rows))
    return found


def _pooled(results: Results, arm: str, seeds: Sequence[int], bucket: Bucket) -> NDArray[np.float64] | None:
    rows = _rows(results, bucket)
    if not seeds or not rows:
        return None
    return np.concatenate([stack(results, arm, seeds, name, BY_LENGTH)[:, of_set] for name, of_set in rows], axis=1)


# --- sharpening -------------------------------------------------------------------------------------------------------


MAIN = "main decoding"
Curves = Literal["matched", "apart", "not measured"]
"""The answer to the question: can two arms be compared at equal entropy? The target is the lower one of their entropies under the main
decoding.

- `matched`: yes. For both arms, the target is within the range of the entropies of the arm's decodings.
- `apart`: no. For at least one arm, the target is outside this range.
- `not measured`: no. An arm has fewer than two measured decodings or not the main one, or the arms have no finished seed in common.
"""


@dataclass(frozen=True)
class Point:
    """The mean entropy (nats/token) and the mean of a metric, for one arm and one decoding.

    `metric` is the name of the metric under the main decoding, such as ``rouge_l``. Under another decoding it is METRIC@DECODING.
    """

    entropy: float
    value: float
    metric: str

    @property
    def decoding(self) -> str:
        return self.metric.partition("@")[2] or MAIN


@dataclass(frozen=True)
class Mechanism:
    """Paired differences ``arm - other`` that show whether a gain is only sharpening (lower entropy). None: not measured."""

    forward_kl: Difference | None
    reverse_kl: Difference | None
    entropy: Difference | None
    greedy: Difference | None
    curves: Curves
    matched: Difference | None
    """Difference of the metric where both arms have the entropy ``at_entropy``. Each arm's value is interpolated between its decodings."""
    at_entropy: float | None


def mechanism(results: Results, arm: str, other: str, metric: str) -> Mechanism:
    """Return the differences between two arms that show whether a gain is only sharpening. They are means over the test sets."""
    greedy = greedy_decoding(results)
    curves, matched, at_entropy = _at_matched_entropy(results, arm, other, metric)
    return Mechanism(
        forward_kl=difference(results, arm, other, "forward_kl"),
        reverse_kl=difference(results, arm, other, "reverse_kl"),
        entropy=difference(results, arm, other, "entropy"),
        greedy=difference(results, arm, other, f"{metric}@{greedy}") if greedy else None,
        curves=curves,
        matched=matched,
        at_entropy=at_entropy,
    )


def greedy_decoding(results: Results) -> str | None:
    """Return the name of the decoding with temperature 0 that otherwise equals the main one (`evaluate`), except perhaps in the seeds.
    Return None if there is no such decoding."""
    return next((name for name in temperatures(results) if results.plan.decodings[name]["temperature"] == 0), None)


def temperatures(results: Results) -> list[str]:
    """Return the names of the decodings that differ from the main one (`evaluate`) only in the temperature, and perhaps in the seeds."""
    allowed = {"temperature", "seeds"}
    return [name for name, changes in results.plan.decodings.items() if "temperature" in changes and set(changes) <= allowed]


def entropy_curve(results: Results, arm: str, metric: str, seeds: Sequence[int], decodings: Iterable[str]) -> list[Point]:
    """Return one point for the main decoding (`evaluate`) of an arm and one for each of `decodings`, in ascending order of entropy.

    The values of a point are means over training seeds and test sets. A decoding that was not measured is omitted.
    """
    sets = sets_with(results, metric)
    points: list[Point] = []
    for suffix in ("", *(f"@{name}" for name in decodings)):
        names = [f"{which}{suffix}" for which in ("entropy", metric)]
        tables = [results.scores[arm][seed].get(member, {}) for seed in seeds for member in sets]
        if tables and all(name in table for name in names for table in tables):
            entropy, value = (float(np.mean([table[name].mean() for table in tables])) for name in names)
            points.append(Point(entropy, value, names[1]))
    return sorted(points, key=lambda point: point.entropy)


def _at_matched_entropy(results: Results, arm: str, other: str, metric: str) -> tuple[Curves, Difference | None, float | None]:
    sets = sets_with(results, metric)
    seeds = common_seeds(results, arm, other, sets, metric)
    both = [entropy_curve(results, name, metric, seeds, temperatures(results)) for name in (arm, other)]
    mains = [point.entropy for points in both for point in points if point.metric == metric]
    if not seeds or len(mains) < 2 or min(map(len, both)) < 2:
        return "not measured", None, None
    target = min(mains)
    if not all(points[0].entropy <= target <= points[-1].entropy for points in both):
        return "apart", None, None
    mine, theirs = ([_blend(results, n, seeds, m, _weights(p, target)) for m in sets] for n, p in zip((arm, other), both, strict=True))
    return "matched", macro_difference(mine, theirs, bounds=metric_of(metric).bounds), target


def _weights(points: Sequence[Point], target: float) -> dict[str, float]:
    left, right = next(pair for pair in pairwise(points) if pair[0].entropy <= target <= pair[1].entropy)
    width = right.entropy - left.entropy
    share = (target - left.entropy) / width if width else 0.0
    return {left.metric: 1 - share, right.metric: share}


def _blend(results: Results, arm: str, seeds: Sequence[int], set_name: str, weights: dict[str, float]) -> np.ndarray:
    return np.sum([weight * stack(results, arm, seeds, set_name, metric) for metric, weight in weights.items()], axis=0)
