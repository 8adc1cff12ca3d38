"""Commands about a finished study."""

import json

from tests.e2e.inprocess import tadistill
from tests.unit.runner.small import small

from tadistill.config import parse
from tadistill.metrics import METRICS
from tadistill.plan.arms import make_plan
from tadistill.results.study import load_plan
from tadistill.runner.run_study import save_plan

RECIPE = small("s")


def test_a_recipe_that_has_changed_since_the_run_says_so(tmp_path):
    file, runs = tmp_path / "small.yaml", tmp_path / "runs"
    file.write_text(RECIPE)
    save_plan(make_plan(parse(RECIPE, source="small.yaml")), runs, recipe_text=RECIPE, command="tadistill run small.yaml seeds=[3]")
    same = tadistill("status", str(file), "--runs", str(runs))
    assert (same.code, "has changed" in same.out) == (0, False)
    file.write_text(RECIPE + "# another learning rate\n")
    other = " ".join(tadistill("status", str(file), "--runs", str(runs)).out.split())
    assert "small.yaml has changed since the last run of the study, `tadistill run small.yaml seeds=[3]`; the following is about" in other
    assert "has changed" not in tadistill("status", "small", "--runs", str(runs)).out


def test_the_teacher_of_a_recipe_is_known_without_its_analysis(tmp_path):
    """In `big > s then mid > s`, the last path does not begin with the original teacher."""
    recipe = RECIPE.replace("study: small", "study: small\nteacher: s\nanalyse: false")
    study = save_plan(make_plan(parse(recipe, source="small.yaml")), tmp_path, recipe_text=recipe, command="")
    assert load_plan(study).teacher == "s"


def test_a_study_whose_metric_has_a_name_that_is_refused_today_can_be_read(tmp_path, monkeypatch):
    """Names become keys of predictions.jsonl in later versions."""
    monkeypatch.setattr("tadistill.metrics.METRICS", dict(METRICS))
    study = save_plan(make_plan(parse(RECIPE, source="small.yaml")), tmp_path, recipe_text=RECIPE, command="")
    content = json.loads((study / "plan.json").read_text())
    content["recipe"]["metrics"] = [{"function": "own:turns"}]
    (study / "plan.json").write_text(json.dumps(content))
    assert load_plan(study).study == "small"
