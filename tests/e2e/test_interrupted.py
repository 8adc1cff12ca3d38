"""Every kind of stage and every sampler, interrupted several times by real signals, ends with the same files as an undisturbed run."""

import json
import multiprocessing
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tests.e2e import interrupted

ARMS = yaml.safe_load(Path(__file__).with_name("interrupted.yaml").read_text())["arms"]
TRAINING = ["sft", *(f"distill {arm}" for arm in ARMS)]
IN_PARTS = ["generate", "signal hidden", "signal top_k", "signal sampled", "evaluate", "analyse"]
OTHERS = ["temper", "probe", "pair"]  # take seconds, and start again from the beginning
UPDATES = 8


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("interrupted")
    process = multiprocessing.get_context("fork").Process(target=interrupted.main, args=(out, []))
    process.start()
    process.join()
    assert process.exitcode == 0
    return json.loads((out / "found.json").read_text())


def test_all_cases_are_looked_at(found):
    assert sorted(found) == sorted(TRAINING + IN_PARTS + OTHERS)


@pytest.mark.parametrize("how", interrupted.SIGNALS)
@pytest.mark.parametrize("name", TRAINING + IN_PARTS + OTHERS)
def test_cut_short_and_resumed_to_the_bit(name, how, found):
    whole, run = found[name]["whole"], found[name][how]
    assert run["digests"] == whole["digests"]
    assert run["rows"] == whole["rows"]
    assert run["left"] == []
    *cut, last = run["attempts"]
    assert last["code"] == 0
    for attempt in cut:
        assert (attempt["killed"] == signal.SIGKILL) if how == "kills" else (attempt["code"] == 3)
    assert len(cut) == len(interrupted.SIGNALS[how]) or (name not in TRAINING and cut)
    if name in TRAINING:
        done = [update for attempt in run["attempts"] for update in attempt["done"]]
        if how == "kills":  # a state was saved before each update, so each kill loses one at most
            assert set(done) == set(range(1, UPDATES + 1))
            assert len(done) <= UPDATES + len(cut)
        else:
            assert done == list(range(1, UPDATES + 1))
    if name in IN_PARTS:
        files = [Path(f) for attempt in run["attempts"] for f in attempt["files"]]
        parts = Counter(f for f in files if f.parent.name in ("parts", "signal") and f.stem != "head")
        assert len(parts) > 1
        assert set(parts.values()) == {1}  # none is made twice


def test_a_kill_between_artifact_and_manifest_loses_neither(found):
    whole, before, after = (found["sft"][name] for name in ("whole", "before the manifest", "after the manifest"))
    assert [a["killed"] for a in before["attempts"]] == [a["killed"] for a in after["attempts"]] == [signal.SIGKILL, None]
    assert before["digests"] == after["digests"] == whole["digests"]
    assert before["attempts"][1]["done"] == [UPDATES]  # from the last state
    assert after["attempts"][1]["done"] == []  # finished
