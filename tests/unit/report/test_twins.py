"""Which arm is the equal-compute baseline of a chain, and what a report says if their FLOPs are not equal."""

from dataclasses import replace

import pytest

from tadistill.report.analysis import analyses
from tadistill.report.answer import answer
from tadistill.report.explain import cautions, verdict_text
from tadistill.report.findings import against
from tadistill.report.path_words import arm_words
from tadistill.report.tables import comparison_table
from tadistill.results.compare import at_equal_compute, direct_of, relative_compute, twin_of
from tadistill.results.verdict import comparisons

from .builder import ArmSpec, StudySpec, build_study

XL_S, CHAIN = ("xl", "s"), ArmSpec("chain", ("xl", "l", "s"))
SEEDS = (1, 2, 3)


def read(folder, *arms, **more):
    return build_study(folder, StudySpec([*arms], seeds=SEEDS, sets={"dolly": 30}, fact_sets=(), **more)).read()


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    return read(tmp_path_factory.mktemp("study"), CHAIN)


def twin(some, chain, *arms, teacher="xl"):
    """The name of the chain's baseline, in a study of these arms that has no results."""
    return found_by(twin_of, some, chain, *arms, teacher=teacher)


def direct(some, chain, *arms, teacher="xl"):
    """The name of the chain's direct arm, in such a study."""
    return found_by(direct_of, some, chain, *arms, teacher=teacher)


def found_by(search, some, chain, *arms, teacher):
    records = [
        replace(
            some.plan.arms[0], name=a.name, path=a.path, models=tuple(dict.fromkeys((*a.before, *a.path))), model=a.path[-1],
            path_text=a.text or " > ".join(a.path), compute=a.compute, method=a.method, of_budget=a.of_budget
        )
        for a in (*arms, chain)
    ]  # fmt: skip
    found = search(replace(some, plan=replace(some.plan, arms=tuple(records), teacher=teacher)), records[-1])
    return found and found.name


def test_another_student_or_teacher_is_no_baseline(some):
    others = [ArmSpec("student", ("xl", "l"), compute="as chain"), ArmSpec("teacher", ("l", "s"), compute="as chain")]
    assert twin(some, CHAIN, *others) is None
    assert twin(some, CHAIN, *others, ArmSpec("twin", XL_S, compute="as chain")) == "twin"
    budgets = [ArmSpec("other", ("xl", "l")), ArmSpec("chain-of", ("xl", "m", "s"))]
    for each in budgets:
        assert twin(some, ArmSpec("chain-1x", ("xl", "l", "s"), compute=f"1x {each.name}"), each) is None


def test_the_baseline_has_the_method_of_its_chain(some):
    kd = ArmSpec("kd", XL_S, compute="as chain", method="forward_kl (dataset)")
    assert twin(some, CHAIN, kd) == "kd"
    assert twin(some, CHAIN, kd, ArmSpec("same", XL_S, compute="as chain")) == "same"
    assert twin(some, CHAIN, ArmSpec("init", XL_S, compute="as chain", text="xl > s, s from xl")) is None


def test_a_baseline_begins_with_the_original_teacher_or_with_the_start_of_the_chain(some):
    chain = ArmSpec("chain", ("l", "m", "s"))
    own, original = ArmSpec("own", ("l", "s"), compute="as chain"), ArmSpec("original", XL_S, compute="as chain")
    assert twin(some, chain, own) == "own"
    assert twin(some, chain, own, original) == "original"
    trained = ArmSpec("chain", ("l", "s"), before=("xl", "l"), text="xl > l then l > s")
    assert twin(some, trained, own) is None
    assert twin(some, trained, own, original) == "original"
    route = ArmSpec("chain", ("m on a + l on b", "s"), before=("m", "l"))
    assert twin(some, route, original) == "original"


@pytest.mark.parametrize(
    ("chain", "direct", "equal"),
    [
        ("1x direct", None, True),
        ("2x direct", "2x direct", True),
        ("2x direct", None, False),
        ("2x direct", "3x direct", False),
        (None, "1x chain", True),
        (None, "2x chain", False),
        ("1x sft", "1x sft", True),
    ],
)
def test_a_budget_is_equal_whatever_the_names_of_the_arms(some, chain, direct, equal):
    found = twin(some, ArmSpec("chain", ("xl", "l", "s"), compute=chain), ArmSpec("direct", XL_S, compute=direct))
    assert found == ("direct" if equal else None)


def test_flops_that_differ_by_more_than_a_tenth_are_not_equal(some):
    (arm,) = some.plan.arms
    near, far = (replace(arm, name="twin", compute="as chain", of_budget=share) for share in (0.95, 0.88))
    assert at_equal_compute(arm, near)
    assert not at_equal_compute(arm, far)
    assert relative_compute(arm, far) == pytest.approx(1 / 0.88)
    both = [replace(arm, name=name, compute="2x direct", of_budget=0.8) for name in ("a", "b")]
    assert relative_compute(*both) == 1  # both miss the same budget
    longer = replace(arm, compute="2x direct", of_budget=0.8)
    assert relative_compute(longer, near) == pytest.approx(1 / 0.95)  # the budget of `near` is what `longer` has
    assert relative_compute(arm, replace(arm, name="old", compute="as chain")) == 1  # an earlier plan.json does not know it


def test_compute_is_no_explanation_if_the_chain_has_that_of_the_direct_arm(tmp_path):
    results = read(tmp_path, ArmSpec("chain", ("xl", "l", "s"), compute="1x direct", of_budget=1.02), ArmSpec("direct", XL_S), also={})
    (found,) = analyses(results)
    assert found.explanations["compute"] == ["Compute explains no difference, because chain and direct have the same compute."]


def test_a_report_credits_nothing_at_unequal_compute(tmp_path):
    results = read(
        tmp_path,
        ArmSpec("chain", ("xl", "l", "s"), gain=9),
        ArmSpec("twin", XL_S, compute="as chain", of_budget=0.88),
        ArmSpec("direct", XL_S, flops=2e17),
    )
    (c,) = comparisons(results)
    assert (c.other, c.against, c.word, c.credit, c.unequal) == ("twin", "off budget", "gain", None, True)
    found = answer(results)
    assert "same compute" not in f"{found.question} {found.answer}"
    assert found.answer.endswith("The two arms had different training compute, so nothing is credited to the path.")
    assert "direct distillation with other compute (twin)" in verdict_text(results, c)
    assert verdict_text(results, c).endswith("The compute of chain and twin differs by more than 10 %, so nothing is credited to the path.")
    assert cautions(results)[0] == (
        "A budget is missed by more than 10 %: twin has 0.88 times the FLOPs that `compute: as chain` sets. "
        "`tadistill plan RECIPE` says why."
    )
    assert "(not at equal compute)" in against(results)
    assert arm_words(results)["twin"].endswith(", with 0.88 times chain's compute")
    assert [title for title, _ in comparison_table(results).rows] == ["chain \N{EN DASH} twin (not equal compute)"]


@pytest.mark.parametrize(("of_budget", "said"), [(0.92, True), (0.995, False)])
def test_the_cost_says_how_equal_equal_compute_is(tmp_path, of_budget, said):
    arms = [ArmSpec("chain", ("xl", "l", "s"), flops=5e17), ArmSpec("direct", XL_S, flops=2e17)]
    twin = ArmSpec("twin", XL_S, compute="as chain", flops=5e17 * of_budget, of_budget=of_budget)
    rule = "and 1.09 times the compute of twin (up to 10 % more or less counts as the same compute)"
    cost = answer(read(tmp_path, *arms, twin, also={})).cost
    assert (f", 2.50 times direct distillation (direct) {rule}" in cost) == ("twin" in cost) == said


def test_without_an_original_teacher_a_chain_begins_with_its_first_path(some):  # `analyse: false` and no `teacher`
    chain = ArmSpec("chain", ("l", "s"), text="xl > l then l > s", before=("xl", "l"))
    others = [ArmSpec("of l", ("l", "s"), compute="as chain"), ArmSpec("twin", XL_S, compute="as chain"), ArmSpec("direct", XL_S)]
    for teacher in (None, "xl"):
        assert twin(some, chain, *others, teacher=teacher) == "twin"
        assert direct(some, chain, *others, teacher=teacher) == "direct"
