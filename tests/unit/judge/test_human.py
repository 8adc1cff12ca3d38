"""Blind sheets: what raters see, and what comes back from them."""

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tadistill.cli import app
from tadistill.config.evaluate import BlindSheet
from tadistill.errors import ConfigError, DataError, StoreError
from tadistill.judge import commands
from tadistill.judge.people import Rating, Sheet, agreement, summarise_ratings, write_sheet
from tadistill.terminal import Terminal


def export(study, **options) -> Path:
    return commands.export_sheet("demo", BlindSheet(**options), runs=study.study_dir.parent, console=Terminal(file=io.StringIO()))


def read(study, *files: Path, **options) -> dict:
    console = Terminal(file=io.StringIO(), width=120)
    path = commands.read_sheets("demo", files, runs=study.study_dir.parent, console=console, command="tadistill human demo", **options)
    return json.loads(path.read_text())


def key_of(page: Path) -> dict:
    return json.loads(page.with_suffix(".key.json").read_text())


def fill(page: Path, to: Path, rate, *, delimiter: str = ",") -> Path:
    """The sheet's CSV with `rate(item, arm)` in its last column, as a spreadsheet saves it."""
    key = key_of(page)["items"]
    rows = list(csv.DictReader(io.StringIO(page.with_suffix(".csv").read_text())))
    for row in rows:
        row["rating"] = rate(row["item"], key[row["item"]]["letters"][row["letter"]])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    to.write_text("\ufeff" + text.getvalue(), encoding="utf-8", newline="")
    return to


def test_sheet_is_blind_and_shuffled(study):
    page = export(study, reference=True)
    key = key_of(page)
    for text in (page.read_text(), page.with_suffix(".csv").read_text()):
        for secret in ("good", "bad", "dolly 0 of run 10, draw 1", "letters", "training_seed", '"set"'):
            assert secret not in text, secret
        assert key["sheet"] in text
    items = key["items"].values()
    assert sorted((i["set"], i["index"]) for i in items) == [("dolly", i) for i in range(4)] + [("facts", i) for i in range(6)]
    assert [i["index"] for i in items] != sorted(i["index"] for i in items)
    assert len({tuple(i["letters"].values()) for i in items}) > 1
    assert all(sorted(i["letters"].values()) == ["bad", "good", "reference"] for i in items)
    words = {"good": "fine", "bad": "poor", "reference": "reference"}
    for row in csv.DictReader(io.StringIO(page.with_suffix(".csv").read_text())):
        item = key["items"][row["item"]]
        assert row["answer"].startswith(words[item["letters"][row["letter"]]])
        assert row["rating"] == ""


def test_a_sheet_in_use_is_left_alone(study):
    page = export(study, limit=2)
    before = page.read_text()
    assert export(study, limit=2).read_text() == before
    with pytest.raises(ConfigError, match="choose another --name"):
        export(study, limit=3)
    assert page.read_text() == before
    assert export(study, limit=3, name="second") != page


def test_a_sheet_and_its_ratings_name_the_evaluations(study, tmp_path):
    page = export(study, limit=2)
    plan = json.loads((study.study_dir / "plan.json").read_text())
    rated = {arm["name"]: [arm["evaluate"]["10"]] for arm in plan["arms"] if arm["name"] != "late"}
    assert key_of(page)["evaluations"] == rated
    filled = fill(page, tmp_path / "ann.csv", lambda item, arm: 3)
    assert read(study, filled)["evaluations"] == rated
    key = key_of(page)
    del key["evaluations"]  # a sheet of an earlier version is the same sheet, and can still be read
    page.with_suffix(".key.json").write_text(json.dumps(key))
    assert "evaluations" not in read(study, filled)
    assert key_of(export(study, limit=2))["evaluations"] == rated


def test_a_sheet_needs_two_answers(study):
    with pytest.raises(ConfigError, match="2 to 26 answers"):
        export(study, arms=["good"])
    assert export(study, arms=["good"], reference=True).is_file()


def test_the_command_line_writes_a_sheet_and_reads_it_back(study, tmp_path):
    root = ["--runs", str(study.study_dir.parent)]
    done = CliRunner().invoke(app, ["human", "demo", "--arm", "good", "--reference", "--limit", "1", "--on", "facts", "--seed", "3", *root])
    assert done.exit_code == 0, done.output
    page = study.study_dir / "judge" / "sheet-blind.html"
    assert [(item["set"], sorted(item["letters"].values())) for item in key_of(page)["items"].values()] == [
        ("facts", ["good", "reference"])
    ]
    filled = fill(page, tmp_path / "ann.csv", lambda item, arm: 5 if arm == "good" else 2)
    assert CliRunner().invoke(app, ["human", "demo", str(filled), *root]).exit_code == 0
    assert json.loads((page.parent / "judge-human-blind.json").read_text())["raters"] == ["ann"]
    wrong = CliRunner().invoke(app, ["human", "demo", "--limit", "0", *root])
    assert "`limit` is 0" in str(wrong.exception)


def test_formulas_are_made_harmless(study, tmp_path):
    from .conftest import predictions

    path = predictions(study, "good")
    path.write_text(path.read_text().replace("fine text", "=HYPERLINK(1)"))
    assert "'=HYPERLINK" in export(study).with_suffix(".csv").read_text()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_two_raters(study, tmp_path, delimiter):
    page = export(study)
    key = key_of(page)["items"]
    lenient = fill(page, tmp_path / "ann.csv", lambda item, arm: 5 if arm == "good" else 2, delimiter=delimiter)
    strict = fill(page, tmp_path / "bob.csv", lambda item, arm: 3 if key[item]["set"] == "dolly" or arm == "good" else "")
    found = read(study, lenient, strict)
    rows = {(r["arm"], r.get("other"), r["set"]): r for r in found["rows"]}
    assert rows["good", None, "dolly"]["score"] == 4
    assert rows["bad", None, "dolly"]["score"] == 2.5
    assert rows["bad", None, "facts"]["score"] == 2
    assert rows["bad", None, "mean"]["score"] == 2.25
    assert (rows["good", None, "mean"]["n"], rows["good", None, "facts"]["low"]) == (10, 4)
    # dolly: Ann prefers good, Bob calls it a tie: the mean of +1 and 0 is a win; facts: Bob did not rate bad
    beaten = rows["bad", "good", "mean"]
    assert (beaten["wins"], beaten["ties"], beaten["losses"], beaten["win_rate"], beaten["n"]) == (0, 0, 10, 0, 10)
    assert (found["mode"], found["raters"], found["scale"], found["missing"]) == ("human", ["ann", "bob"], [1, 5], 6)
    assert (found["agreement"]["raters"], found["agreement"]["shared"]) == (2, 14)
    assert -1 <= found["agreement"]["value"] < 1


def test_a_mean_over_sets_needs_ratings_of_all_of_them():
    """Otherwise the means of a table would cover different sets. One answer of `facts` is rated, so only its arm has a mean."""
    items = {f"p{i:03d}": {"set": name, "letters": {"A": "kd", "B": "takd"}} for i, name in enumerate(["dolly", "vicuna", "facts"], 1)}
    ratings = [Rating("ann", item, letter, 3) for item in ("p001", "p002") for letter in "AB"]
    rows = summarise_ratings([*ratings, Rating("ann", "p003", "A", 1)], {"items": items, "scale": [1, 5]})["rows"]
    assert [row["set"] for row in rows if "score" in row] == ["dolly", "facts", "vicuna", "mean", "dolly", "vicuna"]
    assert [row["set"] for row in rows if "score" not in row] == ["dolly", "vicuna"]


def test_every_file_is_a_rater_whatever_its_name(study, tmp_path):
    page = export(study)
    names = ("a/answers.csv", "b/answers.csv", "b/answers.txt", "bob.csv")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
    files = [fill(page, tmp_path / name, lambda item, arm: 3) for name in names]
    again = tmp_path / "b" / ".." / "a" / "answers.csv"
    found = read(study, *files, again)
    assert found["raters"] == ["a/answers", "answers.txt", "b/answers.csv", "bob"]
    assert found["missing"] == 0
    assert found == read(study, *files) | {"created": found["created"]}


def test_agreement_on_a_published_example():
    """Krippendorff's example of four observers and twelve units (2011, "Computing Krippendorff's Alpha-Reliability"): 0.815 ordinal."""
    observers = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
    ratings = [
        Rating(f"r{i}", f"p{j}", "A", int(value))
        for i, line in enumerate(observers)
        for j, value in enumerate(line.split())
        if value != "."
    ]
    found = agreement(ratings, scale=(1, 5))
    assert found["value"] == pytest.approx(0.815, abs=5e-4)
    assert (found["raters"], found["shared"]) == (4, 11)
    assert agreement(ratings[:9], scale=(1, 5))["value"] is None  # one rater


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8-sig")
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("letter", "buchstabe", "has no column letter"),
        ("p002,", "q002,", "the sheet has no item `q002`; use one of its items, p001 to p010"),
        (",A,", ",Z,", "has no answer `Z`; use one of its answers, A, B"),
        (",3", ",6", "line 2: the rating is `6`; it must be a whole number from 1 to 5"),
        (",3", ",2.5", "the rating is `2.5`"),
        (",3", ",good", "the rating is `good`"),
        ("p001,B", "p001,A", "rated answer A of p001 twice"),
    ],
)
def test_bad_files(study, tmp_path, old, new, message):
    page = export(study)
    path = fill(page, tmp_path / "ann.csv", lambda item, arm: 3)
    edit(path, old, new)
    with pytest.raises(DataError, match=message) as caught:
        read(study, path)
    assert "\n" not in str(caught.value)


def test_more_bad_files(study, tmp_path):
    page = export(study)
    path = fill(page, tmp_path / "ann.csv", lambda item, arm: "")
    with pytest.raises(DataError, match="contains no rating"):
        read(study, path)
    path.write_text("")
    with pytest.raises(DataError, match="has no column item"):
        read(study, path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read(study, path)
    with pytest.raises(ConfigError, match="does not exist"):
        read(study, tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"sheet-other.key.json does not exist"):
        read(study, path, name="other")
    other = fill(export(study, name="other", limit=1), tmp_path / "other.csv", lambda item, arm: 3)
    with pytest.raises(DataError, match="the row belongs to sheet"):
        read(study, other)
    page.with_suffix(".key.json").write_text('{"items": 3}')
    with pytest.raises(DataError, match="is not the key of a sheet"):
        read(study, path)


def test_page_in_a_browser(browser, study, tmp_path):
    path = export(study, limit=2, reference=True)
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.fill("#rater", 'Ann "A", of X')
    page.locator("fieldset[data-letter=B] label:has(input[value='4'])").click()  # with the mouse: p001 B 4
    page.keyboard.press("ArrowRight")  # the focused radio's own key: B becomes 5
    page.locator("#next").click()
    page.keyboard.press("2")  # p002 A 2, the next is marked
    page.keyboard.press("3")  # p002 B 3
    page.keyboard.press("ArrowUp")
    page.keyboard.press("0")  # removed again: B
    assert page.text_content("#done") == "2 of 12 rated"
    page.wait_for_timeout(1000)  # Chromium passes on what a page stores a moment later, and a busy machine reloads before that
    page.reload()
    assert page.text_content("#place") == "Task 2 of 4"
    assert page.text_content("#done") == "2 of 12 rated"
    assert page.input_value("#rater") == 'Ann "A", of X'
    with page.expect_download() as waiting:
        page.click("#download")
    assert waiting.value.suggested_filename == "answers.csv"
    waiting.value.save_as(tmp_path / "answers.csv")
    rows = list(csv.DictReader((tmp_path / "answers.csv").open(encoding="utf-8")))
    assert [(r["item"], r["letter"], r["rating"]) for r in rows] == [("p001", "B", "5"), ("p002", "A", "2")]

    found = read(study, tmp_path / "answers.csv")
    items = key_of(path)["items"]
    assert found["raters"] == ['Ann "A", of X']
    scores = {(r["arm"], r["set"]): r["score"] for r in found["rows"] if "score" in r and r["set"] != "mean"}
    expected = {(items["p001"]["letters"]["B"], items["p001"]["set"]): [5]}
    expected.setdefault((items["p002"]["letters"]["A"], items["p002"]["set"]), []).append(2)
    assert scores == {place: sum(values) / len(values) for place, values in expected.items()}
    assert found["agreement"]["value"] is None

    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*sheet-a.key.json: .*; one of the folders in this path is a file"):
        write_sheet(tmp_path / "file", Sheet("id", [], {}), name="a")
