"""Sign flips, Holm, equivalence, power: brute force, hand-computed examples, the tables of the literature."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.special import ndtri, stdtrit

from tadistill.statistics import (
    Difference,
    equivalent,
    expected_best_of,
    holm,
    inflation,
    macro_difference,
    minimum_detectable_effect,
    seeds_to_detect,
    sign_flip,
    undominated,
)


@pytest.mark.parametrize("differences", [[1.0], [1.0, 2.0, 3.0], [1.0, -2.0, 0.5, 3.0], [0.1, 0.1, -0.1, 0.1, 0.3], [0.0, 0.0]])
def test_sign_flip_is_the_share_of_all_patterns(differences):
    patterns = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=len(differences))]
    expected = np.mean([value >= abs(sum(differences)) - 1e-12 for value in patterns])
    result = sign_flip(differences)
    assert result.p == expected
    assert result.smallest == 2 / 2 ** len(differences)
    assert result.p >= result.smallest


def test_sign_flip_reaches_its_smallest_when_all_seeds_agree():
    assert sign_flip([0.3, 0.1, 0.2, 0.5, 0.4]).p == 0.0625  # five pairs can never be below 5 %
    assert sign_flip(np.arange(1.0, 21.0)).p == 2 / 2**20


def test_sign_flip_does_not_lose_ties_to_rounding():
    assert sign_flip([0.1, 0.2, 0.3]).p == sign_flip([1.0, 2.0, 3.0]).p == 0.25
    assert sign_flip([0.1, 0.2, -0.3]).p == 1.0


def test_holm_by_hand():
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04; a later one is never below an earlier one
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == holm([], untested=2) == []
    assert holm([0.02, 0.01], untested=2) == holm([0.02, 0.01, 1.0, 1.0])[:2] == pytest.approx([0.06, 0.04])


def test_equivalence_looks_at_the_ninety_percent_interval():
    difference = Difference(mean=0.05, low=-0.31, high=0.41, p=0.7, se=0.18, df=30.0, low90=-0.25, high90=0.35)
    assert not equivalent(difference, 0.3)
    assert equivalent(difference, 0.36)
    assert not equivalent(replace(difference, low90=-0.4), 0.36)
    assert not equivalent(replace(difference, high90=0.36), 0.36)


def test_minimum_detectable_effect_has_its_power():
    rng = np.random.default_rng(0)
    for df in (2.0, 7.0, 40.0):
        effect = minimum_detectable_effect(0.5, df)
        t = (effect / 0.5 + rng.normal(size=200_000)) / np.sqrt(rng.chisquare(df, size=200_000) / df)
        assert np.mean(t > stdtrit(df, 0.975)) == pytest.approx(0.8, abs=0.004)
    assert minimum_detectable_effect(2.0, np.inf) == pytest.approx(2 * (ndtri(0.975) + ndtri(0.8)))
    assert minimum_detectable_effect(2.0, 1e7) == pytest.approx(2 * (ndtri(0.975) + ndtri(0.8)), rel=1e-4)
    for df, level in ((0.5, 1 - 0.05 / 28), (1.0, 1 - 1e-7)):  # scipy's inverse never returned for such large quantiles
        large, quantile = minimum_detectable_effect(1.0, df, level=level), stdtrit(df, (1 + level) / 2)
        assert np.mean(large > quantile * np.sqrt(rng.chisquare(df, size=200_000) / df)) == pytest.approx(0.8, abs=0.004)
    assert minimum_detectable_effect(1.0, 5, power=0.9) > minimum_detectable_effect(1.0, 5) > minimum_detectable_effect(1.0, 5, level=0.9)


def test_the_best_of_k_draws():
    rng = np.random.default_rng(1)
    for k in (1, 2, 10, 30, 120):
        largest = rng.normal(size=(20_000, k)).max(axis=1)
        assert expected_best_of(k) == pytest.approx(largest.mean(), abs=0.03)
    assert expected_best_of(1) == pytest.approx(0.0, abs=1e-12)
    assert expected_best_of(2) == pytest.approx(1 / np.sqrt(np.pi))
    assert expected_best_of(3) == pytest.approx(1.5 / np.sqrt(np.pi))
    assert [round(expected_best_of(k), 2) for k in (10, 30, 120)] == [1.54, 2.04, 2.57]


def test_inflation_is_the_difference_of_two_choices():
    assert inflation(10, 10, 0.5) == 0.0
    assert inflation(30, 1, 0.5) == pytest.approx(1.0214, abs=1e-4)
    assert inflation(1, 30, 0.5) == -inflation(30, 1, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sign_flip([]), r"shape \(0,\).*1 to 20 differences"),
        (lambda: sign_flip(np.ones(21)), r"shape \(21,\).*1 to 20 differences"),
        (lambda: sign_flip([1.0, float("inf")]), "NaN or infinite"),
        (lambda: holm([0.1, 1.2]), "numbers from 0 to 1"),
        (lambda: holm([float("nan")]), "numbers from 0 to 1"),
        (lambda: equivalent(Difference(0, 0, 0, 1, 0, 1, 0, 0), 0.0), "margin must be greater than 0, not 0"),
        (lambda: minimum_detectable_effect(-1.0, 3), "cannot be negative"),
        (lambda: minimum_detectable_effect(1.0, 0), "`df` is 0; .*`df` must be greater than 0"),
        (lambda: minimum_detectable_effect(1.0, 3, power=1.0), "`power` is 1.0; it must lie between 0 and 1"),
        (lambda: minimum_detectable_effect(1.0, 3, level=95), "`level` is 95; it must lie between 0 and 1"),
        (lambda: expected_best_of(0), "`k`, the number of draws, is 0; it must be at least 1"),
        (lambda: inflation(1, 2, -1.0), "sigma"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_undominated_keeps_the_first_of_equals():
    assert undominated([("a", 2, 1), ("b", 1, 2), ("c", 2, 1), ("d", 2, 2)], lambda x: x[1:]) == [("b", 1, 2), ("a", 2, 1)]


def test_undominated_is_the_front_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(map(int, row)) for row in rng.integers(0, 5, (20, 3))]
        best = {x for x in points if not any(y != x and all(a <= b for a, b in zip(y, x, strict=True)) for y in points)}
        front = undominated(points, lambda x: x)
        assert set(front) == best
        assert len(front) == len(best)


def test_seeds_to_detect_gives_the_power():
    rng = np.random.default_rng(3)

    def study(seeds: int, effect: float) -> np.ndarray:
        shape = (seeds, 60, 1)
        return effect + 3 * rng.standard_normal((seeds, 1, 1)) + 10 * rng.standard_normal((1, 60, 1)) + 5 * rng.standard_normal(shape)

    large = study(300, 0.0)  # its spread is nearly the true one
    found = macro_difference([large], [0 * large])
    spread = {"se": found.se, "df": found.df, "differences_S": large.mean(axis=(1, 2))}
    seeds = seeds_to_detect(5.0, **spread)
    hits = [macro_difference([values], [0 * values]).p < 0.05 for values in (study(seeds, 5.0) for _ in range(400))]
    assert np.mean(hits) == pytest.approx(0.8, abs=0.06)
    assert seeds_to_detect(4.0, **spread) > seeds
    assert seeds_to_detect(5.0, **spread, level=0.99) > seeds
    assert seeds_to_detect(1.0, **spread) is None  # the prompts alone have a standard error of 1.3
    with pytest.raises(ValueError, match="at least 2 seeds and an effect greater than 0"):
        seeds_to_detect(0.0, **spread)
