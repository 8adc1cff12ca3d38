"""Phases in the plan: they are chained stages, divide updates by share, and combine with all other edges."""

import io

import pytest
from rich.console import Console
from tests.unit.plan.test_plan import model, plan

from tadistill.errors import ConfigError
from tadistill.plan import preview
from tadistill.plan.inputs import FromStage
from tadistill.runner.run_study import describe
from tadistill.store import Store

METHOD = {"objective": {"type": "reverse_kl"}, "sampler": {"type": "dataset"}, "optim": {"steps": 40, "batch": 8}, "select": {"every": 8}}
OPD = {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "max_new_tokens": 8}}
TWO = [{"method": "seqkd", "share": 0.3}, {"method": "opd", "share": 0.7}]
MODELS = {"xl": model(64, seed=1), "l": model(32), "s": model(16)}


def phased(**changes):
    return plan(**{"seeds": [1], "method": METHOD, "methods": {"opd": OPD}} | changes)


def trainings(found, arm: str, model: str = "s"):
    return [s for s in found.stages.values() if s.kind == "distill" and arm in s.arms and s.model == model]


def steps(found, arm: str, model: str = "s") -> list[int]:
    return [s.steps for s in trainings(found, arm, model)]


def test_a_phase_is_one_more_distillation_that_starts_from_the_phase_before():
    found = phased(arms={"a": {"path": "xl > s", "phases": TWO}})
    first, second = trainings(found, "a")
    assert second.spec.student == FromStage(stage=first.key)
    assert first.spec.teacher == second.spec.teacher
    assert [(s.spec.objective.type, s.spec.sampler.type, s.steps) for s in (first, second)] == [
        ("cross_entropy", "teacher", 12),
        ("reverse_kl", "student", 28),
    ]
    assert first.label == "distill xl -> s, cross_entropy on teacher, 12 updates, seed 1"
    assert second.label == "distill xl -> s (phase 2 of 2), reverse_kl on student, 28 updates, seed 1"
    assert found.arms[0].final == {1: second.key}
    assert first.spec.seed == 1 != second.spec.seed


def test_equal_phases_are_the_same_stages_as_the_same_teacher_twice():
    found = phased(arms={"then": "xl > s then xl > s", "phases": {"path": "xl > s", "phases": [{}, {}]}})
    assert [a.final for a in found.arms] == [found.arms[0].final] * 2
    whole = phased(arms={"plain": "xl > s", "one": {"path": "xl > s", "phases": [{"share": 1}]}})
    assert [a.final for a in whole.arms] == [whole.arms[0].final] * 2


def test_a_first_phase_is_shared_with_an_arm_that_ends_there():
    cold = {"path": "xl > s", "method": "seqkd", "optim": {"steps": 12}, "select": {"every": 2}}
    found = phased(arms={"both": {"path": "xl > s", "phases": TWO}, "cold": cold})
    assert trainings(found, "cold") == trainings(found, "both")[:1]


@pytest.mark.parametrize(
    ("whole", "shares", "rollouts", "expected"),
    [
        (40, [0.3, 0.7], None, [12, 28]),
        (40, [None, None, None], None, [13, 14, 13]),  # what rounding takes from the first, the second gets
        (7, [0.5, 0.5], None, [4, 3]),
        (40, [0.25, 0.75], 32, [8, 32]),  # rounds of 4 updates
        (42, [0.3, 0.7], 32, [12, 32]),
        (4, [0.01, 0.99], None, [1, 3]),  # no phase is empty
    ],
)
def test_updates_are_divided_by_share_in_whole_rounds(whole, shares, rollouts, expected):
    sampler = {"type": "student", "rollouts": rollouts} if rollouts else {"type": "student"}
    phases = [{} if share is None else {"share": share} for share in shares]
    method = METHOD | {"sampler": sampler, "optim": {"steps": whole, "batch": 8}}
    assert steps(phased(method=method, arms={"a": {"path": "xl > s", "phases": phases}}), "a") == expected


def test_a_phase_keeps_the_methods_settings_and_changes_its_own():
    phases = [{"optim": {"lr": 0.1}, "select": {"every": 3}}, {"optim": {"batch": 16, "warmup": 2}}]
    first, second = trainings(phased(arms={"a": {"path": "xl > s", "phases": phases}}), "a")
    assert (first.spec.optim.lr, first.spec.optim.batch, first.spec.optim.warmup) == (0.1, 8, 0)
    assert (second.spec.optim.lr, second.spec.optim.batch, second.spec.optim.warmup) == (5e-4, 16, 2)
    assert (first.spec.select.every, second.spec.select.every) == (3, 4)  # its own, and as many checkpoints as without phases


def test_every_learner_of_a_path_has_the_phases_and_a_model_can_have_its_own():
    found = phased(arms={"a": {"path": "xl > l > s", "phases": TWO}})
    assert [steps(found, "a", m) for m in ("l", "s")] == [[12, 28]] * 2
    assert trainings(found, "a")[0].spec.teacher == FromStage(stage=trainings(found, "a", "l")[1].key)
    own = MODELS | {"l": model(32, distill={"phases": TWO})}
    found = phased(models=own, arms={"a": "xl > l > s"})
    assert [steps(found, "a", m) for m in ("l", "s")] == [[12, 28], [40]]
    found = phased(method=METHOD | {"phases": TWO}, arms={"a": "xl > s", "gkd": {"path": "xl > s", "method": "gkd"}, "s": "s",
                   "none": {"path": "xl > s", "phases": []}, "longer": {"path": "s", "method": "sft"}})  # fmt: skip
    assert [len(steps(found, arm)) for arm in ("a", "gkd", "none")] == [2, 1, 1]


def test_phases_with_several_teachers_init_dense_and_a_checkpoint():
    arms = {
        "then": {"path": "l > s then xl > s", "phases": TWO},
        "dense": {"path": "xl > l > s", "dense": {}, "phases": TWO},
        "init": {"path": "xl > l then xl > s", "init": {"s": "l"}, "phases": TWO},
        "early": {"path": "early > s", "phases": TWO},
    }
    narrow = {"num_attention_heads": 1, "num_key_value_heads": 1}
    models = MODELS | {
        "xl": model(64, seed=1, sft={"optim": {"steps": 10}, "keep": [4]}),
        "s": model(16, config=MODELS["s"]["config"] | narrow),
        "early": {"checkpoint": {"of": "xl", "step": 4}},
    }
    found = phased(teacher="xl", models=models, arms=arms)
    assert steps(found, "then") == [6, 14, 6, 14]
    assert [s.label.split(",")[0] for s in trainings(found, "then")] == [
        "distill l -> s",
        "distill l -> s (phase 2 of 2)",
        "distill xl -> s (turn 2)",
        "distill xl -> s (turn 2; phase 2 of 2)",
    ]
    assert len({s.spec.seed for s in trainings(found, "then")}) == 4  # each goes through the prompts in an order of its own
    cold, opd = trainings(found, "dense")
    assert (len(cold.spec.assistants), len(opd.spec.assistants)) == (0, 1)
    assert cold.spec.teacher == FromStage(stage=trainings(found, "dense", "l")[1].key)  # a text has one author, the next model of the path
    assert steps(found, "init") == steps(found, "early") == [12, 28]
    assert trainings(found, "early")[0].spec.teacher.checkpoint == 4


def test_equal_compute_and_budgets_scale_every_phase():
    longer = METHOD | {"optim": {"steps": 400, "batch": 8, "warmup": 10}}
    twin = {"path": "xl > s", "phases": TWO, "compute": "as chain"}
    arms = {"direct": {"path": "xl > s", "phases": TWO}, "chain": {"path": "xl > l > s", "phases": TWO}, "twin": twin}
    found = phased(method=longer, arms=arms, budgets={"times": [1, 2], "arms": ["direct"]})
    flops, updates = ({a.name: value(a) for a in found.arms} for value in (lambda a: a.flops, lambda a: steps(found, a.name)))
    assert flops["twin"] == pytest.approx(flops["chain"], rel=0.01)
    own = next(s.flops for s in found.stages.values() if s.kind == "sft" and s.model == "xl")
    assert flops["direct-2x"] - own == pytest.approx(2 * (flops["direct"] - own), rel=0.01)
    for name in ("twin", "direct-2x"):
        assert updates[name][0] / sum(updates[name]) == pytest.approx(0.3, abs=0.002)
    warm = [p.method.optim.warmup for a in found.arms if a.name == "direct-2x" for p in a.phases]
    assert warm == [round(10 * n / m) for n, m in zip(updates["direct-2x"], updates["direct"], strict=True)]


def test_text_recorded_in_a_later_phase_is_that_of_the_student_after_its_cold_start():
    recorded = {"method": "opd", "sampler": {"recorded": True, "signal": {"type": "hidden"}}}
    found = phased(seeds=[1, 2], arms={"a": {"path": "xl > s", "phases": ["seqkd", recorded]}})
    texts = [s for s in found.stages.values() if s.kind == "generate" and s.model == "s"]
    colds = [s for s in found.stages.values() if s.kind == "distill" and "phase" not in s.label]
    assert [s.spec.teacher for s in texts] == [FromStage(stage=s.key) for s in colds]
    assert [s.label for s in texts] == ["generate with s, seed 1", "generate with s, seed 2"]
    assert all(s.spec.student == t.spec.teacher for s, t in zip(trainings(found, "a")[1::2], texts, strict=True))


def test_the_plan_and_the_report_say_the_phases_in_words(tmp_path):
    grow = [{"method": "opd", "sampler": {"max_new_tokens": n}} for n in (4, 8)]
    found = phased(arms={"a": {"path": "xl > s", "phases": TWO}, "grow": {"path": "xl > s", "phases": grow}})
    console = Console(width=300, file=io.StringIO())
    preview.print_plan(found, Store(tmp_path), console)
    text = console.file.getvalue()
    assert "arms.a has 2 phases: cross_entropy (teacher) 30 %, then reverse_kl (student) 70 % (12 + 28 updates)." in text
    methods = [arm["method"] for arm in describe(found, created="", recipe_text="", command="")["arms"]]
    assert methods == [
        "cross_entropy (teacher) 30 %, then reverse_kl (student) 70 %",
        "reverse_kl (student), max_new_tokens 4, 50 %, then reverse_kl (student), max_new_tokens 8, 50 %",
    ]


def test_a_direct_arm_with_other_phases_is_no_reference(tmp_path):
    found = phased(arms={"chain": {"path": "xl > l > s", "phases": TWO}, "other": {"path": "xl > s", "method": "opd"}})
    assert preview._direct(found, found.arms[0]) is None
    found = phased(arms={"chain": {"path": "xl > l > s", "phases": TWO}, "same": {"path": "xl > s", "phases": TWO}})
    direct = preview._direct(found, found.arms[0])
    assert direct
    assert (direct.name, direct.flops) == ("same", found.arms[1].flops)


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        (
            {"path": "s", "phases": TWO},
            "arms.a has `phases`, but its path `s` has no teacher; write a path",
        ),
        (
            {"path": "xl > s", "phases": [{"method": "minillm"}, {}]},
            "arms.a: phase 1: objective minillm has `pt_weight` above 0|arms.a: objective minillm has `pt_weight` above 0",
        ),
        (
            {"path": "xl > s", "phases": [{"sampler": {"type": "student"}, "objective": {"type": "cross_entropy"}}]},
            "arms.a: phase 1: sampler",
        ),
        ({"path": "xl > s", "objective": {"type": "taid"}, "phases": TWO}, "arms.a: `objective` .* has no effect, because every phase"),
        ({"path": "xl > s", "method": "gkd", "phases": TWO}, "arms.a: `objective` .* has no effect"),
        (
            {"path": "xl > s", "optim": {"steps": 2}, "phases": ["sft", "kd", "sft"]},
            "arms.a: `phases` has 3 phases, but the training has 2 updates",
        ),
        ({"path": "xl > l > s", "dense": {"drop": 0.5}, "phases": ["seqkd", "sft"]}, "arms.a: `dense` .* has no effect"),
    ],
)
def test_mistakes(arm, sentence):
    with pytest.raises(ConfigError, match=sentence):
        phased(arms={"a": arm}, teacher="xl")
