"""The study that is judged: two arms whose answers a fake judge can tell apart, `good` better than `bad`."""

import io
import json
import ssl
from functools import cache
from pathlib import Path

import pytest
from tests.unit.report.builder import ArmSpec, Study, StudySpec, build_study

from tadistill.config.evaluate import Judge
from tadistill.config.load import read_settings
from tadistill.judge import commands
from tadistill.terminal import Terminal

CERTIFICATES = cache(ssl.create_default_context)


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Read the machine's certificates once, not for each client: the endpoints of these tests need none."""
    monkeypatch.setattr(ssl, "create_default_context", CERTIFICATES)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Requests to this machine go straight to it, and no key of the user is sent."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def predictions(study: Study, arm: str, seed: int = 10) -> Path:
    plan = json.loads((study.study_dir / "plan.json").read_text())
    key = next(entry["evaluate"][str(seed)] for entry in plan["arms"] if entry["name"] == arm)
    return study.store_dir / key[:2] / key / "predictions.jsonl"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two arms and one that is not evaluated yet, two seeds, sets of 4 and 6 prompts, two decoding seeds."""
    arms = [ArmSpec("good", ("xl", "s")), ArmSpec("bad", ("xl", "l", "s")), ArmSpec("late", ("xl", "m"))]
    late = (("late", 10), ("late", 20))
    made = build_study(tmp_path, StudySpec(arms, sets={"dolly": 4, "facts": 6}, decoding_seeds=2, unfinished=late))
    for arm, word in (("good", "fine"), ("bad", "poor")):
        for seed in (10, 20):
            path = predictions(made, arm, seed)
            rows = [json.loads(line) for line in path.read_text().split("\n") if line]
            for row in rows:
                row["prediction"] = f"{word} text {row['set']} {row['index']} of run {seed}, draw {row['seed']}"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


class Judged:
    """Runs `tadistill judge` on the study and keeps what it printed."""

    def __init__(self, study: Study):
        self.study, self.said = study, ""

    def __call__(self, url: str, **options):
        console = Terminal(file=(text := io.StringIO()), width=200)
        yes = options.pop("yes", True)
        given = {"model": "judge-1", "base_url": url, "timeout": 20.0, "jobs": 3} | options
        settings = read_settings(Judge, given, (), source="tadistill judge")
        root, command = self.study.study_dir.parent, "tadistill judge demo"
        try:
            path = commands.judge("demo", settings, runs=root, console=console, confirm=lambda _: yes, command=command)
        finally:
            self.said = text.getvalue()
        return path if path is None else json.loads(path.read_text())


@pytest.fixture
def judged(study: Study) -> Judged:
    return Judged(study)
