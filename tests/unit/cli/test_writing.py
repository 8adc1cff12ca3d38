"""The commands that help to write a recipe."""

from typer.testing import CliRunner

from tadistill.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


def test_recipes_lists_a_line_for_each():
    lines = dict(line.split(maxsplit=1) for line in run("recipes").output.splitlines())
    assert lines["quickstart"].startswith("Teacher, teacher assistant (TA) and student on an embedded world")
    assert lines["methods/gkd"].startswith("GKD (Agarwal et al. 2024)")


def test_explain_prints_a_key():
    text = run("explain", "method.optim.lr").output
    for words in ("method.optim.lr", "Peak learning rate.", "greater than 0, at most 10", "0.0005", "docs/reference/recipe.md#method"):
        assert words in text


def test_plan_takes_the_name_of_a_shipped_recipe_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("plan", "quickstart", "seeds=[10]", "--runs", str(tmp_path / "runs"))
    assert "`quickstart` is a recipe that is shipped with tadistill" in found.stderr.replace("\n", "")
    assert found.stdout.startswith("quickstart: ")
