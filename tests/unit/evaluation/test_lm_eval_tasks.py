"""Tasks of lm-eval: local data, results per item, their statistics, and mistakes. Tests that run lm-eval skip where it is not installed."""

import importlib.metadata
import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tests.conftest import tiny_model
from tests.unit.report.builder import SMALL, StudySpec, build_study, key_of
from typer.testing import CliRunner

from tadistill.cli import app
from tadistill.config import validate
from tadistill.data import tinyworld
from tadistill.errors import ConfigError, DataError, StageFailed
from tadistill.evaluation import lm_eval_tasks
from tadistill.evaluation.lm_eval_tasks import TaskResult, load_tasks, read_samples, run_task
from tadistill.evaluation.token_scores import Subject
from tadistill.metrics import MEAN, metric_title
from tadistill.plan.arms import make_plan
from tadistill.plan.inputs import Tasks, task_files
from tadistill.report import write_report
from tadistill.results.collect import primary_metric
from tadistill.runner.preflight import _check_tasks
from tadistill.stages import measuring

with_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install '.[lm-eval]'")
CHOICES = """
task: sums
dataset_path: org/sums
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["1", "2", "3"]
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN = """
task: written
dataset_path: org/sums
dataset_name: main
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def task_file(tmp_path):
    """A task's file, and its data below the root of local data."""

    def write(text: str, folder: str = "org/sums") -> str:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        rows = [{"question": f"who is {i} ?", "label": i % 3} for i in range(5)]
        (tmp_path / folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "task.yaml").write_text(text)
        return str(tmp_path / "task.yaml")

    return write


@with_lm_eval
@pytest.mark.parametrize(("text", "folder", "metrics"), [
    (CHOICES, "org/sums", {"task_score", "task_score/acc_norm"}),
    (WRITTEN, "org/sums/main", {"task_score"}),
])  # fmt: skip
def test_a_task_with_local_data_runs_on_a_model_in_memory(task_file, tmp_path, text, folder, metrics):
    tokenizer = tinyworld.tokenizer(people=10)
    subject = Subject(tiny_model("llama", vocab=len(tokenizer)), tokenizer, len(tokenizer), (tokenizer.eos_token_id,))
    ((name, task),) = load_tasks([task_file(text, folder)], str(tmp_path)).items()
    found = read_samples(name, run_task(name, task, subject, fewshot=None, limit=4, batch=2, chat=False), seed=10)
    assert set(found.scores) == metrics
    assert found.rows == [0, 1, 2, 3]
    assert all(value in (0, 100) for column in found.scores.values() for (value,) in column)
    assert [record["prompt"] for record in found.records] == [f"who is {i} ?" for i in range(4)]
    if text == CHOICES:
        assert {record["prediction"] for record in found.records} <= {"1", "2", "3"}
        assert [record["references"] for record in found.records] == [["1"], ["2"], ["3"], ["1"]]
        assert found.records[1]["task_score"] == 100 * (found.records[1]["prediction"] == "2")


@with_lm_eval
def test_a_task_without_its_data_is_one_sentence(task_file, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda path, name=None, **rest: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(
        DataError, match=r"because of its data set `org/sums`: no network; connect to the Hub once, or write .* org/sums/test"
    ):
        load_tasks([task_file(CHOICES)], str(tmp_path / "elsewhere"))


def sample(row: int, metric: float, kind: str = "none", **more):
    about = {"doc_id": row, "filter": kind, "metrics": ["exact_match", *more], "exact_match": metric, **more}
    return about | {"arguments": [("1 + 1 =", {})], "resps": [["2"]], "target": "2"}


def test_each_filter_of_a_task_is_a_metric():
    found = read_samples("sums", [sample(1, 0.0, "strict"), sample(0, 1.0, "strict"), sample(1, 1.0, "last"), sample(0, 1, "last")], 7)
    assert found.rows == [0, 1]
    assert found.scores == {"task_score": [[100], [0]], "task_score/exact_match,last": [[100], [100]]}
    expected = {"set": "sums", "index": 0, "seed": 7, "prompt": "1 + 1 =", "prediction": "2", "references": ["2"], "task_score": 100}
    assert expected.items() <= found.records[0].items()
    assert metric_title("task_score/exact_match,last") == "task score, exact_match,last"


def test_metrics_without_a_share_per_item_are_named():
    found = read_samples("sums", [sample(0, 1.0, bleu=("a", "b"), loss=3.5), sample(1, 1.0, bleu=("a", "b"), loss=0.5)], 7)
    assert (list(found.scores), found.left_out) == (["task_score"], ("bleu", "loss"))
    with pytest.raises(
        StageFailed, match=r"task `sums` of lm-eval has no metric with a value from 0 to 1 for each item \(it has exact_match"
    ):
        read_samples("sums", [sample(0, 12.0)], 7)


def recipe(**evaluate):
    model = {"load": "scratch:gpt2", "tokenizer": "tinyworld", "config": {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 96}}
    data = {"train": "tinyworld", "dev": "tinyworld", "test": [], "template": "plain", "max_length": 64}
    return validate({"study": "t", "seeds": [1], "models": {"s": model}, "data": data, "evaluate": evaluate, "arms": {"s": "s"}})


def test_tasks_are_a_part_of_the_stage(monkeypatch):
    monkeypatch.setattr("tadistill.plan.inputs.version", lambda name: "0.4.13")
    plans = [make_plan(recipe(tasks=["arc_easy"], **more)) for more in ({}, {"fewshot": 2})]
    (first,), (second,) = (plan.stages.values() for plan in plans)
    assert (first.spec.tasks.names, first.spec.tasks.lm_eval, first.spec.sets) == (("arc_easy",), "0.4.13", ())
    assert first.key != second.key


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("tadistill.plan.inputs.version", missing)
    with pytest.raises(ConfigError, match=r"evaluate\.tasks needs lm-eval: `pip install 'tadistill\[lm-eval\]'`; install it, or remove"):
        make_plan(recipe(tasks=["arc_easy"]))


def test_a_task_file_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr("tadistill.plan.inputs.version", lambda name: "0.4.13")
    with pytest.raises(ConfigError, match=r"evaluate\.tasks names the file nowhere\.yaml, which does not exist"):
        make_plan(recipe(tasks=["nowhere.yaml"]))


def test_a_task_file_is_compared_with_the_plan_and_measured(tmp_path, monkeypatch):
    (tmp_path / "sums.yaml").write_text(CHOICES)
    names = (str(tmp_path / "sums.yaml"),)
    planned = Tasks(names=names, files=tuple(digest for _, digest in task_files(names)), lm_eval="0")
    spec = SimpleNamespace(tasks=planned, sets=("tinyworld",), data=SimpleNamespace(template="plain"))
    said: list[tuple[int, int, str]] = []
    stage = SimpleNamespace(
        spec=spec, folder=tmp_path, task=SimpleNamespace(data_root=None), progress=lambda *now: said.append(now), stop=lambda: False
    )
    result = TaskResult(scores={"acc": [1.0]}, rows=[0], records=[], left_out=())
    for name, found in (("load_tasks", {"sums": None}), ("run_task", None), ("read_samples", result)):
        monkeypatch.setattr(lm_eval_tasks, name, lambda *_, found=found, **settings: found)
    found = measuring._tasks(stage, None, SimpleNamespace(batch=2, seeds=(1,)))  # type: ignore[arg-type]
    assert {name: each.scores for name, each in found.items()} == {"sums": result.scores}
    # the stage's progress is that of its answers to the test set
    assert said == [(0, 1, "loading tasks of lm-eval"), (0, 1, "running sums of lm-eval (1 of 1)")]
    (tmp_path / "sums.yaml").write_text(WRITTEN)
    with pytest.raises(StageFailed, match=r"sums.yaml has changed since this stage was planned"):
        measuring._tasks(stage, None, SimpleNamespace(batch=2, seeds=(1,)))  # type: ignore[arg-type]


def test_a_task_with_the_name_of_the_mean_is_refused(monkeypatch):
    monkeypatch.setattr("tadistill.plan.inputs.version", lambda name: "0.4.13")
    monkeypatch.setattr("tadistill.evaluation.lm_eval_tasks.load_tasks", lambda names, root: {"mean": None})
    with pytest.raises(ConfigError, match="a task of lm-eval is called `mean`, which means the mean over all test sets; rename or"):
        _check_tasks(recipe(tasks=["mean"]))


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match=r"`data\.test` names no set, so nothing can be measured; name a test set"):
        recipe()


@pytest.mark.parametrize("options", [["--harness", "lm-eval"], ["--tasks", "arc_easy"]])
def test_harness_and_tasks_belong_together(tmp_path, options):
    with pytest.raises(ConfigError, match="--harness and --tasks belong together, for instance --harness lm-eval --tasks arc_easy"):
        CliRunner().invoke(app, ["eval", "gpt2", *options, "--runs", str(tmp_path)], catch_exceptions=False)


def test_tasks_stand_beside_test_sets_with_the_same_statistics(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, fact_sets=(), numbered=True))
    rng = np.random.default_rng(2)
    for arm in SMALL:
        for seed in (10, 20):
            folder = study.store_dir / (key := key_of("evaluate", arm.name, seed))[:2] / key
            scores, corpus = (json.loads((folder / name).read_text()) for name in ("scores.json", "corpus.json"))
            scores["arc"] = {"task_score": np.where(rng.random((30, 1)) < 0.4 + 0.1 * arm.gain, 100.0, 0.0).tolist()}
            corpus["arc"] = {"numbers": {}, "reference_length": [0] * 30, "rows": list(range(30)), "unseen": 0.0, "task": True}
            (folder / "scores.json").write_text(json.dumps(scores))
            (folder / "corpus.json").write_text(json.dumps(corpus))
    results = study.read()
    assert primary_metric(results) == "task_score"
    found = results.summaries["chain", MEAN, "task_score"]
    assert 0 < found.low < found.mean < found.high < 100
    page = write_report(results)
    assert "### task score\n" in page.with_suffix(".md").read_text(encoding="utf-8")
    content = json.loads(page.with_name("results.json").read_text())
    assert content["comparisons"][0]["metric"] == "task_score"
