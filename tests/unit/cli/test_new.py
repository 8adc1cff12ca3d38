"""`tadistill new`: four answers become a recipe that can be planned."""

from functools import cache
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from tests.byte_models import CHATML, ROWS, byte_model, byte_tokenizer, save, write_rows
from typer.testing import CliRunner

from tadistill.cli import app
from tadistill.cli.writing import _METHODS, recipe_text
from tadistill.config import load
from tadistill.config.method import METHODS
from tadistill.config.schema import recipe_schema, schema_file
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save(folder / "teacher", byte_model(), byte_tokenizer(CHATML))
    save(folder / "student", byte_model(seed=1), byte_tokenizer(CHATML))
    save(folder / "plain", byte_model(), byte_tokenizer(None))
    (folder / "rows").mkdir()
    for role in ("train", "dev", "test"):
        write_rows(folder / "rows" / f"{role}.jsonl", ROWS * 4)
    write_rows(folder / "all.jsonl", ROWS * 4)
    (folder / "recipes").mkdir()
    return folder


@pytest.fixture(autouse=True)
def here(inputs, monkeypatch):
    monkeypatch.chdir(inputs)


def new(*arguments: str, answers: str = ""):
    return CliRunner().invoke(app, ["new", *arguments], input=answers, catch_exceptions=False)


def flags(**changed: str) -> list[str]:
    given = {"teacher": "teacher", "student": "student", "data": "rows", "method": "gkd"} | changed
    return [part for name, value in given.items() for part in (f"--{name}", value)]


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(recipe_schema())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_of_every_method_can_be_planned(method, tmp_path):
    file = tmp_path / f"{method}.yaml"
    found = new(str(file), *flags(method=method))
    assert f"next: tadistill plan {file}" in found.output.replace("\n", "")
    recipe = load(file)
    assert recipe.study == method
    assert make_plan(recipe).stages
    validator().validate(yaml.safe_load(file.read_text().replace("2e-5", "0.00002")))


def test_the_recipe_points_editors_to_the_schema_and_explains_its_keys(tmp_path):
    new(str(tmp_path / "mine.yaml"), *flags())
    first, *rest = (tmp_path / "mine.yaml").read_text().splitlines()
    assert first == f"# yaml-language-server: $schema={schema_file().as_uri()}"
    assert all("#" in line or line.endswith(":") or line.startswith(("study", "teacher", "student")) for line in rest)


def test_questions_are_asked_at_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("tadistill.cli.writing._at_terminal", lambda: True)
    found = new(str(tmp_path / "a.yaml"), "--student", "student", answers="teacher\nrows\ngdk\ngkd\n")
    assert "Teacher (hub id or directory):" in found.output
    assert "Student" not in found.output
    assert "`gdk` is not a method; did you mean `gkd`?" in found.output.replace("\n", " ")
    assert load(tmp_path / "a.yaml").method.objective.type == "jensen_shannon"


def test_without_a_terminal_one_sentence_names_the_options(tmp_path):
    with pytest.raises(
        ConfigError, match="`tadistill new` can ask questions only at a terminal; give the answers with --student and --method"
    ):
        new(str(tmp_path / "a.yaml"), "--teacher", "teacher", "--data", "rows")
    with pytest.raises(ConfigError, match="`gdk` is not a method; did you mean `gkd`"):
        new(str(tmp_path / "a.yaml"), *flags(method="gdk"))
    with pytest.raises(ConfigError, match=r"nowhere/a.yaml cannot be written \(No such file or directory\)"):
        new("nowhere/a.yaml", *flags())
    assert not (tmp_path / "a.yaml").exists()


def test_the_help_lists_the_methods():
    assert set(_METHODS.split(", ")) == set(METHODS)


def test_a_file_is_never_overwritten(tmp_path):
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="already exists; choose another name for the new recipe"):
        new(str(tmp_path / "a.yaml"), *flags())
    assert (tmp_path / "a.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("data", "loads", "changes"),
    [
        ("rows", ["../rows", "../rows", "../rows"], 0),
        ("rows/train.jsonl", ["../rows/train.jsonl", "../rows/dev.jsonl", "../rows/test.jsonl"], 0),
        ("all.jsonl", ["../all.jsonl"] * 3, 2),
        ("dolly", ["dolly"] * 3, 0),
        ("nope.jsonl", ["nope.jsonl"] * 3, 2),
    ],
)
def test_data_becomes_three_sets_with_paths_from_the_recipe(inputs, data, loads, changes):
    file = inputs / "recipes" / f"{data.replace('/', '-')}.yaml"
    said = new(str(file), *flags(data=data)).output
    assert (f"{data} does not exist yet; write this file" in said) == (data == "nope.jsonl")
    text = file.read_text()
    content = yaml.safe_load(text)
    assert [content["data"][role] for role in ("train", "dev", "test")] == loads
    assert text.count("CHANGE THIS") == changes
    assert content["teacher"] == "../teacher"


@pytest.mark.parametrize(
    ("teacher", "template"),
    [("teacher", "chat"), ("plain", "alpaca"), ("org/some-Instruct", "chat"), ("org/gemma-3-1b-it", "chat"), ("org/some-base", "alpaca")],
)
def test_the_template_is_that_of_the_teacher(tmp_path, teacher, template):
    new(str(tmp_path / "a.yaml"), *flags(teacher=teacher))
    assert yaml.safe_load((tmp_path / "a.yaml").read_text())["data"]["template"] == template


def write(folder: Path, **given: str) -> tuple[str, dict]:
    text = recipe_text(folder / "a.yaml", **{"teacher": "gpt2", "student": "gpt2", "data": "dolly", "method": "kd"} | given)
    return text, yaml.safe_load(text)


@pytest.mark.parametrize("data", ["HuggingFaceH4/ultrachat_200k", "some/very/long/path/of/a/data/set/on/this/disk"])
def test_a_comment_is_no_part_of_a_long_value(tmp_path, data):
    text, content = write(tmp_path, data=data)
    assert [content["data"][role] for role in ("train", "dev", "test")] == [data] * 3
    assert text.count(f": {data} # ") == 3
    assert write(tmp_path, method=max(METHODS, key=len))[1]["method"]["name"] == max(METHODS, key=len)


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["all"], ["all", "all", "all"]),
        (["rows", "dev", "test"], ["rows", None, None]),
        (["train", "more"], [None, "train", "train"]),
        (["test"], ["train", "train", None]),
        (["a", "b"], ["train", "train", "train"]),
    ],
)
def test_the_split_of_a_folder_is_the_file_that_it_has(tmp_path, files, splits):
    for name in files:
        (tmp_path / f"{name}.jsonl").touch()
    text, content = write(tmp_path, data=str(tmp_path))
    sets = [content["data"][role] for role in ("train", "dev", "test")]
    assert sets == [{"load": str(tmp_path), "split": split} if split else str(tmp_path) for split in splits]
    assert text.count("CHANGE THIS") == sum(split is not None for split in splits[1:])


def test_commands_with_a_space_in_the_name_can_be_copied(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    found = new("~/sub/my kd.yaml", *flags())
    file = tmp_path / "sub" / "my kd.yaml"
    assert f"next: tadistill plan '{file}'" in found.output.replace("\n", "")
    assert "#   tadistill run 'my kd.yaml'      # does" in file.read_text()
    assert not Path("~").exists()


def test_the_working_directory_is_written_as_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").touch()
    assert "\n  train: ." in (text := recipe_text(Path("a.yaml"), "gpt2", "gpt2", ".", "kd"))
    assert "./." not in text
