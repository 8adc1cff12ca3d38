"""The short form of benchmarks/fuzz.py: wrong recipes and data are refused in sentences that name their place, before any stage."""

import runpy
from pathlib import Path
from unittest import mock

import pytest
from transformers import AutoModelForCausalLM

FUZZ = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "fuzz.py"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SECRET", "s3cr3t")


def test_the_last_sentence_of_many_has_no_place():
    for left in ("1 more problem is", "30 more problems are"):
        assert FUZZ["PLACE"].search(f"recipe: {left} shown when those above are corrected")


def test_no_alarm_rings_during_the_import_of_transformers():
    """On a busy machine, the import lasted longer than the alarm. It left half a package, and all later tries failed. Now a model is built
    before the first alarm, which imports what tries need."""
    build = AutoModelForCausalLM.from_config
    with mock.patch.object(AutoModelForCausalLM, "from_config", side_effect=build) as built, mock.patch("signal.alarm") as alarm:
        FUZZ["Tries"]()
    assert built.called
    assert not alarm.called


@pytest.mark.slow
@pytest.mark.parametrize(("what", "count", "seed"), [("recipes", 120, 16), ("data", 50, 16)])
def test_wrong_input_is_refused_before_any_stage(what, count, seed, tmp_path):
    tries = FUZZ["Tries"]()
    FUZZ[f"fuzz_{what}"](count, seed, tries)
    assert not tries.problems, "\n".join(tries.problems)
    assert sum(tries.count.values()) == count
    assert not list(tmp_path.glob("runs*"))
