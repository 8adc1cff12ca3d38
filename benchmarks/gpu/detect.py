"""Runs a study on a pretended GPU, and reports operations that mix its tensors with the CPU's.

    python benchmarks/gpu/detect.py [--short] [--precision fp32|bf16] [--planted] [--json PATH]

The studies have every kind of stage but `ask`, every objective and every sampler, models with two tokenizers, routes, phases and an EMA
teacher, with models of two families and a few thousand weights. A GPU would refuse each mixing that is found, so the exit status is 1 if
there is one. `pretend.py` says how they are found. g++ is needed. The script also counts, for each stage, the operations after which the
CPU waits for the GPU.

`--short` runs one arm for each kind of work, for the tests, and measures each model and each path only once. `--planted` adds a loss in
the user's own code that mixes, which must be found.
"""

import argparse
import contextlib
import gc
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from pretend import Seen, pretended

MODELS = """
study: detect
teacher: xl
seeds: [1]
models:
  xl: {load: "scratch:llama", tokenizer: tinyworld, seed: 1, config: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 32, max_position_embeddings: 64}, sft: {optim: {steps: 2, batch: 4, precision: PRECISION}, select: {every: 2}, keep: [1]}}
  l: {load: "scratch:gpt2", tokenizer: tinyworld, config: {n_embd: 28, n_layer: 2, n_head: 2, n_positions: 64}, sft: {optim: {steps: 1, batch: 4, precision: PRECISION}, select: {metric: last}}}
  b: {load: "scratch:gpt2", tokenizer: tinyworld-bpe, config: {n_embd: 16, n_layer: 1, n_head: 2, n_positions: 96}}
  s: {init: {from: xl, layers: [1]}}
  p: {init: {from: xl, layers: 1, layers_by: influence, hidden: 8, intermediate: 16, heads: 2}}
  early: {checkpoint: {of: xl, step: 1}}
  soft: {temper: {of: xl, tau: 0.8}}
  like: {temper: {of: xl, like: kd}}
data: {train: tinyworld, dev: tinyworld, test: [tinyworld, tinyworld_choices], corpus: tinyworld, template: plain, max_length: 48, world: {people: 20}, limit: {train: 12, dev: 2, test: 2}}
method:
  objective: {type: minillm}
  sampler: {type: teacher_mixed, rollouts: 8, inner_epochs: 2, max_new_tokens: 4}
  optim: {steps: 2, batch: 4, lr: 1e-3, precision: PRECISION}
  select: {metric: rouge_l, every: 2}
evaluate: {seeds: [1], max_new_tokens: 4, precision: PRECISION, also: {greedy: {temperature: 0}, narrow: {top_k: 3, top_p: 0.9, no_repeat_ngram: 2}}}
runtime: {code: .}
arms:
"""  # noqa: E501
SHORT = """
  kd: {path: l > s, objective: {type: forward_kl, kd_ratio: 0.5}, sampler: {type: dataset}}
  hidden: {path: xl > s, objective: {type: jensen_shannon}, sampler: {type: dataset, signal: {type: hidden}}}
  pair: {path: xl > s, objective: {type: contrastive}, sampler: {type: pair, max_new_tokens: 4}, select: {metric: last}}
  like: like > s
  over-spans: {path: xl > b, objective: {type: reverse_kl}, sampler: {type: student, max_new_tokens: 4}}
"""
REST = """
  minillm: xl > s
  official: {path: l > s, objective: {type: minillm, preset: official}}
  pruned: xl > p
  early: early > s
  soft: soft > s
  seqkd: {path: xl > s, objective: {type: cross_entropy}, sampler: {type: teacher, max_new_tokens: 4}}
  top_k: {path: xl > s, objective: {type: reverse_kl}, sampler: {type: dataset, signal: {type: top_k, k: 8}}, select: {metric: reverse_kl}}
  dense: {path: xl > l > s, dense: {drop: 0.3}}
  dense-kd: {path: xl > l > s, dense: {kind: arithmetic}, objective: {type: forward_kl}, sampler: {type: dataset}}
  speculative: {path: xl > s, objective: {type: jensen_shannon}, sampler: {type: speculative, k: 5, max_new_tokens: 4}}
  mix: {path: xl > l, objective: {type: skew_forward_kl}, sampler: {type: mix, max_new_tokens: 4}}
  replay: {path: xl > s, objective: {type: skew_reverse_kl}, sampler: {type: replay, tolerance: 0, increment: 1, capacity: 8, max_new_tokens: 4}, select: {metric: loss, every: 1}}
  k2: {path: xl > s, objective: {type: sampled_kl}, sampler: {type: student, max_new_tokens: 4}}
  k3: {path: xl > s, objective: {type: sampled_kl, estimator: k3}, sampler: {type: student, max_new_tokens: 4}}
  control: {path: xl > s, objective: {type: no_teacher}, sampler: {type: student, max_new_tokens: 4}}
  sampled: {path: xl > s, objective: {type: forward_kl}, sampler: {type: dataset, signal: {type: sampled, draws: 8}}}
  recorded: {path: xl > s, objective: {type: reverse_kl}, sampler: {type: student, recorded: true, max_new_tokens: 4}}
  budget: {path: l > s, objective: {type: reverse_kl}, sampler: {type: dataset}, optim: {tokens: 64}}
  packed: {path: xl > l, objective: {type: jensen_shannon}, sampler: {type: dataset}, optim: {packed: true, tokens: 64}}
  packed-minillm: {path: l > s, optim: {packed: true, tokens: 64}}
  context: {path: xl > s, context: "{instruction} {output}", objective: {type: forward_kl}, sampler: {type: student, max_new_tokens: 4}}
  phases: {path: xl > s, sampler: {type: dataset}, phases: [{objective: {type: forward_kl}}, {objective: {type: reverse_kl}, sampler: {type: student, max_new_tokens: 4}}]}
  ema: {path: s > s, ema: 0.5, context: "{instruction} {output}", objective: {type: reverse_kl}, sampler: {type: student, max_new_tokens: 4}}
  spans-kl: {path: xl > b, objective: {type: forward_kl, kd_ratio: 0.5}, sampler: {type: dataset}, optim: {packed: true, tokens: 200}}
  spans-js: {path: l > b, objective: {type: jensen_shannon}, sampler: {type: dataset}}
  spans-gold: {path: xl > b, objective: {type: gold}, sampler: {type: dataset}}
  spans-context: {path: xl > b, context: "{instruction} {output}", objective: {type: skew_reverse_kl}, sampler: {type: student, max_new_tokens: 4}}
  spans-minillm: {path: xl > b, objective: {type: minillm, pt_weight: 0}, sampler: {type: teacher_mixed, alpha: 0, rollouts: 8, inner_epochs: 2, max_new_tokens: 4}}
  spans-seqkd: {path: xl > b, objective: {type: cross_entropy}, sampler: {type: teacher, max_new_tokens: 4}}
  checkpointed: {path: xl > l, objective: {type: reverse_kl}, sampler: {type: dataset}, optim: {gradient_checkpointing: true, micro_batch: 2}}
"""  # noqa: E501
OTHERS, SETS = (
    "also: {greedy: {temperature: 0}, narrow: {top_k: 3, top_p: 0.9, no_repeat_ngram: 2}}",
    "test: [tinyworld, tinyworld_choices]",
)
ROUTES = """
  kd: {path: xl > s, objective: {type: forward_kl}, sampler: {type: dataset}}
  route: {path: xl on facts + l on skills > s, objective: {type: reverse_kl}, sampler: {type: student, max_new_tokens: 4}}
  route-minillm: {path: xl on facts + l on skills > s, objective: {type: minillm, pt_weight: 0}, sampler: {type: student, rollouts: 8, inner_epochs: 2, max_new_tokens: 4}}
  route-seqkd: {path: xl on facts + l on skills > s, objective: {type: cross_entropy}, sampler: {type: teacher, max_new_tokens: 4}}
"""  # noqa: E501
ONE_SET, SETS_OF_ROUTES = (
    "train: tinyworld, dev: tinyworld, test: [tinyworld, tinyworld_choices]",
    "train: {facts: {load: tinyworld_facts, weight: 1}, skills: {load: tinyworld_skills, weight: 1}}, "
    "dev: {facts: {load: tinyworld_facts}, skills: {load: tinyworld_skills}}, test: [tinyworld]",
)
DIVERGENCES = ["jeffreys", "total_variation", "adaptive_kl", "alpha_beta", "alpha_mixture", "top_k_forward_kl", "top_k_reverse_kl", "taid"]
OWN = """
import torch

SCALES = torch.ones(1)


def fair(student_logits, teacher_logits):
    return (student_logits - teacher_logits).square().mean(-1)


def planted(student_logits, teacher_logits):
    return fair(student_logits, teacher_logits) * SCALES
"""


def recipe(precision: str, *, short: bool, planted: bool) -> str:
    """Return the recipe."""
    arms = SHORT if short else SHORT + REST
    if not short:
        arms += "".join(f"  {name}: {{path: xl > s, objective: {{type: {name}}}, sampler: {{type: dataset}}}}\n" for name in DIVERGENCES)
    if planted or not short:
        function = "planted" if planted else "fair"
        arms += f'  own: {{path: xl > s, objective: {{type: custom, function: "own:{function}"}}, sampler: {{type: dataset}}}}\n'
    whole = (MODELS + arms).replace("PRECISION", precision)
    return whole.replace(OTHERS, "also: {greedy: {temperature: 0}}").replace(SETS, "test: [tinyworld]") if short else whole


def recipe_of_routes(precision: str) -> str:
    """Return the recipe of students with a teacher for each training set."""
    return (MODELS.replace(ONE_SET, SETS_OF_ROUTES) + ROUTES).replace("PRECISION", precision)


def run(text: str, seen: Seen, folder: Path, *, short: bool, probes: bool) -> list[dict[str, Any]]:
    """Run a recipe's stages in this process, one after another. Returns what was seen in each of them."""
    from accelerate.state import AcceleratorState

    from tadistill.config import parse
    from tadistill.plan.arms import make_plan, plan_probes
    from tadistill.plan.task import make_task
    from tadistill.stages.execute import run_stage
    from tadistill.store import store_of

    (folder / "own.py").write_text(OWN)
    made = parse(text, source="detect", folder=folder)
    plan, store, rows, done = make_plan(made), store_of(folder / "runs"), [], set()
    plans = [plan, plan_probes(made, ["xl", "l"], prompts=2, k=4).plan] if probes else [plan]
    for plan in plans:
        for stage in plan.stages.values():
            if store.finished(stage.key):
                continue
            if short and stage.spec.measures:
                path = stage.label.partition(",")[0]  # such as `analyse distill xl -> s`
                work = f"greedy {stage.model}" if stage.label.endswith("greedy") else path
                if work in done:
                    continue
                done.add(work)
            before = Counter(seen.mixings), Counter(seen.waits), seen.operations
            AcceleratorState._reset_state(True)  # the next stage may have another precision
            gc.freeze()  # each stage ends with a collection, which need not look through what is here already
            run_stage(make_task(plan, stage, store), progress=lambda *_: None, alarm=lambda _: None, stop=lambda: False)
            kind, mixed, waits = stage.spec.kind, seen.mixings - before[0], seen.waits - before[1]
            rows.append({"stage": stage.label, "kind": kind, "operations": seen.operations - before[2], "mixings": mixed, "waits": waits})
            print(f"{kind:9} {stage.label[:60]:60} {rows[-1]['operations']:7} operations, {waits.total():4} waits", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Find operations that mix a GPU's tensors with the CPU's.")
    parser.add_argument("--short", action="store_true", help="one arm for each kind of work")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--planted", action="store_true", help="add a loss that mixes")
    parser.add_argument("--json", type=Path, help="write what was found there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pretended() as seen, contextlib.chdir(folder):
        text = recipe(options.precision, short=options.short, planted=options.planted)
        rows = run(text, seen, Path(folder), short=options.short, probes=not options.short)
        if not options.short:
            rows += run(recipe_of_routes(options.precision), seen, Path(folder), short=False, probes=False)
    kinds = sorted({row["kind"] for row in rows})
    print(
        f"{len(rows)} stages of {len(kinds)} kinds ({', '.join(kinds)}), {options.precision}: {seen.operations:,} operations on the device"
    )
    for mixing, count in seen.mixings.most_common():
        print(f"MIXED {count} times: {mixing}")
    print(f"{len(seen.mixings)} places mix tensors of the GPU and the CPU")
    if options.json:
        options.json.write_text(json.dumps({"mixings": seen.mixings, "waits": seen.waits, "stages": rows}, indent=1) + "\n")
    return 1 if seen.mixings else 0


if __name__ == "__main__":
    sys.exit(main())
