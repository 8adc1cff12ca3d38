"""What Slurm says, from commands that only pretend; tests/slurm asks a real one."""

import io
import json
import os
import time
from dataclasses import asdict
from datetime import datetime

import pytest
from tests.unit.plan.fakes import spec

from tadistill.cluster import slurm
from tadistill.cluster.job import Job, JobRecord, Place, arrays, read_record
from tadistill.cluster.list_and_clean import studies
from tadistill.cluster.sbatch import Request
from tadistill.cluster.slurm import Entry
from tadistill.cluster.status import cancel, print_status, status_rows
from tadistill.disk import write_json
from tadistill.errors import ConfigError, StoreError, TadistillError
from tadistill.plan.graph import Stage
from tadistill.runner.local import LocalRun, StageProgress
from tadistill.store import Store
from tadistill.terminal import Terminal

REQUEST = Request(None, 0, 1, 1, 1, 1, 60, 1)


def test_no_slurm_is_one_sentence(programs):
    with pytest.raises(ConfigError, match="squeue does not answer, so the state of jobs is unknown; run this command on a login node"):
        slurm.queued()
    programs("squeue", "exit 1")
    with pytest.raises(ConfigError, match="squeue does not answer"):
        slurm.queued()
    assert slurm.ended(["3"]) == {}


def test_squeue_and_sacct_are_read(programs):
    programs("squeue", "echo '7_1|RUNNING|1:02|distill-s-abc|None'; echo '8|PENDING|0:00|x|DependencyNeverSatisfied'; echo rubbish")
    found = slurm.queued()
    assert found["7_1"] == Entry("7_1", "RUNNING", "1:02", "distill-s-abc", "None")
    assert found["8"].hopeless
    programs("sacct", "echo '3|CANCELLED by 0|00:10|2026-05-01T10:00:00|a'; echo '4_0|TIMEOUT|01:00|2026-05-01T10:00:00|b'")
    assert {i: e.state for i, e in slurm.ended(["3", "4_0", "5"]).items()} == {"3": "CANCELLED", "4_0": "TIMEOUT"}
    programs(
        "sacct",
        "echo '9_0|COMPLETED|00:10|Unknown|x'; echo '9_1|FAILED|00:10|Unknown|x'; echo '9_2|FAILED|00:00|Unknown|x'",
    )
    assert slurm.ended(["9"])["9"].id == "9_1"  # a chain
    programs("squeue", "echo '7_1|RUNNING|1:02|distill-a|b-abc|None'")  # as the jobs of earlier versions were called
    assert slurm.queued() == {"7_1": Entry("7_1", "RUNNING", "1:02", "distill-a|b-abc", "None")}
    programs("sacct", "echo '3|FAILED|00:10|2026-05-01T10:00:00|distill-a|b-abc'")
    assert slurm.ended(["3"])["3"].name == "distill-a|b-abc"
    for end, seconds in (("2026-05-01T10:00:00", datetime(2026, 5, 1, 10).timestamp()), ("Unknown", 0.0), ("tomorrow at ten", 0.0)):
        programs("sacct", f"echo '3|TIMEOUT|00:10|{end}|n'")
        assert slurm.ended(["3"])["3"].ended == seconds
    programs("sacct", "exit 1")  # accounting is off
    assert slurm.ended(["7_1"])["7_1"].state == "RUNNING"


def test_a_cancel_that_fails_says_so(programs):
    programs("scancel", "exit 1")
    programs("squeue", "echo '7_1|PENDING|0:00|x|Priority'; echo '8|PENDING|0:00|x|Priority'; echo '9|COMPLETING|0:10|x|None'")
    slurm.cancel(["9"])
    with pytest.raises(TadistillError, match="scancel failed for 7_1, 8; run `squeue --me`"):
        slurm.cancel(["8", "7_1"])


def test_only_the_job_that_was_submitted_counts(tmp_path):
    store = Store(tmp_path)
    JobRecord("7", 1, "distill-s-abc", "study").write(store, "ab12")
    record = read_record(store, "ab12")
    assert record is not None
    assert record.live({"7_1": Entry("7_1", "RUNNING", "0:10", "distill-s-abc")})
    assert not record.live({"7_1": Entry("7_1", "RUNNING", "0:10", "another")})  # the id was given again
    assert not record.live({"7_1": Entry("7_1", "PENDING", "0:00", "distill-s-abc", "DependencyNeverSatisfied")})
    content = json.loads((store.folder("ab12") / "job.json").read_text())
    (store.folder("ab12") / "job.json").write_text(json.dumps(content | {"partition": "gpu"}))
    assert read_record(store, "ab12") == record  # another version of tadistill wrote it
    for damaged in (b"{}", b"[]", b"3", b"{", b"\xff"):
        (store.folder("ab12") / "job.json").write_bytes(damaged)
        assert read_record(store, "ab12") is None
    assert not record.live({})
    segments = {"9_1": Entry("9_1", "PENDING", "0:00", "x"), "9_0": Entry("9_0", "RUNNING", "0:10", "x")}
    chain = JobRecord("9", None, "x", "study")
    assert chain.live(segments) == segments["9_0"]


def stage(key: str, *parents: str) -> Stage:
    return Stage(spec("distill", *parents), key, f"distill {key}", "s", 0, None)


def test_the_name_of_a_job_has_only_characters_that_slurm_keeps():
    member = Stage(spec("distill"), "0123456789abcdef", "distill", "ü|x y", 0, None)
    assert Job((member,), REQUEST, 0).name == "distill---x-y-01234567"


def test_dependencies_of_arrays():
    def job(key: str, *parents: str) -> Job:
        return Job((stage(key, *parents),), REQUEST, 0)

    places = {"t": Place("1"), "a0": Place("2", 0), "a1": Place("2", 1), "b1": Place("3", 1), "c": Place("4")}
    (both,) = arrays([job("x", "t", "a0"), job("y", "t", "a1")], places)
    assert (len(both[0]), both[1]) == (2, "aftercorr:2,afterok:1")
    # one of the seeds is finished already: its element waits for nothing of that array
    assert [d for _, d in arrays([job("x", "t"), job("y", "t", "a1")], places)] == ["afterok:1", "afterok:1:2_1"]
    # indices do not correspond
    assert [d for _, d in arrays([job("x", "b1"), job("y", "c")], places)] == ["afterok:3_1", "afterok:4"]
    (free,) = arrays([job("x", "done"), job("y")], places)
    assert (len(free[0]), free[1]) == (2, None)


def test_status_of_every_kind(programs, tmp_path):
    study, store = tmp_path / "study", Store(tmp_path / "store")
    study.mkdir()
    keys = ["done", "runs", "wait", "fail", "gone", "lost", "none"]
    stages = [{"key": key, "kind": "sft", "label": key, "steps": 10} for key in keys]
    (study / "plan.json").write_text(json.dumps({"stages": stages}))
    for i, key in enumerate(keys[:-1]):
        JobRecord(str(i), None, key, "study").write(store, key)
    store.finish("done", {"seconds": 3700.0})
    (store.folder("runs") / "metrics.jsonl").write_text('{"step": 4, "train/loss": 1.5, "train/lr": 1}\n{"step": 5, "tra')
    (store.folder("fail") / "failure.txt").write_text("it broke\n")
    programs("squeue", "case $* in *--me*) echo '1|RUNNING|0:05|runs|None'; echo '2|PENDING|0:00|wait|Dependency';; esac")
    programs("sacct", "echo '4|OUT_OF_MEMORY|00:10|2026-05-01T10:00:00|gone'")
    found = {row.label: row for row in status_rows(study, store)}
    expected = ["done", "running", "queued", "failed", "out_of_memory", "lost", "waiting"]
    assert {label: row.state for label, row in found.items()} == dict(zip(keys, expected, strict=True))
    assert found["done"].elapsed == "1:01:40"
    assert found["runs"].last == "4/10 train/loss 1.5"
    assert found["fail"].last == "it broke"
    (study / "plan.json").write_text("{")
    with pytest.raises(StoreError, match=r"plan.json cannot be read \(.*\): run or submit the recipe again"):
        status_rows(study, store)


def test_a_job_in_the_queue_counts_more_than_a_run_that_has_ended(programs, tmp_path):
    study, store = tmp_path / "study", Store(tmp_path / "store")
    write_json(study / "plan.json", {"created": "", "stages": [{"key": "k", "kind": "sft", "label": "k", "steps": 10}]})
    JobRecord("1", None, "n", "study").write(store, "k")
    submitted = (store.folder("k") / "job.json").stat().st_mtime

    def local(seen: float, **facts) -> None:
        run = LocalRun(1, "elsewhere", 1.0, "", "", seen=seen, total=1, **facts)
        write_json(study / "local" / "elsewhere-1.json", asdict(run))

    def state() -> tuple[str, str]:
        (row,), (listed,) = status_rows(study, store), studies(tmp_path, store)
        return row.state, listed.state

    for facts in ({"stages": {"k": StageProgress("k")}}, {"ended": "failed", "failed": {"k": "it broke"}}):
        how = facts.get("ended", "killed")
        local(submitted - 1000, **facts)
        programs("squeue", "echo '1|RUNNING|0:05|n|None'")
        assert state() == ("running", "running")
        programs("squeue", "echo '1|PENDING|0:00|n|Priority'")
        assert state() == ("queued", "queued")
        programs("squeue", "")
        programs("sacct", "echo '1|TIMEOUT|00:10|2026-05-01T10:00:00|n'")
        assert state() == ("timeout", how)
        JobRecord("1", None, "n", "study").write(store, "k")
        os.utime(store.folder("k") / "job.json", (submitted - 2000, submitted - 2000))  # the run was after the job
        assert state() == (how, how)
        JobRecord("1", None, "n", "study").write(store, "k")
    local(time.time(), stages={"k": StageProgress("k")})  # it runs there now
    programs("squeue", "exit 1")
    assert state() == ("running", "running")


STARTED = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "POWER_UP_NODE")


@pytest.mark.parametrize(("word", "state"), [*((word, "running") for word in STARTED), *((word, "queued") for word in WAITING)])
def test_a_job_in_the_queue_runs_or_is_queued(word, state, tmp_path, monkeypatch):
    """A suspended job was "not running", and a stopped one "starts at update 0", so a user started a second run."""
    study, store = tmp_path / "study", Store(tmp_path / "store")
    write_json(study / "plan.json", {"created": "", "stages": [{"key": "k", "kind": "sft", "label": "k", "steps": 10}]})
    JobRecord("1", None, "n", "study").write(store, "k")
    monkeypatch.setattr(slurm, "queued", lambda **_: {"1": Entry("1", word, "0:05", "n", "None" if state == "running" else "Held")})
    (row,), (listed,) = status_rows(study, store), studies(tmp_path, store)
    assert (row.state, listed.state) == (state, state)
    unusual = "" if word in ("RUNNING", "COMPLETING", "PENDING", "CONFIGURING", "REQUEUED") else f"{word.lower()} in Slurm"
    assert row.last == ", ".join(filter(None, (unusual, "Held" if state == "queued" else "")))
    output = io.StringIO()
    print_status(study, store, Terminal(file=output, width=200))
    assert "jobs are queued or running; cancel them with" in output.getvalue()


def test_cancel_of_an_earlier_run_finds_its_jobs(tmp_path, monkeypatch):
    """The name of its folder is not the name of the study, so the command that `status` printed cancelled no job."""
    earlier, store, asked = tmp_path / "mine" / "earlier" / "0123abcd", Store(tmp_path / "store"), []
    write_json(earlier / "plan.json", {"study": "mine", "stages": [{"key": "k"}, {"key": "l"}]})
    JobRecord("1", None, "n", "mine").write(store, "k")
    JobRecord("2", None, "n", "other").write(store, "l")
    monkeypatch.setattr(slurm, "queued", lambda: {i: Entry(i, "PENDING", "", "n", "") for i in "12"})
    monkeypatch.setattr(slurm, "cancel", lambda ids: asked.append({*ids}))
    assert cancel(earlier, store) == 1
    assert asked == [{"1"}]


def test_list_knows_no_state_of_jobs_if_squeue_does_not_answer(programs, tmp_path):
    study, store = tmp_path / "study", Store(tmp_path / "store")
    write_json(study / "plan.json", {"created": "", "stages": [{"key": "k", "kind": "sft", "label": "k", "steps": 10}]})
    assert [row.state for row in studies(tmp_path, store)] == ["not running"]
    JobRecord("1", None, "n", "study").write(store, "k")
    assert [row.state for row in studies(tmp_path, store)] == ["not known (squeue does not answer)"]
    run = LocalRun(1, "elsewhere", 1.0, "", "", seen=time.time() + 5, ended="failed", failed={"k": "it broke"})
    write_json(study / "local" / "elsewhere-1.json", asdict(run))  # after the job
    assert [row.state for row in studies(tmp_path, store)] == ["failed"]


def test_without_slurm_a_run_after_the_last_job_has_the_state(programs, tmp_path):  # `programs`: there is no squeue
    study, store = tmp_path / "study", Store(tmp_path / "store")
    write_json(study / "plan.json", {"stages": [{"key": key, "kind": "sft", "label": key, "steps": 10} for key in ("k", "new")]})
    JobRecord("1", None, "n", "study").write(store, "k")
    submitted = (store.folder("k") / "job.json").stat().st_mtime
    run = LocalRun(1, "elsewhere", 1.0, "", "", seen=submitted + 5, ended="failed", failed={"k": "it broke"})
    write_json(study / "local" / "elsewhere-1.json", asdict(run))
    assert [(row.state, row.last) for row in status_rows(study, store)] == [("failed", "it broke"), ("waiting", "")]
    os.utime(store.folder("k") / "job.json", (submitted + 9, submitted + 9))  # a job was submitted after the run
    with pytest.raises(ConfigError, match="squeue does not answer"):
        status_rows(study, store)
    os.utime(store.folder("k") / "job.json", (submitted, submitted))
    JobRecord("2", None, "n", "study").write(store, "new")  # only a job has this stage
    with pytest.raises(ConfigError, match="squeue does not answer"):
        status_rows(study, store)


def a_run_that_failed_after_a_submission(tmp_path):
    """A study whose job was submitted 9,000 seconds before now, and whose run on another machine failed 5,000 seconds before now."""
    study, store = tmp_path / "study", Store(tmp_path / "store")
    write_json(study / "plan.json", {"stages": [{"key": "k", "kind": "sft", "label": "k", "steps": 10}]})
    JobRecord("1", None, "n", "study").write(store, "k")
    now = time.time()
    os.utime(store.folder("k") / "job.json", (now - 9000, now - 9000))
    run = LocalRun(1, "elsewhere", 1.0, "", "", seen=now - 5000, ended="failed", failed={"k": "the run broke"})
    write_json(study / "local" / "elsewhere-1.json", asdict(run))
    return study, store, now


def test_a_job_that_failed_after_a_run_has_the_state(programs, tmp_path):
    study, store, _ = a_run_that_failed_after_a_submission(tmp_path)
    (store.folder("k") / "failure.txt").write_text("the job broke\n")
    programs("squeue", "")
    programs("sacct", "echo '1|FAILED|00:10|2026-05-01T10:00:00|n'")
    assert [(row.state, row.last) for row in status_rows(study, store)] == [("failed", "the job broke")]


@pytest.mark.parametrize("how", ["TIMEOUT", "OUT_OF_MEMORY"])
def test_a_job_that_slurm_ended_after_a_run_has_the_state(how, programs, tmp_path):
    study, store, now = a_run_that_failed_after_a_submission(tmp_path)
    programs("squeue", "")
    for seconds, state in ((1000, how.lower()), (8000, "failed")):
        programs("sacct", f"echo '1|{how}|00:10|{datetime.fromtimestamp(now - seconds).isoformat(timespec='seconds')}|n'")
        assert [row.state for row in status_rows(study, store)] == [state]


def test_list_asks_slurm_only_if_a_job_was_submitted(programs, tmp_path):
    study, store, asked = tmp_path / "study", Store(tmp_path / "store"), tmp_path / "asked"
    write_json(study / "plan.json", {"created": "", "stages": [{"key": "k", "kind": "sft", "label": "k", "steps": 10}]})
    programs("squeue", f"echo x >> '{asked}'")
    assert [row.state for row in studies(tmp_path, store)] == ["not running"]
    assert not asked.exists()
    JobRecord("1", None, "n", "study").write(store, "k")
    studies(tmp_path, store)
    assert asked.read_text() == "x\n"
