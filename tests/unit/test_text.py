"""Text of strangers: visible, short in messages, harmless in a terminal, in Markdown and in CSV; an output that cannot be written."""

import csv
import io
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from markupsafe import Markup
from tests.unit.advise.example import report
from tests.unit.report.builder import ArmSpec, StudySpec, build_study

from tadistill.advise.page import render_advice
from tadistill.disk import ordinary_permissions, read_json, write_json
from tadistill.errors import ConfigError, Gathering, ModelError, about
from tadistill.judge.people import Sheet, render_sheet
from tadistill.report import read_results, summary_table, write_report
from tadistill.report.plain_text import code, escape_markdown, side_by_side
from tadistill.store import Store
from tadistill.terminal import Terminal
from tadistill.text import counted, form, guarded, one_line, shortened, size, visible, visible_parts

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]")
EVIL = "a\x1b[2J\x1b]0;title\x07\u202eb\x9b\ud800\u2028c\r\0"


def test_control_characters_are_written_out():
    assert visible(EVIL) == r"a\x1b[2J\x1b]0;title\x07\u202eb\x9b\ud800\u2028c\r\x00"
    assert visible("é 😀 \t\n 👩\u200d👩") == "é 😀 \t\n 👩\u200d👩"
    assert one_line("a\nb") == r"a\nb"


@pytest.mark.parametrize("value", ["x" * 100_000, "x y " * 25_000, "`x` " * 2000])
@pytest.mark.parametrize("quote", ["`{}`", "'{}'", '"{}"', "{}", "[{}]"])
def test_a_message_is_short_and_one_line(value, quote):
    error = ConfigError(f"key.a is {quote.format(value)}\n\x1b[2J; correct the model's key")
    assert len(str(error)) <= 3000
    assert str(error).isprintable()
    assert str(error).startswith("key.a is ")
    assert error.problems[0] == shortened(error.problems[0])  # cutting again changes nothing
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


def test_sentences_with_apostrophes_are_not_cut():
    text = "the tokenizer's tokens differ from the model's, " * 8 + "so use the model's"
    assert str(ConfigError(text)) == text
    cut = str(ConfigError(f"models.a.load is '{'y' * 500}', which is no model; write a hub id"))
    assert cut.endswith("(342 more characters)', which is no model; write a hub id")


def test_several_problems_keep_their_names():
    found = Gathering()
    for name in ("a", "b"):
        with found.about(f"models.{name}"):
            raise ModelError("it has no EOS")
    with found.about("models.c"), about("models.d"):
        raise ModelError("models.d.load is missing")
    with pytest.raises(ModelError) as error:
        found.finish()
    assert error.value.problems == ("models.a: it has no EOS", "models.b: it has no EOS", "models.d.load is missing")


def test_cells_that_begin_a_formula_are_text():
    assert [guarded(c) for c in ("=1", "+1", "-1", "@a", "\tx", "1", "a=1")] == ["'=1", "'+1", "'-1", "'@a", "'\tx", "1", "a=1"]


def test_code_in_markdown_keeps_its_fence():
    assert code("a`b``c") == "``` a`b``c ```"
    assert code("x\n`````\ny\x1b", "yaml") == "``````yaml\nx\n`````\ny\\x1b\n``````"
    assert escape_markdown("[l](javascript:x)|<b>\x1b\n") == r"[l]\(javascript:x)\|&lt;b>\x1b "


def test_a_study_with_evil_names_stays_harmless(tmp_path):
    evil = EVIL.replace("\ud800", "")  # JSON files hold no half characters
    arms = [ArmSpec(name, ("xl", "s"), gain=0.1 * i, method=evil) for i, name in enumerate(('=cmd|"/C calc"!A1', evil, "-3"))]
    study = build_study(tmp_path, StudySpec(arms=arms, prompt=evil + " {index}", answer=evil))
    plan = read_json(study.study_dir / "plan.json")
    write_json(study.study_dir / "plan.json", plan | {"recipe_text": f"a\n`````\n{evil}", "command": f"tadistill run `x` {evil}"})
    results = read_results(study.study_dir, Store(study.store_dir))
    write_report(results)
    printed = io.StringIO()
    console = Terminal(file=printed, force_terminal=True, width=100)
    console.print(summary_table(results), side_by_side(results, 2))
    markdown = (study.study_dir / "report.md").read_text(encoding="utf-8")
    for text in (re.sub(r"\x1b\[[\d;]*m", "", printed.getvalue()), markdown):
        assert not HIDDEN.search(text)
        assert r"\x1b[2J" in text
    page = (study.study_dir / "report.html").read_text(encoding="utf-8")
    assert not HIDDEN.search(page)
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert r"\u202eb" in str(embedded["samples"])
    assert not HIDDEN.search(str(embedded["samples"]))
    rows = [*csv.reader(io.StringIO((study.study_dir / "results.csv").read_text(encoding="utf-8")))]
    named = {row[rows[0].index("arm")] for row in rows[1:]}
    assert {'\'=cmd|"/C calc"!A1', "'-3"} <= named
    assert not any(cell.startswith(("=", "@", "+")) for row in rows for cell in row)


def test_sheets_and_advice_show_what_is_hidden():
    items = [{"item": "1", "instruction": EVIL, "input": "", "answers": [{"letter": "A", "text": EVIL}]}]
    sheet = render_sheet(Sheet("s", tuple(items), {}))
    assert not HIDDEN.search(sheet)
    assert r"a\\x1b[2J" in sheet
    assert "\\u001b" not in sheet
    advice = render_advice(replace(report(), study=EVIL, command=EVIL))
    assert not HIDDEN.search(advice)
    assert r"a\x1b[2J" in advice


def test_a_sentence_is_printed_as_it_is():
    console = Terminal(file=(printed := io.StringIO()), width=20, force_terminal=True)
    console.say(sentence := "wrote out[a]/x[/b] and :warning:/2.csv, with more than 20 characters")
    assert printed.getvalue() == f"{sentence}\n"


def test_the_parts_of_a_value_become_visible():
    assert visible_parts({"a\x1b": ["\u202eb", ("c", 1)], "d": None}) == {r"a\x1b": [r"\u202eb", ["c", 1]], "d": None}
    assert visible_parts(Markup("<b>\u200f</b>")) == "<b>\u200f</b>"


def test_files_for_others_follow_the_umask(tmp_path):
    (tmp_path / "private").write_text("x", encoding="utf-8")
    (tmp_path / "private").chmod(0o600)
    before = os.umask(0o022)
    try:
        ordinary_permissions(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "environment", "code", "words"),
    [
        ("/dev/full", {}, 1, "error: the output cannot be written (No space left on device)"),
        (None, {"PYTHONIOENCODING": "ascii", "COLUMNS": "20"}, 0, ""),
        (None, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 0, ""),
        ("pipe", {}, 141, ""),
    ],
)
def test_an_output_that_cannot_show_all(output, environment, code, words, tmp_path):
    program = (
        "import sys; from tadistill import cli; from tadistill.cli.shared import console\n"
        "@cli.app.command()\ndef show():\n    for _ in range(999): console.print('\\u00e9 \\u2013 \\u2026 \\U0001f600', 'word ' * 9)\n"
        "sys.argv = ['tadistill', 'show']; cli.main()"
    )
    target = subprocess.PIPE if output in (None, "pipe") else open(output, "w")  # noqa: SIM115
    ran = subprocess.Popen([sys.executable, "-c", program], stdout=target, stderr=subprocess.PIPE, env=os.environ | environment)
    if output == "pipe":
        assert ran.stdout is not None
        ran.stdout.close()
        error = ran.stderr.read() if ran.stderr else b""
        ran.wait()
    else:
        _, error = ran.communicate()
    assert (ran.returncode, error.decode().strip()[: len(words) or None]) == (code, words)


def test_a_noun_has_the_form_that_its_number_needs():
    assert [counted(number, "stage") for number in (0, 1, 2)] == ["0 stages", "1 stage", "2 stages"]
    assert [counted(number, "of them is", "of them are") for number in (1, 3)] == ["1 of them is", "3 of them are"]
    assert [form(number, "reply", "replies") for number in (1, 1000)] == ["reply", "replies"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (37.8e6, "37.8 MB"), (1.93e9, "1.9 GB"), (2e13, "20.0 TB")),
        *((999.4, "999 B"), (999.7, "1.0 kB"), (999.94e6, "999.9 MB"), (999.96e6, "1.0 GB"), (999.96e9, "1.0 TB")),
    ],
)
def test_sizes_are_in_the_unit_that_fits(count, text):
    assert size(count) == text
