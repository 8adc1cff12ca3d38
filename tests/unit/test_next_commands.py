"""The end of a command that runs stages: the answer, the next commands, and the options of its output."""

import io
import json

import pytest
from tests.unit.report.builder import SMALL, ArmSpec, StudySpec, build_study

from tadistill.cli.shared import report_study, terminal_for
from tadistill.errors import ConfigError
from tadistill.store import store_of
from tadistill.terminal import Terminal


def ended(study, **options):
    terminal = Terminal(file=io.StringIO(), width=80, **options)
    report_study(study.study_dir, store_of(study.study_dir.parent), terminal)
    return terminal.file.getvalue()


def test_commands_that_come_next(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL))
    path = study.study_dir / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": "tadistill run 'my demo.yaml' seeds=[1] optim.lr=2"}))
    place = f"--runs {tmp_path}"
    out = ended(study)
    said = [line.strip() for line in out.splitlines() if line.startswith("  tadistill ")]
    watch, export, more = said
    assert watch == f"tadistill watch demo {place}"
    assert export in (f"tadistill export demo {arm.name} ./{arm.name} {place}" for arm in SMALL)
    assert more == "tadistill run 'my demo.yaml' 'seeds=[10,20,30]' optim.lr=2"
    assert f"report: {study.study_dir / 'report.html'}" in out


def test_what_is_missing_is_run_first(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, unfinished=(("chain", 10),)))
    assert ended(study).endswith(f"Run what is missing:\n  {study.read().plan.command}\n")


def test_models_alone_have_no_next_command(tmp_path):
    study = build_study(tmp_path, StudySpec([ArmSpec("xl", ("xl",))], seeds=(0,), sets={"dolly": 12}, teacher=None, trained=False, also={}))
    assert ended(study).splitlines()[-1].startswith("report: ")


def test_the_report_as_an_event(tmp_path, capsys):
    study = build_study(tmp_path, StudySpec(SMALL))
    ended(study, events=True)
    event = json.loads(capsys.readouterr().out)
    assert event["event"] == "report"
    assert event["page"] == str(study.study_dir / "report.html")
    assert event["answer"].startswith("Distillation through")


def test_options_that_contradict_each_other(monkeypatch):
    monkeypatch.setattr("tadistill.terminal.Terminal.keep_stdout", lambda _: None)  # it would last for all later tests
    assert terminal_for(quiet=True, verbose=False, log="json").detail == "problems"
    with pytest.raises(ConfigError, match="--quiet and --verbose cannot be used together"):
        terminal_for(quiet=True, verbose=True, log="text")
