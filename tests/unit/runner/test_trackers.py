"""Experiment trackers: one run per arm and seed, each tried for real where its package is installed."""

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tadistill.config import validate
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.runner import trackers
from tadistill.runner.trackers import Trackers, check_trackers
from tadistill.store import Store

CONFIG = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
MODEL = {"load": "scratch:llama", "tokenizer": "tinyworld", "config": CONFIG}


def recipe(*names):
    return validate(
        {
            "study": "t",
            "seeds": [1],
            "models": {"xl": MODEL, "s": MODEL | {"sft": {"optim": {"steps": 2}}}},
            "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "template": "plain"},
            "method": {"optim": {"steps": 2}},
            "evaluate": {"also": {}},
            "arms": {"sft": "s", "direct": "xl > s"},
            "runtime": {"trackers": names},
        }
    )


class Study:
    """A study whose stages write their files when the test says so."""

    def __init__(self, root, *names):
        self.plan, self.store = make_plan(recipe(*names)), Store(root / "store")
        self.folder, self.said = root / "t", []
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trackers = Trackers(self.plan, self.store, self.said.append)

    def key(self, kind, model="s"):
        return next(s.key for s in self.plan.stages.values() if (s.kind, s.model) == (kind, model))

    def train(self, kind, *steps):
        folder = self.store.folder(self.key(kind))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in steps))

    def evaluate(self, monkeypatch):
        finished = {arm.evaluate[1] for arm in self.plan.arms}
        for key in finished:
            self.store.folder(key).mkdir(parents=True, exist_ok=True)
            (self.store.folder(key) / "scores.json").write_text(json.dumps({"tinyworld": {"rouge_l": [[10.0], [30.0]]}}))
        monkeypatch.setattr(Store, "finished", lambda self, key: key in finished)


class Seen:
    """A tracker that remembers."""

    runs: dict = {}

    def __init__(self, folder, study, name, config):
        self.lines = self.runs.setdefault(name, [])

    def log(self, stage, step, values):
        self.lines.append((stage, step, dict(values)))

    def flush(self):
        pass

    def finish(self, results):
        self.lines.append(dict(results))


@pytest.fixture
def seen(monkeypatch):
    monkeypatch.setattr(trackers, "_KINDS", {"wandb": Seen})
    monkeypatch.setattr(Seen, "runs", {})
    return Seen.runs


def test_an_arm_shows_all_its_stages_and_its_test_results(tmp_path, monkeypatch, seen):
    study = Study(tmp_path, "wandb")
    study.train("sft", 1)
    study.trackers.send()
    assert seen == {name: [("sft s", 1, {"train/loss": 1.0})] for name in ("sft seed 1", "direct seed 1")}
    study.train("sft", 2)
    study.train("distill", 2)
    study.evaluate(monkeypatch)
    study.trackers.close()
    end = {"test/tinyworld/rouge_l": 20.0}
    half = {"train/loss": 0.5}
    assert seen["sft seed 1"] == [("sft s", 1, {"train/loss": 1.0}), ("sft s", 2, half), end]
    assert seen["direct seed 1"] == [("sft s", 1, {"train/loss": 1.0}), ("sft s", 2, half), ("distill s", 2, half), end]


def test_a_continued_study_sends_nothing_twice(tmp_path, monkeypatch, seen):
    study = Study(tmp_path, "wandb")
    study.train("sft", 1, 2)
    study.trackers.close()
    again = Study(tmp_path, "wandb")
    again.train("sft", 3)
    again.evaluate(monkeypatch)
    again.trackers.close()
    assert [line[1] for line in seen["sft seed 1"] if isinstance(line, tuple)] == [1, 2, 3]
    before = {name: list(lines) for name, lines in seen.items()}
    Study(tmp_path, "wandb").trackers.close()
    assert seen == before


def test_a_tracker_that_fails_is_switched_off_and_the_study_goes_on(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no network")

    monkeypatch.setattr(trackers, "_KINDS", {"wandb": broken})
    study = Study(tmp_path, "wandb")
    study.train("sft", 1)
    study.trackers.close()
    assert study.said == ["wandb is switched off, because it failed: OSError: no network"]


def test_a_line_that_is_being_written_is_read_later(tmp_path, seen):
    study = Study(tmp_path, "wandb")
    study.train("sft", 1)
    path = study.store.folder(study.key("sft")) / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "tra')
    study.trackers.send()
    assert [line[1] for line in seen["sft seed 1"]] == [1]


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the package of trackio is not installed; run `pip install .tadistill\[trackio"):
        check_trackers(recipe("trackio"))


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_real_tracker_writes_its_files_under_the_study_and_prints_nothing(tmp_path, monkeypatch, capfd, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)  # nobody is logged in, so wandb works offline and does not ask
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "t" / "trackio"))
    monkeypatch.setitem(sys.modules, "openai", ModuleType("openai"))  # of a teacher behind an API
    study = Study(tmp_path, name)
    study.train("sft", 1)
    study.trackers.send()
    study.train("distill", 1, 2)
    study.evaluate(monkeypatch)
    study.trackers.close()
    assert (study.said, capfd.readouterr()) == ([], ("", ""))
    found = [path.relative_to(study.folder) for path in study.folder.rglob("*") if path.is_file()]
    read = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[name](study.folder, found)
    assert read == {"sft seed 1", "direct seed 1"}


def _tensorboard(folder, found):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = {path.parent.name: EventAccumulator(str((folder / path).parent)).Reload() for path in found if "tfevents" in path.name}
    tags = set(runs["direct seed 1"].Tags()["tensors"])
    assert {"sft s/train/loss", "distill s/train/loss", "test/tinyworld/rouge_l"} <= tags
    return set(runs)


def _trackio(folder, found):
    import sqlite3

    (path,) = (folder / path for path in found if path.suffix == ".db")
    rows = sqlite3.connect(path).execute("SELECT run_name, metrics FROM metrics").fetchall()
    assert any("test/tinyworld/rouge_l" in str(row[1]) for row in rows)
    return {row[0] for row in rows}


def _wandb(folder, found):
    runs = {path.parent.name.rpartition("-")[2]: folder / path for path in found if path.suffix == ".wandb"}
    names = {trackers.key_of(["t", name]): name for name in ("sft seed 1", "direct seed 1")}
    content = SimpleNamespace(**{names[run].replace(" ", "_"): path.read_bytes() for run, path in runs.items()})
    assert b"distill s/train/loss" in content.direct_seed_1
    assert b"test/tinyworld/rouge_l" in content.direct_seed_1
    return {names[run] for run in runs}
