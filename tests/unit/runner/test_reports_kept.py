"""Reports that a later command would replace are kept, and evaluations of different models have studies of their own."""

import io
import json
import shutil

import pytest
import yaml

from tadistill.config import parse
from tadistill.errors import ConfigError, StoreError
from tadistill.plan.arms import make_plan
from tadistill.plan.study_tokens import StudyTokens
from tadistill.runner.local import REPORT
from tadistill.runner.run_study import evaluation_recipe, save_plan
from tadistill.terminal import Terminal

RECIPE = """
study: kept
seeds: [1, 2]
models: {a: {load: scratch:gpt2, tokenizer: tinyworld, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 512}}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld]}
arms: {a: a}
"""


def save(tmp_path, *overrides: str) -> str:
    """What the terminal says when the plan is written; a report of it follows."""
    said = io.StringIO()
    plan = make_plan(parse(RECIPE, list(overrides), source="r.yaml"))
    study = save_plan(plan, tmp_path, recipe_text=RECIPE, command=f"run {' '.join(overrides)}", console=Terminal(file=said, width=300))
    for name in REPORT:
        (study / name).write_text(f"of {overrides}")
    return said.getvalue()


def test_a_report_of_other_seeds_is_kept(tmp_path):
    assert save(tmp_path) == ""
    assert save(tmp_path) == ""  # the same evaluations: nothing is lost
    assert save(tmp_path, "margin=0.3") == ""
    said = save(tmp_path, "seeds=[1]")
    (folder,) = (tmp_path / "kept" / "earlier").iterdir()
    assert str(folder / "report.html") in said
    assert sorted(path.name for path in folder.iterdir()) == sorted(["plan.json", *REPORT])
    assert (folder / "report.html").read_text() == "of ('margin=0.3',)"
    assert json.loads((folder / "plan.json").read_text())["command"] == "run margin=0.3"
    assert json.loads((tmp_path / "kept" / "plan.json").read_text())["command"] == "run seeds=[1]"
    save(tmp_path, "evaluate.temperature=0")
    assert len(list((tmp_path / "kept" / "earlier").iterdir())) == 2


def test_numbers_without_a_page_are_kept(tmp_path):
    save(tmp_path)
    (tmp_path / "kept" / "report.html").unlink()
    assert "was moved to" in save(tmp_path, "seeds=[1]")
    (folder,) = (tmp_path / "kept" / "earlier").iterdir()
    assert (folder / "results.json").read_text() == "of ()"


@pytest.mark.parametrize("place", ["shutil.copy2", "pathlib.Path.mkdir", "os.replace"])
def test_a_report_that_cannot_be_moved_is_said_and_stays(tmp_path, monkeypatch, place):
    save(tmp_path)
    study, full = tmp_path / "kept", OSError(28, "No space left on device")

    def refused(source, *_, **__):
        if place == "shutil.copy2":
            shutil.copyfile(source, *_)
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(place, refused)
        with pytest.raises(StoreError, match=r"cannot write .*earlier/.*: No space left on device; free some space"):
            save(tmp_path, "seeds=[1]")
    assert [*study.glob("earlier/*/*")] == []
    assert (study / "report.html").read_text() == "of ()"
    assert "was moved to" in save(tmp_path, "seeds=[1]")


def test_the_settings_that_differ_from_the_last_run_are_named(tmp_path):
    assert save(tmp_path, "runtime.jobs=1") == ""
    assert save(tmp_path, "runtime.jobs=2") == ""  # changes no numbers
    said = save(tmp_path, "evaluate.temperature=0", "arms.b=a")
    (folder,) = (tmp_path / "kept" / "earlier").iterdir()
    first = "kept has other settings than in its last run: evaluate.temperature 1.0 → 0.0 and arms.b (new). "
    assert said.startswith(first)
    command = f"tadistill report kept/earlier/{folder.name} --runs {tmp_path}"
    assert said.endswith(f"was moved to {folder / 'report.html'}; `{command}` writes it again\n")
    assert "seeds [1, 2] → [3], evaluate.temperature 0.0 → 1.0, arms.b (removed) and 1 more. " in save(tmp_path, "margin=0.4", "seeds=[3]")
    plan = tmp_path / "kept" / "plan.json"
    content = json.loads(plan.read_text())
    del content["recipe"]["margin"]  # a plan of another version
    plan.write_text(json.dumps(content))
    assert "margin" not in save(tmp_path, "seeds=[3]").partition("report")[0]


def test_a_trained_model_of_an_earlier_report_can_be_copied(tmp_path):
    """A study that trains nothing has nothing to copy."""
    save(tmp_path, "models.a.sft={optim: {steps: 1}}")
    assert "ARM --runs" in save(tmp_path, "models.a.sft={optim: {steps: 1}}", "seeds=[1]").partition("; `tadistill export")[2]


@pytest.mark.parametrize("damaged", ["{", "[1]", "{}", '{"created": "today"}', '{"created": "today", "recipe": 3}'])
def test_a_damaged_plan_is_written_again(damaged, tmp_path):
    save(tmp_path)
    (tmp_path / "kept" / "plan.json").write_text(damaged)
    assert "other settings" not in save(tmp_path)
    assert json.loads((tmp_path / "kept" / "plan.json").read_text())["study"] == "kept"


def test_a_plan_without_a_report_is_replaced(tmp_path):
    save(tmp_path)
    for name in REPORT:
        (tmp_path / "kept" / name).unlink()
    assert save(tmp_path, "seeds=[1]") == "kept has other settings than in its last run: seeds [1, 2] → [1]\n"
    assert not (tmp_path / "kept" / "earlier").exists()


def test_models_of_one_name_have_studies_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one/final", "two/final"):
        (tmp_path / name).mkdir(parents=True)

    def study(*models: str) -> str:
        return yaml.safe_load(evaluation_recipe(models, ["dolly"], seeds=[1]))["study"]

    assert study("one/final").startswith("eval-final-")
    assert study("one/final") != study("two/final")
    assert study("one/final") == study("one/final/") == study(str(tmp_path / "one" / "final")) == study("./one/final")
    assert study("org-a/model") != study("org-b/model")
    assert study("one/final", "two/final") != study("two/final", "one/final")
    assert len(study("org/" + "x" * 300)) <= 80


def test_a_model_is_the_same_in_all_spellings_of_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m" / "sft").mkdir(parents=True)
    for other in ("m/sft", "./m/sft", "m/sft/", str(tmp_path / "m" / "sft")):
        with pytest.raises(ConfigError, match="a model is given twice in m/sft, "):
            evaluation_recipe(["m/sft", other], ["dolly"], seeds=[1])
    content = yaml.safe_load(evaluation_recipe(["org/a", "m/sft"], ["dolly"], seeds=[1], teacher="./m/sft"))
    assert (content["teacher"], [*content["models"]]) == ("sft", ["a", "sft"])


def test_an_evaluation_reads_no_set_but_those_it_tests(tmp_path):
    """Its recipe needs a train and a dev set. Columns in `--set data.test=…` do not hold for these two, and the forms of their rows (here
    instructions, not conversations) decide nothing."""
    rows = tmp_path / "chat.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n')
    text = evaluation_recipe(["m"], [str(rows)], seeds=[1])
    assert [yaml.safe_load(text)["data"][role]["load"] for role in ("train", "dev")] == ["tinyworld_open"] * 2
    assert StudyTokens(parse(text, source="eval"), None)._forms == {"messages"}
