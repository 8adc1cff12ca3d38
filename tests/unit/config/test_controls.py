"""Controls of arms, and `fair`: how they are written out, and mistakes in one sentence."""

import pytest

from tadistill.config import parse
from tadistill.errors import ConfigError

WORLD = {
    "study": "controls",
    "seeds": [10],
    "models": {
        name: {"load": "scratch:llama", "tokenizer": "tinyworld", "config": {"hidden_size": size}}
        for name, size in (("xl", 64), ("l", 48), ("s", 32))
    },
    "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"]},
    "method": {"sampler": {"type": "teacher_mixed", "max_new_tokens": 8, "alpha": 0.5}, "objective": {"type": "reverse_kl"}},
}


def arms(given: dict, **more):
    return parse(WORLD | {"arms": given} | more, source="recipe").arms


def test_a_control_has_the_ends_the_settings_and_the_compute_of_its_arm():
    chain = {"path": "xl > l > s", "optim": {"lr": 0.01, "steps": 6}}
    found = arms(
        {"chain": chain, "soft": {"control": "tempered of chain"}, "noise": {"control": "random_teacher of chain", "optim": {"lr": 1}}}
    )
    soft, noise = found["soft"], found["noise"]
    assert (soft.path, soft.compute, soft.controls) == ((("xl", "s"),), "as chain", ("tempered", "chain"))
    assert soft.optim == found["chain"].optim
    assert (noise.optim.lr, noise.optim.steps) == (1, 6)


def test_no_teacher_trains_on_the_students_own_text():
    none = arms({"direct": "xl > s", "none": {"control": "no_teacher of direct"}})["none"]
    assert none.objective.type == "no_teacher"
    assert (none.sampler.type, none.sampler.max_new_tokens) == ("student", 8)
    assert (none.path, none.compute) == ((("xl", "s"),), "as direct")


def test_a_fair_study_has_a_baseline_and_all_controls_of_each_chain():
    found = arms({"direct": "xl > s", "chain": "xl > l > s", "own": {"control": "no_teacher of chain", "optim": {"lr": 0.5}}}, fair=True)
    assert list(found) == ["direct", "chain", "chain-equal-compute", "chain-tempered", "chain-random-teacher", "own"]
    assert [arm.compute for arm in found.values()] == [None, None, *["as chain"] * 4]
    assert list(arms({"direct": "xl > s"}, fair=True)) == ["direct"]
    for compute in ("as chain", "1x chain", "1.0x chain"):
        assert "chain-equal-compute" not in arms({"chain": "xl > l > s", "twin": {"path": "xl > s", "compute": compute}}, fair=True)
    assert "chain-equal-compute" in arms({"chain": "xl > l > s", "twice": {"path": "xl > s", "compute": "2x chain"}}, fair=True)


@pytest.mark.parametrize(
    ("other", "added"),
    [
        ({"path": "l > s"}, True),
        ({"path": "xl > l"}, True),
        ({"path": "xl > s", "init": {"s": "xl"}}, True),
        ({"path": "xl > s"}, False),
    ],
)
def test_only_direct_distillation_with_the_same_ends_is_a_baseline(other, added):
    found = arms({"chain": "xl > l > s", "other": other | {"compute": "as chain"}}, fair=True)
    assert ("chain-equal-compute" in found) == added


def test_the_original_teacher_can_teach_the_baseline_of_a_chain_without_it():
    models = WORLD["models"] | {"m": WORLD["models"]["s"]}
    given = {"chain": "l > m > s", "other": {"path": "xl > s", "compute": "1x chain"}}
    assert "chain-equal-compute" not in arms(given, fair=True, teacher="xl", models=models)
    assert "chain-equal-compute" in arms(given, fair=True, models=models)


def test_a_recipe_written_out_is_the_same_recipe():
    recipe = parse(WORLD | {"arms": {"chain": "xl > l > s"}, "fair": True}, source="recipe")
    assert parse(recipe.model_dump(mode="json", by_alias=True), source="recipe") == recipe


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"a": {"control": "tempered"}}, "write `no_teacher of ARM`"),
        ({"a": {"control": "no_teacher of b"}, "c": "xl > s"}, "is `no_teacher of b`, but `b` is not an arm; choose one of c"),
        ({"d": "xl > s", "a": {"control": "tempered of d"}}, "but it needs the entropy of an assistant, and `d` has none"),
        ({"d": "xl > s", "a": {"control": "no_teacher of d"}, "b": {"control": "no_teacher of a"}}, "`a` is a control itself"),
        (
            {"d": "xl > s", "a": {"control": "no_teacher of d", "path": "l > s"}},
            "so arms.a.path must be `xl > s`, but it is another path; remove `path`",
        ),
        ({"d": "s", "a": {"control": "no_teacher of d"}}, "needs an arm with one path of at least two models and no `init`"),
    ],
)
def test_mistakes(given, sentence):
    with pytest.raises(ConfigError) as error:
        arms(given)
    (found,) = error.value.problems
    assert sentence in found


def test_budgets_change_the_compute_that_a_control_takes():
    with pytest.raises(ConfigError, match="sets the compute of an arm, but `budgets` set it too; remove one of these two keys"):
        arms({"d": "xl > s", "c": "xl > l > s"}, fair=True, budgets=[1, 2])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"c": "xl > l > s", "c-no-teacher": "xl > s"},
            "`fair` adds an arm `c-no-teacher`, but the recipe already has an arm of this name",
        ),
        (
            {"c": "xl on a + l on b > m > s"},
            "to arms.c, but these need one teacher, and the arm's path begins with several (`xl on a + l on b`); remove",
        ),
    ],
)
def test_arms_that_fair_cannot_add(given, sentence):
    with pytest.raises(ConfigError) as error:
        arms(given, fair=True)
    assert sentence in str(error.value)
