"""The metrics of a training stage: one JSON object per line in metrics.jsonl, and accelerate's trackers if a recipe names some.

Metric names are paths: train/loss, dev/rouge_l, rollout/length. After a resume, lines after the checkpoint are dropped, so that a curve has
every step once.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tadistill.disk import write_text, writing


class RunLog:
    """The log of one training stage."""

    def __init__(self, path: Path, *, resume_step: int = 0, track: Callable[[dict, int], None] | None = None):
        self.path, self.track = path, track
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resume_step]
            write_text(path, "".join(line + "\n" for line in lines))  # a kill must not take the lines before the checkpoint along

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line for `step`, the number of updates done."""
        line = {"step": step, **{name: float(f"{value:.6g}") for name, value in metrics.items()}}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.track:
            self.track(dict(metrics), step)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # a line cut short by a kill
