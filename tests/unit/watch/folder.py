"""A study's folder in any state: a plan of two models and two seeds, logs, manifests, and the record of a run."""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tadistill.disk import write_json
from tadistill.runner.local import LocalRun, StageProgress, _born
from tadistill.store import ROLLOUTS, Store

NASTY = "<script>window.hacked = 1</script>"
PLAN = {  # label -> key, kind, parents, steps
    "sft xl, seed 1": ("1" * 16, "sft", {}, 100),
    "sft s, seed 1": ("2" * 16, "sft", {}, 100),
    "sft s, seed 2": ("3" * 16, "sft", {}, 100),
    "distill xl -> s, minillm, seed 1": ("4" * 16, "distill", {"teacher": "1" * 16, "student": "2" * 16}, 100),
    "distill xl -> s, minillm, seed 2": ("5" * 16, "distill", {"teacher": "1" * 16, "student": "3" * 16}, 100),
    "evaluate distill xl -> s, seed 1": ("6" * 16, "evaluate", {"model": "4" * 16}, None),
}
XL, S1, S2, D1, D2, E1 = (key for key, *_ in PLAN.values())


@dataclass
class Folder:
    """A study that the test writes by hand."""

    runs: Path

    @property
    def study(self) -> Path:
        return self.runs / "small"

    @property
    def store(self) -> Store:
        return Store(self.runs / "store")

    def log(self, key: str, first: int, last: int, loss: float = 2.0) -> None:
        """Append the lines of updates first … last to a stage's log."""
        path = self.store.folder(key) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        dev = {"dev/rouge_l": 20.0, "dev/rouge_l/my chat": 19.0}
        rows = [{"step": i, "train/loss": loss, "rollout/entropy": 1.0} | dev for i in range(first, last + 1)]
        with path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def finish(self, *keys: str, alarms: tuple[str, ...] = ()) -> None:
        for key in keys:
            write_json(self.store.folder(key) / "manifest.json", {"seconds": 61.0, "files": {}, "alarms": alarms})

    def sampled(self, key: str, response: str) -> None:
        row = {"prompt": "a line\n" * 40 + "a question", "response": response}
        write_json(self.store.folder(key) / ROLLOUTS, {"step": 40, "rows": [row]})

    def run(self, *running: str, dead: bool = False, **facts) -> None:
        """Write the record of a run of this process, or of a process that has ended."""
        stages = {key: StageProgress("", 30, 100, "loss 2.000, 120 tokens/s", 65.0, 100.0) for key in running}
        born = 1.0 if dead else _born(os.getpid()) or 0.0
        common = {"pid": os.getpid(), "host": platform.node(), "born": born, "command": "tadistill run small.yaml", "started": "today"}
        numbers = {"seen": time.time(), "done": 1, "total": len(PLAN), "seconds": 300.0, "left": 240.0}
        run = LocalRun(**common | numbers | facts, stages=stages)
        write_json(self.study / "local" / f"{run.host}-{run.pid}.json", asdict(run))


def make_folder(runs: Path) -> Folder:
    stages = [
        {"key": key, "kind": kind, "label": label, "model": "s", "parents": parents, "seed": 1, "arms": ["a"], "steps": steps}
        for label, (key, kind, parents, steps) in PLAN.items()
    ]
    write_json(runs / "small" / "plan.json", {"stages": stages, "command": "tadistill run small.yaml"})
    return Folder(runs)
