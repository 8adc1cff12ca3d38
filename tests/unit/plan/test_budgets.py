"""Arms at several training budgets: their names, their FLOPs, shared stages, and mistakes."""

import pytest
from tests.unit.plan.test_plan import model, recipe

from tadistill.config import validate
from tadistill.config.added_arms import budget_of
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.plan.inputs import Split
from tadistill.plan.notes import off_budget
from tadistill.runner.run_study import describe

METHOD = {
    "objective": {"type": "reverse_kl"},
    "sampler": {"type": "student", "max_new_tokens": 16},
    "optim": {"steps": 40, "batch": 16, "warmup": 4},
    "select": {"metric": "loss", "every": 10},
}
ARMS = {
    "teacher": "xl",
    "sft": "s",
    "longer": {"path": "s", "objective": {"type": "cross_entropy"}, "sampler": {"type": "dataset"}},
    "direct": "xl > s",
    "chain": "xl > l > s",
}


def plan(**changes):
    return make_plan(validate(recipe(**{"arms": ARMS, "method": METHOD, "budgets": [1, 2, 4], "teacher": "xl", "seeds": [1], **changes})))


def test_every_arm_has_the_flops_of_its_budget():
    found = plan()
    arms = {arm.name: arm for arm in found.arms}
    assert list(arms) == ["teacher", "sft", *(f"longer-{n}x" for n in (1, 2, 4)), "direct", "direct-2x", "direct-4x",
                          "chain-1x", "chain-2x", "chain-4x"]  # fmt: skip
    of_teacher = arms["teacher"].flops
    unit = arms["direct"].flops - of_teacher
    for times in (1, 2, 4):
        assert arms[f"chain-{times}x"].flops == pytest.approx(of_teacher + times * unit, rel=0.03)
        assert arms[f"longer-{times}x"].flops == pytest.approx(times * unit, rel=0.03)
    assert arms["direct-4x"].flops == pytest.approx(of_teacher + 4 * unit, rel=0.01)


def test_updates_warmup_and_looks_at_dev_are_scaled():
    arms = {arm.name: arm.method for arm in plan().arms}
    short, long = arms["direct"], arms["direct-4x"]
    scale = long.optim.steps / short.optim.steps
    assert scale > 4  # fine-tuning before the distillation is not repeated
    assert long.optim.warmup == round(4 * scale)
    assert long.optim.steps // long.select.every == short.optim.steps // short.select.every


def test_a_budget_that_whole_rounds_cannot_meet_is_said():
    assert not [*off_budget(plan())]
    rounds = {"sampler": METHOD["sampler"] | {"rollouts": 256, "inner_epochs": 4}, "optim": METHOD["optim"] | {"steps": 128}}
    found = [*off_budget(plan(method=METHOD | rounds, budgets=[1, 8]))]
    assert len(found) == 1
    assert found[0].startswith("arms.chain-1x has `compute: 1x direct`, but it needs ")
    assert "choose smaller rounds" in found[0]


BARE = recipe()["models"] | {"s": model(16, sft=None), "l": model(32, sft=None)}


def test_a_missed_budget_of_an_arm_without_rounds_has_another_reason():
    one = {"objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}, "optim": {"steps": 2, "batch": 16}}
    arms = {"direct": "xl > s", "more": {"path": "xl > s", "compute": "1.3x direct"}}
    found = [*off_budget(plan(method=METHOD | one, arms=arms, models=BARE, budgets=None))]
    assert len(found) == 1
    assert found[0].endswith("because the arm makes a whole number of updates; choose smaller batches (`optim.batch`) or a larger budget")


def test_plan_json_has_an_arms_share_of_its_budget():
    rounds = {"sampler": METHOD["sampler"] | {"rollouts": 256}, "optim": METHOD["optim"] | {"steps": 16}}
    arms = {"direct": "xl > s", "more": {"path": "xl > s", "compute": "1.3x direct"}}
    found = plan(method=METHOD | rounds, arms=arms, models=BARE, budgets=None)
    direct, more = describe(found, created="", recipe_text="", command="")["arms"]
    assert direct["of_budget"] is None
    assert more["of_budget"] == pytest.approx(1 / 1.3)
    (sentence,) = off_budget(found)
    assert sentence.startswith("arms.more has `compute: 1.3x direct`, but it needs 0.77 times these FLOPs, because the arm's updates come")


def test_an_arm_without_the_original_teacher_does_not_get_the_budget_of_its_training():
    arms = {
        "chain": "xl > l > s",
        "other": {"path": "l > s", "compute": "as chain"},
        "back": {"path": "xl > s", "compute": "as l-s"},
        "l-s": "l > s",
    }
    long = recipe()["models"] | {"xl": model(64, sft={"optim": {"steps": 500}})}
    found = plan(arms=arms, budgets=None, models=long)
    flops = {arm.name: arm.flops for arm in found.arms}
    of_teacher = next(stage.flops for stage in found.stages.values() if (stage.kind, stage.model) == ("sft", "xl"))
    assert flops["other"] == pytest.approx(flops["chain"] - of_teacher, rel=0.05)
    assert flops["back"] == pytest.approx(flops["l-s"] + of_teacher, rel=0.05)
    assert not [*off_budget(found)]


def test_a_budget_adds_no_stage_that_no_arm_needs():
    arms = {"l-s": "l > s", "longer": {"path": "l > s", "compute": "2x l-s"}}
    found = plan(arms=arms, budgets=None, analyse=False, evaluate={"also": {}})
    assert all(stage.arms for stage in found.stages.values())


def test_budgets_hash_no_data_set_again(monkeypatch):
    """The teachers' own trainings, which `compute` leaves out, read the same sets."""
    read, of = [], Split.of
    monkeypatch.setattr(Split, "of", lambda rows, **fields: read.append(fields["role"]) or of(rows, **fields))
    plan()
    assert read.count("train") == 1


def test_the_answers_of_the_teacher_are_a_cost_of_the_arm_that_learns_them():
    phases = [{"objective": {"type": "cross_entropy"}, "sampler": {"type": "teacher", "max_new_tokens": 16}}, {}]
    arms = {"cold": {"path": "xl > s", "phases": phases}, "twin": {"path": "xl > s", "compute": "as cold"}}
    assert not [*off_budget(plan(arms=arms, budgets=None))]


def test_equal_stages_are_shared():
    once, more = plan(budgets=[1, 2]), plan(budgets=[1, 2, 8])
    assert set(once.stages) < set(more.stages)
    assert {arm.name for arm in more.arms} - {arm.name for arm in once.arms} == {"longer-8x", "direct-8x", "chain-8x"}


def test_a_recipe_that_is_read_again_has_the_same_arms():
    first = validate(recipe(arms=ARMS, method=METHOD, budgets={"times": [0.5, 2], "of": "direct", "arms": ["chain"]}))
    assert list(first.arms) == ["teacher", "sft", "longer", "direct", "chain-0.5x", "chain-2x"]
    assert validate(first.model_dump(mode="json")).arms == first.arms


@pytest.mark.parametrize(
    ("budgets", "sentence"),
    [
        ([1], "at least 2"),
        ([2, 1], r"`budgets` are \[2, 1\]; write them in rising order, such as"),
        ([0, 1], "greater than or equal to 0.001|at least 0.001"),
        (
            {"times": [1, 2], "of": "teacher"},
            "`budgets.of` is `teacher`, which defines no budget; set budgets.of to an arm that trains a model",
        ),
        ({"times": [1, 2], "of": "nobody"}, "`budgets.of` is `nobody`"),
        (
            {"times": [1, 2], "arms": ["sft"]},
            "`budgets.arms` names `sft`, whose budget cannot change; name only arms that train a model and have no `compute` "
            ".such arms: longer, direct",
        ),
        ([0.001, 1], r"arms.direct-0.001x has `compute: 0.001x direct`, but the budget of .* before its distillation; raise the budget"),
    ],
)
def test_mistakes(budgets, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan(budgets=budgets)


def test_a_name_that_a_budget_takes():
    with pytest.raises(
        ConfigError, match="`budgets` add an arm `direct-2x`, but the recipe already has an arm of this name; rename the recipe's arm"
    ):
        plan(arms=ARMS | {"direct-2x": "xl > s"})


def test_compute_in_times_of_an_arm():
    arms = {"direct": "xl > s", "chain": {"path": "xl > l > s", "compute": "3x direct"}}
    found = {arm.name: arm for arm in plan(arms=arms, budgets=None, teacher=None, models=recipe()["models"] | {"xl": model(64)}).arms}
    assert found["chain"].flops > 1.5 * found["direct"].flops
    with pytest.raises(ConfigError, match=r"compute` is `three times direct`; write `as ARM` or `4x ARM`"):
        plan(arms=arms | {"chain": {"path": "xl > l > s", "compute": "three times direct"}})
    with pytest.raises(ConfigError, match=r"arms.teacher trains no model, so `compute: 2x direct` has no effect"):
        plan(arms=arms | {"teacher": {"path": "xl", "compute": "2x direct"}}, budgets=None)


def test_the_budget_of_an_arm():
    assert budget_of("chain-0.5x", "0.5x direct") == ("chain", 0.5, "direct")
    assert budget_of("chain", "0.5x direct") is None
    assert budget_of("twin", "as chain") is None
    assert budget_of("direct", None) is None


@pytest.mark.parametrize(
    "own",
    [
        {"checkpoint": {"of": "whole", "step": 5}},
        {"init": {"from": "whole", "layers": [0]}, "sft": {"optim": {"steps": 10}}},
    ],
)
def test_no_training_behind_the_original_teacher_is_counted(own):
    whole = model(64)
    whole["sft"] |= {"optim": {"steps": 500}, "keep": [5], "select": {"metric": "last"}}
    found = plan(models={"whole": whole, "xl": own, "l": model(32), "s": model(16)})
    shares = {arm.name: arm.of_budget for arm in found.arms if arm.of_budget is not None}
    assert set(shares) == {arm.name for arm in found.arms if arm.arm.compute}
    assert shares == dict.fromkeys(shares, pytest.approx(1, rel=0.03))
    assert not [*off_budget(found)]
