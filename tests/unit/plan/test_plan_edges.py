"""Edges in the plan: then, init in an arm, dense guidance, checkpoints, tempered teachers, and mistakes found before anything runs."""

import pytest
from tests.unit.plan.test_plan import model, plan

from tadistill.errors import ConfigError
from tadistill.plan.inputs import FromStage

MODELS = {"xl": model(64, seed=1), "l": model(32), "s": model(16)}
XL = {"optim": {"steps": 10}, "keep": [4]}


def stages(found, arm: str, kind: str = "distill", seed: int = 1):
    return [s for s in found.stages.values() if arm in s.arms and s.kind == kind and s.seed == seed]


def specs(found, arm: str, kind: str = "distill") -> list[dict]:
    return [s.spec.content() for s in stages(found, arm, kind)]


def test_a_curriculum_continues_the_student_and_divides_its_updates():
    found = plan(teacher="xl", arms={"weak-then-strong": {"path": "l > s then xl > s", "optim": {"steps": 64}}, "weak": "l > s"})
    first, second = (s for s in stages(found, "weak-then-strong"))
    assert second.spec.student == FromStage(stage=first.key)
    assert [s.steps for s in (first, second)] == [32, 32]
    assert first.spec.seed == 1 != second.spec.seed  # other prompts than in the first turn
    assert "(turn 2)" in second.label


def test_a_chain_then_its_teacher_shares_the_assistant():
    found = plan(
        arms={"chain": {"path": "xl > l > s", "optim": {"steps": 32}}, "both": {"path": "xl > l > s then xl > s", "optim": {"steps": 32}}}
    )
    assert len(stages(found, "both")) == 3
    assert len({s.key for s in [*stages(found, "chain"), *stages(found, "both")]}) == 4  # xl > l is one stage


def test_init_in_an_arm_starts_from_its_taught_assistant():
    models = MODELS | {"s": model(16, config=MODELS["s"]["config"] | {"num_attention_heads": 1, "num_key_value_heads": 1})}
    found = plan(models=models, arms={"cascade": {"path": "xl > l then xl > s", "init": {"s": "l"}}})
    taught, last = stages(found, "cascade")
    assert taught.model == "l"
    (sft,) = (s for s in stages(found, "cascade", "sft") if s.model == "s")
    assert sft.spec.student.of == FromStage(stage=taught.key)
    shape = {"layers": 2, "hidden": 16, "intermediate": 32, "heads": 1, "kv_heads": 1}
    assert sft.spec.student.prune == shape
    assert last.spec.student == FromStage(stage=sft.key)
    assert [last.spec.teacher.stage] == [s.key for s in stages(found, "cascade", "sft") if s.model == "xl"]


def test_dense_guidance_has_all_bigger_models():
    found = plan(arms={"dense": {"path": "xl > l > s", "dense": {"drop": 0.5}}, "chain": "xl > l > s"})
    first, second = specs(found, "dense")
    assert "dense" not in first  # one teacher
    assert second["dense"] == {"kind": "geometric", "weights": (), "drop": 0.5}
    assert second["assistants"] == [{"stage": next(s.key for s in stages(found, "chain") if s.model == "l")}]
    costs = {a.name: a.flops for a in found.arms}
    dense, chain = (next(s.flops for s in stages(found, arm) if s.model == "s") for arm in ("dense", "chain"))
    assert dense != chain
    assert costs["dense"] - costs["chain"] == pytest.approx(dense - chain)


def test_a_checkpoint_is_part_of_its_models_stage():
    models = MODELS | {"xl": model(64, seed=1, sft=XL), "early": {"checkpoint": {"of": "xl", "step": 4}}}
    found = plan(teacher="xl", models=models, arms={"early": "early > s", "direct": "xl > s"})
    (early,), (direct,) = specs(found, "early"), specs(found, "direct")
    assert early["teacher"] == direct["teacher"] | {"checkpoint": 4}
    assert found.arms[0].flops == found.arms[1].flops


def test_a_tempered_teacher_needs_the_arm_but_is_not_charged_for_it():
    models = MODELS | {"soft": {"temper": {"of": "xl", "like": "ta"}}, "half": {"temper": {"of": "xl", "tau": 0.5}}}
    found = plan(teacher="xl", models=models, arms={"soft": "soft > s", "ta": "xl > l", "direct": "xl > s", "half": "half > s"})
    (temper,) = stages(found, "soft", "temper")
    assert set(temper.parents.values()) == {stages(found, "ta")[0].key, stages(found, "direct", "sft")[0].key}
    costs = {a.name: a.flops for a in found.arms}
    assert costs["soft"] == costs["direct"] == costs["half"]
    assert specs(found, "half")[0]["teacher"]["temper"] == 0.5


def test_dense_guidance_of_the_recipe_leaves_out_arms_without_a_teacher():
    method = {"objective": {"type": "reverse_kl"}, "optim": {"steps": 16, "batch": 16}, "dense": {}}
    longer = {"path": "s", "objective": {"type": "cross_entropy"}}
    found = plan(method=method, arms={"chain": "xl > l > s", "longer": longer})
    assert [bool(s.get("dense")) for s in specs(found, "chain")] == [False, True]
    assert [s.label for s in stages(found, "longer", "sft") if s.model == "s"] == ["sft s, seed 1", "sft s, continued, seed 1"]


def test_a_dropped_teacher_is_paid_for_as_often_as_it_is_kept():
    """Drawn again where none stays: of two teachers each is kept in (1 - p) / (1 - p^2) of the updates."""
    method = {"objective": {"type": "reverse_kl"}, "sampler": {"type": "dataset"}, "optim": {"steps": 16, "batch": 16}}

    def teachers(dense):
        found = plan(method=method, arms={"a": {"path": "xl > l > s", "dense": dense}})
        (last,) = (s for s in stages(found, "a") if s.model == "s")
        return last.cost.parts["training/teacher"].flops

    assert teachers({"drop": 0.5}) == pytest.approx(teachers({}) * 2 / 3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": {"a": "s > l"}}, "s .* teaches the bigger model l .*; write the path from big to small"),
        ({"arms": {"a": "xl > s > l"}, "teacher": "xl"}, "in `xl > s > l`, s "),
        ({"models": MODELS | {"e": {"checkpoint": {"of": "xl", "step": 4}}}}, "add 4 to models.xl.sft.keep"),
        (
            {"models": MODELS | {"xl": model(64, sft={"optim": {"steps": 3}, "keep": [4]})}},
            "keep has 4, but the last update is 3; write numbers from 1 to 3",
        ),
        ({"models": MODELS | {"e": {"checkpoint": {"of": "q", "step": 4}}}}, "models.e` is made from `q`, which is not a model"),
        ({"models": MODELS | {"t": {"temper": {"of": "xl", "like": "q"}}}}, "temper.like` is `q`, which is not an arm"),
        (
            {"models": MODELS | {"t": {"temper": {"of": "xl", "like": "a"}}}, "arms": {"a": "t > s"}},
            "`temper.like: a`, but arm a needs this model",
        ),
        ({"arms": {"a": {"path": "xl > s", "dense": {}}}}, "has `dense`, but in `xl > s` no model has two teachers"),
        ({"arms": {"a": {"path": "xl > l > s", "dense": {"weights": [0, 0]}}}}, "set at least one weight above 0"),
        ({"arms": {"a": {"path": "xl > l > s", "dense": {"weights": [1]}}}}, "dense.weights has 1 entry, but s has 2 teachers"),
        ({"arms": {"a": {"path": "xl > l > s", "init": {"s": "l"}}}}, "s cannot start from l: head_dim is 8, but pruning cannot change it"),
        ({"models": MODELS | {"p": {"init": {"from": "xl", "heads": 3}}}, "arms": {"a": "xl > p"}}, "models.p.init: heads is 3, but"),
        ({"arms": {"a": {"path": "xl > l > s then xl > s", "compute": "as b"}, "b": "xl > s"}}, "needs a path of two models"),
    ],
)
def test_mistakes(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan(**changes)
