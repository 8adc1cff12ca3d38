"""A training set whose rows stay on the disk gives the same weights, texts and counts as one in memory."""

import json

from tests.e2e.inprocess import tadistill

from tadistill.data import survey
from tadistill.stages import context

RECIPE = """
study: large
seeds: [1]
models:
  t: {load: scratch:llama, tokenizer: tinyworld, config: &shape {hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2,
      num_key_value_heads: 2, intermediate_size: 16, max_position_embeddings: 64}, sft: &sft {optim: {lr: 1e-2, steps: 3, batch: 4}}}
  s: {load: scratch:llama, tokenizer: tinyworld, config: *shape, seed: 2, sft: *sft}
  p: {init: {from: t, hidden: 8}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld], template: plain, max_prompt: 12, max_length: 20,
  limit: {train: 60, dev: 4, test: 4}}
method:
  objective: {type: forward_kl}
  sampler: {type: dataset, signal: {type: top_k, k: 4}}
  optim: {lr: 1e-2, steps: 3, batch: 4}
evaluate: {seeds: [1], max_new_tokens: 4, also: {}}
arms:
  kd: t > s
  seqkd: {path: t > s, objective: {type: cross_entropy}, sampler: {type: teacher, max_new_tokens: 4}}
  rounds: {path: t > s, objective: {type: reverse_kl}, sampler: {type: student, max_new_tokens: 4}}
  pruned: {path: t > p}
"""


def test_same_weights_and_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("TADISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    found = []
    for name, limit in (("memory", 5000), ("disk", 10)):
        monkeypatch.setattr(survey, "LARGE", limit)
        monkeypatch.setattr(context, "LARGE", limit)
        done = tadistill("run", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / name))
        assert done.code == 0, done.err
        manifests = sorted((tmp_path / name / "store").rglob("manifest.json"))
        read = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in manifests}
        kinds = (".safetensors", "responses.jsonl", "answers.jsonl")
        found.append({key: {f: d for f, d in m["files"].items() if f.endswith(kinds)} | {"rows": m.get("rows")} for key, m in read.items()})
    assert found[0] == found[1]
    assert any(found[0].values())
    assert len(list((tmp_path / "cache" / "encoded").glob("*.arrow"))) == 1
