"""A study whose student and teacher have different tokenizers: losses over spans, from the recipe to the report."""

import json

import pytest
import yaml
from tests.e2e.inprocess import tadistill
from tests.e2e.test_tokenizers import recipe

from tadistill.config import load
from tadistill.plan.arms import make_plan
from tadistill.store import Store

ROWS = 16
DATA = {"path": "t > s", "sampler": {"type": "dataset"}}
ARMS = {
    "kl": DATA | {"objective": {"type": "forward_kl", "kd_ratio": 0.5}, "optim": {"packed": True, "tokens": 200}},
    "gold": DATA | {"objective": {"type": "gold"}},
    "own prompt": DATA | {"objective": {"type": "reverse_kl"}, "context": "Think. {prompt}"},
    "taught": {"path": "t > s", "objective": {"type": "forward_kl"}},
    "rkl": {"path": "t > s", "method": "on-policy-rkl", "sampler": {"max_new_tokens": 8}},
    "minillm": {"path": "t > s", "objective": {"type": "minillm", "pt_weight": 0}}
    | {"sampler": {"type": "teacher_mixed", "alpha": 0, "rollouts": ROWS, "inner_epochs": 2, "max_new_tokens": 8}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The finished study: its output, its folder, its plan, and the last line of each arm's training log."""
    folder = tmp_path_factory.mktemp("spans")
    file, runs = folder / "spans.yaml", folder / "runs"
    given = recipe(arms=ARMS)
    given["method"] |= {"optim": {"lr": 1e-3, "steps": 2, "batch": ROWS}, "select": {"metric": "last"}}
    file.write_text(yaml.safe_dump(given | {"study": "spans", "evaluate": {**given["evaluate"], "also": {}}}))
    done = tadistill("run", str(file), "--runs", str(runs))
    assert done.code == 0, done.err
    plan, store = make_plan(load(file)), Store(runs / "store")
    stages = {arm.name: plan.stages[str(arm.final[1])] for arm in plan.arms}
    logs = {name: (store.folder(stage.key) / "metrics.jsonl").read_text().splitlines() for name, stage in stages.items()}
    return folder, stages, store, {name: json.loads(lines[-1]) for name, lines in logs.items()}


def test_every_loss_trains_and_its_spans_are_counted(study):
    _, stages, _, logs = study
    for name, row in logs.items():
        assert ", over spans" in stages[name].label
        assert row["spans/spans"] > 0
        assert 0 <= row["spans/single"] <= 1
        assert row["train/grad_norm"] > 0
    for name in ("kl", "gold", "own prompt"):  # every token of a data set's text is read by both
        assert logs[name]["spans/left_out"] == 0
        assert logs[name]["spans/single"] > 0.4


def test_the_plan_counts_the_teachers_own_tokens(study):
    """One update has all rows, so lengths are known: plan and meter differ by less than 1 %.

    For divergences, the logits inside spans are estimated. These models consist mostly of their heads, so the error is as large as it gets.
    """
    _, stages, store, _ = study
    for name, error in (("gold", 0.01), ("own prompt", 0.1)):
        found = store.manifest(stages[name].key)["ledger"]["parts"]
        for part in ("training/student", "training/teacher"):
            assert stages[name].cost.parts[part].flops == pytest.approx(found[part]["flops"], rel=error), (name, part)
            assert stages[name].cost.parts[part].positions == found[part]["positions"]
    parts = store.manifest(stages["minillm"].key)["ledger"]["parts"]
    assert "watching/teacher" not in parts  # the teacher's log-probabilities are known from sampling


def test_the_plan_and_the_report_name_what_is_compared(study):
    folder, *_ = study
    text = " ".join((folder / "runs" / "spans" / "report.md").read_text().split())
    plan = " ".join(tadistill("plan", str(folder / "spans.yaml"), "--runs", str(folder / "runs")).out.split())
    for found in (text.replace("\\", ""), plan):
        why = "of s is computed over spans of text, because t has another tokenizer"
        assert f"the loss `forward_kl` {why}: at the start of a span, the loss compares the probabilities of groups of next tokens" in found
        assert f"the loss `gold` {why}, as in GOLD of TRL 1.16" in found
        assert "the single-step term (the expected reward of the next token) is left out" in found
