"""Completion in a shell, as bash asks for it."""

import pytest
import typer
from tests.unit.report.builder import SMALL, StudySpec, build_study
from typer._completion_classes import BashComplete

from tadistill.cli import app


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    build_study(folder / "runs", StudySpec(SMALL, (10,), {"dolly": 2}, (), 1))
    (folder / "mine.yaml").write_text("study: mine\nteacher: gpt2\nstudent: gpt2\ndata: dolly\n")
    (folder / "more").mkdir()
    return folder


@pytest.fixture
def offered(place, monkeypatch):
    """Return what is offered at the end of a command line."""
    monkeypatch.chdir(place)

    def ask(line: str) -> list[str]:
        words = f"tadistill {line}"
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        return BashComplete(typer.main.get_command(app), {}, "tadistill", "_TADISTILL_COMPLETE").complete().split("\n")

    return ask


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run qu", ["quickstart"]),
        ("plan methods/gk", ["methods/gkd"]),
        ("run m", ["mine.yaml", "more/", "minillm/gpt2-120M", "methods/gkd"]),
        ("doctor smoll", ["smollm2_dolly"]),
        ("report d", ["demo"]),
        ("export demo di", ["direct", "direct-long"]),
        ("judge demo --arm c", ["chain"]),
        ("run quickstart method.optim.schedule=", ["method.optim.schedule=cosine", "method.optim.schedule=linear"]),
        ("run quickstart arms.assistant-teaches.opt", ["arms.assistant-teaches.optim.lr="]),
        ("run quickstart models.xl.init.lay", ["models.xl.init.layers=", "models.xl.init.layers_by="]),
        ("run quickstart analyse=", ["analyse=true", "analyse=false"]),
        ("run nothing.yaml method.se", ["method.select.metric=", "method.select.every="]),
        ("eval x --set data.te", ["data.template=", "data.test="]),
        ("eval x --set data.template=", ["data.template=alpaca", "data.template=chat", "data.template=plain"]),
        ("explain method.optim.l", ["method.optim.lr", "method.optim.lr_min"]),
        ("explain kd_", ["kd_ratio"]),
    ],
)
def test_words_are_offered(offered, line, words):
    found = offered(line)
    assert {*words} <= {*found}
    assert all(word.startswith(line.split(" ")[-1]) for word in found)


@pytest.mark.parametrize("line", ["export nothing x", "eval x --set method", "export demo zz"])
def test_nothing_fits(offered, line):
    assert offered(line) == [""]
