"""Curves of quality over compute: their points, their paired differences, where they cross and where they converge."""

import re
from functools import cache

import numpy as np
import pytest

from tadistill.metrics import MEAN
from tadistill.report import write_report
from tadistill.report.figures.compute import curve_sentences
from tadistill.results.budget_curves import BudgetPoint, _limit, budget_curves, first_crossing
from tadistill.results.collect import Summary
from tadistill.results.compare import difference, twin_of

from .builder import ArmSpec, StudySpec, build_study

SEEDS = (1, 2, 3, 4, 5)
TIMES = (1, 2, 4, 8)
PERCENT = (0.0, 100.0)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Call it with the gains of a chain over direct distillation at each budget; a study is built and read once."""
    return cache(lambda *gains: build(tmp_path_factory.mktemp("study"), gains))


def build(folder, gains):
    direct = [ArmSpec("direct" if t == 1 else f"direct-{t}x", ("xl", "s"), 3.0 * i, None if t == 1 else f"{t}x direct", 1e17 * t)
              for i, t in enumerate(TIMES)]  # fmt: skip
    chain = [ArmSpec(f"chain-{t}x", ("xl", "l", "s"), 3.0 * i + gain, f"{t}x direct", 1e17 * t)
             for i, (t, gain) in enumerate(zip(TIMES, gains, strict=True))]  # fmt: skip
    made = build_study(folder, StudySpec([*direct, *chain], seeds=SEEDS, sets={"dolly": 80, "vicuna": 40}, fact_sets=(), also={}))
    return made.read()


@pytest.mark.slow
def test_curves_have_the_arms_of_each_budget(study):
    results = study(-12, -12, 12, 12)
    direct, chain = budget_curves(results)
    assert (direct.name, chain.name) == ("direct", "chain")
    assert [point.times for point in direct.points] == [point.times for point in chain.points] == list(TIMES)
    assert [point.arm for point in direct.points] == ["direct", "direct-2x", "direct-4x", "direct-8x"]
    assert all(point.gap is None for point in direct.points)
    assert direct.crossing is None
    assert chain.points[1].gap == difference(results, "chain-2x", "direct-2x", "rouge_l")
    assert chain.points[2].summary == results.summaries["chain-4x", MEAN, "rouge_l"]
    assert direct.last_gain == difference(results, "direct-8x", "direct-4x", "rouge_l")
    assert budget_curves(results) is budget_curves(results)


def test_a_chain_is_compared_with_direct_distillation_at_its_budget(study):
    results = study(-12, -12, 12, 12)
    arms = {arm.name: arm for arm in results.plan.arms}
    twins = {name: twin.name if (twin := twin_of(results, arms[name])) else None for name in arms if name.startswith("chain")}
    assert twins == {"chain-1x": "direct", "chain-2x": "direct-2x", "chain-4x": "direct-4x", "chain-8x": "direct-8x"}


def test_a_clear_crossing_is_found_between_its_budgets(study):
    _, chain = budget_curves(study(-12, -12, 12, 12))
    assert chain.crossing is not None
    assert chain.crossing.low is not None
    assert chain.crossing.high is not None
    assert 2 < chain.crossing.low <= chain.crossing.times <= chain.crossing.high < 4


@pytest.mark.slow
def test_curves_that_do_not_cross_have_no_crossing(study):
    _, chain = budget_curves(study(12, 12, 12, 12))
    assert chain.crossing is None


def test_first_crossing():
    x = np.log(np.array([1.0, 2.0, 4.0]))
    rows = np.array([[-1.0, 1.0, 2.0], [-2.0, -1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]])
    found = np.exp(first_crossing(x, rows, rises=True))
    assert found == pytest.approx([np.sqrt(2), np.sqrt(8), np.inf, 0, np.sqrt(2)])
    assert first_crossing(x, rows[2:4], rises=False).tolist() == [-np.inf, np.inf]


def points(scores, width):
    return [BudgetPoint(2.0**i, f"a-{i}", None, Summary(s, s - width, s + width, {}), None) for i, s in enumerate(scores)]


def test_a_power_law_converges_to_its_limit():
    scores = [30 - 20 * (2.0**i) ** -0.8 for i in range(6)]
    found = _limit(points(scores, 0.2), PERCENT)
    assert found is not None
    assert found.value == pytest.approx(30, abs=0.01)
    assert 29 < found.low < 30 < found.high < 31
    wide = _limit(points(scores, 4.0), PERCENT)
    assert wide is None or wide.high - wide.low > 3 * (found.high - found.low)  # noisy scores leave the limit open


def test_three_budgets_are_too_few_for_a_limit():
    assert _limit(points([10, 15, 18], 0.1), PERCENT) is None


@pytest.mark.parametrize("scores", [(10, 12, 14, 50), (10, 30, 60, 40), (10, 20, 40, 80)], ids=["late", "falls", "beyond 100"])
def test_a_curve_that_is_no_power_law_has_no_limit(scores):
    assert _limit(points(scores, 1.0), PERCENT) is None


def test_the_interval_of_a_limit_stays_within_the_bounds():
    found = _limit(points([92, 95, 96.5, 97.5], 2.0), PERCENT)
    assert found is not None
    assert found.high == 100
    assert found.low < found.value <= 100


def test_the_page_has_the_curves(study):
    results = study(-12, -12, 12, 12)
    page = write_report(results).read_text(encoding="utf-8")
    finding = (
        "Against direct at the same budget, chain at 4× and chain at 8× are clearly better; chain at 1× and chain at 2× are clearly worse"
    )
    assert finding in page
    assert page.count('id="figure-budgets"') == page.count('id="figure-budget-gaps"') == 1
    (said,) = [text for text in curve_sentences(results) if text.startswith("chain")]
    assert re.search(r"it crosses direct at [23]\.?\d?× \(95 % interval 2\.\d× to [23]", said)


def test_a_study_without_budgets_has_no_curves(tmp_path):
    results = build_study(tmp_path, StudySpec([ArmSpec("direct", ("xl", "s"))])).read()
    assert budget_curves(results) == ()
    assert "figure-budgets" not in write_report(results).read_text(encoding="utf-8")
