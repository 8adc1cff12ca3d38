"""Intervals, tests and power for scores that arms share training seeds and prompts for. Needs numpy and scipy only."""

from tadistill.statistics.bootstrap import Difference, bootstrap_interval, macro_difference, macro_interval, macro_intervals
from tadistill.statistics.power import detectable, expected_best_of, inflation, minimum_detectable_effect, undominated
from tadistill.statistics.tests import SignFlip, equivalent, holm, sign_flip

__all__ = [
    "Difference",
    "SignFlip",
    "bootstrap_interval",
    "detectable",
    "equivalent",
    "expected_best_of",
    "holm",
    "inflation",
    "macro_difference",
    "macro_interval",
    "macro_intervals",
    "minimum_detectable_effect",
    "sign_flip",
    "undominated",
]
