"""The states of stages: from manifests, the record of a run, and Slurm's queue."""

import json
import re
import time
from collections import namedtuple
from queue import Queue
from threading import Event, Thread

import psutil
import pytest

from tadistill.cluster import slurm
from tadistill.cluster.list_and_clean import studies
from tadistill.cluster.status import status_rows
from tadistill.disk import write_json
from tadistill.errors import ConfigError, StoreError
from tadistill.train.checkpoint import Checkpoints, TrainState
from tadistill.watch.machine import Machine, Use, read_gpus
from tadistill.watch.page import HEIGHT, Node, draw, nodes_of, picked, render
from tadistill.watch.state import Watched

from .folder import D1, D2, E1, PLAN, S1, S2, XL


def look(folder):
    return Watched(folder.study, folder.store).look()


def states(moment):
    return {stage.key: stage.state for stage in moment.stages}


def test_a_running_study(folder):
    folder.finish(XL, alarms=("update 10: collapse",))
    folder.log(S1, 1, 30)
    folder.run(S1)
    moment = look(folder)
    assert states(moment) == {XL: "done", S1: "running", S2: "waiting", D1: "waiting", D2: "waiting", E1: "waiting"}
    assert moment.state == "running"
    assert moment.left == pytest.approx(240, abs=2)
    stage = moment.stages[1]
    assert (stage.done, stage.total, stage.left, stage.note) == (30, 100, 100.0, "loss 2.000, 120 tokens/s")
    assert moment.alarms == ("sft xl, seed 1: update 10: collapse",)


def test_a_killed_run_is_shown_as_such(folder):
    folder.finish(XL)
    folder.run(S1, dead=True)
    moment = look(folder)
    assert states(moment) == {XL: "done", S1: "killed", S2: "waiting", D1: "waiting", D2: "waiting", E1: "waiting"}
    assert (moment.state, moment.left) == ("killed", None)
    assert {stage.key: stage.note for stage in moment.stages if stage.note.startswith("waits")} == dict.fromkeys(
        (D1, E1), "waits for sft s, seed 1"
    )


def test_a_stage_shows_the_update_at_which_the_next_run_continues_it(folder):
    files = Checkpoints(folder.store.folder(S1))
    folder.log(S1, 1, 60)
    files.save(TrainState(step=52))
    folder.run(S1, dead=True)
    killed = look(folder).stages[1]
    assert (killed.state, killed.done, killed.left) == ("killed", 52, None)
    assert killed.note == "loss 2.000, 120 tokens/s; the next run continues at update 52 of 100"
    folder.run(S1, ended="interrupted")
    stopped = look(folder).stages[1]
    assert (stopped.state, stopped.done, stopped.left, stopped.note) == ("stopped", 52, None, killed.note)
    folder.run()  # another run works on other stages
    assert look(folder).stages[1].state == "stopped"
    alerts = render(look(folder), Use("here", 1, 0.0, 1, 1, 0, 0.0, 0, (), ""), (), ())["alerts"]
    assert "<b>Stopped</b> sft s, seed 1: the next run continues at update 52 of 100" in alerts


def test_other_ends_of_a_run(folder):
    folder.run(S1, ended="interrupted")
    assert (look(folder).state, states(look(folder))[S1]) == ("interrupted", "stopped")
    folder.run(ended="failed", failed={S1: "the loss is not finite"})
    moment = look(folder)
    assert (moment.state, moment.stages[1].state, moment.stages[1].note) == ("failed", "failed", "the loss is not finite")
    folder.finish(*(key for key, *_ in PLAN.values()))
    assert look(folder).state == "finished"


@pytest.mark.parametrize(
    ("how", "state", "of_stage"),
    [
        ({}, "running", "running"),
        ({"dead": True}, "killed", "killed"),
        ({"ended": "interrupted"}, "interrupted", "stopped"),
        ({"ended": "failed", "failed": {S1: "it broke"}}, "failed", "failed"),
        ({"ended": "finished"}, "not running", "waiting"),
    ],
)
def test_all_commands_tell_the_same(folder, how, state, of_stage):
    folder.finish(XL)
    folder.run(*(S1,) if "failed" not in how and of_stage != "waiting" else (), **how)
    plan = json.loads((folder.study / "plan.json").read_text())
    write_json(folder.study / "plan.json", plan | {"created": "2026"})
    moment, (listed,), rows = look(folder), studies(folder.runs, folder.store), status_rows(folder.study, folder.store)
    assert (moment.state, listed.state, moment.stages[1].state) == (state, state, of_stage)
    assert [row.state for row in rows] == [stage.state for stage in moment.stages]


def test_a_study_that_was_never_run_and_a_damaged_plan(folder):
    assert look(folder).state == "not running"
    for plan in ("{", '{"stages": [{}]}', '{"stages": 3}'):
        (folder.study / "plan.json").write_text(plan)
        with pytest.raises(StoreError, match=r"plan\.json cannot be read"):
            look(folder)


def test_jobs_of_slurm(folder, monkeypatch):
    asked = []
    for key, job in ((S1, "7"), (S2, "8")):
        write_json(folder.store.folder(key) / "job.json", {"job": job, "index": None, "name": f"n{job}", "study": "small"})
    folder.log(S1, 1, 40)
    entries = {"7": slurm.Entry("7", "RUNNING", "1:02", "n7"), "8": slurm.Entry("8", "PENDING", "0:00", "n8", "Priority")}
    monkeypatch.setattr(slurm, "queued", lambda strict: asked.append(1) or entries)
    folder.run(S1, dead=True, seen=1.0)  # before the job
    (folder.study / "jobs").mkdir()
    (folder.study / "jobs" / "7_0_log.out").write_text("10:00:00 alarm: update 10: collapse\n")
    watched = Watched(folder.study, folder.store)
    moment = watched.look()
    found = {stage.key: stage for stage in moment.stages}
    assert (found[S1].state, found[S1].elapsed, found[S1].done, found[S1].note) == ("running", "1:02", 40, "loss 2.000")
    assert (found[S2].state, found[S2].note) == ("queued", "Priority")
    assert (moment.state, moment.left) == ("running", None)
    assert moment.alarms == ("update 10: collapse (10:00:00)",)
    watched._moment = None
    watched.look()
    assert len(asked) == 1  # all users share Slurm

    def silent(strict):
        raise ConfigError("squeue does not answer")

    monkeypatch.setattr(slurm, "queued", silent)
    moment = look(folder)
    assert moment.problems == ("squeue does not answer",)
    assert (states(moment)[S1], states(moment)[S2]) == ("killed", "waiting")


def test_rollouts_are_read_again_when_they_change(folder):
    watched = Watched(folder.study, folder.store)
    folder.sampled(D1, "old")
    ((prompt, response),) = watched.look().rollouts[D1].rows
    assert (prompt.splitlines()[-1], response) == ("a question", "old")
    time.sleep(0.01)
    folder.sampled(D1, "new")
    (folder.store.folder(D2)).mkdir(parents=True)
    (folder.store.folder(D2) / "rollouts.json").write_text("{")
    watched._moment = None
    assert {key: found.rows[0][1] for key, found in watched.look().rollouts.items()} == {D1: "new"}


def test_the_graph_has_a_node_for_all_seeds(folder):
    folder.finish(XL, S1)
    moment = look(folder)
    nodes = {node.title + node.detail: node for node in nodes_of(moment.stages)}
    assert set(nodes) == {"sft xl", "sft s", "distill xl -> sminillm"}
    assert [stage.key for stage in nodes["distill xl -> sminillm"].stages] == [D1, D2]
    assert [stage.key for stage in nodes["distill xl -> sminillm"].measures] == [E1]
    assert nodes["distill xl -> sminillm"].parents == (XL, S1)
    assert nodes["sft s"].says == "1 done, 1 waiting"
    places = {node.title: (x, y) for node, x, y in draw(list(nodes.values())).nodes}
    assert places["sft xl"][0] == places["sft s"][0] < places["distill xl -> s"][0]


def test_a_title_keeps_the_names_of_its_arms_together(folder):
    common = {"kind": "sft", "label": "sft s, seed 1", "model": "s", "parents": {}, "seed": 1}
    stages = [{"key": "0" * 16, "arms": ["a", "b"], **common}, {"key": "1" * 16, "arms": ["c"], **common}]
    (folder.study / "plan.json").write_text(json.dumps({"stages": stages}))
    assert [node.title for node in nodes_of(look(folder).stages)] == ["sft s (a, b)", "sft s (c)"]


def test_a_wide_study_gets_columns_that_fit_a_screen(folder):
    stages = [{"key": f"{i:016x}", "kind": "sft", "label": f"sft m{i}, seed 1", "model": "m", "parents": {}, "seed": 1} for i in range(20)]
    last = {"key": "f" * 16, "kind": "distill", "label": "distill m0 -> s", "model": "s", "parents": {"teacher": "0" * 16}, "seed": 1}
    (folder.study / "plan.json").write_text(json.dumps({"stages": [*stages, last]}))
    drawn = draw(nodes_of(look(folder).stages))
    places = {(x, y) for _, x, y in drawn.nodes}
    assert len(places) == 21
    assert drawn.height < 720
    assert max(drawn.nodes, key=lambda found: found[1])[0].title == "distill m0 -> s"


def test_the_choice_of_curves(folder):
    folder.finish(XL)
    for key in (XL, S1, S2):
        folder.log(key, 1, 3)
    folder.run(S1)
    moment = look(folder)
    nodes = nodes_of(moment.stages)
    assert [s.key for s in picked(nodes, moment.logs, ())[0]] == [S1]
    assert [s.key for s in picked(nodes, moment.logs, [S1])[0]] == [S1, S2]
    folder.run(S2, ended="interrupted")
    moment = look(folder)
    assert [s.key for s in picked(nodes_of(moment.stages), moment.logs, ())[0]] == [S1, S2]  # S1 has begun too
    folder.finish(S1, S2)
    moment = look(folder)
    assert {s.key for s in picked(nodes_of(moment.stages), moment.logs, ())[0]} == {XL, S1, S2}


def test_an_evaluation_alone_has_a_node(folder):
    plan = {"key": E1, "kind": "evaluate", "label": "evaluate gpt2", "model": "gpt2", "parents": {}, "seed": 0, "arms": []}
    (folder.study / "plan.json").write_text(json.dumps({"stages": [plan]}))
    node = nodes_of(look(folder).stages)[0]
    assert (node.title, node.detail, node.says) == ("gpt2", "as it is", "waiting")


def test_gpus_as_nvidia_smi_describes_them():
    full, empty = read_gpus("NVIDIA H100, 87, 40960, 81920, 61\nNVIDIA GB10, [N/A], [N/A], [N/A], 45\n")
    assert (full.used, full.memory, full.total, full.celsius) == (87, 40 * 2**30, 80 * 2**30, 61)
    assert (empty.name, empty.used, empty.memory, empty.celsius) == ("NVIDIA GB10", None, None, 45)
    assert read_gpus("No devices were found\n") == ()


def test_the_machine_of_a_run_and_of_another(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    machine = Machine()
    folder.run(S1)
    use = machine.look(look(folder).runs, elsewhere=False)
    assert use.own_processes >= 1
    assert use.own_memory > 1 << 20
    assert (use.cpu, use.own_cpu) == (None, None)  # a load is a mean between two measurements
    assert "– of" in render(look(folder), use, (), ())["machine"]
    machine._at = float("-inf")
    time.sleep(0.02)  # Linux counts the time of cores in hundredths of a second
    again = machine.look(look(folder).runs, elsewhere=False)
    assert again.cpu is not None
    assert again.own_cpu is not None
    assert use.note == "There is no NVIDIA GPU on this machine, or no nvidia-smi."
    folder.run(S1, host="node7")
    machine = Machine()
    use = machine.look([run for run in look(folder).runs if run.host == "node7"], elsewhere=False)
    assert (use.own_processes, use.note.startswith("The run is on node7, but the load is that of")) == (0, True)


def test_the_load_is_the_same_for_all_threads(monkeypatch):
    """It was 0 in each thread that measured for the first time, and each request to the page has a thread of its own."""
    monkeypatch.setenv("PATH", "")
    spent = iter([(100.0, 900.0, 50.0, 50.0), (190.0, 905.0, 55.0, 140.0), (190.0, 905.0, 55.0, 140.0)])
    names = namedtuple("names", "user idle iowait guest")
    monkeypatch.setattr(psutil, "cpu_times", lambda: names(*next(spent)))
    machine, said, end = Machine(), Queue[float | None](), Event()

    def request() -> None:
        machine._at = float("-inf")
        said.put(machine.look((), elsewhere=False).cpu)
        end.wait()

    found = []
    for _ in range(3):
        Thread(target=request).start()
        found.append(said.get(timeout=10))
    end.set()
    assert found == [None, 90.0, None]  # the first has none before it, and no time has passed before the third


def test_a_stage_that_waits_names_the_first_stage_that_needs_attention(folder):
    folder.run(S1, dead=True, failed={D1: "out of memory"})
    notes = {stage.key: stage.note for stage in look(folder).stages if stage.note.startswith("waits")}
    assert notes == dict.fromkeys((E1,), "waits for sft s, seed 1")


def test_an_edge_over_several_columns_passes_no_node():
    """It passed behind a node and came out on its other side, as if this node were its start."""
    above = {"a": (), "b": (), "x": ("a",), "y": ("b",), "z": ("a",), "end": ("x", "a", "b"), "last": ("end", "x", "a")}
    drawn = draw([Node(name, name, "", (), (), parents) for name, parents in above.items()])
    pairs = [(parent, name) for name, parents in above.items() for parent in parents]
    lanes = {pair: int(found[1]) for pair, path in zip(pairs, drawn.edges, strict=True) if (found := re.search(r" (\d+)H", path))}
    assert set(lanes) == {("a", "end"), ("b", "end"), ("x", "last"), ("a", "last")}
    assert all(not y <= lane <= y + HEIGHT for lane in lanes.values() for _, _, y in drawn.nodes)
    assert max(lanes.values()) < drawn.height
    assert len({lanes["a", "end"], lanes["b", "end"], lanes["x", "last"]}) == 3
