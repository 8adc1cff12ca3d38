"""The Python API: what it takes, what it returns, what it records, and its mistakes in sentences."""

import logging
import pickle
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tests.byte_models import ROWS, byte_model, byte_tokenizer, write_rows
from tests.e2e.inprocess import run_here

import tadistill
from tadistill import api
from tadistill.api.arguments import read_recipe
from tadistill.config import Data, Evaluate, parse
from tadistill.config.common import Decoding
from tadistill.config.data import Limit
from tadistill.data.encoding_rules import Rules
from tadistill.errors import ConfigError, ModelError, StoreError
from tadistill.evaluation import text_scores
from tadistill.metrics import METRICS

RECIPE = """
study: calls
seeds: [1]
models: {a: {load: scratch:gpt2, tokenizer: tinyworld, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld]}
arms: {a: a}
"""


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that were recorded; nothing is run."""
    found = []

    def run_study(recipe, *, runs, recipe_text, command):
        found.append(command)
        return tmp_path

    monkeypatch.setattr(api, "run_study", run_study)
    monkeypatch.setattr(api, "_reported", lambda directory, root: None)
    return found


def test_the_recorded_command_is_the_call(commands, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    api.run(recipe)
    api.run(recipe, ["seeds=[2]", "evaluate.temperature=0"], runs=tmp_path)
    api.run(parse(RECIPE, [], source="r.yaml"))
    path = repr(str(recipe))
    assert commands == [
        f"tadistill.run({path})",
        f"tadistill.run({path}, ['seeds=[2]', 'evaluate.temperature=0'], runs={str(tmp_path)!r})",
        "tadistill.run(recipe)",
    ]


def test_overrides_need_a_file(commands):
    with pytest.raises(ConfigError, match=r"overrides \['seeds=\[2\]'\] apply to a recipe's file"):
        api.run(parse(RECIPE, [], source="r.yaml"), ["seeds=[2]"])
    assert commands == []


MODEL = torch.nn.TransformerEncoderLayer(2, 1, 2)  # its text has several lines

# --- a study that is run ------------------------------------------------------------------------------------------------

TINY = """
study: tiny
seeds: [1]
models:
  a:
    load: scratch:llama
    tokenizer: tinyworld
    config: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, intermediate_size: 16,
             max_position_embeddings: 64, tie_word_embeddings: true}
    sft: {optim: {steps: 2, batch: 4}, select: {metric: last}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, max_prompt: 24, max_length: 64,
       limit: {train: 40, test: 4, dev: 4}, world: {people: 20}}
evaluate: {seeds: [1], max_new_tokens: 4, also: {}}
analyse: false
arms: {trained: a}
"""


def run_in_this_process(patch):
    patch.setattr("tadistill.runner.schedule.prepared", nullcontext)
    patch.setattr("tadistill.runner.run_study.run_stages", run_here)


@pytest.fixture
def runs_here(monkeypatch):
    run_in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of one stage and its evaluation, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        run_in_this_process(patch)
        return tadistill.run(TINY, ["study=api"], runs=tmp_path_factory.mktemp("runs"))


def test_a_study_has_rows_arms_and_a_page(study):
    assert study.arms == ["trained"]
    assert study.page.read_text(encoding="utf-8").startswith("<!")
    row = next(row for row in study.rows if row["metric"] == "rouge_l")
    assert (row["arm"], row["seed"], row["set"]) == ("trained", 1, "tinyworld")
    assert study.directory.name == "api"


def test_a_notebook_and_a_terminal_show_the_table(study):
    assert "trained" in str(study)
    assert f"report: {study.page}" in str(study).replace("\n", "")
    assert "trained" in study._repr_html_()
    assert study._repr_html_().startswith("<pre")
    console = Console(record=True, width=100)
    console.print(study)
    assert "ROUGE-L" in console.export_text()


def test_the_text_of_a_study_is_the_same_in_jupyter(study, monkeypatch):
    before = str(study), study._repr_html_()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert (str(study), study._repr_html_()) == before


def test_a_student_is_loaded_by_study_or_name(study):
    model, tokenizer = tadistill.load_student(study, "trained", 1)
    again, _ = tadistill.load_student("api", "trained", runs=study.directory.parent)
    ids = torch.tensor([tokenizer("what is the favourite colour of bavan ?")["input_ids"]])
    assert torch.equal(model(ids).logits, again(ids).logits)


def weights(of, arm="trained"):
    model, _ = tadistill.load_student(of, arm)
    return torch.cat([part.detach().flatten() for part in model.parameters()])


def test_a_study_keeps_its_model_and_its_page_after_a_later_run(study, runs_here, tmp_path, monkeypatch):
    """They were those of the newest run with the study's name."""
    shutil.copytree(study.directory.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    first = tadistill.run(TINY, ["study=api"])
    own, page, pickled = weights(first), first.page.read_bytes(), pickle.dumps(first)
    second = tadistill.run(TINY, ["study=api", "models.a.sft.optim.lr=0.1"])
    third = tadistill.run(TINY, ["study=api", "models.a.sft.optim.lr=0.01"])
    assert first.directory.parent == second.directory.parent == tmp_path / "runs" / "api" / "earlier"
    assert third.directory == tmp_path / "runs" / "api"
    assert first.page.read_bytes() == page
    assert torch.equal(weights(first), own)
    assert torch.equal(weights(first.directory), own)  # the folder of the earlier report is a study
    assert not torch.equal(weights(second), own)
    assert first.rows == study.rows
    copy = pickle.loads(pickled)  # made before the later runs
    assert torch.equal(weights(copy), own)
    assert copy.directory == first.directory
    shutil.rmtree(first.directory)
    with pytest.raises(StoreError, match="has the plan of a later run with other settings, and the plan of this study was not kept; run"):
        weights(pickle.loads(pickled))


def test_of_two_runs_at_once_each_returns_its_own_study(study, runs_here, tmp_path, monkeypatch):
    """The first returned the study of the second, whose plan was the newer one."""
    others = []

    def run_with_another(*args, **settings):
        monkeypatch.setattr("tadistill.runner.run_study.run_stages", run_here)
        others.append(tadistill.run(TINY, ["study=api", "models.a.sft.optim.lr=0.1"], runs=tmp_path))
        run_here(*args, **settings)

    monkeypatch.setattr("tadistill.runner.run_study.run_stages", run_with_another)
    first = tadistill.run(TINY, ["study=api"], runs=tmp_path)
    (second,) = others
    assert first.rows == study.rows
    assert torch.equal(weights(first), weights(study))
    assert not torch.equal(weights(second), weights(study))
    assert (first.directory.parent, second.directory) == (tmp_path / "api" / "earlier", tmp_path / "api")
    assert first.page.is_file()
    assert first.page.read_bytes() != second.page.read_bytes()
    for each in (first, second):
        assert torch.equal(weights(pickle.loads(pickle.dumps(each))), weights(each))


@pytest.mark.slow
def test_a_study_that_another_process_pickled_has_its_own_model_after_a_later_run(study, runs_here, tmp_path):
    """It was the model of the later run."""
    shutil.copytree(study.directory.parent, tmp_path / "runs")
    code = (
        "import pathlib, pickle, sys, tadistill, torch; study = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()); "
        "torch.save(tadistill.load_student(study, 'trained')[0].state_dict(), sys.argv[2])"
    )
    (tmp_path / "study.pickle").write_bytes(pickle.dumps(tadistill.run(TINY, ["study=api"], runs=tmp_path / "runs")))
    tadistill.run(TINY, ["study=api", "models.a.sft.optim.lr=0.1"], runs=tmp_path / "runs")
    subprocess.run([sys.executable, "-c", code, tmp_path / "study.pickle", tmp_path / "weights.pt"], check=True)
    own, found = tadistill.load_student(study, "trained")[0].state_dict(), torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(found[name], part) for name, part in own.items())


def test_a_study_can_be_used_from_another_directory_and_process(study, runs_here, tmp_path, monkeypatch):
    shutil.copytree(study.directory.parent, tmp_path / "relative")
    monkeypatch.chdir(tmp_path)
    found = tadistill.run(TINY, ["study=api"], runs="relative")
    planned = tadistill.plan(TINY, ["study=api"], runs="relative")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for each in (found, pickle.loads(pickle.dumps(found))):
        assert torch.equal(weights(each), weights(study))
        assert each.rows == study.rows
        assert each.page == tmp_path / "relative" / "api" / "report.html"
    assert [stage["finished"] for stage in planned.stages] == [True, True]
    assert pickle.loads(pickle.dumps(planned)).stages == planned.stages


def test_a_study_keeps_the_titles_of_its_own_metrics(study, runs_here, tmp_path, monkeypatch):
    """They were those of the last study of the process, for metrics of the same name."""
    monkeypatch.setattr("tadistill.metrics.METRICS", dict(METRICS))
    shutil.copytree(study.directory.parent / "store", tmp_path / "runs" / "store")
    (tmp_path / "scores.py").write_text("def words(prediction, references):\n    return float(len(prediction.split()))\n")
    monkeypatch.chdir(tmp_path)

    def run(name, **metric):
        return tadistill.run(yaml.safe_load(TINY) | {"study": name, "metrics": [{"function": "scores:words", **metric}]})

    first = run("one", title="count of words")
    shown, rows = str(first), first.rows
    second = run("two", title="wordiness", better="lower", unit="percentage points")
    assert ("count of words" in shown, "wordiness" in str(second)) == (True, True)
    assert (str(first), first.rows) == (shown, rows)


SET = "choices, columns, instruction, load, revision, split"
KEYS = ", ".join(sorted(set(Data.model_fields) - {"train", "dev", "test", "corpus"}))

# --- a loaded model -----------------------------------------------------------------------------------------------------


def evaluated(study, on: Any = "tinyworld", **settings):
    model, tokenizer = tadistill.load_student(study, "trained", 1)
    decoding, data = {"max_new_tokens": 4, **settings}, {"template": "plain", "world": {"people": 20}}
    (found,) = tadistill.evaluate(model, tokenizer, on, settings=decoding, limit=4, data=data).values()
    return found


def test_a_loaded_model_has_the_scores_of_its_study(study):
    """There was no argument for `data.world`, so the prompts were about 120 people."""
    model, tokenizer = tadistill.load_student(study, "trained", 1)
    data = {key: value for key, value in yaml.safe_load(TINY)["data"].items() if key not in ("train", "dev", "test")} | {
        "limit": {"test": 4}
    }
    found = tadistill.evaluate(model, tokenizer, "tinyworld", settings={"max_new_tokens": 4, "seeds": [1]}, data=data)["tinyworld"]
    rows = {row["metric"]: row["value"] for row in study.rows}
    assert found.keys() >= {"fact_accuracy", "rouge_l", "loss"}
    assert found == {metric: pytest.approx(rows[metric]) for metric in found}


@pytest.mark.parametrize(
    ("thinking", "expected"), [("drop", "red"), ("keep", "<think>it is</think>red"), ("mask", "<think>it is</think>red")]
)
def test_a_loaded_model_is_compared_with_the_references_of_a_study(study, tmp_path, monkeypatch, thinking, expected):
    """With `thinking: drop`, the references still had their thinking."""
    rows, compared = tmp_path / "rows.jsonl", []
    rows.write_text('{"instruction": "what is it ?", "output": "<think>it is</think>red"}\n', encoding="utf-8")
    monkeypatch.setattr(text_scores, "rouge_l", lambda answers, references: compared.extend(references) or [0.0] * len(answers))
    model, tokenizer = tadistill.load_student(study, "trained")
    data, decoding = {"template": "plain", "thinking": thinking}, {"seeds": [1], "max_new_tokens": 4}
    tadistill.evaluate(model, tokenizer, rows, settings=decoding, data=data)
    assert compared == [(expected,)]


@pytest.mark.parametrize(
    ("on", "arguments", "said"),
    [
        ({"load": "x", "world": {}}, {}, "tadistill.evaluate: `on.0.world` is not a known key; did you mean `data.world`?"),
        ({"instruction": "x"}, {}, "tadistill.evaluate: `on.0.load` is missing; add it."),
        (["x", {"load": "y/x.jsonl"}], {}, "tadistill.evaluate: `on`: two data sets have the name `x`; rename"),
        ({"load": "x", "extra": ["y"]}, {}, "tadistill.evaluate: `on`: data set `x` has `extra`, but"),
        ("x", {"template": "y"}, "tadistill.evaluate: `template` is 'y': write 'alpaca'"),
        ("x", {"data": 3}, "`data` is 3; give a dict with keys of a recipe's `data`"),
        ("x", {"data": {"wrld": 3}}, "tadistill.evaluate, data: `wrld` is not a known key; did you mean `world`?"),
        ("x", {"data": {"world": {"people": 3}}}, "tadistill.evaluate, data: `world.people` is 3: write a number of at least 10"),
        ("x", {"data": {"dev": "x"}}, "`data` has `dev`, but the data sets of an evaluation are those of `on`; remove `dev`"),
        ("x", {"data": {"context": {}}}, f"tadistill.evaluate, data: `context` is not a known key; the known keys here are: {KEYS}."),
        ("x", {"data": {"dataset": "x"}}, f"tadistill.evaluate, data: `dataset` is not a known key; the known keys here are: {KEYS}."),
        ({"load": "x", "weight": 3}, {}, f"tadistill.evaluate: `on.0.weight` is not a known key; the known keys here are: {SET}."),
        ("x", {"data": {"limit": {"tset": 3}}}, "tadistill.evaluate, data: `limit.tset` is not a known key; did you mean `test`?"),
        (
            "x",
            {"data": {"limit": 3}},
            "tadistill.evaluate, data: `limit` is 3, but it must be a group of keys; write keys below limit, or in "
            "braces (possible keys: test)",
        ),
        ("x", {"data": {"limit": {"train": 3}}}, "`data` has `limit.train`, but an evaluation only reads test sets; remove it, or write"),
        ("x", {"data": {"limit": {"test": 2, "dev": 3}}}, "`data` has `limit.dev`, but an evaluation only reads test sets; remove it, or"),
        ("x", {"data": {"root": "."}, "data_root": "."}, "`data` has `root`, which the argument `data_root` also sets; remove one"),
    ],
)
def test_mistakes_in_the_data_of_an_evaluation_name_its_arguments(on, arguments, said):
    with pytest.raises(ConfigError) as caught:
        tadistill.evaluate(None, None, on, **arguments)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(said)


def test_a_loaded_model_keeps_the_mode_of_each_module(study):
    model, tokenizer = tadistill.load_student(study, "trained", 1)
    model.train()
    model.model.layers[0].eval()  # as a user freezes the dropout of a layer
    before = [module.training for module in model.modules()]
    tadistill.evaluate(model, tokenizer, "tinyworld", template="plain", settings={"max_new_tokens": 4, "seeds": [1]}, limit=2)
    assert [module.training for module in model.modules()] == before


@pytest.mark.slow
def test_wrapped_models_have_the_scores_of_the_model(study):
    model, tokenizer = tadistill.load_student(study, "trained", 1)

    def scores(wrapped):
        settings = {"max_new_tokens": 4, "seeds": [1]}
        return tadistill.evaluate(wrapped, tokenizer, "tinyworld", template="plain", settings=settings, limit=2)

    plain = scores(model)
    assert scores(torch.compile(model)) == plain
    assert (
        scores(get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))) == plain
    )  # an adapter that was not trained changes nothing


def test_paths_are_given_as_texts_or_as_paths(study, commands, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "what is it ?", "output": "it"}\n', encoding="utf-8")
    expected = evaluated(study, str(tmp_path / "rows.jsonl"), seeds=[1])
    for on in (tmp_path / "rows.jsonl", [tmp_path / "rows.jsonl"], {"load": tmp_path / "rows.jsonl"}):
        assert evaluated(study, on, seeds=[1]) == expected
    data = {"train": tmp_path / "rows.jsonl", "dev": "tinyworld", "test": [{"load": tmp_path / "rows.jsonl"}]}
    recipe = yaml.safe_load(RECIPE) | {"data": data}
    assert parse(recipe, [], source="recipe").data.test[0].load == str(tmp_path / "rows.jsonl")
    api.compare([tmp_path / "a", tmp_path / "b"], on=tmp_path / "rows.jsonl", teacher=tmp_path / "t")
    a, b, rows, t = (str(tmp_path / name) for name in ("a", "b", "rows.jsonl", "t"))
    assert commands == [f"tadistill compare {a} {b} --on {rows} --seeds 10 --teacher {t}"]


@pytest.mark.parametrize("seeds", [range(1, 3), (1, 2), np.array([1, 2]), [np.int64(1), np.int32(2)]])
def test_seeds_are_whole_numbers_of_python_or_numpy(commands, seeds):
    api.compare(["a", "b"], seeds=seeds)
    assert commands == ["tadistill compare a b --on dolly --seeds 1,2"]


def test_numbers_of_a_recipe_may_be_those_of_numpy():
    recipe = {**yaml.safe_load(RECIPE), "seeds": np.arange(1, 3), "margin": np.float32(0.5), "analyse": np.bool_(False)}
    found, text, _ = read_recipe(recipe | {"evaluate": {"seeds": range(2), "max_new_tokens": np.int64(8)}, "study": np.str_("s")}, ())
    assert (found.study, found.seeds, found.margin, found.analyse) == ("s", (1, 2), 0.5, False)
    assert (found.evaluate.seeds, found.evaluate.max_new_tokens) == ((0, 1), 8)
    assert parse(text, [], source="again").model_dump() == found.model_dump()


def test_the_text_of_a_recipe_that_was_no_file_has_the_keys_that_are_set(tmp_path, monkeypatch):
    """Each model had `tokenizer: null`, which is refused for a model behind an API."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    api = {"model": "large", "at": "http://localhost:1/v1"}
    recipe = {**yaml.safe_load(RECIPE), "models": {"a": {"load": "./m"}, "t": {"api": api}}}
    found, text, _ = read_recipe(recipe, ())
    assert {key: set(group) for key, group in yaml.safe_load(text)["models"].items()} == {"a": {"load"}, "t": {"api"}}
    assert set(yaml.safe_load(text)["data"]) == {"train", "dev", "test"}
    assert parse(text, [], source="again", folder=tmp_path).model_dump() == found.model_dump()


def test_a_recipe_in_one_line_is_a_text():
    line = yaml.safe_dump(yaml.safe_load(RECIPE), default_flow_style=True, width=10_000).strip()
    assert "\n" not in line
    assert read_recipe(line, ())[0].model_dump() == read_recipe(RECIPE, ())[0].model_dump()


def test_scoring_adds_no_handler_to_the_root_logger(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert text_scores.rouge_l(["the cats sat"], [["a cat sits"]]) == [pytest.approx(100 / 3)]
    assert logging.getLogger().handlers == []


@pytest.mark.filterwarnings("ignore:tinyworld. .* unknown to the tokenizer, so bits_per_byte is too low")
def test_other_decodings_and_bits_per_byte_are_measured_if_they_are_set(study):
    plain, greedy = evaluated(study, seeds=[1, 2]), evaluated(study, seeds=[1], temperature=0)
    found = evaluated(study, seeds=[1, 2], bits_per_byte=True, also={"cold": {"temperature": 0}})
    assert not any("@" in metric or metric == "bits_per_byte" for metric in plain)
    assert plain.items() <= found.items()
    assert found.keys() - plain.keys() >= {"bits_per_byte", "rouge_l@cold", "length@cold", "distinct_1@cold"}
    assert all(greedy[metric.removesuffix("@cold")] == value for metric, value in found.items() if metric.endswith("@cold"))


def test_pass_at_of_a_set_with_right_answers(study, tmp_path):
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"instruction": "what is 1 ?", "output": "1", "answer": 1}\n', encoding="utf-8")
    right = {"load": str(sums), "columns": {"numeric": "answer"}}
    assert "numeric/2" in evaluated(study, right, seeds=[1], samples=2, pass_at=[2])
    with pytest.raises(ConfigError, match="pass_at needs right answers, but no test set names a column"):
        evaluated(study, str(sums), seeds=[1], samples=2, pass_at=[2])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ["arc_easy"]}, "settings.tasks is for lm-eval, which tadistill.evaluate does not run; remove `tasks`"),
        ({"fewshot": 2}, "settings.fewshot is for lm-eval"),
        ({"engine": "vllm"}, "settings.engine is `vllm`, but a loaded model is sampled in this process"),
        ({"also": {"fast": {"engine": "vllm"}}}, "settings.also.fast.engine is `vllm`"),
        ({"precision": "bf16"}, r"settings.precision is `bf16`, but the weights of the loaded model are float32; convert"),
    ],
)
def test_settings_without_effect_on_a_loaded_model_are_refused(study, settings, said):
    with pytest.raises(ConfigError, match=said):
        evaluated(study, **settings)


def test_a_model_that_cannot_read_the_prompts_is_refused(study):
    with pytest.raises(ConfigError, match=r"positions, but the longest prompt of `tinyworld` \(\d+ tokens\) plus max_new_tokens \(9999\)"):
        evaluated(study, max_new_tokens=9999)
    model, tokenizer = tadistill.load_student(study, "trained", 1)
    model.resize_token_embeddings(10)
    with pytest.raises(ModelError, match="but the model has only 10 embeddings; use the tokenizer that belongs to the model"):
        tadistill.evaluate(model, tokenizer, "tinyworld", template="plain", settings={"max_new_tokens": 4}, limit=4)


def test_every_setting_of_an_evaluation_is_used_or_refused():
    """A new key of `evaluate` must be used by `tadistill.evaluate`, or refused in `api.loaded_model._check_call`."""
    used = {*Decoding.model_fields, "seeds", "samples", "pass_at", "batch", "bits_per_byte", "also"}
    assert set(Evaluate.model_fields) == used | {"tasks", "fewshot", "precision"}


def test_every_key_of_data_is_used_or_refused():
    """A new key of `data` must be used by `tadistill.evaluate`, or refused in `api.loaded_model._data`."""
    of_rules = {each.name for each in fields(Rules)} - {"context"}
    assert set(Data.model_fields) == of_rules | {"root", "world", "limit"} | {"train", "dev", "test", "corpus"}
    assert set(Limit.model_fields) == {"test"} | {"train", "dev"}


def test_a_loaded_model_gets_a_bos_as_the_data_say(tmp_path):
    """`bos: never` had no effect."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    model = byte_model()

    def loss(adds_bos: bool, **data):
        settings = {"seeds": [1], "max_new_tokens": 2}
        tokenizer = byte_tokenizer(adds_bos=adds_bos)
        return tadistill.evaluate(model, tokenizer, tmp_path / "rows.jsonl", template="plain", settings=settings, data=data)["rows"]["loss"]

    without = loss(False)
    assert loss(True, bos="never") == loss(False, bos="never") == without
    assert loss(True) == loss(True, bos="auto") != without


def test_a_plan_says_what_is_finished(study):
    planned = tadistill.plan(yaml.safe_load(TINY), ["study=api"], runs=study.directory.parent)
    assert [(stage["label"], stage["finished"]) for stage in planned.stages] == [("sft a, seed 1", True), ("evaluate sft a, seed 1", True)]
    assert repr(planned) == "PlannedStudy('api', 2 stages)"
    assert "sft a, seed 1" in planned._repr_html_()


@pytest.mark.slow
def test_plan_can_be_called_if_its_package_was_imported_before():
    """In a process of its own, because one import of the API would be enough."""
    code = (
        f"import tadistill.report; print(len(tadistill.plan({TINY!r}).stages)); assert 'Nothing is run' in tadistill.plan.__call__.__doc__"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "2\n"


def test_the_names_are_offered_and_others_are_not():
    assert {"run", "plan", "evaluate", "compare", "load_student", "objectives"} <= {*dir(tadistill)}
    with pytest.raises(AttributeError, match="has no attribute 'runn'"):
        _ = tadistill.runn


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: tadistill.run(3), "`recipe` is 3; give a path, the name of a recipe"),
        (
            lambda: tadistill.run(yaml.safe_load(TINY) | {"margin": np.float32}),
            "recipe: `margin` is <class 'numpy.float32'>, but a value is",
        ),
        (lambda: tadistill.run(TINY, "seeds=[2]"), r"overrides are 'seeds=\[2\]'; give a list"),
        (lambda: tadistill.run("study: x\nmodel: y\n"), "recipe, line 2: `model` is not a known key; did you mean `models`"),
        (lambda: tadistill.plan("quikstart"), "did you mean `quickstart`"),
        (lambda: tadistill.run(TINY, 3), r"overrides are 3; give a list"),
        (lambda: tadistill.run(TINY, None), r"overrides are None; give a list"),
        (lambda: tadistill.run(TINY, runs=3), r"the runs directory is 3; give a path"),
        (lambda: tadistill.compare(["a", "b"], ["x", "y/x.jsonl"]), "test sets: `on`: two data sets have the name `x`; rename"),
        (lambda: tadistill.compare(MODEL), "`models` is a TransformerEncoderLayer; give a list of names, paths or hub ids"),
        (lambda: tadistill.compare([MODEL, "gpt2"]), "`models` has a TransformerEncoderLayer; give a list of names, paths or hub ids"),
        (lambda: tadistill.compare([None, "gpt2"]), "`models` has None; give a list"),
        (lambda: tadistill.compare(["", "gpt2"]), "`models` has ''; give a list"),
        (lambda: tadistill.compare(["a", "b"], {"load": "x"}), "`on` is {'load': 'x'}; give a list of names, paths"),
        (lambda: tadistill.compare(["a", "b"], ["dolly", {"load": "x"}]), "`on` has {'load': 'x'}; give a list of names, paths"),
        (
            lambda: tadistill.compare(["a", "b"], teacher=MODEL),
            "`teacher` is a TransformerEncoderLayer; give the directory or the hub id of one model",
        ),
        (lambda: tadistill.compare(["a", "b"], seeds=[]), r"`seeds` is \[\]; give a list of numbers"),
        (lambda: tadistill.compare(["a", "b"], seeds=[1, True]), r"`seeds` is \[1, True\]; give a list of numbers"),
        (lambda: tadistill.compare(["a", "b"], seeds=np.array([1.5])), r"`seeds` is array\(\[1.5\]\); give a list of numbers"),
        (lambda: tadistill.load_student(None, "a"), "`study` is None; give what tadistill.run returned, or a study's name"),
        (lambda: tadistill.load_student("tiny", "a", "1"), "`seed` is '1'; give a training seed, which is a whole number"),
        (lambda: tadistill.evaluate(None, None, [3]), r"`on` is \[3\]; give a list"),
        (lambda: tadistill.compare("gpt2"), "compare needs a list of two models or more"),
        (lambda: tadistill.compare(["gpt2", "gpt2"]), "gpt2"),
        (lambda: tadistill.compare(["a", "b"], 3), "`on` is 3; give a list of names, paths or hub ids"),
        (lambda: tadistill.compare(["a", "b"], [], seeds=[10]), r"`on` is \[\]; give a list of names"),
        (lambda: tadistill.compare(["a", "b"], seeds=10), r"`seeds` is 10; give a list of numbers, for instance \[10\]"),
        (lambda: tadistill.evaluate(None, None, 3), "`on` is 3; give a list"),
        (lambda: tadistill.evaluate(None, None, "dolly", settings="x"), "`settings` is 'x'; give a dict with keys of `evaluate`"),
        (lambda: tadistill.load_student("nothing", "a", runs="nowhere"), r"there is no study `nothing` in \S+/nowhere"),
        (lambda: tadistill.evaluate("gpt2", None, "tinyworld"), "needs a loaded model and its tokenizer, but got str and NoneType"),
    ],
)
def test_mistakes_are_sentences(call, said):
    with pytest.raises(ConfigError, match=said):
        call()
