"""Decide whether each chain (path with assistants) of a study is better than its equal-compute baseline, which is direct distillation with
the same compute.

The verdict depends on the difference of the primary metric:
- `gain` or `loss`: the 95 % interval excludes 0, and the p-value is below 0.05 after Holm's adjustment over all comparisons of the study.
- `equivalent`: two one-sided tests show that the difference is within the recipe's margin.
- `no evidence`: all other cases, and fewer than three training seeds.

A gain is credited to the path under two conditions: the student is not farther from the original teacher, and the gain is not sharpening
(`tadistill.results.compare`). A study without chains compares its models in pairs instead.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from tadistill import constants
from tadistill.constants import SEEDS_FOR_A_CLAIM
from tadistill.metrics import MEAN
from tadistill.results.collect import Results, once, primary_metric, sets_with
from tadistill.results.compare import Mechanism, at_equal_compute, compare, differences_per_seed, direct_of, mechanism, twin_of
from tadistill.results.curves import values_on_dev
from tadistill.results.study import ArmRecord
from tadistill.statistics import Difference, SignFlip, equivalent, holm, minimum_detectable_effect, seeds_to_detect, sign_flip
from tadistill.statistics import inflation as inflation_of

ALPHA = 0.05
_SEEDS_FOR_SIGNS = 6  # from this number of seeds, reports leave out the sign-flip test, because it adds nothing to the t-test

Word = Literal["gain", "loss", "equivalent", "no evidence"]
SHOWN: dict[Word, str] = {"gain": "clearly better", "loss": "clearly worse", "equivalent": "equivalent", "no evidence": "undecided"}
"""Maps a verdict to its words in reports. There `loss` is the loss of a training."""
Against = Literal["equal compute", "off budget", "plain direct", "pair"]
"""The kind of arm that another arm is compared with. A chain (path with assistants) has one of the first three, which are all direct
distillation:

- `equal compute`: with the chain's budget, and with FLOPs that differ by at most 10 %.
- `off budget`: with the chain's budget, but with FLOPs that differ by more.
- `plain direct`: with another budget.
"""
Credit = Literal["credited", "sharpening", "farther from the teacher", "not measured"]


@dataclass(frozen=True)
class Selection:
    """The advantage of an arm whose trainings chose their best checkpoints on dev among more checkpoints than those of the other arm.

    ``mine`` and ``theirs`` are the numbers of checkpoints (see `checkpoints_chosen_from`). ``inflation`` is an upper bound of the
    advantage. It is computed from ``sigma``, the standard deviation of the primary metric on dev over the later half of the checkpoints.
    ``inflation`` and ``sigma`` are None if the metric was not measured on dev.
    """

    mine: int
    theirs: int
    sigma: float | None
    inflation: float | None


@dataclass(frozen=True)
class Comparison:
    """The comparison of two arms: the paired difference ``arm - other`` of the primary metric, its tests and its verdict."""

    arm: str
    other: str
    against: Against
    metric: str
    n_sets: int
    n_prompts: int
    seeds: tuple[int, ...]
    trained: bool
    """False if the study trained neither model. Differences then vary only over prompts."""
    difference: Difference
    per_seed: dict[int, float]
    p_holm: float
    family: int
    """The number of comparisons for which Holm's method adjusts the p-value."""
    sign_flip: SignFlip | None
    """The sign-flip test, for trained arms with 2 to 5 common seeds. None for all others."""
    margin: float
    equivalent: bool
    detectable: float | None
    """The smallest true difference that this study finds with 80 % power. None if nothing varies, or with one training seed."""
    seeds_needed: int | None
    """The number of training seeds with which the study finds a true difference of the observed size with 80 % power. The number assumes
    that the true variances between seeds and between prompts are the observed ones.

    None if the verdict is not `no evidence`, if there are fewer than three seeds, or if the variance between prompts is so large that no
    number of seeds is enough."""
    word: Word
    selection: Selection | None
    """The advantage of an arm that chose among more checkpoints than the other arm. None if it did not."""
    decoding_seeds: tuple[int, int]
    planned_seeds: tuple[tuple[int, ...], tuple[int, ...]]
    mechanism: Mechanism | None
    """Differences that show whether a gain is only sharpening. None for pairs of a study without chains."""
    credit: Credit | None
    """`credited`, or the reason why a gain over direct distillation with the same compute is not credited to the path. None if there is no
    such gain."""

    @property
    def unequal(self) -> bool:
        """True if `arm` is a chain, and the two arms had different compute."""
        return self.against in ("off budget", "plain direct")

    @property
    def few_seeds(self) -> bool:
        """True if the arms have too few common training seeds for a claim."""
        return self.trained and len(self.seeds) < SEEDS_FOR_A_CLAIM


@dataclass(frozen=True)
class ComparedPair:
    """Two arms that the study compares. `other` is None if the study has no arm with which to compare."""

    arm: ArmRecord
    other: ArmRecord | None
    against: Against


@once
def pairs(results: Results) -> tuple[ComparedPair, ...]:
    """Return the pairs of arms to compare. Each chain (path with assistants) is compared with direct distillation.

    If the study has no chains, all competing arms are compared with each other.
    """
    chains = [arm for arm in results.plan.arms if arm.has_assistant]
    if chains:
        return tuple(_chain_pair(results, chain) for chain in chains)
    return tuple(ComparedPair(a, b, "pair") for group in competitors(results) for a, b in combinations(group, 2))


def control_pairs(results: Results) -> list[tuple[ArmRecord, ArmRecord]]:
    """Return each arm that has a control, together with the control. An arm with several controls is returned once for each of them."""
    arms = {arm.name: arm for arm in results.plan.arms}
    return [(arms[control.arm], other) for other in results.plan.arms if (control := other.control) and control.arm in arms]


def competitors(results: Results) -> list[list[ArmRecord]]:
    """Return groups of arms that train the same student. The teacher itself is left out. If nothing is trained, all arms are one group."""
    if not any(arm.is_trained for arm in results.plan.arms):
        return [list(results.plan.arms)]
    groups: dict[str, list[ArmRecord]] = {}
    for arm in results.plan.arms:
        if arm.path != (results.plan.teacher,):
            groups.setdefault(arm.model, []).append(arm)
    return list(groups.values())


def _chain_pair(results: Results, chain: ArmRecord) -> ComparedPair:
    twin = twin_of(results, chain)
    if twin is None:
        return ComparedPair(chain, direct_of(results, chain), "plain direct")
    return ComparedPair(chain, twin, "equal compute" if at_equal_compute(chain, twin) else "off budget")


@once
def comparisons(results: Results) -> tuple[Comparison, ...]:
    """Return a comparison for each pair of arms with a common finished seed, in the plan's order."""
    metric = primary_metric(results)
    found: list[tuple[ComparedPair, ArmRecord, Difference, tuple[int, ...]]] = []
    for pair in pairs(results):
        compared = compare(results, pair.arm.name, pair.other.name, metric) if pair.other else None
        if pair.other and compared:
            found.append((pair, pair.other, *compared))
    family = sum(pair.other is not None for pair in pairs(results))
    adjusted = holm([difference.p for _, _, difference, _ in found], untested=family - len(found))
    return tuple(_comparison(results, *entry, p_holm, family) for entry, p_holm in zip(found, adjusted, strict=True))


def by_importance(results: Results) -> list[Comparison]:
    """Return the result of `comparisons`, but with one comparison moved to the front. The report's answer is about this comparison.

    In a study with chains, it is the one with the highest difference ``arm - other`` among the gains, or among all comparisons if there is
    no gain. In a study without chains, it is the one between the two arms with the highest means in the first group of `competitors`
    with several arms.
    """
    found = list(comparisons(results))
    if not found:
        return []
    if found[0].against == "pair":
        pair = set(_two_best(results))
        first = next((c for c in found if {c.arm, c.other} == pair), found[0])
    else:
        first = max(found, key=lambda c: (c.word == "gain", c.difference.mean))
    return [first, *(c for c in found if c is not first)]


def _two_best(results: Results) -> list[str]:
    metric = primary_metric(results)
    means = {name: summary.mean for (name, of_set, m), summary in results.summaries.items() if (of_set, m) == (MEAN, metric)}
    groups = [[arm.name for arm in group if arm.name in means and arm.control is None] for group in competitors(results)]
    group = next((names for names in groups if len(names) > 1), [])
    return sorted(group, key=lambda name: -means[name])[:2]


def _comparison(
    results: Results, pair: ComparedPair, other: ArmRecord, difference: Difference, seeds: tuple[int, ...], p_holm: float, family: int
) -> Comparison:
    arm, metric, margin = pair.arm, primary_metric(results), results.plan.margin
    trained = arm.is_trained or other.is_trained
    per_seed = differences_per_seed(results, arm.name, other.name, metric)
    inside = equivalent(difference, margin) if margin > 0 else False
    word = _word(difference, p_holm, inside, enough=difference.se > 0 and enough_seeds(arm, other, len(seeds)))
    why = None if pair.against == "pair" else mechanism(results, arm.name, other.name, metric)
    sets = sets_with(results, metric)
    tables = [results.scores[name][seeds[0]] for name in (arm.name, other.name)]
    mine, theirs = (max(table[name][metric].shape[1] for name in sets) for table in tables)
    return Comparison(
        arm=arm.name,
        other=other.name,
        against=pair.against,
        metric=metric,
        n_sets=len(sets),
        n_prompts=sum(len(tables[0][name][metric]) for name in sets),
        seeds=seeds,
        trained=trained,
        difference=difference,
        per_seed=per_seed,
        p_holm=p_holm,
        family=family,
        sign_flip=sign_flip(list(per_seed.values())) if trained and 2 <= len(seeds) < _SEEDS_FOR_SIGNS else None,
        margin=margin,
        equivalent=inside,
        detectable=_detectable(difference, family) if not trained or len(seeds) > 1 else None,
        seeds_needed=_seeds_needed(difference, per_seed, family) if trained and word == "no evidence" else None,
        word=word,
        selection=_selection(results, arm, other, seeds, metric),
        decoding_seeds=(mine, theirs),
        planned_seeds=(tuple(sorted(arm.evaluate)), tuple(sorted(other.evaluate))),
        mechanism=why,
        credit=_credit(why) if why and word == "gain" and pair.against == "equal compute" else None,
    )


def _detectable(difference: Difference, family: int) -> float | None:
    return minimum_detectable_effect(difference.se, difference.df, level=1 - ALPHA / family) if difference.se > 0 else None


def _seeds_needed(difference: Difference, per_seed: dict[int, float], family: int) -> int | None:
    if len(per_seed) < SEEDS_FOR_A_CLAIM or difference.se == 0 or difference.mean == 0:
        return None
    d = difference
    return seeds_to_detect(abs(d.mean), se=d.se, df=d.df, differences_S=list(per_seed.values()), level=1 - ALPHA / family)


def _word(difference: Difference, p_holm: float, inside: bool, *, enough: bool) -> Word:
    if is_clear(difference, p_holm, enough=enough):
        return "gain" if difference.mean > 0 else "loss"
    return "equivalent" if enough and inside else "no evidence"


def is_clear(difference: Difference, p: float, *, enough: bool) -> bool:
    """Return True if reports may call a difference clear: its interval excludes 0, its p-value, corrected for the number of comparisons,
    is below 0.05, and there are enough training seeds (`enough_seeds`)."""
    return enough and p < ALPHA and not difference.covers_zero


def enough_seeds(arm: ArmRecord, other: ArmRecord, seeds: int) -> bool:
    """Return True if the number of common training seeds is enough for a claim about two arms, or if neither of them is trained."""
    return constants.enough_seeds(seeds, trained=arm.is_trained or other.is_trained)


def _credit(why: Mechanism) -> Credit:
    divergences, controls = (why.forward_kl, why.reverse_kl), [d for d in (why.greedy, why.matched) if d is not None]
    if not all(d.above_zero for d in controls):
        return "sharpening"
    if any(d is not None and d.above_zero for d in divergences):
        return "farther from the teacher"
    if None in divergences or not controls:
        return "not measured"
    return "credited"


def _selection(results: Results, arm: ArmRecord, other: ArmRecord, seeds: tuple[int, ...], metric: str) -> Selection | None:
    mine, theirs = checkpoints_chosen_from(results, arm, other, seeds[0]), checkpoints_chosen_from(results, other, arm, seeds[0])
    if mine <= theirs:
        return None
    sigma = _spread_on_dev(results, (arm, other), seeds, metric)
    best = inflation_of(max(mine, 1), max(theirs, 1), sigma) if sigma is not None else None
    return Selection(mine, theirs, sigma, best)


def checkpoints_chosen_from(results: Results, arm: ArmRecord, other: ArmRecord, seed: int) -> int:
    """Return the number of checkpoints from which the trainings of `arm` chose, summed over those that `other` does not share.

    A training with one checkpoint chose nothing, so it does not count. The result is 0 if no training chose.
    """
    shared = {stage.key for stage in results.plan.ancestors(other.final[seed])}
    own = (stage for stage in results.plan.ancestors(arm.final[seed]) if stage.key not in shared)
    return sum(stage.checkpoints for stage in own if stage.checkpoints > 1)


def _spread_on_dev(results: Results, arms: tuple[ArmRecord, ArmRecord], seeds: tuple[int, ...], metric: str) -> float | None:
    keys = [key for arm in arms for seed in seeds if (key := arm.final[seed]) is not None]
    variances = [variance for key in keys if (variance := _variance_on_dev(results, key, metric)) is not None]
    return float(np.sqrt(np.mean(variances))) if variances else None


@once
def _variance_on_dev(results: Results, key: str, metric: str) -> float | None:
    values = values_on_dev(results, key, metric)
    later = values[len(values) // 2 :] if len(values) > 3 else values
    return float(np.var(later, ddof=1)) if len(later) > 1 else None
