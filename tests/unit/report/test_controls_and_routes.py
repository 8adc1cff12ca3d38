"""Controls are no distillation, and routes are no assistants: what a report says of both."""

import json

import pytest

from tadistill.cli.shared import _next_commands
from tadistill.report import write_report
from tadistill.report.answer import answer
from tadistill.report.explain import verdict_text
from tadistill.report.figures.behaviour import exposure_figure
from tadistill.report.figures.scores import differences
from tadistill.report.findings import against
from tadistill.report.page import render_page, roles
from tadistill.report.plain_text import render_markdown
from tadistill.report.tables import comparison_table, counted_text
from tadistill.results.verdict import comparisons

from .builder import ArmSpec, StudySpec, build_study


@pytest.fixture(scope="module")
def fair(tmp_path_factory):
    """A chain with two controls. The control with random weights has the highest mean."""
    arms = [
        ArmSpec("sft", ("s",), method="sft", flops=1e15),
        ArmSpec("chain", ("xl", "l", "s")),
        ArmSpec("twin", ("xl", "s"), compute="as chain"),
        ArmSpec("nobody", ("xl", "s"), compute="as chain", text="xl > s, control no_teacher of chain"),
        ArmSpec("noise", ("xl", "s"), gain=9.0, compute="as chain", text="xl > s, control random_teacher of chain"),
    ]
    return build_study(tmp_path_factory.mktemp("fair"), StudySpec(arms, sets={"dolly": 12}, fact_sets=())).results


def test_a_control_is_not_the_best_arm(fair):
    against = answer(fair).against_sft
    assert "the best of 2 distilled arms" in against
    assert "noise" not in against
    commands = [command for command, _ in _next_commands(fair, fair.study_dir) if " export " in command]
    assert len(commands) == 1
    assert "noise" not in commands[0]


def test_a_control_is_not_the_best_arm_without_chains(tmp_path):
    arms = [
        ArmSpec("kd", ("xl", "s")),
        ArmSpec("gkd", ("xl", "s")),
        ArmSpec("noise", ("xl", "s"), gain=9.0, compute="as kd", text="xl > s, control random_teacher of kd"),
    ]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1, 2, 3), sets={"dolly": 12}, fact_sets=())).read()
    assert "noise" not in answer(results).answer
    alone = build_study(tmp_path / "alone", StudySpec([arms[0], arms[2]], seeds=(1,), sets={"dolly": 12}, fact_sets=())).read()
    assert answer(alone).answer.startswith("kd scores")
    assert answer(alone).answer.endswith("The study has only controls to compare it with.")


def test_each_control_has_a_row_of_its_own(fair):
    pairs = [(row.arm.name, row.other.name) for row in differences(fair)]
    assert pairs.count(("chain", "nobody")) == pairs.count(("chain", "noise")) == 1
    assert not {"nobody", "noise"} & {arm for arm, _ in pairs}
    table = comparison_table(fair)
    assert table is not None
    assert [title for title, _ in table.rows] == ["chain – twin", "chain – nobody", "chain – noise"]
    assert table.rows[2][1][0].text.startswith("−")
    assert table.rows[2][1][-1].text == "control"


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """Two routes without an assistant, and one after a path of its own; the training sets have shares."""
    route, method = ("m on maths + xl on chat", "s"), "reverse_kl (student)"
    arms = [
        ArmSpec("direct", ("xl", "s"), method=method),
        ArmSpec("first", route, method=method),
        ArmSpec("second", route, method=method),
    ]
    study = build_study(tmp_path_factory.mktemp("routed"), StudySpec(arms, sets={"dolly": 12}, fact_sets=()))
    train = {"maths": {"load": "m", "weight": 3}, "chat": {"load": "c", "weight": 1}}
    change(study, lambda plan: plan["recipe"]["data"].update(train=train, dev={"load": "c"}))
    return study


def change(study, edit):
    path = study.study_dir / "plan.json"
    plan = json.loads(path.read_text())
    edit(plan)
    path.write_text(json.dumps(plan))


def test_a_route_is_no_assistant(routed):
    results = routed.results
    assert answer(results).answer.startswith("Neither of the 2 ways to distil (first and second) is clearly better than direct")
    assert against(results).startswith("Neither of 2 ways to distil is")
    assert [verdict_text(results, c).partition(" (")[0] for c in comparisons(results)] == ["Path m on maths + xl on chat > s"] * 2


def test_the_report_says_what_the_same_compute_leaves_out(routed, tmp_path):
    said = "the training of the first teachers, but the rule `compute: as ARM` does not count it"
    assert said not in counted_text(routed.results)
    arms = [ArmSpec("mopd", ("m on maths + xl on chat", "s")), ArmSpec("one", ("xl", "s"), compute="as mopd")]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1,), sets={"dolly": 12}, fact_sets=())).read()
    assert said in render_markdown(results)
    assert said in render_page(results)


def test_a_student_that_is_taught_twice_is_a_student(tmp_path):
    text = "l > s then m on maths + xl on chat > s"
    arms = [ArmSpec("later", ("m on maths + xl on chat", "s"), before=("l", "s"), text=text)]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1,))).read()
    assert results.plan.arms[0].models == ("l", "s", "m", "xl")
    assert roles(results) == {"xl": "teacher", "l": "assistant", "m": "teacher", "s": "student"}


def test_shares_of_training_sets_are_a_note(routed):
    drawn = "Training draws 75 % of its rows from maths and 25 % from chat."
    write_report(routed.results)
    page = (routed.study_dir / "report.html").read_text(encoding="utf-8")
    assert f'<p class="note">{drawn}' in page
    assert f"\n\n{drawn}" in (routed.study_dir / "report.md").read_text(encoding="utf-8")
    content = json.loads((routed.study_dir / "results.json").read_text(encoding="utf-8"))
    assert content["training_shares"].startswith(drawn)
    assert not any("Training draws" in caution for caution in content["cautions"])


def test_exposure_without_values_is_no_figure(tmp_path):
    study = build_study(tmp_path, StudySpec([ArmSpec("direct", ("xl", "s"))], seeds=(1,)))
    for path in study.store_dir.glob("*/*/exposure.json"):
        nothing = {who: {"kl": [0.0] * 5, "count": [1] * 5} for who in ("student", "teacher")}
        path.write_text(json.dumps({"dolly": nothing, "facts": nothing}))
    assert exposure_figure(study.results) is None


def test_exposure_of_few_answers_is_inside_its_axes(tmp_path):
    study = build_study(tmp_path, StudySpec([ArmSpec("direct", ("xl", "s"))], seeds=(1,)))
    for path in study.store_dir.glob("*/*/exposure.json"):
        few = {who: {"kl": [kl] * 5, "count": [2] * 5} for who, kl in (("student", 1.5), ("teacher", 1.0))}
        path.write_text(json.dumps({"dolly": few, "facts": few}))
    figure = exposure_figure(study.results)
    assert figure is not None
    assert figure.y.low <= 0 < 50 <= figure.y.high


def test_equal_arms_have_no_interval_of_width_0(tmp_path):
    arms = [ArmSpec("sft", ("s",), method="sft", flops=1e15), ArmSpec("chain", ("xl", "l", "s")), ArmSpec("direct", ("xl", "s"))]
    study = build_study(tmp_path, StudySpec(arms, seeds=(1, 2, 3), sets={"dolly": 12}, fact_sets=()))
    for path in study.store_dir.glob("*/*/scores.json"):
        content = json.loads(path.read_text())
        for table in content.values():
            table |= {m: [[0.0] * len(row) for row in v] for m, v in table.items() if m == "rouge_l"}
        path.write_text(json.dumps(content))
    results, zero = study.read(), "all paired differences are 0"
    (c,) = comparisons(results)
    sentences = [answer(results).answer, answer(results).against_sft, verdict_text(results, c), render_markdown(results)]
    assert all(zero in sentence for sentence in sentences)
    assert not any(wrong in sentence for sentence in sentences for wrong in ("0.0 to 0.0", "95 % 0.0", "[0.0, 0.0]", "[0.00, 0.00]"))
