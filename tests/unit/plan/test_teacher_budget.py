"""`teacher_budget: as ARM`: what an arm asks of the original teacher, alone and together with `compute`."""

import pytest
from tests.unit.plan.test_plan import recipe

from tadistill.config import validate
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.plan.kinds import DistillSpec, GenerateSpec
from tadistill.plan.notes import off_teacher_budget

LIVE = {
    "objective": {"type": "reverse_kl"},
    "sampler": {"type": "student", "max_new_tokens": 16},
    "optim": {"steps": 4, "batch": 16},
    "select": {"metric": "last"},
}
TEXT = {"objective": {"type": "cross_entropy"}, "sampler": {"type": "teacher", "max_new_tokens": 16}}


def planned(arms: dict, **changes):
    return make_plan(validate(recipe(**{"arms": arms, "method": LIVE, "teacher": "xl", "seeds": [1], **changes})))


def arms_of(plan) -> dict:
    return {arm.name: arm for arm in plan.arms}


def stages_of(plan, arm: str, kind: type) -> list:
    return [stage for stage in plan.stages.values() if arm in stage.arms and isinstance(stage.spec, kind)]


def test_a_teacher_that_runs_in_training_is_asked_once_for_each_sampled_token():
    found = planned({"start": "s", "direct": "xl > s", "twice": {"path": "xl > s", "optim": {"steps": 8}}})
    arms = arms_of(found)
    assert arms["start"].asked == 0
    assert arms["twice"].asked == pytest.approx(2 * arms["direct"].asked)
    (stage,) = stages_of(found, "direct", DistillSpec)
    # logits at every token that is asked for, and nothing else is asked
    assert arms["direct"].asked == pytest.approx(stage.cost.parts["training/teacher"].heads)


def test_passes_over_the_same_rollouts_ask_once():
    once = LIVE | {"sampler": LIVE["sampler"] | {"rollouts": 16, "inner_epochs": 4}}
    assert arms_of(planned({"direct": "xl > s"}, method=once))["direct"].asked == pytest.approx(
        arms_of(planned({"direct": "xl > s"}))["direct"].asked / 4
    )


def test_a_teacher_that_writes_text_answers_as_many_prompts_as_the_budget_allows():
    arms = {"direct": "xl > s", "seqkd": {"path": "xl > s", **TEXT, "compute": "2x direct", "teacher_budget": "as direct"}}
    found = planned(arms)
    direct, seqkd = arms_of(found)["direct"], arms_of(found)["seqkd"]
    (written,), (trained,) = stages_of(found, "seqkd", GenerateSpec), stages_of(found, "seqkd", DistillSpec)
    assert seqkd.asked == pytest.approx(direct.asked, rel=0.02)
    assert written.spec.train.limit == trained.spec.train.limit == pytest.approx(64, abs=6)  # 4 updates of 16 answers
    teacher = next(stage.flops for stage in found.stages.values() if stage.kind == "sft" and stage.model == "xl")
    assert seqkd.flops - teacher == pytest.approx(2 * (direct.flops - teacher), rel=0.05)  # `compute` sets the updates
    assert not [*off_teacher_budget(found)]


def test_in_a_chain_the_first_step_asks_and_compute_sets_the_others():
    arms = {"direct": "xl > s", "chain": {"path": "xl > l > s", "compute": "4x direct", "teacher_budget": "as direct"}}
    found = planned(arms)
    to_l, to_s = (next(s for s in stages_of(found, "chain", DistillSpec) if s.model == name) for name in ("l", "s"))
    (direct,) = stages_of(found, "direct", DistillSpec)
    assert to_l.steps == direct.steps
    assert to_s.steps > 2 * direct.steps
    assert arms_of(found)["chain"].asked == arms_of(found)["direct"].asked
    teacher = next(stage.flops for stage in found.stages.values() if stage.kind == "sft" and stage.model == "xl")
    assert arms_of(found)["chain"].flops - teacher == pytest.approx(4 * (arms_of(found)["direct"].flops - teacher), rel=0.05)


def test_dense_teachers_are_asked_wherever_the_recipe_sets_dense():
    """The student of a dense chain learns from the original teacher too, so its updates count."""
    models, dense = recipe()["models"], {"dense": {"kind": "arithmetic"}}
    chain = {"path": "xl > l > s", "teacher_budget": "as direct"}
    half = {"share": 0.5}
    plans = [
        planned({"direct": "xl > s", "chain": chain | dense}),
        planned({"direct": "xl > s", "chain": chain}, models=models | {"s": models["s"] | {"distill": dense}}),
        planned({"direct": "xl > s", "chain": chain | {"phases": [half | dense, half | dense]}}),
    ]
    for found in plans:
        assert arms_of(found)["chain"].asked == pytest.approx(arms_of(found)["direct"].asked, rel=0.1)
        assert sum(stage.steps for stage in stages_of(found, "chain", DistillSpec) if stage.model == "s") == 2
        assert not [*off_teacher_budget(found)]


def test_the_key_of_an_arm_without_a_budget_stays():
    alone = planned({"direct": "xl > s"})
    both = planned({"direct": "xl > s", "seqkd": {"path": "xl > s", **TEXT, "teacher_budget": "as direct"}})
    assert set(alone.stages) <= set(both.stages)


@pytest.mark.parametrize(
    ("arm", "why"),
    [
        ({"path": "xl > s", "teacher_budget": "direct"}, "write `as ARM`"),
        ({"path": "xl > s", "teacher_budget": "as dirct"}, "`dirct` is not an arm; did you mean `direct`?"),
        ({"path": "xl > s", "teacher_budget": "as a"}, "`teacher_budget` has a cycle"),
        ({"path": "s", "teacher_budget": "as direct"}, "xl writes or scores no answer for `a`; remove `teacher_budget`"),
        ({"path": "xl > s", **TEXT, "teacher_budget": "as start"}, "no answer for `start`; remove `teacher_budget`"),
        ({"path": "xl > s", **TEXT, "teacher_budget": "as long"}, "the training set has 5,220 prompts; name an arm with fewer answers"),
        ({"path": "xl > s", "compute": "as direct", "teacher_budget": "as long"}, "the original teacher runs in every update of the arm"),
        ({"path": "xl > s", "compute": "as b", "teacher_budget": "as direct"}, "arms need each other's budgets"),
    ],
)
def test_what_cannot_be(arm, why):
    arms = {"start": "s", "direct": "xl > s", "long": {"path": "xl > s", "optim": {"steps": 4000}}, "a": arm}
    if arm.get("compute") == "as b":
        arms["b"] = {"path": "xl > s", **TEXT, "teacher_budget": "as a"}
    with pytest.raises(ConfigError, match=why.replace("?", "\\?")):
        planned(arms)


def test_a_teacher_with_another_tokenizer_is_asked_in_its_own_tokens():
    words = recipe()["models"]
    pieces = {name: entry | {"tokenizer": "tinyworld-bpe"} for name, entry in words.items() if name != "xl"}
    arms = {"direct": "xl > s", "seqkd": {"path": "xl > s", **TEXT, "teacher_budget": "as direct"}}
    live = LIVE | {"sampler": LIVE["sampler"] | {"max_new_tokens": 40}}
    alone, across = (planned(arms, models=models, method=live) for models in (words, words | pieces))
    (mine,), (other,) = (stages_of(found, "direct", DistillSpec) for found in (alone, across))
    assert arms_of(across)["direct"].asked == pytest.approx(arms_of(alone)["direct"].asked, rel=0.05)  # the same text
    heads = {name: stage.cost.parts[f"training/{name}"].heads for name, stage in (("teacher", other), ("student", other))}
    assert heads["student"] > 1.3 * heads["teacher"]
    assert mine.cost.parts["training/student"].heads == pytest.approx(mine.cost.parts["training/teacher"].heads)
    assert arms_of(across)["seqkd"].asked == pytest.approx(arms_of(across)["direct"].asked, rel=0.03)
