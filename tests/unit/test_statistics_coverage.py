"""Simulated studies with known effects: a 95 % interval holds the truth about 95 % of the time, also with three seeds.

A few hundred studies with fixed seeds; bounds are three binomial standard errors around 93-97 %. The full simulation is
`benchmarks/intervals.py`.
"""

import numpy as np
import pytest

from tadistill.statistics import holm, macro_difference, macro_interval

STUDIES, SEED = 250, 1
SIZES = (50, 24, 8, 170, 100)
SHARES = {  # what seed, prompt and prompt x seed contribute to the variance of the mean
    "all seed": (1.0, 0.0, 0.0),
    "mostly seed": (1.0, 0.1, 0.1),
    "equal": (1.0, 1.0, 1.0),
    "all prompt": (0.0, 1.0, 0.0),
    "all prompt x seed noise": (0.0, 0.0, 1.0),
}


def arms(rng, shares, seeds, count, skewed):
    """Scores of arms with a true mean of 0, set by set, each (seeds, prompts, 1), with a difficulty that arms share."""
    of_seed, of_prompt, of_both = shares
    per_prompt = sum(1 / n for n in SIZES) / len(SIZES) ** 2
    wobbles = rng.normal(0, np.sqrt(per_prompt * seeds * of_seed), size=(count, seeds, 1))

    def noise(*shape):
        return rng.exponential(size=shape) - 1 if skewed else rng.normal(size=shape)

    scores = [[] for _ in range(count)]
    for size in SIZES:
        hard_N = np.sqrt(of_prompt) * noise(size)
        for arm, wobble in zip(scores, wobbles, strict=True):
            own_SN = np.sqrt(of_prompt) * noise(size) + np.sqrt(seeds * of_both) * noise(seeds, size)
            arm.append((hard_N + wobble + own_SN)[..., None])
    return scores


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "skewed"), [(3, False), (3, True), (5, True)])
@pytest.mark.parametrize("name", SHARES)
def test_intervals_hold_the_truth(name, seeds, skewed):
    rng = np.random.default_rng((SEED, seeds, list(SHARES).index(name), skewed))
    hits = np.zeros(3)
    for _ in range(STUDIES):
        a, b = arms(rng, SHARES[name], seeds, 2, skewed)
        low, high = macro_interval(a)
        difference = macro_difference(a, b)
        hits += (low <= 0 <= high, difference.covers_zero, difference.low90 <= 0 <= difference.high90)
    macro, apart, apart_90 = hits / STUDIES
    error = 3 * np.sqrt(0.05 * 0.95 / STUDIES)
    assert 0.93 - error <= macro <= 0.97 + error
    assert 0.93 - error <= apart <= 0.97 + error
    assert apart_90 == pytest.approx(0.90, abs=0.03 + 3 * np.sqrt(0.09 / STUDIES))


def test_the_interval_of_three_seeds_that_vary_is_students():
    """Resampling three seeds gives an interval that holds the truth three times in four only."""
    rng = np.random.default_rng(8)
    hits, resampled = 0, 0
    for _ in range(STUDIES):
        means_S = rng.normal(size=3)
        low, high = macro_interval([np.repeat(means_S[:, None, None], 20, axis=1)])
        hits += low <= 0 <= high
        resampled += np.quantile(rng.choice(means_S, size=(500, 3)).mean(axis=1), [0.025, 0.975]).prod() <= 0
    assert hits / STUDIES > 0.92
    assert resampled / STUDIES < 0.85


def test_holm_finds_nothing_among_equal_arms():
    rng = np.random.default_rng(9)
    nothing = 0
    for _ in range(100):
        first, *others = arms(rng, SHARES["equal"], 3, 12, skewed=False)
        p = [macro_difference(other, first).p for other in others]
        nothing += min(holm(p)) >= 0.05
    assert nothing >= 90


def test_a_large_effect_is_found():
    rng = np.random.default_rng(10)
    found = 0
    for _ in range(100):
        a, b = arms(rng, SHARES["equal"], 5, 2, skewed=False)
        error = np.sqrt(2 * 3 * sum(1 / n for n in SIZES)) / len(SIZES)
        found += macro_difference([x + 5 * error for x in a], b).p < 0.05
    assert found >= 90
