"""A study on a real Slurm: arrays, a requeue by signal, a planned failure, its children, the branch again, and the report.

One study goes through all of it, in the order of the tests.
"""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from tests.e2e.inprocess import tadistill
from tests.slurm import warm

from tadistill.cluster import slurm
from tadistill.cluster.status import status_rows
from tadistill.config import load
from tadistill.plan.arms import make_plan
from tadistill.store import Store

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "unit" / "cluster" / "golden"
RECIPE, CLUSTER = HERE / "study.yaml", HERE / "cluster.yaml"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Study:
    """The study's command line and its files."""

    def __init__(self, runs: Path, python: str):
        self.python = python  # what starts the jobs of `submit`
        self.runs, self.store, self.directory = runs, Store(runs / "store"), runs / "tiny"
        self.stages = make_plan(load(RECIPE)).stages

    def call(self, *arguments: str, code: int = 0) -> str:
        done = tadistill(*arguments, "--runs", str(self.runs))
        assert done.code == code, done.out + done.err
        return " ".join(ANSI.sub("", done.out + done.err).split())

    def submit(self) -> str:
        with mock.patch.object(sys, "executable", self.python):
            return self.call("submit", str(RECIPE), "--cluster", str(CLUSTER), "--account", "def-tests")

    def key(self, label: str) -> str:
        (found,) = (s.key for s in self.stages.values() if s.label.startswith(label))
        return found

    def states(self) -> Counter[str]:
        return Counter(row.state for row in status_rows(self.directory, self.store))

    def await_end(self, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while queued := slurm.queued():
            assert time.monotonic() < end, queued
            time.sleep(1)


@pytest.fixture(scope="module")
def study(slurm, tmp_path_factory):
    with warm.python(slurm) as python:
        yield Study(tmp_path_factory.mktemp("runs"), python)


@pytest.mark.parametrize("site", ["narval", "rorqual"])
def test_the_controller_takes_the_resource_lines_of_real_sites(slurm, site, tmp_path):
    """The scripts of all kinds of stages are accepted. Lines with dependencies are left out, because they name jobs that do not exist."""
    scripts = GOLDEN.joinpath(f"{site}.txt").read_text().split("#!/bin/bash")[1:]
    assert len(scripts) == 6
    for i, text in enumerate(scripts):
        lines = [line for line in text.splitlines() if "--dependency" not in line and "--output" not in line]
        assert _accepted(tmp_path / f"{i}.sh", lines)
    lines = [line.replace("a100", "v100").replace("h100", "v100") for line in lines]
    assert not _accepted(tmp_path / "unknown.sh", lines)


FAILS = "distill l -> s, minillm on teacher_mixed (rounds of 32, 4 updates each), 8 updates, seed 20"


def test_a_study_goes_as_arrays_and_survives_a_signal(study):
    # one stage cannot write its log: a planned failure
    obstacle = study.store.folder(study.key(FAILS)) / "metrics.jsonl"
    obstacle.mkdir(parents=True)
    said = study.submit()
    assert "11 stages; 0 are done, 0 are already queued, and 11 were submitted now as 8 jobs" in said
    assert len(re.findall(r"_\[0-1\]", said)) == 3  # arrays of seeds; the teacher and its evaluation are single jobs
    assert "0 were submitted now as 0 jobs" in study.submit()  # all of it is queued
    # the teacher saves, goes back into the queue under its own id, and ends where it would have ended
    teacher = study.key("sft xl")
    record = json.loads((study.store.folder(teacher) / "job.json").read_text())
    log = study.store.folder(teacher) / "metrics.jsonl"
    end = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < end
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR2", record["job"]], check=True)
    study.await_end()
    text = (study.directory / "jobs" / f"{record['job']}_0_log.out").read_text()
    assert re.search(r"stopped at update \d+ of 200", text)
    assert text.count("Starting with JobEnvironment") == 2
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [*range(2, 201, 2)]  # each once, across the interruption
    assert study.store.finished(teacher)


def test_a_failure_takes_its_children_and_nothing_else(study):
    failed = study.key(FAILS)
    lost = {s.key for s in study.stages.values() if failed in s.parents.values()} | {failed}
    lost |= {s.key for s in study.stages.values() if set(s.parents.values()) & lost}
    assert {s.key for s in study.stages.values() if not study.store.finished(s.key)} == lost
    assert study.states() == {"done": 8, "failed": 1, "cancelled": 2}
    said = study.call("status", "tiny")
    assert "8 done, 2 cancelled, 1 failed" in said
    assert "nothing is queued or running; continue with `" in said


def test_the_failed_branch_goes_again_and_the_report_follows(study):
    report = study.directory / "report.html"
    assert report.is_file()  # written when all jobs had ended, failed or not
    first = report.stat().st_mtime_ns
    (study.store.folder(study.key(FAILS)) / "metrics.jsonl").rmdir()
    assert "8 are done, 0 are already queued, and 3 were submitted now as 2 jobs" in study.submit()
    study.await_end()
    assert study.states() == {"done": 11}
    assert report.stat().st_mtime_ns > first
    assert {row["arm"] for row in json.loads((study.directory / "results.json").read_text())["rows"]} == {"teacher", "takd"}
    assert "11 are done, 0 are already queued, and 0 were submitted now as 0 jobs" in study.submit()
    assert "all stages are done" in study.call("status", "tiny")


def test_a_chain_of_segments_goes_on_where_the_one_before_stopped(study, tmp_path):
    """Where a job may not call Slurm: a told segment ends, the next one resumes, the rest end at once, and children start after them."""
    profile, recipe = tmp_path / "chain.yaml", tmp_path / "chained.yaml"
    profile.write_text(CLUSTER.read_text() + "resume: chain\n")
    text = RECIPE.read_text().replace("study: tiny", "study: tiny3").replace("    seed: 10\n", "    seed: 11\n")
    recipe.write_text(re.sub(r"  takd: .*\n", "", text))
    assert "submitted now as 2 jobs" in study.call("submit", str(recipe), "--cluster", str(profile), "--account", "def-tests")
    records = [(path, json.loads(path.read_text())) for path in study.runs.glob("store/*/*/job.json")]
    ((sft, job),) = [(path, r["job"]) for path, r in records if r["study"] == "tiny3" and r["name"].startswith("sft-xl")]
    end = time.monotonic() + 400
    while not (log := sft.with_name("metrics.jsonl")).is_file() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < end
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR2", f"{job}_0"], check=False)  # says "already done" of an array that has more elements
    while {row.state for row in status_rows(study.runs / "tiny3", study.store)} != {"done"}:
        assert time.monotonic() < end
        time.sleep(1)
    study.call("cancel", "tiny3")  # segments of the evaluation that have nothing to do
    study.await_end()
    logs = [(study.runs / "tiny3" / "jobs" / f"{job}_{i}_0_log.out").read_text() for i in range(3)]
    assert "stopped at update" in logs[0]
    assert "200/200" in logs[1]
    assert "/200" not in logs[2]  # nothing was left


def test_two_submissions_cancelling_and_stale_records(study):
    """Two submissions at once submit each job once. Cancelled jobs, and those whose id Slurm does not know or gave to another, go again."""
    more = [str(RECIPE), "seeds=[40]", "study=tiny2", "--cluster", str(CLUSTER), "--account", "def-tests", "--runs", str(study.runs)]
    subprocess.run(["scontrol", "update", f"NodeName={_node()}", "State=DRAIN", "Reason=test"], check=True)  # nothing starts
    try:
        both = [subprocess.Popen([sys.executable, "-m", "tadistill", "submit", *more], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        said = [" ".join(process.communicate(timeout=120)[0].split()) for process in both]
        (stages,) = {int(n) for text in said for n in re.findall(r" are done, 0 are already queued, and (\d+) were submitted", text)}
        assert sorted("0 were submitted now as 0 jobs" in text for text in said) == [False, True]
        assert f"{stages} are already queued" in next(text for text in said if "0 were submitted now as 0 jobs" in text)
        (jobs,) = re.findall(r"(\d+) jobs? cancelled", study.call("cancel", "tiny2"))
        assert int(jobs) == len(stage_jobs(study, "tiny2"))
        study.await_end()
        assert f"0 are already queued, and {stages} were submitted now" in study.call("submit", *more[:-2])
        first, second, *_ = [p for p in study.runs.glob("store/*/*/job.json") if json.loads(p.read_text())["study"] == "tiny2"]
        # an id that is not there, or that belongs to another job by now
        first.write_text(json.dumps({"job": "1", "index": None, "name": "x", "study": "tiny2"}))
        second.write_text("{")
        assert re.search(rf"{stages - 2} are already queued, and 2 were submitted now as (1 job|2 jobs)", study.call("submit", *more[:-2]))
    finally:
        subprocess.run(["scancel", "--quiet", "--me"], check=False)
        study.await_end()
        subprocess.run(["scontrol", "update", f"NodeName={_node()}", "State=RESUME"], check=True)


def stage_jobs(study: Study, name: str) -> set[tuple]:
    """Return the jobs that a study's records name."""
    found = [json.loads(p.read_text()) for p in study.runs.glob("store/*/*/job.json")]
    return {(record["job"], record["index"]) for record in found if record["study"] == name}


def _accepted(path: Path, lines: list[str]) -> bool:
    path.write_text("\n".join(["#!/bin/bash", *lines]))
    return subprocess.run(["sbatch", "--test-only", path], capture_output=True, check=False).returncode == 0


def _node() -> str:
    return subprocess.run(["sinfo", "-h", "-o", "%n"], capture_output=True, text=True, check=True).stdout.strip()
