"""The live table: its lines for windows of many sizes, what it leaves on a terminal, and the progress that stages report to it."""

import io
import re
from types import SimpleNamespace

import pytest
from tests.unit.runner.small import small

from tadistill.config import load, parse
from tadistill.errors import Interrupted
from tadistill.metrics import training_numbers, training_text
from tadistill.plan.arms import make_plan
from tadistill.plan.graph import distinct_labels
from tadistill.runner.live_table import SHARED, Board, LiveTable, sparkline, table_lines
from tadistill.runner.local import LocalRun, StageProgress
from tadistill.stages.context import Done
from tadistill.terminal import Terminal

TEXT = "loss 4.210, 15,200 tokens/s"


@pytest.fixture(scope="module")
def quickstart():
    return make_plan(load("recipes/quickstart.yaml", []))


def board_of(plan, done=0, running=(), failed=()):
    """Return a board and a run: the first `done` stages are finished, then the stages `running` run and `failed` have failed."""
    labels = distinct_labels((s.key, s.label, s.arms) for s in plan.stages.values())
    keys = list(plan.stages)
    board = Board(plan, labels, keys)
    run = LocalRun(1, "here", 0.0, "tadistill run", "today", total=len(keys), done=done, seconds=250.0, left=720.0)
    for key in (*keys[:done], *failed, *running):
        board.start(key)
    for key in keys[:done]:
        board.end(key, 10.0)
    for key in failed:
        board.end(key, None)
    for key in running:
        for loss in (6, 5, 4.5, 4.21):
            board.progress(key, f"loss {loss:.3f}, 15,200 tokens/s")
        run.stages[key] = StageProgress(labels[key], 96, 160, TEXT, 65.0, 100.0)
    return board, run


def lines(board, run, width=80, height=24, **options):
    return [line.plain for line in table_lines(board, run, width=width, height=height, **options)]


def test_arms_running_stages_and_the_time_left(quickstart):
    keys = [key for key, stage in quickstart.stages.items() if stage.label.startswith("distill xl -> s, minillm")][:2]
    board, run = board_of(quickstart, done=21, running=keys)
    assert lines(board, run) == [
        "✓ teacher             2 stages, 20 s",
        "✓ sft                 9 stages, 2 min",
        "  shared by arms      5 of 11 stages",
        "  sft-longer          5 of 12 stages",
        "● minillm             0 of 12 stages",
        "    seed 10  distill xl -> s, minillm on teacher_mixed",
        "      ━━━━━━━─────  96/160  loss 4.210  █▄▂▁  15,200 tokens/s  65 s, 2 min left",
        "    seed 20  distill xl -> s, minillm on teacher_mixed",
        "      ━━━━━━━─────  96/160  loss 4.210  █▄▂▁  15,200 tokens/s  65 s, 2 min left",
        "  87 stages wait: kd, seqkd, abkd, assistant, assistant-teaches, assistant-sta…",
        "21/133 stages ━╸────────  4 min, about 12 min left  110 wait",
    ]


@pytest.mark.parametrize("height", [1, 3, 6, 10, 24, 60])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 160])
def test_the_table_fits_every_window(quickstart, width, height):
    for done, count in ((0, 1), (40, 8), (130, 2), (133, 0)):
        left = list(quickstart.stages)[done:]
        found = lines(*board_of(quickstart, done, left[: 2 * count : 2]), width, height)
        assert len(found) <= max(1, height - 1)
        assert max(map(len, found)) < width
        assert found[-1].startswith(f"{done}/133 stages"[: width - 2])


def test_a_wide_window_has_one_line_for_a_stage(quickstart):
    board, run = board_of(quickstart, 0, list(quickstart.stages)[:1])
    (line,) = [line for line in lines(board, run, 160) if " 96/160" in line]
    assert line.startswith("    seed 10  sft xl ")
    assert line.endswith("15,200 tokens/s  65 s, 2 min left")


def test_finished_arms_fold_where_the_window_is_low(quickstart):
    board, run = board_of(quickstart, 120, list(quickstart.stages)[120:122])
    assert sum(line.startswith("✓") for line in lines(board, run, height=24)) > 5
    (line,) = [line for line in lines(board, run, width=160, height=8) if line.startswith("✓")]
    assert re.match(r"✓ \d+ stages done, \d+ min: shared by arms, teacher, sft, ", line)


def test_stages_behind_a_failed_one_are_counted(quickstart):
    first, _, teacher_only, *_ = quickstart.stages
    shown = "\n".join(lines(*board_of(quickstart, failed=[first]), width=160))
    assert re.search(r"✗ shared by arms +0 of 11 stages, 1 failed, \d+ cannot run", shown)
    assert re.search(r"\d+ wait, \d+ cannot run$", shown)
    board, _ = board_of(quickstart, done=2, failed=[teacher_only])
    assert board.blocked() == set()


def test_a_stage_without_numbers_says_what_it_does(quickstart):
    key = next(iter(quickstart.stages))
    board, run = board_of(quickstart, running=[key])
    board.losses[key].clear()
    run.stages[key] = StageProgress("x", 0, 1, "loading model", 3.0)
    assert lines(board, run)[2] == "      loading model  3 s"


def test_only_ascii_on_a_terminal_that_has_no_more(quickstart):
    board, run = board_of(quickstart, 21, list(quickstart.stages)[21:23], failed=list(quickstart.stages)[23:24])
    shown = "\n".join(lines(board, run, width=160, plain=True))
    assert shown.replace("…", "").isascii()
    assert "#########-------  96/160  loss 4.210  15,200 tokens/s" in shown


def test_a_study_from_the_store_and_without_arms():
    plan = make_plan(parse(small("s"), [], source="small.yaml"))
    board = Board(plan, {key: stage.label for key, stage in plan.stages.items()}, [])
    run = LocalRun(1, "here", 0.0, "", "", total=2, done=2)
    assert lines(board, run)[0] == "✓ 2 stages from the store: sft"
    assert SHARED not in board.groups


@pytest.mark.parametrize(
    ("values", "curve"), [([], ""), ([1.0], ""), ([2.0, 1.0], "█▁"), ([3.0, 3.0], "▁▁"), ([1, 1, 5, 5, 9, 9, 9], "▁▃▆█")]
)
def test_a_sparkline_shows_means(values, curve):
    assert sparkline(values, 4) == curve


def test_the_table_is_drawn_again_below_printed_lines_and_removed(quickstart):
    key = next(iter(quickstart.stages))
    terminal = Terminal(file=io.StringIO(), force_terminal=True, width=80, height=24, _environ={})
    with LiveTable(terminal, *board_of(quickstart, running=[key])) as table:
        table.refresh()
        height = terminal.file.getvalue().count("\n") + 1
        assert height == len(lines(table.board, table.run))
        terminal.file.truncate(0)
        table.print("[yellow]alarm[/] x")
        assert terminal.file.getvalue().count("\x1b[1A") == height - 1
        assert "alarm" in terminal.file.getvalue()
        terminal.width = 40  # the window gets narrower: it folds the lines of the table
        folds = sum((len(line) - 1) // 40 for line in lines(table.board, table.run))
        terminal.file.truncate(0)
        table.print("x")
        assert folds > 2
        assert terminal.file.getvalue().count("\x1b[1A") == height - 1 + folds
        terminal.file.truncate(0)
    assert terminal.file.getvalue().endswith("\x1b[1A\x1b[2K" * height)


@pytest.mark.parametrize(("loss", "speed", "numbers"), [(4.2104, 15200.4, (4.21, 15200.0)), (-0.5, 0.2, (-0.5, 0.0))])
def test_numbers_of_training_come_back_from_their_text(loss, speed, numbers):
    assert training_numbers(training_text(loss, speed)) == numbers
    assert training_numbers("evaluating on dev") is None


def test_a_part_stops_before_its_end_only():
    shown: list[tuple[int, int, str]] = []
    done = Done(SimpleNamespace(progress=lambda *now: shown.append(now), stop=lambda: True), 6, "answers")
    done.part(2)
    done(2)  # at the end of a part, which is saved next, nothing stops
    done.part(4)
    with pytest.raises(Interrupted):
        done(3)
    assert shown == [(0, 6, "answers"), (2, 6, "answers"), (5, 6, "answers")]


def test_no_colour_where_it_is_not_wanted(quickstart):
    terminal = Terminal(file=io.StringIO(), force_terminal=True, color_system="standard", width=80, height=24, _environ={"NO_COLOR": "1"})
    with LiveTable(terminal, *board_of(quickstart, running=list(quickstart.stages)[:1])) as table:
        table.refresh()
    assert not re.search(r"\x1b\[(\d;)?3\dm", terminal.file.getvalue())
