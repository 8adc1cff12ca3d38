"""Bootstrap intervals: known answers, coverage on simulated data, pairing, determinism, errors."""

import numpy as np
import pytest

from tadistill.statistics import (
    Difference,
    bootstrap_interval,
    hierarchical_interval,
    macro_difference,
    macro_interval,
    paired_difference,
)


def test_constant_data_has_zero_width():
    assert bootstrap_interval(np.full((30, 4), 7.0)) == pytest.approx((7.0, 7.0), abs=1e-12)
    assert hierarchical_interval(np.full((3, 30, 4), 7.0)) == pytest.approx((7.0, 7.0), abs=1e-12)
    difference = paired_difference(np.full((3, 9, 2), 5.0), np.full((3, 9, 2), 3.0))
    assert (difference.mean, difference.low, difference.high) == pytest.approx((2.0, 2.0, 2.0), abs=1e-12)


def test_single_prompt_gives_its_decoding_mean():
    assert bootstrap_interval([[1.0, 2.0, 6.0]]) == pytest.approx((3.0, 3.0))


def test_two_prompts_have_the_exact_resampling_distribution():
    # draws of two from {0, 1}: means 0, .5, 1 with probabilities 1/4, 1/2, 1/4
    assert bootstrap_interval([[0.0], [1.0]], level=0.95) == (0.0, 1.0)
    assert bootstrap_interval([[0.0], [1.0]], level=0.4) == (0.5, 0.5)


def test_interval_width_is_the_standard_error():
    values = np.random.default_rng(1).normal(size=(400, 1))
    low, high = bootstrap_interval(values, replicates=20_000)
    expected = 1.959964 * values.std() / 20.0
    assert (high - low) / 2 == pytest.approx(expected, rel=0.03)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * expected)


def test_coverage_over_prompts():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        prompts = rng.normal(2.0, 3.0, size=(60, 1))
        low, high = bootstrap_interval(prompts + rng.normal(0, 1, size=(60, 5)), replicates=500)
        hits += low <= 2.0 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_coverage_over_seeds_and_prompts():
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(300):
        values = rng.normal(0, 0.5, size=(12, 1, 1)) + rng.normal(0, 3, size=(1, 80, 1)) + rng.normal(0, 1, size=(12, 80, 2))
        low, high = hierarchical_interval(values, replicates=500)
        hits += low <= 0.0 <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_seed_noise_widens_the_hierarchical_interval():
    values = np.array([-1.0, 0.0, 1.0])[:, None, None] + np.zeros((3, 50, 1))
    low, high = hierarchical_interval(values)
    assert (low, high) == pytest.approx((-1.0, 1.0), abs=0.35)
    assert bootstrap_interval(values[0]) == pytest.approx((-1.0, -1.0))


def test_a_single_seed_resamples_prompts_only():
    values = np.random.default_rng(5).normal(size=(40, 3))
    assert hierarchical_interval(values[None]) == pytest.approx(bootstrap_interval(values))


def test_pairing_cancels_common_noise():
    rng = np.random.default_rng(6)
    common = rng.normal(0, 10, size=(3, 100, 1))
    a, b = common + 1.0, common + rng.normal(0, 0.01, size=common.shape)
    difference = paired_difference(a, b)
    low, high = hierarchical_interval(a)
    assert difference.high - difference.low < 0.01 * (high - low)
    assert difference.mean == pytest.approx(float((a - b).mean()))
    assert not difference.covers_zero
    assert paired_difference(a, a).covers_zero


def test_macro_mean_weighs_sets_equally_and_matches_the_independent_formula():
    rng = np.random.default_rng(7)
    large, small = rng.normal(0, 1, size=(1, 400, 1)), rng.normal(10, 1, size=(1, 100, 1))
    low, high = macro_interval([large, small], replicates=20_000)
    assert (low + high) / 2 == pytest.approx((large.mean() + small.mean()) / 2, abs=0.01)
    error = np.sqrt(large.var() / 400 + small.var() / 100) / 2
    assert (high - low) / 2 == pytest.approx(1.959964 * error, rel=0.03)
    difference = macro_difference([large, small], [large - 1, small - 3])
    assert (difference.mean, difference.low, difference.high) == pytest.approx((2.0, 2.0, 2.0))


def test_decoding_seeds_may_differ_in_number_between_the_sides_of_a_pair():
    assert paired_difference(np.ones((2, 5, 3)), np.zeros((2, 5, 1))) == Difference(1.0, 1.0, 1.0)


def test_many_prompts_agree_with_the_unblocked_formula(monkeypatch):
    values = np.random.default_rng(8).normal(size=(2, 50, 1))
    whole = hierarchical_interval(values, seed=9)
    monkeypatch.setattr("tadistill.statistics._CELLS_AT_ONCE", 70)  # a block is one replicate
    from tadistill.statistics import _counts

    _counts.cache_clear()
    assert hierarchical_interval(values, seed=9) == pytest.approx(whole, abs=1e-12)
    _counts.cache_clear()


def test_same_seed_same_interval_other_seed_other_interval():
    values = np.random.default_rng(9).normal(size=(3, 40, 2))
    assert hierarchical_interval(values, seed=1) == hierarchical_interval(values, seed=1)
    assert hierarchical_interval(values, seed=1) != hierarchical_interval(values, seed=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([1.0, 2.0]), r"\(prompts, decoding seeds\), not \(2,\)"),
        (lambda: hierarchical_interval(np.zeros((2, 3))), r"training seeds, prompts, decoding seeds"),
        (lambda: hierarchical_interval(np.zeros((2, 0, 1))), r"none empty, not \(2, 0, 1\)"),
        (lambda: bootstrap_interval([[1.0], [float("nan")]]), "1 of 2 values are NaN or infinite"),
        (lambda: paired_difference(np.zeros((2, 3, 1)), np.zeros((2, 4, 1))), "same seeds and prompts on both sides"),
        (lambda: macro_interval([]), "no values"),
        (lambda: macro_interval([np.zeros((2, 3, 1)), np.zeros((1, 3, 1))]), "2 and 1 training seeds"),
        (lambda: bootstrap_interval([[1.0]], level=95), "level must lie between 0 and 1, not 95"),
        (lambda: bootstrap_interval([[1.0]], replicates=0), "replicates must be at least 1, not 0"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
