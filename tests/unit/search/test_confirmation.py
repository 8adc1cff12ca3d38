"""confirm.yaml of a search is a recipe that plans, whatever sections the searched recipe has, and wherever its data sets are."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tadistill.config import Recipe, load
from tadistill.plan.arms import make_plan
from tadistill.plan.task import check_sources
from tadistill.search.choice import Choice, Tried, choice_notes, write_choice
from tadistill.search.strategies import Round

RECIPE = """
study: STUDY
seeds: [1]
models:
  t: {load: "scratch:gpt2", tokenizer: tinyworld, seed: 1, config: {n_embd: 32, n_layer: 2, n_head: 2, n_positions: 512},
      sft: {optim: {steps: 4}, select: {metric: last}, keep: [2], sets: [maths]}}
  big: {checkpoint: {of: t, step: 2}}
  a: {init: {from: big, layers: 1}, sft: {optim: {steps: 4}, select: {metric: last}}}
  b: {load: "scratch:gpt2", tokenizer: tinyworld, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 512}, distill: mine}
  s: {load: "scratch:gpt2", tokenizer: tinyworld, config: {n_embd: 8, n_layer: 1, n_head: 2, n_positions: 512}}
  cool: {temper: {of: t, like: direct}}
data:
  train: {maths: {load: maths.jsonl, weight: 1}, chat: {load: sets/chat, weight: 3}}
  dev: {maths: maths.jsonl, chat: sets/chat}
  test: [tinyworld, maths.jsonl]
  corpus: {load: maths.jsonl, columns: {text: output}}
  template: plain
  max_length: 64
method: {name: mine, optim: {steps: 8}, select: {metric: loss}}
methods: {mine: {phases: [{method: seqkd, share: 0.5}, {method: kd, share: 0.5}]}}
evaluate: {seeds: [1], max_new_tokens: 8, also: {cold: {temperature: 0}}}
metrics: [{function: "confirmed:points", better: higher}]
teacher: t
analyse: true
margin: 0.5
search: {teacher: t, assistants: [a, b], student: s}
runtime: {jobs: 1}
resources:
  default: {hours: 1}
  sft: {processes: 2}
  sft t: {processes: 1}
  distill a: {processes: 1}
  sft big: {processes: 1}
  distill b: {processes: 1}
  distill s: {processes: 1}
"""
BUDGETS = "arms: {direct: t > s, mild: t > b > s}\nfair: false\nbudgets: [1, 2]\n"
FAIR = "arms: {direct: t > s, mild: t > b > s}\nfair: true\nbudgets: null\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The recipe's folder: data sets, and a function of the user's own."""
    found = tmp_path_factory.mktemp("my recipes")
    rows = [json.dumps({"instruction": f"what is {i} ?", "output": f"{i} ."}) for i in range(8)]
    for name in ("maths.jsonl", *(f"sets/chat/{split}.jsonl" for split in ("train", "dev"))):
        (found / name).parent.mkdir(parents=True, exist_ok=True)
        (found / name).write_text("\n".join(rows), encoding="utf-8")
    (found / "confirmed.py").write_text("def points(prediction, references):\n    return 1.0\n", encoding="utf-8")
    return found


@pytest.fixture
def searched(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(arms: str, study: str = "lattice"):
        (folder / "r.yaml").write_text(RECIPE.replace("STUDY", study) + arms, encoding="utf-8")
        recipe = load(folder / "r.yaml")
        assert recipe.model_fields_set == set(Recipe.model_fields)  # a new section of recipes belongs into this test
        return recipe

    return write


def confirmation(recipe, path, runs, direct: float | None = 1.0):
    tried = (Tried(path, 1.0, (1.0,)),)
    rounds = ((Round((path,), 1.0), {path: 1.0}),)
    choice = Choice(recipe.study, "exhaustive", "loss", -1, tried, rounds, direct, trained=1.0, discarded=0.0, distillations=2)
    file = write_choice(choice, recipe, runs / recipe.study)
    assert file is not None
    return choice, file


@pytest.mark.parametrize("arms", [BUDGETS, FAIR])
@pytest.mark.parametrize(("path", "kept"), [(("t", "a", "s"), {"t", "big", "a", "s"}), (("t", "b", "s"), {"t", "b", "s"})])
def test_every_section_is_kept_and_the_recipe_plans(searched, tmp_path, arms, path, kept):
    recipe = searched(arms)
    _, file = confirmation(recipe, path, tmp_path / "runs")
    found = load(file)
    assert [arm.name for arm in make_plan(found).arms] == ["direct", "chain", "twin"]
    check_sources(found)
    assert set(found.models) == kept
    assert set(found.resources) == {entry for entry in recipe.resources if " " not in entry or entry.split()[1] in kept}
    same = {"method", "methods", "evaluate", "metrics", "analyse", "margin", "runtime"}
    assert found.model_dump(include=same) == recipe.model_dump(include=same)


@pytest.mark.parametrize("inside", [True, False], ids=["in the recipe's folder", "elsewhere"])
def test_a_fixed_teacher_is_not_trained_again(searched, folder, tmp_path, monkeypatch, inside):
    if inside:
        monkeypatch.chdir(folder)
    recipe = searched(FAIR)
    _, file = confirmation(recipe, ("t", "b", "s"), tmp_path / "runs")

    def teachers(of: Recipe) -> set[str]:
        return {key for key, stage in make_plan(of).stages.items() if (stage.kind, stage.model) == ("sft", "t")}

    assert teachers(load(file)) == teachers(recipe)
    assert len(teachers(recipe)) == 1


def test_another_file_with_the_same_path_is_not_read(searched, folder, tmp_path):
    recipe = searched(FAIR)
    (tmp_path / "maths.jsonl").write_text("{}", encoding="utf-8")
    _, file = confirmation(recipe, ("t", "b", "s"), tmp_path / "runs")
    assert load(file).data.train["maths"].load == os.path.relpath(folder / "maths.jsonl", file.parent)
    check_sources(load(file))


@pytest.mark.parametrize(("code", "there"), [(None, "recipes"), ("../lib", "lib")])
def test_paths_beside_the_recipe_work_in_a_copy_of_the_project(folder, tmp_path, monkeypatch, code, there):
    """They were absolute: models, the folder of data sets, data sets beside the recipe, and the folder of functions."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for name in ("recipes/models/b", "recipes/data", "models/t", "recipes/models/a", "lib"):
        (project / name).mkdir(parents=True)
    for name in ("recipes/models/b", "models/t", "recipes/models/a"):
        config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512, "vocab_size": 64}
        (project / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(folder / "confirmed.py", project / there)
    shutil.copy(folder / "maths.jsonl", project / "recipes")
    raw = yaml.safe_load(RECIPE.replace("STUDY", "lattice"))
    raw["models"] = {name: {"load": load, "tokenizer": "tinyworld"} for name, load in (("t", "../models/t"), ("b", "models/b"))} | {
        "s": raw["models"]["s"],
        "a": {"load": str(project / "recipes" / "models" / "a"), "tokenizer": "tinyworld"},
    }
    raw["data"] |= {"train": "maths.jsonl", "dev": "maths.jsonl", "root": "data"}
    raw |= {"arms": {"mild": "t > a > b > s"}, "methods": {}, "method": {"name": "kd", "optim": {"steps": 8}}, "resources": {}}
    raw["runtime"] |= {"code": code} if code else {}
    (project / "recipes" / "r.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    _, file = confirmation(load(project / "recipes" / "r.yaml"), ("t", "a", "b", "s"), project / "runs")
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    loads = {name: model["load"] for name, model in found["models"].items()}
    assert {name: loads[name] for name in "tb"} == {"t": "../../models/t", "b": "../../recipes/models/b"}
    assert loads["a"] == str(project / "recipes" / "models" / "a")  # as the user has written it
    assert (found["data"]["root"], found["runtime"]["code"]) == ("../../recipes/data", f"../../{there}")
    assert found["data"]["train"]["load"] == "../../recipes/maths.jsonl"
    project.rename(elsewhere)
    recipe = load(elsewhere / "runs" / "lattice" / "confirm.yaml")
    assert recipe.models["t"].load == str(elsewhere / "models" / "t")
    assert recipe.models["b"].load == str(elsewhere / "recipes" / "models" / "b")
    assert Path(recipe.data.root).resolve() == elsewhere / "recipes" / "data"
    assert recipe.data.train.paths[0].resolve() == elsewhere / "recipes" / "maths.jsonl"
    assert Path(recipe.runtime.code).resolve() == elsewhere / there


def test_a_study_with_the_longest_name_is_confirmed(searched, tmp_path):
    recipe = searched(BUDGETS, study="x" * 80)
    _, file = confirmation(recipe, ("t", "b", "s"), tmp_path / "runs")
    assert load(file).study == "x" * 72 + "-confirm"


def test_without_flops_there_is_no_arm_of_equal_compute(searched, tmp_path):
    _, file = confirmation(searched(FAIR), ("t", "b", "s"), tmp_path / "runs", direct=None)
    assert [arm.name for arm in make_plan(load(file)).arms] == ["direct", "chain"]


def test_the_printed_command_can_be_pasted(searched, tmp_path):
    choice, file = confirmation(searched(BUDGETS), ("t", "b", "s"), tmp_path / "my runs")
    assert "# Run it in the folder where the search ran" in file.read_text(encoding="utf-8")
    assert choice_notes(choice, file, tmp_path / "my runs")[-1].endswith(f"tadistill run '{file}' --runs '{tmp_path / 'my runs'}'")
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["study"] == "lattice-confirm"
