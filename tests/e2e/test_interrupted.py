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


@pytest.mark.parametrize("name", TRAINING + IN_PARTS + OTHERS)
def test_cut_short_and_resumed_to_the_bit(name, found):
    whole, run = found[name]["whole"], found[name]["cut"]
    assert run["digests"] == whole["digests"]
    assert run["rows"] == whole["rows"]
    assert run["left"] == []
    *cut, last = run["attempts"]
    assert last["code"] == 0
    for attempt, how in zip(cut, interrupted.SIGNALS, strict=False):
        assert (attempt["killed"] == how) if how == signal.SIGKILL else (attempt["code"] == 3)
    assert len(cut) == len(interrupted.SIGNALS) or (name not in TRAINING and cut)
    if name in TRAINING:
        done, killed = [], False  # a state was saved before each update, so a kill loses one at most, and a signal to stop loses none
        for attempt, before in zip(run["attempts"], [None, *interrupted.SIGNALS], strict=True):
            killed |= before == signal.SIGKILL
            repeated = done[-1:] == attempt["done"][:1] != []
            assert killed or not repeated
            done += attempt["done"][repeated:]
            killed &= not attempt["done"]
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
