"""Bootstrap intervals: known answers, pairing, invariances, determinism, errors. Coverage is in test_statistics_coverage.py."""

import numpy as np
import pytest
from scipy.special import stdtrit

from tadistill.statistics import bootstrap, macro_difference, macro_interval, macro_intervals


def crossed(rng, seeds, prompts, of_seed=1.0, of_prompt=3.0, rest=1.0, decodes=2):
    effects = rng.normal(0, of_seed, size=(seeds, 1, 1)) + rng.normal(0, of_prompt, size=(1, prompts, 1))
    return effects + rng.normal(0, rest, size=(seeds, prompts, decodes))


def prompt_interval(values_NK, **settings):
    """The interval of one model: a single training seed."""
    return macro_interval([np.asarray(values_NK)[None]], **settings)


def test_constant_data_has_zero_width():
    assert prompt_interval(np.full((30, 4), 7.0)) == pytest.approx((7.0, 7.0), abs=1e-12)
    assert macro_interval([np.full((3, 30, 4), 7.0)]) == pytest.approx((7.0, 7.0), abs=1e-12)
    difference = macro_difference([np.full((3, 9, 2), 5.0)], [np.full((3, 9, 2), 3.0)])
    assert (difference.mean, difference.low, difference.high, difference.se) == (2.0, 2.0, 2.0, 0.0)
    assert (difference.p, difference.df) == (pytest.approx(2 / 10_001), np.inf)
    nothing = macro_difference([np.zeros((3, 9, 2))], [np.zeros((3, 9, 2))])
    assert (nothing.low, nothing.high, nothing.p, nothing.covers_zero) == (0.0, 0.0, 1.0, True)


def test_a_single_prompt_gives_its_decoding_mean():
    assert prompt_interval([[1.0, 2.0, 6.0]]) == pytest.approx((3.0, 3.0))


def test_two_prompts_have_one_degree_of_freedom():
    difference = macro_difference([[[[0.0], [1.0]]]], [np.zeros((1, 2, 1))])
    assert (difference.mean, difference.se, difference.df) == pytest.approx((0.5, 0.5, 1.0))


def test_one_seed_of_many_prompts_has_the_standard_error_of_its_mean():
    values = np.random.default_rng(1).normal(size=(400, 1))
    low, high = prompt_interval(values, replicates=20_000)
    error = values.std(ddof=1) / 20.0
    assert (high - low) / 2 == pytest.approx(1.966 * error, rel=0.03)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * error)
    difference = macro_difference([values[None]], [np.zeros((1, 400, 1))])
    assert (difference.se, difference.df) == pytest.approx((error, 399))


@pytest.mark.parametrize("seeds", [3, 5])
def test_seeds_without_prompt_noise_give_students_interval(seeds):
    means_S = np.random.default_rng(2).normal(size=seeds)
    difference = macro_difference([means_S[:, None, None] + np.zeros((seeds, 50, 1))], [np.zeros((seeds, 50, 1))], replicates=40_000)
    error = means_S.std(ddof=1) / np.sqrt(seeds)
    assert (difference.se, difference.df) == pytest.approx((error, seeds - 1))
    half = stdtrit(seeds - 1, 0.975) * error
    assert (difference.low, difference.high) == pytest.approx((means_S.mean() - half, means_S.mean() + half), abs=0.08 * half)


def test_the_variance_is_that_of_crossed_effects():
    rng = np.random.default_rng(3)
    variances = [macro_difference([crossed(rng, 8, 40)], [np.zeros((8, 40, 2))], replicates=10).se ** 2 for _ in range(400)]
    assert np.mean(variances) == pytest.approx(1.0 / 8 + 9.0 / 40 + 0.5 / 320, rel=0.05)


def test_a_single_seed_resamples_prompts_only():
    values = np.random.default_rng(5).normal(size=(40, 3))
    assert macro_interval([values[None]]) == prompt_interval(values)


def test_pairing_cancels_common_noise():
    rng = np.random.default_rng(6)
    common = rng.normal(0, 10, size=(3, 100, 1))
    a, b = common + 1.0, common + rng.normal(0, 0.01, size=common.shape)
    difference = macro_difference([a], [b])
    low, high = macro_interval([a])
    assert difference.high - difference.low < 0.01 * (high - low)
    assert difference.mean == pytest.approx(float((a - b).mean()))
    assert not difference.covers_zero
    assert macro_difference([a], [a]).covers_zero


def test_the_macro_mean_weighs_sets_equally_and_matches_the_independent_formula():
    rng = np.random.default_rng(7)
    large, small = rng.normal(0, 1, size=(1, 400, 1)), rng.normal(10, 1, size=(1, 100, 1))
    low, high = macro_interval([large, small], replicates=20_000)
    assert (low + high) / 2 == pytest.approx((large.mean() + small.mean()) / 2, abs=0.01)
    error = np.sqrt(large.var(ddof=1) / 400 + small.var(ddof=1) / 100) / 2
    assert (high - low) / 2 == pytest.approx(1.973 * error, rel=0.03)
    difference = macro_difference([large, small], [large - 1, small - 3])
    assert (difference.mean, difference.low, difference.high) == pytest.approx((2.0, 2.0, 2.0))


def test_sets_of_one_size_are_resampled_independently():
    values = np.random.default_rng(8).normal(size=(1, 200, 1))
    one, two = prompt_interval(values[0]), macro_interval([values, values])
    assert (two[1] - two[0]) / (one[1] - one[0]) == pytest.approx(np.sqrt(0.5), rel=0.04)


def test_decoding_seeds_may_differ_in_number_between_the_sides_of_a_pair():
    difference = macro_difference([np.ones((2, 5, 3))], [np.zeros((2, 5, 1))])
    assert (difference.mean, difference.low, difference.high) == (1.0, 1.0, 1.0)


def test_the_order_of_seeds_decodes_and_sets_does_not_matter():
    rng = np.random.default_rng(9)
    a, b = crossed(rng, 4, 30), crossed(rng, 4, 50)
    nothing = [np.zeros_like(a), np.zeros_like(b)]
    first = macro_difference([a, b], nothing)
    turned = macro_difference([b[::-1, :, ::-1], a[::-1, :, ::-1]], nothing[::-1])
    for field in ("mean", "low", "high", "p", "se", "df", "low90", "high90"):
        assert getattr(turned, field) == pytest.approx(getattr(first, field), rel=1e-9)


def test_the_order_of_prompts_matters_within_the_noise_of_resampling_only():
    a = crossed(np.random.default_rng(10), 4, 60)
    first, turned = (macro_difference([x], [np.zeros_like(x)]) for x in (a, a[:, ::-1]))
    assert (turned.mean, turned.se, turned.df) == pytest.approx((first.mean, first.se, first.df))
    assert (turned.low, turned.high) == pytest.approx((first.low, first.high), abs=0.05 * (first.high - first.low))


def test_a_difference_turned_round_is_its_mirror_image():
    rng = np.random.default_rng(11)
    a, b = crossed(rng, 5, 60) + 1.0, crossed(rng, 5, 60)
    there, back = macro_difference([a], [b], replicates=40_000), macro_difference([b], [a], replicates=40_000)
    width = there.high - there.low
    assert (-back.mean, back.se, back.df) == pytest.approx((there.mean, there.se, there.df))
    assert (-back.high, -back.low) == pytest.approx((there.low, there.high), abs=0.03 * width)


def test_p_and_intervals_tell_the_same():
    rng = np.random.default_rng(12)
    for shift in np.linspace(0.0, 3.0, 13):
        a = crossed(rng, 5, 60, of_seed=0.3) + shift
        difference = macro_difference([a], [np.zeros_like(a)])
        assert (difference.p < 0.05) == (not difference.covers_zero)
        assert (difference.p < 0.10) == (not difference.low90 <= 0.0 <= difference.high90)
        assert difference.low < difference.low90 < difference.high90 < difference.high
        assert difference.p > 0


def test_the_level_is_the_width():
    a = crossed(np.random.default_rng(13), 5, 60)
    at = {level: macro_difference([a], [np.zeros_like(a)], level=level) for level in (0.5, 0.9, 0.99)}
    assert at[0.5].low > at[0.9].low > at[0.99].low
    assert (at[0.9].low, at[0.9].high) == (at[0.9].low90, at[0.9].high90) == (at[0.5].low90, at[0.5].high90)


def test_many_prompts_agree_with_the_unblocked_formula(monkeypatch):
    values = np.random.default_rng(8).normal(size=(2, 50, 1))
    whole = macro_interval([values], seed=9)
    monkeypatch.setattr(bootstrap, "_CELLS_AT_ONCE", 70)  # a block is one replicate
    bootstrap._counts.cache_clear()
    assert macro_interval([values], seed=9) == pytest.approx(whole, abs=1e-12)
    bootstrap._counts.cache_clear()


def test_same_seed_same_interval_other_seed_other_interval():
    values = np.random.default_rng(9).normal(size=(3, 40, 2))
    assert macro_interval([values], seed=1) == macro_interval([values], seed=1)
    assert macro_interval([values], seed=1) != macro_interval([values], seed=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompt_interval([1.0, 2.0]), r"\(training seeds, prompts, decoding seeds\), none of them empty; the shape is \(1, 2\)"),
        (lambda: macro_interval([np.zeros((2, 3))]), r"training seeds, prompts, decoding seeds"),
        (lambda: macro_interval([np.zeros((2, 0, 1))]), r"none of them empty; the shape is \(2, 0, 1\)"),
        (lambda: prompt_interval([[1.0], [float("nan")]]), "1 of 2 scores are NaN or infinite"),
        (lambda: macro_difference([np.zeros((2, 3, 1))], [np.zeros((2, 4, 1))]), "scores for the same seeds and prompts"),
        (lambda: macro_interval([]), "no scores"),
        (lambda: macro_interval([np.zeros((2, 3, 1)), np.zeros((1, 3, 1))]), "2 and 1 training seeds"),
        (lambda: prompt_interval([[1.0]], level=95), "level must lie between 0 and 1, not 95"),
        (lambda: prompt_interval([[1.0]], replicates=0), "replicates must be at least 1, not 0"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_many_intervals_at_once_are_those_of_each_alone():
    rng = np.random.default_rng(5)
    shapes = [((3, 20, 2), (3, 31, 1))] * 70 + [((2, 20, 1),), ((1, 20, 3),), ((3, 1, 1), (3, 9, 1))]
    problems = [[rng.normal(size=shape) for shape in of_problem] for of_problem in shapes]
    found = macro_intervals(problems, replicates=500)
    alone = [macro_interval(problem, replicates=500) for problem in problems]
    np.testing.assert_allclose(found, alone, rtol=1e-12)
    assert macro_intervals([]) == []
