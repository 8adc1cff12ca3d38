"""The commands that help to write a recipe."""

import pytest
from typer.testing import CliRunner

from tadistill.cli import app
from tadistill.errors import ConfigError


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


def test_recipes_lists_a_line_for_each():
    lines = dict(line.split(maxsplit=1) for line in run("recipes").output.splitlines())
    assert lines["quickstart"].startswith("Teacher, teacher assistant (TA) and student on the built-in data set tinyworld")
    assert lines["methods/gkd"].startswith("GKD (Agarwal et al. 2024)")


def test_explain_prints_a_key():
    text = run("explain", "method.optim.lr").output
    for words in ("method.optim.lr", "Peak learning rate.", "greater than 0, at most 10", "0.0005", "The recipe"):
        assert words in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["error", "budget"], "The parts of a path's KL(student ‖ teacher)"),
        (["route"], "Several teachers at the start of a path"),
        (["sft"], "Supervised fine-tuning: training on the answers"),
        (["rouge_l"], "From 0 to 100; higher is better."),
        (["teacher"], "method.sampler, type teacher"),
        (["verdict"], "clearly better, clearly worse, equivalent or undecided"),
        (["Clear"], "excludes 0, also after adjustment"),
        (["entropy", "plane"], "score against entropy"),
        (["TA"], "a model of middle size"),
        (["t0.5"], "Decoding at temperature 0.5"),
        (["pass@8"], "at least one of k sampled answers"),
        (["~>"], "different tokenizers"),
        (["tempered"], "the assistant's mean entropy"),
    ],
)
def test_explain_knows_words_of_reports_and_metrics(words, said):
    assert said in " ".join(run("explain", *words).output.split())


def test_explain_explains_several_words():
    text = run("explain", "warmup", "micro_batch").output
    assert "method.optim.warmup" in text
    assert "method.optim.micro_batch" in text
    with pytest.raises(ConfigError, match="`kxq` is no key or value of a recipe, and no word of a report that `tadistill explain` knows; "):
        CliRunner().invoke(app, ["explain", "warmup", "kxq"], catch_exceptions=False)


def test_explain_proposes_a_word():
    with pytest.raises(ConfigError, match="did you mean `error budget`"):
        CliRunner().invoke(app, ["explain", "eror", "budget"], catch_exceptions=False)


def test_plan_takes_the_name_of_a_shipped_recipe_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("plan", "quickstart", "seeds=[10]", "--runs", str(tmp_path / "runs"))
    assert "`quickstart` is a recipe that comes with tadistill" in found.stderr.replace("\n", "")
    assert found.stdout.startswith("quickstart: ")
