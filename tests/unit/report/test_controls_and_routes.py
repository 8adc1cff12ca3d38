"""Controls are no distillation, and routes are no assistants: what a report says of both."""

import pytest

from tadistill.cli.shared import _next_commands
from tadistill.report.figures.scores import differences
from tadistill.report.page import roles
from tadistill.report.tables import comparison_table
from tadistill.report.text import answer

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
    assert "the best of 2 arms" in against
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
