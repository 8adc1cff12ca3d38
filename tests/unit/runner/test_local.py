"""The record and the log of a run on this machine, and what `tadistill status` says about it."""

import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tests.e2e.inprocess import tadistill
from tests.unit.runner.small import small

from tadistill.cluster.status import print_status, status_rows
from tadistill.config import load, parse
from tadistill.disk import write_json
from tadistill.errors import ConfigError, NotPlanned, StageFailed, StoreError
from tadistill.plan.arms import make_plan
from tadistill.results.study import find_study
from tadistill.runner import local, processes, screen
from tadistill.runner.local import Journal, StageProgress, local_runs
from tadistill.runner.run_study import _beginning, run_study, save_plan
from tadistill.runner.screen import Screen
from tadistill.store import Store
from tadistill.terminal import Terminal
from tadistill.train.checkpoint import Checkpoints, TrainState

RECIPE = small("s")


@pytest.fixture
def plan():
    return make_plan(parse(RECIPE, [], source="small.yaml"))


@pytest.fixture
def study(plan, tmp_path):
    return save_plan(plan, tmp_path, recipe_text="", command="tadistill run small.yaml seeds=[1]")


def status(study):
    console = Terminal(file=io.StringIO(), width=120)
    print_status(study, Store(study.parent / "store"), console)
    return console.file.getvalue()


def journal(study):
    return Journal(study, done=0, total=2, complain=pytest.fail)


def test_status_shows_a_run_of_this_machine(plan, study):
    key = next(iter(plan.stages))
    mine = journal(study)
    mine.run.stages[key] = StageProgress("x", 3, 8, "loss 5.01, 120 tokens/s", 65.0, 100.0)
    mine.run.left = 240.0
    mine.save()
    row = status_rows(study, Store(study.parent / "store"))[0]
    assert (row.label, row.job, row.state, row.elapsed) == ("sft s, seed 1", mine.run.name, "running", "1:05")
    assert row.last == "3/8, loss 5.01, 120 tokens/s, 2 min left"
    assert f"process {os.getpid()} on" in status(study)
    assert "0/2 stages done, about 4 min left" in status(study)
    assert "run.log; tadistill watch small --runs" in status(study)


def test_status_of_a_stage_that_stopped(plan, study):
    store = Store(study.parent / "store")
    folder = store.folder(next(iter(plan.stages)))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 3, "train/loss": 5.01}\n')
    assert [row.state for row in status_rows(study, store)] == ["stopped", "waiting"]


def test_status_of_many_stages_has_one_line_for_the_seeds_of_a_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("tadistill.plan.graph._MANY", 3)
    study = save_plan(make_plan(parse(RECIPE, ["seeds=[1,2]"], source="small.yaml")), tmp_path, recipe_text="", command="tadistill run")
    lines = [line.split() for line in status(study).splitlines()]
    assert ["sft", "s,", "2", "seeds", "waiting"] in lines
    assert "a line of several seeds stands for their stages; tadistill watch small --runs" in status(study)


def save_state(study, key, step):
    files = Checkpoints(Store(study.parent / "store").folder(key))
    files.directory.mkdir(parents=True, exist_ok=True)
    files.save(TrainState(step=step))


def test_status_says_where_a_stopped_stage_continues(plan, study):
    store = Store(study.parent / "store")
    first, second = plan.stages
    (store.folder(second) / "parts").mkdir(parents=True)
    (store.folder(second) / "parts" / "a.json").write_text("[]")
    save_state(study, first, 5)
    assert [(row.state, row.last) for row in status_rows(study, store)] == [
        ("stopped", "the next run continues at update 5 of 8"),
        ("stopped", "the next run continues after 1 finished part"),
    ]
    ended = journal(study)
    ended.run.born, ended.run.stages[first] = 1.0, StageProgress("x", 6, 8, "loss 5.01", left=100.0)
    ended.save()
    assert status_rows(study, store)[0].last == "6/8, loss 5.01; the next run continues at update 5 of 8"
    save_state(study, first, 7)  # after `kill -9`, `status` said 6/8 although 7 updates were saved
    assert status_rows(study, store)[0].last == "7/8, loss 5.01; the next run continues at update 7 of 8"
    for state in store.folder(first).glob("state*.pt"):
        state.unlink()
    assert status_rows(study, store)[0].last == "6/8, loss 5.01; no state was saved, so the next run starts at update 0"


def test_status_of_a_killed_run(plan, study, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    killed = journal(study)
    killed.run.stages[next(iter(plan.stages))] = StageProgress("x")
    killed.run.pid = ended.pid
    killed.save()
    assert [row.state for row in status_rows(study, Store(study.parent / "store"))] == ["killed", "waiting"]
    assert "it was killed" in status(study)
    assert "nothing is running; continue with `" in status(study)
    # a later process with the same id is another process
    killed.run.pid, killed.run.born = os.getpid(), 1.0
    assert killed.run.state == "killed"
    # another machine: only the age of the record is known
    killed.run.host = "elsewhere"
    assert killed.run.state == "running"
    killed.run.seen = time.time() - 1000
    assert killed.run.state == "killed"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="other systems keep the start time itself")
def test_a_step_of_the_clock_kills_no_run(study, monkeypatch):
    mine, earlier = journal(study), journal(study)
    earlier.run.born = psutil.Process().create_time()  # as earlier versions wrote it
    assert (mine.run.state, earlier.run.state) == ("running", "running")
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: earlier.run.born + 1)
    mine.save()
    assert [run.state for run in local_runs(study)] == ["running"]


def test_a_new_run_deletes_the_records_of_ended_runs(study):
    first = journal(study)
    first.run.host, first.run.ended = "elsewhere", "failed"
    first.save()
    (study / "local" / "damaged-1.json").write_text("{")
    journal(study).save()
    assert [run.host for run in local_runs(study)] == [local.platform.node()]


def test_a_search_keeps_the_stages_of_earlier_rounds(plan, study):
    """The record named only those of the newest round after a resume, so `tadistill clean` deleted the others under the search."""
    first, second = plan.stages
    store, console = Store(study.parent / "store"), Terminal(file=io.StringIO())
    for needs in ((), ("f" * 16, first)):
        with Screen(plan, store, console, todo=[second], jobs=1, needs=needs):
            (run,) = local_runs(study)
            assert run.needs == [*dict.fromkeys([*needs, first, second])]


@pytest.mark.parametrize("verb", ["search", "advise"])
def test_a_run_does_not_delete_what_alone_names_the_stages_of_a_search(study, monkeypatch, verb):
    """`tadistill clean` offered the stages of an interrupted search after a run of a study with the same name, also in a container, where
    each process has the same id. And the failed stages of the search were shown as those of the run."""

    def ended(command: str, *needs: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["tadistill", *command.split()])
        monkeypatch.setattr(local, "_born", lambda *_, **__: " ".join(needs))  # another process with the same id
        with local.planning(study):
            pass
        run = Journal(study, done=0, total=2, complain=said.append, needs=needs)
        run.run.ended, run.run.failed = "failed", dict.fromkeys(needs, "out of memory")
        run.save()
        (left,) = local_runs(study)
        assert left.failed.keys() == {*needs}
        return local.unfinished_stages(study, verb)

    said = list[str]()
    assert ended(f"{verb} small.yaml", "a", "b") == ["a", "b"]
    assert ended("run small.yaml", "c") == ["a", "b"]
    with monkeypatch.context() as full:
        full.setattr(local, "write_json", lambda *_: (_ for _ in ()).throw(StoreError("no space left")))
        full.setattr("sys.argv", ["tadistill", verb, "small.yaml"])
        Journal(study, done=0, total=2, complain=said.append, needs=["d"])
    assert "no space left" in said[0]
    assert local.unfinished_stages(study, verb) == ["a", "b"]
    local.result_written(study, "judge")
    assert ended(f"{verb} small.yaml", "a", "e") == ["a", "b", "e"]  # it has not come to stage b yet
    write_json(study / f"{'advice' if verb == 'advise' else verb}.json", {"stages": ["a", "e"]})
    local.result_written(study, verb)
    assert ended("run small.yaml", "f") == []


@pytest.mark.parametrize("same_process", [False, True])
@pytest.mark.parametrize("command", ["run", "search"])
def test_the_stages_of_a_search_that_an_earlier_version_began_are_kept(study, monkeypatch, command, same_process):
    """Only the record of its process named them, and the next command deleted it."""
    monkeypatch.setattr("sys.argv", ["tadistill", "search", "small.yaml"])
    old = journal(study)
    old.run.born, old.run.needs, old.run.ended = "earlier", ["a", "b"], "interrupted"
    old.run.host = old.run.host if same_process else "elsewhere"
    old.save()
    assert local.unfinished_stages(study, "search") == []
    monkeypatch.setattr("sys.argv", ["tadistill", command, "small.yaml"])
    if command == "run":  # a search has no plan.json
        with local.planning(study):
            assert local.unfinished_stages(study, "search") == ["a", "b"]
    new = Journal(study, done=0, total=2, complain=pytest.fail, needs=["c"])
    new.save()
    assert sorted(local.unfinished_stages(study, "search")) == ["a", "b", *["c"] * (command == "search")]
    assert [run.needs for run in local_runs(study)] == [["c"]]


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
@pytest.mark.parametrize(("verb", "result"), [("search", "search.json"), ("advise", "advice.json")])
def test_whether_a_result_names_the_stages_does_not_depend_on_clocks(study, monkeypatch, verb, result, seconds):
    """The time of the record is that of its machine, the time of the result that of the disk. If they differed by a second, the stages of a
    finished search were kept for ever, or those of an interrupted one were lost."""
    monkeypatch.setattr("sys.argv", ["tadistill", verb, "small.yaml"])
    old = journal(study)
    old.run.born, old.run.needs, old.run.ended = "earlier", ["a", "b"], "finished"
    old.save()
    for names, kept in ((["a", "b", "c"], []), (["a", "c"], ["a", "b"])):
        write_json(study / result, {"stages": names})
        os.utime(study / result, (old.run.seen + seconds,) * 2)
        monkeypatch.setattr("sys.argv", ["tadistill", "run", "small.yaml"])
        with local.planning(study):
            assert local.unfinished_stages(study, verb) == kept
        old.save()


def test_an_old_record_that_cannot_be_deleted_ends_nothing(study, monkeypatch):
    old = journal(study)
    old.run.host, old.run.ended = "elsewhere", "failed"
    old.save()
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    assert journal(study).run.state == "running"


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    mine = Journal(tmp_path / "file", done=0, total=1, complain=said.append)
    mine.log("a")
    mine.save()
    assert len(said) == 1
    assert "The run goes on" in said[0]


def shown(plan, study, monkeypatch, *, fail=False, **options):
    """Show a study's first stage on a screen without a terminal, with a clock of our own."""
    clock = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    console = Terminal(file=io.StringIO(), width=60, **options)
    first, second = plan.stages
    with Screen(plan, Store(study.parent / "store"), console, todo=[first, second], jobs=1) as mine:
        mine.start(first)
        clock[0] = 30.0
        mine.show(first, (4, 8, "loss 5.010, 120 tokens/s"))
        mine.show(first, "update 4: collapse")
        clock[0] = 61.0
        mine.remind()
        mine.tick()
        record = json.loads(next((study / "local").iterdir()).read_text())
        mine.end(first, "it broke" if fail else None)
    return console.file.getvalue(), record


def test_a_line_a_minute_without_a_terminal(plan, study, monkeypatch):
    out, record = shown(plan, study, monkeypatch)
    line = next(line for line in out.splitlines() if "tokens/s" in line)
    assert "sft s, seed 1: 4/8, loss 5.010, 120 tokens/s, " in line
    assert line.endswith(" left")
    assert "all stages: 0/2, " in out
    assert record["left"] > 0
    assert record["stages"][next(iter(plan.stages))]["left"] > 0
    log = (study / "run.log").read_text()
    assert "4/8, loss 5.010, 120 tokens/s" in log
    assert "1/2 sft s, seed 1" in log
    assert "end: finished, 1 of 2 stages are done" in log


def test_a_failed_stage_is_in_log_and_status(plan, study, monkeypatch):
    shown(plan, study, monkeypatch, fail=True)
    assert "it broke" in (study / "run.log").read_text()
    row = status_rows(study, Store(study.parent / "store"))[0]
    assert (row.state, row.last) == ("failed", "it broke")
    assert "ended because a stage failed" in status(study)


def test_quiet_prints_problems_only(plan, study, monkeypatch):
    out, _ = shown(plan, study, monkeypatch, fail=True, detail="problems")
    assert out.splitlines() == [
        "alarm sft s, seed 1: update 4: collapse",
        "the run is already stopping: the running stages save their state",
        "failed sft s, seed 1: it broke",
    ]


def test_verbose_names_key_and_folder(plan, study, monkeypatch):
    out, _ = shown(plan, study, monkeypatch, detail="everything")
    key = next(iter(plan.stages))
    assert f"started sft s, seed 1 ({key}, {study.parent / 'store' / key[:2] / key})" in out
    assert "1/2 sft s, seed 1 61.0 s" in out


def test_events_as_json(plan, study, monkeypatch, capsys):
    shown(plan, study, monkeypatch, events=True)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    key, about = next(iter(plan.stages)), {"label": "sft s, seed 1", "kind": "sft", "arms": ["sft"], "seed": 1}
    names = ["study_start", "start", "alarm", "note", "progress", "end", "study_end"]
    assert [event["event"] for event in events] == names
    assert [event["event"] for event in events if event.get("key") == key] == ["start", "alarm", "progress", "end"]
    assert all(event[name] == value for event in events if "key" in event for name, value in about.items())
    start, began, alarm, _, progress, end, last = (
        {k: v for k, v in e.items() if k not in ("event", "time", "key", *about)} for e in events
    )
    assert start | {"command": ""} == {"study": "small", "command": "", "stages": 2, "todo": 2, "jobs": 1}
    assert began == {"continues_at": None}
    assert alarm == {"text": "update 4: collapse"}
    assert progress.pop("left") > 0
    assert progress.pop("study_left") > 0
    expected = {"done": 4, "total": 8, "text": "loss 5.010, 120 tokens/s", "seconds": 61.0, "study_done": 0}
    assert progress == expected | {"loss": 5.01, "tokens_per_second": 120.0}
    assert end == {"seconds": 61.0, "done": 1, "stages": 2}
    assert last == {"state": "finished", "done": 1, "stages": 2, "seconds": 61.0}
    shown(plan, study, monkeypatch, fail=True, events=True)
    failed = [e for line in capsys.readouterr().out.splitlines() if (e := json.loads(line))["event"] == "failed"]
    assert [(e["key"], e["reason"], e["seconds"]) for e in failed] == [(key, "it broke", 61.0)]


def test_a_stage_that_continues_says_so(plan, study, monkeypatch, capsys):
    key = next(iter(plan.stages))
    save_state(study, key, 5)
    beginning = _beginning(plan, Store(study.parent / "store"), [*plan.stages.values()], 2)
    assert beginning == "small: 0 of 2 stages are finished. 1 will be continued. 1 will be started. 2 run at a time."
    out, _ = shown(plan, study, monkeypatch)
    assert "continues sft s, seed 1 at update 5 of 8" in out.splitlines()
    assert f"continues: sft s, seed 1 ({key}) at update 5 of 8" in (study / "run.log").read_text()
    shown(plan, study, monkeypatch, events=True)
    starts = [event for line in capsys.readouterr().out.splitlines() if (event := json.loads(line))["event"] == "start"]
    assert [event["continues_at"] for event in starts] == [5]


def test_a_stage_that_continues_shows_its_saved_update_until_it_has_loaded_its_models(plan, study):
    key = next(iter(plan.stages))
    save_state(study, key, 5)
    with Screen(plan, Store(study.parent / "store"), Terminal(file=io.StringIO()), todo=[key], jobs=1) as mine:
        mine.start(key)
        assert status_rows(study, mine.store)[0].last == "5/8, continues at update 5 of 8"
        mine.show(key, (0, 8, "loading model"))
        assert (mine.run.stages[key].done, mine.run.stages[key].note) == (5, "loading model")
        mine.show(key, (4, 8, "the state before"))  # the newest state was damaged
        assert mine.run.stages[key].done == 4


def test_finished_parts_are_the_start_of_a_stage_and_no_work_of_this_run(plan, study, monkeypatch):
    """They were counted in an instant, so the time left was far too short."""
    key = list(plan.stages)[1]  # the evaluation
    store = Store(study.parent / "store")
    write_json(store.folder(key) / "parts" / "own-1.json", [])
    clock = [100.0]
    monkeypatch.setattr(screen, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with Screen(plan, store, Terminal(file=io.StringIO()), todo=[key], jobs=1) as mine:
        mine.start(key)
        for clock[0], done in ((101.0, 0), (110.0, 60), (120.0, 70)):
            mine.show(key, (done, 100, "answers"))
        assert mine.estimate.left(key) == pytest.approx(30)  # ten answers took ten seconds


def test_a_terminal_gets_a_table_and_one_line_at_the_end(plan, study, monkeypatch):
    out, _ = shown(plan, study, monkeypatch, force_terminal=True, _environ={})
    assert "━━━━──── 4/8  loss 5.010" in re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "1/2 sft s, seed 1" not in out
    assert "alarm" in out
    assert out.splitlines()[-1].endswith("1 of 2 stages are done (finished after 61 s)")
    plain, _ = shown(plan, study, monkeypatch, force_terminal=True, _environ={"TERM": "dumb"})
    assert "\x1b[1A" not in plain
    assert "1/2 sft s, seed 1 61.0 s" in plain


def test_a_study_is_found_by_its_recipe(study, tmp_path):
    recipe = tmp_path / "other name.yaml"
    recipe.write_text(RECIPE)
    assert find_study(str(recipe), tmp_path)[0] == find_study("small", tmp_path)[0] == study
    recipe.write_text("study: nowhere")
    with pytest.raises(ConfigError, match="there is no study `nowhere`"):
        find_study(str(recipe), tmp_path)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "search.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"nowhere is a search, which has no page and no report; `tadistill status nowhere .*` shows it"):
        find_study(str(recipe), tmp_path)
    assert find_study(str(recipe), tmp_path, searches=True)[0] == tmp_path / "nowhere"


def refuse() -> int:
    """Refuse the input of a study, and return the process id of the server that was to fork its stages."""
    found = []

    def check() -> None:
        with processes.prepared():
            found.append(forkserver._forkserver._forkserver_pid)
            raise ConfigError("the input is wrong")

    with pytest.raises(ConfigError):
        check()
    return found[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such a server")
def test_a_refused_study_leaves_no_server():
    """It would go on importing torch after the command has ended. The next study of the same program gets a new one."""
    first, second = refuse(), refuse()
    assert first != second
    for pid in (first, second):
        assert pid > 0
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("collects", [True, False])
def test_the_garbage_collector_is_as_it_was_before_the_checks(monkeypatch, collects):
    monkeypatch.setattr(processes, "prepare", lambda: None)
    monkeypatch.setattr(processes, "gc", SimpleNamespace(isenabled=lambda: collects, disable=list, enable=lambda: seen.append("enabled")))
    seen: list[str] = []
    with processes.prepared():
        pass
    assert seen == ["enabled"] * collects


def test_an_interrupted_run_says_so(plan, study):
    with pytest.raises(KeyboardInterrupt), Screen(plan, Store(study.parent / "store"), Terminal(file=io.StringIO()), todo=[], jobs=1):
        raise KeyboardInterrupt
    assert local_runs(study)[-1].state == "interrupted"
    with pytest.raises(StageFailed), Screen(plan, Store(study.parent / "store"), Terminal(file=io.StringIO()), todo=[], jobs=1):
        raise StageFailed
    assert local_runs(study)[-1].state == "failed"


def test_a_study_is_known_while_it_is_planned(tmp_path, monkeypatch):
    """The plan and the checks take seconds, or minutes if models are downloaded."""
    recipe, runs = tmp_path / "early.yaml", tmp_path / "new" / "runs"
    recipe.write_text(RECIPE.replace("study: small", "study: early"))
    console = Terminal(file=io.StringIO())

    def look(*_, **__):
        with pytest.raises(NotPlanned, match=rf"study early has no stages yet: process {os.getpid()} on .* is planning the study"):
            find_study(str(recipe), runs)
        shown = tadistill("status", "early", "--runs", str(runs))
        assert (shown.code, "is planning the study" in " ".join(shown.out.split())) == (0, True)
        raise ConfigError("the models are too large")

    monkeypatch.setattr("tadistill.runner.preflight.check_study", look)
    with pytest.raises(ConfigError, match="too large"):
        run_study(load(recipe), runs=runs, console=console)
    assert "planning the study …\nchecking models and data …\n" in console.file.getvalue()
    assert not runs.parent.exists()
    with pytest.raises(ConfigError, match="there is no study `early`"):
        find_study("early", runs)


def test_other_machines_know_of_a_long_plan(study):
    elsewhere = replace(journal(study).run, host="elsewhere", seen=time.time() - 1000)
    assert (replace(elsewhere, total=0).planning, elsewhere.state) == (True, "killed")


def test_watch_waits_for_the_plan(tmp_path, monkeypatch):
    planned = local.planning(tmp_path / "early")
    planned.__enter__()
    monkeypatch.setattr("time.sleep", lambda _: planned.__exit__(None, None, None))
    shown = tadistill("watch", "early", "--runs", str(tmp_path))
    assert "waiting for its stages" in shown.out
    assert "there is no study `early`" in shown.err
