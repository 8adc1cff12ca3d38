"""Send the numbers of a study to experiment trackers, such as W&B: one run for each arm (a path of models) and training seed.

While a training of an arm runs, the training's numbers are sent to the tracker's run of the arm. Each number's name begins with the kind of
stage and the trained model, as in `distill s/train/loss`. At the end, the means on the test sets follow (`test/dolly/rouge_l` …). If
several arms share a training, its numbers are sent to the run of each arm. runs/STUDY/trackers.json records what was sent. A continued
study sends only what is new.
"""

import contextlib
import importlib.util
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tadistill.config import Recipe
from tadistill.disk import read_json, write_json
from tadistill.errors import ConfigError
from tadistill.plan.arms import Plan, PlannedArm
from tadistill.plan.graph import with_ancestors
from tadistill.store import Store, key_of

_SECONDS = 10.0
_STATE = "trackers.json"
Values = Mapping[str, float]


class _Run(Protocol):
    def log(self, stage: str, step: int, values: Values) -> None: ...
    def flush(self) -> None: ...
    def finish(self, results: Values) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, study: str, name: str, config: dict[str, Any]):  # the folder replaces a project
        self.writer = import_module("tensorboard.summary").Writer(str(folder / "tensorboard" / name))

    def log(self, stage: str, step: int, values: Values) -> None:
        for key, value in values.items():
            self.writer.add_scalar(f"{stage}/{key}", value, step)

    def flush(self) -> None:
        self.writer.flush()

    def finish(self, results: Values) -> None:
        for key, value in results.items():
            self.writer.add_scalar(key, value, 0)
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, study: str, name: str, config: dict[str, Any]):
        wandb = import_module("wandb")
        quiet = wandb.Settings(silent=True, console="off")
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # otherwise it advertises Weave, silent or not, where openai is imported
        common: dict[str, Any] = {"project": study, "group": study, "name": name, "config": config, "dir": str(folder), "settings": quiet}
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
            common["mode"] = "offline"  # otherwise wandb would ask for a login in the middle of a run
        self.run = wandb.init(id=key_of([study, name]), resume="allow", reinit="create_new", **common)
        self.stages: set[str] = set()

    def log(self, stage: str, step: int, values: Values) -> None:
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log(_row(stage, step, values))

    def flush(self) -> None:
        pass

    def finish(self, results: Values) -> None:
        self.run.summary.update(dict(results))
        self.run.finish()


def _row(stage: str, step: int, values: Values) -> dict[str, float]:
    return {f"{stage}/{key}": value for key, value in values.items()} | {f"{stage}/step": step}


class _Trackio:
    # Trackio allows one open run per process, so values are collected, and a run is opened only to send them

    def __init__(self, folder: Path, study: str, name: str, config: dict[str, Any]):
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported
        self.open: dict[str, Any] = {"project": study, "group": study, "name": name, "config": config, "resume": "allow", "embed": False}
        self.rows: list[dict[str, float]] = []

    def log(self, stage: str, step: int, values: Values) -> None:
        self.rows.append(_row(stage, step, values))

    def flush(self) -> None:
        if not self.rows:
            return
        with contextlib.redirect_stdout(io.StringIO()):
            trackio = import_module("trackio")
            run = trackio.init(**self.open, auto_log_gpu=False, auto_log_cpu=False)
            for row in self.rows:
                run.log(row)
            trackio.finish()
        self.rows.clear()

    def finish(self, results: Values) -> None:
        self.rows += [dict(results)] if results else []
        self.flush()


_KINDS: dict[str, Callable[..., _Run]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


def missing_trackers(recipe: Recipe) -> list[str]:
    """Return one sentence for each tracker of the recipe whose package is not installed."""
    absent = [name for name in recipe.runtime.trackers if importlib.util.find_spec(name) is None]
    return [f"runtime.trackers: the package of {name} is not installed; run `pip install 'tadistill[{name}]'`" for name in absent]


def check_trackers(recipe: Recipe) -> None:
    """Raise a ConfigError if the package of a tracker is not installed."""
    if absent := missing_trackers(recipe):
        raise ConfigError(*absent)


def _rows(path: Path, after: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > after:
            rows.append(row)
    return rows


class Trackers:
    """The tracker runs of all arms and seeds of a study. If a tracker fails, it is switched off with a message, and the study goes on."""

    def __init__(self, plan: Plan, store: Store, say: Callable[[str], None]):
        self.plan, self.store, self.say = plan, store, say
        self.folder = store.root.parent / plan.recipe.study
        self.at = 0.0
        self.path = self.folder / _STATE
        self.sent: dict[str, dict[str, dict[str, int]]] = read_json(self.path) if self.path.is_file() else {}
        self.off: set[str] = set()
        self.runs: dict[tuple[str, str], _Run] = {}

    def tick(self) -> None:
        """Send new values, at most once in ten seconds."""
        if self.plan.recipe.runtime.trackers and time.monotonic() - self.at > _SECONDS:
            self.send()

    def send(self) -> None:
        """Send all new values of trainings, and the results of arms that have been evaluated."""
        for tracker in self.plan.recipe.runtime.trackers:
            for arm in self.plan.arms:
                for seed in self.plan.recipe.seeds:
                    if tracker not in self.off:
                        self._send(tracker, arm, seed)
        self.at = time.monotonic()

    def close(self) -> None:
        """Send the remaining values and close all runs."""
        self.send()
        for (tracker, _), run in self.runs.items():
            with self._guarded(tracker):
                run.finish({})
        self.runs.clear()

    def _send(self, tracker: str, arm: PlannedArm, seed: int) -> None:
        name = f"{arm.name} seed {seed}"
        sent = self.sent.setdefault(tracker, {}).setdefault(name, {})
        measured = [arm.evaluate[seed], *(keys[seed] for keys in arm.also.values())]
        if measured[0] in sent:
            return
        with self._guarded(tracker):
            for label, key in self._stages(arm, seed).items():
                for row in _rows(self.store.folder(key) / "metrics.jsonl", after=sent.get(key, 0)):
                    self._run(tracker, arm, name, seed).log(label, row["step"], {k: v for k, v in row.items() if k != "step"})
                    sent[key] = row["step"]
            if (tracker, name) in self.runs:
                self.runs[tracker, name].flush()
            if all(self.store.finished(key) for key in measured):
                self._run(tracker, arm, name, seed).finish(self._results(arm, seed))
                del self.runs[tracker, name]
                sent[measured[0]] = 1
            write_json(self.path, self.sent)

    def _run(self, tracker: str, arm: PlannedArm, name: str, seed: int) -> _Run:
        if (tracker, name) not in self.runs:
            config = {"study": self.plan.recipe.study, "arm": arm.name, "path": arm.arm.text, "seed": seed}
            self.runs[tracker, name] = _KINDS[tracker](self.folder, self.plan.recipe.study, name, config)
        return self.runs[tracker, name]

    def _stages(self, arm: PlannedArm, seed: int) -> dict[str, str]:
        final = arm.final[seed]
        needed = with_ancestors(self.plan.stages, [final]) if final else set()
        found: dict[str, str] = {}
        for key, stage in self.plan.stages.items():  # parents before children
            if key in needed and stage.spec.trains:
                label = f"{stage.kind} {stage.model}"
                found[label if label not in found else f"{label} {1 + sum(other.startswith(label) for other in found)}"] = key
        return found

    def _results(self, arm: PlannedArm, seed: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for suffix, key in {"": arm.evaluate[seed], **{f"@{name}": keys[seed] for name, keys in arm.also.items()}}.items():
            scores = read_json(self.store.folder(key) / "scores.json")
            for name, table in scores.items():
                for metric, rows in table.items():  # (prompts, seeds)
                    found[f"test/{name}/{metric}{suffix}"] = statistics.fmean(value for row in rows for value in row)
        return found

    @contextlib.contextmanager
    def _guarded(self, tracker: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker may lose its server, and this must not end the study
            self.off.add(tracker)
            self.say(f"{tracker} is switched off, because it failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
