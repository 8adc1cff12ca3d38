"""Intervals: known answers, bounds, pairing, invariances, errors. Coverage is in test_statistics_coverage.py."""

import numpy as np
import pytest
from scipy.special import expit, logit, stdtr, stdtrit

from tadistill.statistics import equivalent, macro_difference, macro_interval


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
    assert (difference.p, difference.df) == (2.0**-8, np.inf)  # a sign test over 9 prompts
    nothing = macro_difference([np.zeros((3, 9, 2))], [np.zeros((3, 9, 2))])
    assert (nothing.low, nothing.high, nothing.p, nothing.covers_zero) == (0.0, 0.0, 1.0, True)


def test_a_single_prompt_gives_its_decoding_mean():
    assert prompt_interval([[1.0, 2.0, 6.0]]) == pytest.approx((3.0, 3.0))


def test_two_prompts_have_one_degree_of_freedom():
    difference = macro_difference([[[[0.0], [1.0]]]], [np.zeros((1, 2, 1))])
    assert (difference.mean, difference.se, difference.df) == pytest.approx((0.5, 0.5, 1.0))


def test_one_seed_of_many_prompts_has_the_standard_error_of_its_mean():
    values = np.random.default_rng(1).normal(size=(400, 1))
    low, high = prompt_interval(values)
    error = values.std(ddof=1) / 20.0
    assert (high - low) / 2 == pytest.approx(1.966 * error, rel=0.001)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=1e-12)
    difference = macro_difference([values[None]], [np.zeros((1, 400, 1))])
    assert (difference.se, difference.df) == pytest.approx((error, 399))


@pytest.mark.parametrize("seeds", [3, 5])
def test_seeds_without_prompt_noise_give_students_interval(seeds):
    means_S = np.random.default_rng(2).normal(size=seeds)
    difference = macro_difference([means_S[:, None, None] + np.zeros((seeds, 50, 1))], [np.zeros((seeds, 50, 1))])
    error = means_S.std(ddof=1) / np.sqrt(seeds)
    assert (difference.se, difference.df) == pytest.approx((error, seeds - 1))
    half = stdtrit(seeds - 1, 0.975) * error
    assert (difference.low, difference.high) == pytest.approx((means_S.mean() - half, means_S.mean() + half), rel=1e-12)


def test_the_variance_is_that_of_crossed_effects():
    rng = np.random.default_rng(3)
    variances = [macro_difference([crossed(rng, 8, 40)], [np.zeros((8, 40, 2))]).se ** 2 for _ in range(400)]
    assert np.mean(variances) == pytest.approx(1.0 / 8 + 9.0 / 40 + 0.5 / 320, rel=0.05)


def test_a_single_seed_varies_over_prompts_only():
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
    low, high = macro_interval([large, small])
    assert (low + high) / 2 == pytest.approx((large.mean() + small.mean()) / 2, abs=1e-9)
    error = np.sqrt(large.var(ddof=1) / 400 + small.var(ddof=1) / 100) / 2
    assert (high - low) / 2 == pytest.approx(1.973 * error, rel=0.002)
    difference = macro_difference([large, small], [large - 1, small - 3])
    assert (difference.mean, difference.low, difference.high) == pytest.approx((2.0, 2.0, 2.0))


def test_two_sets_halve_the_variance():
    values = np.random.default_rng(8).normal(size=(1, 200, 1))
    one, two = prompt_interval(values[0]), macro_interval([values, values])
    assert (two[1] - two[0]) / (one[1] - one[0]) == pytest.approx(np.sqrt(0.5) * stdtrit(398, 0.975) / stdtrit(199, 0.975))


def test_decoding_seeds_may_differ_in_number_between_the_sides_of_a_pair():
    difference = macro_difference([np.ones((2, 5, 3))], [np.zeros((2, 5, 1))])
    assert (difference.mean, difference.low, difference.high) == (1.0, 1.0, 1.0)


def test_the_order_of_seeds_prompts_decodes_and_sets_does_not_matter():
    rng = np.random.default_rng(9)
    a, b = crossed(rng, 4, 30), crossed(rng, 4, 50)
    nothing = [np.zeros_like(a), np.zeros_like(b)]
    first = macro_difference([a, b], nothing)
    turned = macro_difference([b[::-1, ::-1, ::-1], a[::-1, ::-1, ::-1]], nothing[::-1])
    for field in ("mean", "low", "high", "p", "se", "df", "low90", "high90"):
        assert getattr(turned, field) == pytest.approx(getattr(first, field), rel=1e-9)


def test_a_difference_turned_round_is_its_mirror_image():
    rng = np.random.default_rng(11)
    a, b = crossed(rng, 5, 60) + 1.0, crossed(rng, 5, 60)
    there, back = macro_difference([a], [b]), macro_difference([b], [a])
    assert (-back.mean, back.se, back.df, back.p) == pytest.approx((there.mean, there.se, there.df, there.p))
    assert (-back.high, -back.low) == pytest.approx((there.low, there.high))


def test_p_and_intervals_tell_the_same():
    rng = np.random.default_rng(12)
    for shift in np.linspace(0.0, 3.0, 13):
        a = crossed(rng, 5, 60, of_seed=0.3) + shift
        difference = macro_difference([a], [np.zeros_like(a)])
        assert (difference.p < 0.05) == (not difference.covers_zero)
        assert (difference.p < 0.10) == (not difference.low90 <= 0.0 <= difference.high90)
        assert difference.low < difference.low90 < difference.high90 < difference.high
        assert difference.p > 0


def shares(rng, mean, seeds, prompts):
    """Answers that are right (100) or wrong (0), with a difficulty that seeds share."""
    return 100.0 * (expit(logit(mean) + rng.normal(0, 1, size=(1, prompts, 1))) > rng.uniform(size=(seeds, prompts, 1)))


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_set_with_one_prompt_gives_no_interval(seeds):
    rng = np.random.default_rng(seeds)
    many, one = rng.uniform(20, 30, (seeds, 40, 2)), rng.uniform(20, 30, (seeds, 1, 2))
    strata = [many, one]
    mean = np.mean([many.mean(), one.mean()])
    assert macro_interval(strata, bounds=(0, 100)) == pytest.approx((mean, mean))
    found = macro_difference([many + 9, one + 9], strata, bounds=(0, 100))
    assert (found.p, found.one_prompt, found.covers_zero, equivalent(found, 20)) == (1, True, True, False)
    assert macro_interval([np.zeros((seeds, 1, 2))], bounds=(0, 100)) == pytest.approx((0, 97.5))  # at a bound, the exact limit is known


@pytest.mark.parametrize("mean", [0.01, 0.03, 0.5, 0.97])
@pytest.mark.parametrize("seeds", [1, 3])
def test_no_interval_leaves_the_bounds(mean, seeds):
    rng = np.random.default_rng((14, seeds, int(100 * mean)))
    for _ in range(50):
        a, b = shares(rng, mean, seeds, 12), shares(rng, 0.5, seeds, 12)
        low, high = macro_interval([a], bounds=(0, 100))
        assert 0 <= low <= a.mean() <= high <= 100
        apart = macro_difference([a], [b], bounds=(0, 100))
        assert -100 <= apart.low <= apart.low90 <= apart.mean <= apart.high90 <= apart.high <= 100
        assert (apart.p < 0.05) == (not apart.covers_zero)


def test_a_bounded_interval_solves_wilsons_equation():
    values = np.array([[[0.0], [0.0], [0.0], [100.0]]])
    low, high = macro_interval([values], bounds=(0, 100))
    answers = 0.25 * 0.75 / 0.25**2  # the standard error of the mean is 0.25
    for share in (low / 100, high / 100):
        assert abs(0.25 - share) == pytest.approx(stdtrit(3, 0.975) * np.sqrt(share * (1 - share) / answers))
    assert macro_interval([values / 25 + 1], bounds=(1, 5)) == pytest.approx((low / 25 + 1, high / 25 + 1))  # any bounds
    assert macro_interval([100 - values], bounds=(0, 100)) == pytest.approx((100 - high, 100 - low))


def test_many_independent_answers_have_the_textbook_interval():
    """Wilson's interval of 95 right answers of 1000 with z = 1.96; t with 999 degrees of freedom is slightly larger."""
    values = np.zeros((1, 1000, 1))
    values[0, :95] = 1
    assert macro_interval([values], bounds=(0, 1)) == pytest.approx((0.0783452, 0.1147544), abs=5e-5)


def test_far_from_its_bounds_a_bounded_interval_is_the_unbounded_one():
    values = 50 + np.random.default_rng(15).normal(size=(3, 400, 1))
    free, bounded = macro_interval([values]), macro_interval([values], bounds=(0, 100))
    assert bounded == pytest.approx(free, abs=1e-4)
    apart, inside = (macro_difference([values], [values[:, ::-1] + 0.1], bounds=b) for b in ((-np.inf, np.inf), (0.0, 100.0)))
    assert (inside.low, inside.high, inside.p) == pytest.approx((apart.low, apart.high, apart.p), abs=1e-4)


def test_scores_that_are_all_at_a_bound_have_the_exact_limit():
    assert macro_interval([np.zeros((3, 20, 2))], bounds=(0, 100)) == pytest.approx((0, 100 * (1 - 0.025 ** (1 / 20))))
    assert macro_interval([np.full((1, 20, 1), 100.0)], bounds=(0, 100)) == pytest.approx((100 * 0.025 ** (1 / 20), 100))
    two = macro_interval([np.zeros((1, 20, 1)), np.zeros((1, 80, 1))], bounds=(0, 100))
    assert two[1] == pytest.approx(50 * (2 - 0.025 ** (1 / 20) - 0.025 ** (1 / 80)))
    everything = macro_difference([np.full((1, 20, 1), 100.0)], [np.zeros((1, 20, 1))], bounds=(0, 100))
    assert (everything.low, everything.high) == pytest.approx((200 * 0.025 ** (1 / 20) - 100, 100))
    assert macro_interval([np.zeros((3, 20, 2))], bounds=(0, np.inf)) == (0, 0)


def test_an_interval_ends_at_a_single_bound():
    values = np.array([[[0.0], [0.1], [0.0]]])
    low, high = macro_interval([values], bounds=(0, np.inf))
    assert (low, high) == (0, macro_interval([values])[1])
    assert macro_interval([values - 0.1 / 3 - 1e-9], bounds=(0, np.inf))[0] == 0  # a mean of 0 computed as slightly less


def test_p_is_students_and_as_small_as_the_data_say():
    a = np.array([1.0, 1.1, 0.9])[:, None, None] + np.zeros((3, 5, 1))
    difference = macro_difference([a], [np.zeros_like(a)])
    assert difference.p == pytest.approx(2 * stdtr(2, -1 / (0.1 / np.sqrt(3))))
    many = np.random.default_rng(16).normal(1, 1, size=(1, 400, 1))
    assert 0 < macro_difference([many], [np.zeros_like(many)]).p < 1e-20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompt_interval([1.0, 2.0]), r"scores have shape \(1, 2\); they need three axes"),
        (lambda: macro_interval([np.zeros((2, 3))]), r"training seeds, prompts, decoding seeds"),
        (lambda: macro_interval([np.zeros((2, 0, 1))]), r"shape \(2, 0, 1\).*none may be empty"),
        (lambda: prompt_interval([[1.0], [float("nan")]]), "1 of 2 scores are NaN or infinite"),
        (lambda: macro_difference([np.zeros((2, 3, 1))], [np.zeros((2, 4, 1))]), "scores for the same seeds and prompts"),
        (lambda: macro_interval([]), "no scores"),
        (lambda: macro_interval([np.zeros((2, 3, 1)), np.zeros((1, 3, 1))]), "2 and 1 training seeds"),
        (lambda: macro_interval([np.full((1, 3, 1), 101.0)], bounds=(0, 100)), "between 0 and 100 cannot have the mean 101"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
