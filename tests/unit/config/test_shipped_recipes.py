"""Shipped recipes by name, in a checkout and in an installed wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from tadistill.config import load
from tadistill.config.recipe_files import located, recipes_folder, remark, shipped, summary
from tadistill.errors import ConfigError
from tadistill.results.study import find_study

ROOT = Path(__file__).parents[3]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_of_the_repository_is_shipped_and_has_a_line():
    assert {*shipped().values()} == {*(ROOT / "recipes").rglob("*.yaml")}
    assert [*shipped()][:2] == ["objectives", "quickstart"]
    lines = [summary(path) for path in shipped().values()]
    assert all(len(line) > 20 and line.endswith((".", "?")) for line in lines)  # one ended at the end of the file's first line
    assert not [line for line in lines if ".yaml" in line or "docs/" in line]  # a reader of the list sees neither


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml", "recipes/quickstart"])
def test_a_shipped_recipe_is_found_by_name(elsewhere, name):
    assert located(name) == recipes_folder() / "quickstart.yaml"
    assert remark(name) == f"`{name}` is a recipe that comes with tadistill: {recipes_folder() / 'quickstart.yaml'}"
    assert load(name).study == "quickstart"


@pytest.mark.parametrize(("name", "file"), [("methods/gkd", "methods/gkd"), ("gkd", "methods/gkd"), ("gpt2-takd", "takd/gpt2-takd")])
def test_the_last_part_of_a_name_is_enough(elsewhere, name, file):
    assert located(name) == recipes_folder() / f"{file}.yaml"


def test_a_file_wins_over_a_shipped_recipe(elsewhere):
    own = elsewhere / "quickstart.yaml"
    own.write_text((recipes_folder() / "quickstart.yaml").read_text(encoding="utf-8").replace("study: quickstart", "study: mine"))
    assert load("quickstart").study == load("quickstart.yaml").study == "mine"
    assert (
        remark("quickstart") == "`quickstart` is read from your file quickstart.yaml, and not from the recipe of tadistill with this name"
    )
    assert remark("quickstart.yaml") == ""
    assert load(ROOT / "recipes" / "quickstart.yaml").study == "quickstart"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("quikstart", "did you mean `quickstart`"), ("methods/gdk", "did you mean `methods/gkd`"), ("zzz", "`tadistill recipes` lists")],
)
def test_an_unknown_name_gets_a_hint(elsewhere, name, hint):
    with pytest.raises(ConfigError, match=hint):
        load(name)


def test_a_study_is_found_by_the_shipped_recipe_of_its_run(elsewhere):
    with pytest.raises(ConfigError, match=r"there is no study `methods/gkd` in \S+/runs; start one with `tadistill run methods/gkd`"):
        find_study("methods/gkd", Path("runs"))
    with pytest.raises(ConfigError, match=r"nothing.yaml is not a recipe that can be read"):
        find_study("nothing.yaml", Path("runs"))
    (elsewhere / "runs" / "gkd").mkdir(parents=True)
    (elsewhere / "runs" / "gkd" / "plan.json").write_text("{}")
    assert find_study("methods/gkd", Path("runs"))[0] == Path("runs/gkd")


@pytest.mark.slow
def test_a_wheel_holds_the_recipes(elsewhere):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(elsewhere), versions=["standard"])
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if name.startswith("tadistill/recipes/")}
        content.extractall(elsewhere / "site")
    files = (path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert names == {f"tadistill/{path.as_posix()}" for path in files}  # with the data of a recipe, which lies beside it
    program = (
        "from tadistill.config import load; from tadistill.config.recipe_files import shipped, located; "
        "from tadistill.config.schema import schema_file; import json; "
        "assert str(located('quickstart')).startswith(sys.argv[1]), located('quickstart'); "
        "assert schema_file().is_file(); print(load('quickstart').study, len(shipped()))"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, sys.argv[1]); {program}", str(elsewhere / "site")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == f"quickstart {len(shipped())}\n", ran.stderr
