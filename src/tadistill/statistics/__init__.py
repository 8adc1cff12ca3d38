"""Confidence intervals, significance tests and statistical power, for models that share training seeds and test prompts."""

from tadistill.statistics.intervals import ROUNDING, Difference, macro_difference, macro_interval, pass_at_k
from tadistill.statistics.significance import (
    SignFlip,
    equivalent,
    expected_best_of,
    holm,
    inflation,
    minimum_detectable_effect,
    seeds_spread,
    seeds_to_detect,
    sign_flip,
    spread_claimed,
    undominated,
)

__all__ = [
    "ROUNDING",
    "Difference",
    "SignFlip",
    "equivalent",
    "expected_best_of",
    "holm",
    "inflation",
    "macro_difference",
    "macro_interval",
    "minimum_detectable_effect",
    "pass_at_k",
    "seeds_spread",
    "seeds_to_detect",
    "sign_flip",
    "spread_claimed",
    "undominated",
]
