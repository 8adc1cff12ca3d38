"""Labels of stages: short, and never equal for two stages."""

from tadistill.plan.graph import distinct_labels, table_lines

KD = "distill xl -> s, forward_kl on dataset, 60 updates, seed 1"
MINILLM = "distill xl -> s, minillm on teacher_mixed (rounds of 256, 16 updates each), 160 updates, seed 1"


def labels(*stages, **options):
    return list(distinct_labels(((str(i), label, arms) for i, (label, arms) in enumerate(stages)), **options).values())


def test_method_and_seed_stay_and_details_go():
    assert labels((KD, {"kd"}), (MINILLM, {"direct"}), (f"evaluate {MINILLM}", {"direct"})) == [
        "distill xl -> s, forward_kl on dataset, seed 1",
        "distill xl -> s, minillm on teacher_mixed, seed 1",
        "evaluate distill xl -> s, minillm on teacher_mixed, seed 1",
    ]
    assert labels((MINILLM, {"direct"}), short=False) == [MINILLM]


def test_details_stay_where_only_they_differ():
    longer = KD.replace("60", "120")
    assert labels((KD, {"kd"}), (longer, {"twin"})) == [KD, longer]
    other = MINILLM.replace("rounds of 256, 16", "rounds of 128, 8")
    assert labels((MINILLM, {"a"}), (other, {"b"})) == [MINILLM, other]
    assert labels(("distill xl -> s (turn 2), kd, 1 update, seed 1", {"a"}), ("distill xl -> s, kd, 1 update, seed 1", {"a"})) == [
        "distill xl -> s (turn 2), kd, seed 1",
        "distill xl -> s, kd, seed 1",
    ]


def test_equal_labels_name_arms_and_else_keys():
    brief = KD.replace(", 60 updates", "")
    assert labels((KD, {"kd"}), (KD, {"low", "high"})) == [f"{brief} (kd)", f"{brief} (high, low)"]
    assert labels((KD, ()), (KD, ())) == [f"{brief} (0)", f"{brief} (1)"]
    assert labels((KD, {"kd"}), (KD, {"low"}), short=False) == [f"{brief} (kd)", f"{brief} (low)"]


def test_a_table_of_many_stages_has_one_line_for_the_seeds_of_a_stage_in_one_state():
    few = {f"sft s, seed {i}": "done" for i in range(200)}
    assert table_lines(few) == [(label, [label]) for label in few]
    begun = {"sft m, seed 1": "running", "sft m, seed 2": "running", "sft m, seed 3": "waiting", "eval sft s, seed 1, greedy": "done"}
    assert table_lines(few | {"sft s, seed 200": "waiting", "sft s, seed 201": "waiting"} | begun) == [
        ("sft s, 200 seeds", [*few]),
        ("sft s, 2 seeds", ["sft s, seed 200", "sft s, seed 201"]),
        *((label, [label]) for label in begun),
    ]
