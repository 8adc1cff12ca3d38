"""A study with every kind of edge, through the command line: it runs, and each model is what its edge asks for."""

import json
from pathlib import Path

import pytest
import torch
from tests.e2e.inprocess import tadistill
from transformers import AutoModelForCausalLM

RECIPE = Path(__file__).with_name("edges.yaml")
SMALL = ["data.limit={train: 400, dev: 8, test: 6}", "method.sampler.max_new_tokens=8", "evaluate.max_new_tokens=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("edges")
    done = tadistill("run", str(RECIPE), *SMALL, "--runs", str(runs))
    assert done.code == 0, done.out + done.err
    return runs


def manifests(runs: Path) -> list[dict]:
    found = [json.loads(p.read_text()) | {"folder": p.parent} for p in runs.glob("store/*/*/manifest.json")]
    return [m | {"spec": json.loads((m["folder"] / "stage.json").read_text())["spec"]} for m in found]


def test_every_arm_has_results(finished):
    rows = json.loads((finished / "tiny" / "results.json").read_text())["rows"]
    arms = {"teacher", "ta", "chain", "curriculum", "dense", "dense-kd", "early", "soft", "like", "cascade", "pruned"}
    assert {r["arm"] for r in rows if r["metric"] == "rouge_l"} == arms
    assert {r["arm"] for r in rows if r["metric"] == "reverse_kl"} == arms
    assert (finished / "tiny" / "report.html").is_file()


def test_a_checkpoint_is_kept_beside_the_model(finished):
    (sft,) = (m["folder"] for m in manifests(finished) if m["label"].startswith("sft xl"))
    early, last = (AutoModelForCausalLM.from_pretrained(sft / name) for name in ("model-10", "model"))
    assert not torch.equal(early.lm_head.weight, last.lm_head.weight)


def test_the_matched_entropy_is_the_assistants(finished):
    (temper,) = (m for m in manifests(finished) if m["kind"] == "temper")
    assert 0.05 < temper["tau"] < 20
    assert temper["entropy"] > 0
    assert (temper["folder"] / "model" / "model.safetensors").is_file()
