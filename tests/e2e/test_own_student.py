"""One student from own data and code: the short form, early stopping, a metric and an objective of a module beside the recipe."""

import json

from tests.e2e.inprocess import tadistill

from tadistill.report import read_results
from tadistill.store import Store

RECIPE = """\
study: mine
teacher: &model
  load: "scratch:llama"
  tokenizer: tinyworld
  config: {hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1, max_position_embeddings: 128}
student: *model
data: {train: train.jsonl, dev: dev.jsonl, test: test.jsonl, template: plain}
method:
  objective: {type: custom, function: "mine_code:loss"}
  optim: {lr: 1e-12, steps: 20, batch: 4}
  select: {every: 2, patience: 2}
evaluate: {max_new_tokens: 4}
metrics: [{function: "mine_code:size", title: characters, better: lower, decimals: 2}]
"""
CODE = """\
def size(prediction, references):
    return len(prediction)

def loss(student, teacher):
    return (student - teacher).pow(2).mean(-1)
"""


def test_own_data_and_code_from_a_short_recipe(tmp_path, monkeypatch):
    """The learning rate is so small that dev never improves after update 2, so training stops at update 6 of 20."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "mine_code.py").write_text(CODE)
    for name in ("train", "dev", "test"):
        rows = [{"instruction": f"where is {i} ?", "output": "in the city ."} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tadistill("run", "mine.yaml", "--runs", "runs")
    assert (done.code, done.err) == (0, "")
    assert "2 stages, 2 to run" in done.out
    assert "characters" in done.out

    results = read_results(tmp_path / "runs" / "mine", Store(tmp_path / "runs" / "store"))
    stage = next(stage for stage in results.plan.stages if stage.kind == "distill")
    manifest = results.store.manifest(stage.key)
    assert (manifest["steps"], manifest["best_step"], manifest["stopped_early"], manifest["checkpoints"]) == (6, 2, True, 3)
    planned = json.loads((tmp_path / "runs" / "mine" / "plan.json").read_text())["arms"][0]["flops"]
    assert 0.25 * planned < results.plan.arms[0].flops < 0.35 * planned
    assert stage.checkpoints == 3
    page = (tmp_path / "runs" / "mine" / "report.md").read_text()
    assert "characters" in page
    (row,) = [row for row in results.rows if row.metric == "size"]
    assert row.value > 0

    assert "to run" not in tadistill("run", "mine.yaml", "--runs", "runs").out
    (tmp_path / "mine_code.py").write_text(CODE.replace("len(prediction)", "2 * len(prediction)"))
    assert "2 stages, 2 to run" in tadistill("run", "mine.yaml", "--runs", "runs").out


def test_a_tracker_without_its_package_is_known_before_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tadistill.runner.trackers.importlib.util.find_spec", lambda name: None)
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("metrics:", "#").replace("objective: {type: custom", "#"))
    sentence = "the package of trackio is not installed; run `pip install 'tadistill[trackio]'`"
    for command, code in (("plan", 0), ("run", 2)):
        done = tadistill(command, "mine.yaml", "runtime.trackers=[trackio]", "data=tinyworld", "--runs", "runs")
        assert done.code == code
        assert sentence in " ".join((done.out + done.err).split())
