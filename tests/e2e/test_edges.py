"""A study with every kind of edge, through the command line: it runs, and each model is what its edge says."""

import json
from pathlib import Path

import pytest
import torch
from tests.e2e.test_study import run
from transformers import AutoModelForCausalLM

ARMS = """
  teacher: xl
  ta: xl > l
  chain: xl > l > s
  curriculum: l > s then xl > s
  dense: {path: xl > l > s, dense: {drop: 0.3}}
  dense-kd: {path: xl > l > s, dense: {kind: arithmetic}, objective: {type: forward_kl}, sampler: {type: dataset}}
  early: early > s
  soft: soft > s
  like: like > s
teacher: xl
models:
  early: {checkpoint: {of: xl, step: 10}}
  soft: {temper: {of: xl, tau: 0.8}}
  like: {temper: {of: xl, like: ta}}
  xl: {load: "scratch:llama", tokenizer: tinyworld, seed: 1, config: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 64, max_position_embeddings: 128}, sft: {optim: {steps: 30, lr: 3e-3}, select: {every: 10}, keep: [10]}}
  l: {load: "scratch:llama", tokenizer: tinyworld, config: {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 32, max_position_embeddings: 128}, sft: {optim: {steps: 20, lr: 3e-3}, select: {every: 10}}}
  s: {load: "scratch:llama", tokenizer: tinyworld, config: {hidden_size: 8, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 16, max_position_embeddings: 128}, sft: {optim: {steps: 10, lr: 3e-3}, select: {metric: last}}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], corpus: tinyworld, template: plain, max_length: 64, world: {people: 20}, limit: {train: 400, dev: 16, test: 12}}
study: tiny
seeds: [1]
method:
  objective: {type: minillm}
  sampler: {type: teacher_mixed, rollouts: 32, inner_epochs: 2, max_new_tokens: 16}
  optim: {steps: 8, batch: 16, lr: 1e-3}
  select: {metric: rouge_l, every: 4}
evaluate: {seeds: [1], max_new_tokens: 16, also: {}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    from tests.e2e import test_study

    runs = tmp_path_factory.mktemp("edges")
    recipe = runs / "r.yaml"
    recipe.write_text(f"arms:{ARMS}")
    before, test_study.RECIPE = test_study.RECIPE, recipe
    try:
        run(runs)
    finally:
        test_study.RECIPE = before
    return runs


def manifests(runs: Path) -> list[dict]:
    found = [json.loads(p.read_text()) | {"folder": p.parent} for p in runs.glob("store/*/*/manifest.json")]
    return [m | {"spec": json.loads((m["folder"] / "stage.json").read_text())["spec"]} for m in found]


def test_every_arm_has_results(finished):
    rows = json.loads((finished / "tiny" / "results.json").read_text())["rows"]
    arms = {"teacher", "ta", "chain", "curriculum", "dense", "dense-kd", "early", "soft", "like"}
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
