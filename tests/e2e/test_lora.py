"""Studies that train adapters: artifacts are ordinary models, a kill changes nothing, and gradient checkpointing changes no loss."""

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tadistill.config import validate
from tadistill.errors import Interrupted
from tadistill.plan.arms import Plan, make_plan
from tadistill.plan.task import make_task
from tadistill.stages.execute import run_stage
from tadistill.store import Store

CONFIG = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
}
TARGET = {"gpt2": "attn.c_proj", "llama": "o_proj"}
OPTIM = {"steps": 6, "batch": 8, "lr": 1e-2}
ROUNDS = {"type": "teacher_mixed", "max_new_tokens": 8, "rollouts": 16, "inner_epochs": 1}


def plan(family: str) -> Plan:
    """Plan a teacher and a student with adapters on one kind of matrix. GPT-2 and the adapters have dropout."""
    base = {"load": f"scratch:{family}", "tokenizer": "tinyworld", "config": CONFIG[family]}
    base |= {"lora": {"r": 4, "alpha": 8, "dropout": 0.1, "targets": [TARGET[family]]}}
    sft = {"optim": OPTIM, "select": {"metric": "loss", "every": 2}}
    minillm = {"path": "t > s", "objective": {"type": "minillm", "pt_weight": 0}, "sampler": ROUNDS}
    recipe = {
        "study": "lora",
        "seeds": [1],
        "models": {
            "t": base | {"seed": 2, "sft": sft | {"keep": [3]}},
            "s": base | {"sft": sft},
            "e": {"checkpoint": {"of": "t", "step": 3}},
        },
        "data": {"train": "tinyworld", "dev": "tinyworld", "test": ["tinyworld"], "template": "plain", "max_length": 48}
        | {"limit": {"train": 64, "dev": 8, "test": 4}, "world": {"people": 20}},
        "method": {"objective": {"type": "forward_kl"}, "sampler": {"type": "dataset"}, "optim": OPTIM}
        | {"select": {"metric": "rouge_l", "every": 3}},
        "evaluate": {"also": {}, "max_new_tokens": 8},
        "arms": {
            "kd": "t > s",
            "early": "e > s",
            "minillm": minillm,
            "again": minillm | {"optim": {"gradient_checkpointing": True}},
        },
        "teacher": "t",
    }
    return make_plan(validate(recipe))


def run(found: Plan, root: Path, *, kills: bool = False) -> dict[str, Path]:
    """Run all stages and return their folders by label. With `kills`, run the training stages only, stop each after three updates and
    resume it."""
    store = Store(root)
    for stage in found.stages.values():
        task = make_task(found, stage, store)
        quiet = {"progress": lambda *_: None, "alarm": lambda _: None}
        if kills and not stage.steps:
            continue
        if kills:
            calls = iter(range(100))
            with pytest.raises(Interrupted):
                run_stage(task, stop=lambda calls=calls: next(calls) == 3, **quiet)
        run_stage(task, stop=lambda: False, **quiet)
        gc.freeze()  # as in `inprocess.run_here`
    return {f"{stage.label} {' '.join(sorted(stage.arms))}": store.folder(key) for key, stage in found.stages.items()}


@pytest.fixture(scope="module", params=CONFIG)
def study(request, tmp_path_factory):
    """A family, its plan, and the folders of its stages."""
    found = plan(request.param)
    return request.param, found, run(found, tmp_path_factory.mktemp("whole"))


def trained(folders: dict[str, Path]) -> dict[str, Path]:
    return {label: folder / "model" for label, folder in folders.items() if label.startswith(("sft", "distill"))}


def test_artifacts_are_ordinary_models_that_differ_where_adapters_were(study):
    family, _, folders = study
    found = trained(folders)
    assert len(found) == 6
    (start,) = (load_file(folder / "model.safetensors") for label, folder in found.items() if label.startswith("sft s"))
    (teacher,) = (folder for label, folder in found.items() if label.startswith("sft t"))
    assert (teacher.with_name("model-3") / "config.json").is_file()
    for label, folder in found.items():
        _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        if label.startswith("distill"):
            after = load_file(folder / "model.safetensors")
            assert set(after) == set(start)
            changed = {name for name in start if not torch.equal(start[name], after[name])}
            assert changed == {name for name in start if name.endswith(f"{TARGET[family]}.weight")}


def test_a_kill_changes_nothing(study, tmp_path):
    _, found, folders = study
    for label, folder in trained(run(found, tmp_path, kills=True)).items():
        ours, theirs = load_file(folder / "model.safetensors"), load_file(trained(folders)[label] / "model.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), label


def test_layers_that_run_again_change_no_loss(study):
    _, _, folders = study
    of = {
        arm: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for label, folder in folders.items()
        for arm in ("minillm", "again")
        if label.startswith("distill") and label.endswith(f" {arm}")
    }
    assert len(of["again"]) == len(of["minillm"]) == OPTIM["steps"]
    for again, plain in zip(of["again"], of["minillm"], strict=True):
        assert {k: v for k, v in again.items() if "tokens_per_second" not in k} == pytest.approx(
            {k: v for k, v in plain.items() if "tokens_per_second" not in k}, abs=1e-6
        )
