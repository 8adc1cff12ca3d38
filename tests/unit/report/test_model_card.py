"""Exported students and their model cards."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tadistill.config.model import ModelConfig
from tadistill.disk import digest
from tadistill.errors import ConfigError, StoreError
from tadistill.report.against_sft import against_sft
from tadistill.report.explain import verdict_text
from tadistill.report.export import export
from tadistill.report.model_card import model_card
from tadistill.results.number_text import number
from tadistill.results.verdict import comparisons
from tadistill.runner.run_study import _base

from .builder import SMALL, ArmSpec, StudySpec, build_study, key_of


def test_an_export_is_the_trained_model_with_its_card(shared, tmp_path):
    target = export(shared.results, "chain", 20, tmp_path / "out")
    assert json.loads((target / "config.json").read_text()) == {"arm": "chain", "seed": 20}
    card = (target / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "gpt2-s",
        "datasets": ["MiniLLM/dolly"],
        "metrics": ["accuracy", "rouge", "perplexity", "exact_match"],
        "tags": ["distillation", "tadistill"],
    }
    results = shared.results
    assert card == model_card(results, "chain", 20, target, str(tmp_path / "out"))
    assert verdict_text(results, comparisons(results)[0]).replace("<", "&lt;") in card
    own = shared.scores["chain", 20]["dolly"]["rouge_l"].mean()
    assert f"| ROUGE-L (points) | dolly | {number(own, 'rouge_l')} [" in card
    assert f"`{key_of('distill', ('xl', 'l'), 20, '')}`" in card  # the assistant's stage too
    assert "tadistill run recipes/demo.yaml" in card
    assert "torch 2.13.0" in card


def test_incomplete_weights_of_a_killed_process_are_not_exported(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL))
    key = key_of("distill", ("xl", "l", "s"), 20, "chain")
    (study.store_dir / key[:2] / key / "model" / ".tmpStrVoJ").write_bytes(b"0123")
    assert not (export(study.results, "chain", 20, tmp_path / "out") / ".tmpStrVoJ").exists()


def test_the_first_seed_is_exported_by_default(shared, tmp_path):
    target = export(shared.results, "direct-long", None, tmp_path / "out")
    assert json.loads((target / "config.json").read_text())["seed"] == 10
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "against direct distillation with the same compute (direct-long)" in card  # a twin's card tells it too


def test_the_first_seed_is_the_recipes_not_the_smallest(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, seeds=(30, 10)))
    target = export(study.results, "chain", None, tmp_path / "out")
    assert json.loads((target / "config.json").read_text())["seed"] == 30
    key = key_of("distill", ("xl", "l", "s"), 30, "chain")
    (study.store_dir / key[:2] / key / "manifest.json").unlink()
    target = export(study.read(), "chain", None, tmp_path / "next")  # the first that is finished
    assert json.loads((target / "config.json").read_text())["seed"] == 10
    card = (target / "README.md").read_text(encoding="utf-8")
    assert "The exported seed is the recipe's first finished seed, or the seed that the user named." in card


KEPT = {"of": "m", "step": 10}


@pytest.mark.parametrize(
    ("models", "base", "said"),
    [
        ({"s": {"checkpoint": KEPT}}, "gpt2-m", "Model s is model m after update 10 of its fine-tuning. Model xl is `gpt2-xl`."),
        ({"s": {"temper": {"of": "m", "tau": 0.7}}}, "gpt2-m", "Model s is model m with another temperature. Model xl is"),
        (
            {"s": {"init": {"from": "l", "layers": [0]}, "sft": {"optim": {}}}, "l": {"checkpoint": KEPT}},
            "gpt2-m",
            "Model s is cut out of model l (layers [0]), fine-tuned on the training data. Model xl is `gpt2-xl`. Model l is model m after",
        ),
        ({"s": {"load": "scratch:llama"}, "l": {"api": {}}}, None, "`scratch:llama`. Model xl is `gpt2-xl`. Model l is behind an API."),
    ],
)
def test_the_base_model_is_found_through_what_a_model_is_made_from(study, tmp_path, models, base, said):
    plan = json.loads((study.study_dir / "plan.json").read_text())
    empty = dict.fromkeys(("load", "init", "checkpoint", "temper"))
    plan["recipe"]["models"] |= {name: empty | model for name, model in models.items()}
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    target = export(study.read(), "chain", 10, tmp_path / "out")
    _, front, text = (target / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front).get("base_model") == base
    assert said in text


@pytest.mark.parametrize(
    ("recorded", "there", "base", "data"),
    [
        (("directory:1", "file:1"), False, None, None),
        (("hub:m/sft@main", "hub:data/dolly@main:train"), True, "m/sft", ["data/dolly"]),
        (None, False, "m/sft", ["data/dolly"]),  # an earlier version may have recorded nothing
        (None, True, None, None),
    ],
)
def test_a_source_is_on_the_hub_if_it_was_when_the_study_was_planned(study, tmp_path, monkeypatch, recorded, there, base, data):
    monkeypatch.chdir(tmp_path)
    plan = json.loads((study.study_dir / "plan.json").read_text())
    plan["recipe"]["models"]["s"]["load"] = "m/sft"
    plan["recipe"]["data"] = {"train": {"load": "data/dolly"}, "corpus": {"load": "texts/corpus.txt"}}
    (study.study_dir / "plan.json").write_text(json.dumps(plan))
    if there:
        for name in ("m/sft/config.json", "data/dolly/train.jsonl"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text("{}")
    if recorded:
        key = key_of("sft", ("s",), 10, "")
        train = {"ref": {"load": "data/dolly"}, "fingerprint": recorded[1]}
        spec = {"model": {"of": {"load": "m/sft", "fingerprint": recorded[0]}}, "train": [train]}
        (study.store_dir / key[:2] / key / "stage.json").write_text(json.dumps({"spec": spec}))
    front = yaml.safe_load(model_card(study.read(), "chain", 10, tmp_path, "out").split("---\n")[1])
    assert (front.get("base_model"), front.get("datasets")) == (base, data)


@pytest.mark.parametrize(("written", "recorded"), [("m/base", "./m/base"), ("../other/m", "../other/m"), ("org/base", "org/base")])
def test_a_local_base_of_an_adapter_is_recorded_as_a_path(tmp_path, monkeypatch, written, recorded):
    (tmp_path / "work" / "lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    settings = {"peft_type": "LORA", "base_model_name_or_path": written}
    (tmp_path / "work" / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    if written != "org/base":
        (tmp_path / "work" / written).mkdir(parents=True)
        (tmp_path / "work" / written / "config.json").write_text("{}")
    assert _base(ModelConfig(load="./lora")) == {"base": recorded}


def test_a_card_tells_a_negative_result(tmp_path):
    arms = [ArmSpec("chain", ("xl", "l", "s"), gain=-6), ArmSpec("twin", ("xl", "s"), compute="as chain")]
    study = build_study(tmp_path, StudySpec(arms, seeds=(1, 2, 3), fact_sets=()))
    card = model_card(study.read(), "chain", 1, tmp_path, "out")
    assert " against direct distillation with the same compute (twin): the difference in ROUGE-L is −" in card
    assert " Verdict: clearly worse (p " in card


def _verdicts(results, arm, tmp_path):
    card = model_card(results, arm, 1, tmp_path, "out")
    return card.split("## Verdict\n\n")[1].split("\n\n## ")[0]


def test_a_card_says_how_its_arm_differs_from_fine_tuning(tmp_path):
    """In a study with assistants, whose verdicts are about their paths, it said that the arm was compared with no arm."""
    direct = [ArmSpec("kd", ("xl", "s")), ArmSpec("bad", ("xl", "s"), gain=-9), ArmSpec("later", ("xl", "s"))]
    arms = [ArmSpec("sft", ("s",), flops=1e18), *direct, ArmSpec("chain", ("xl", "l", "s")), ArmSpec("assistant", ("xl", "l"))]
    spec = StudySpec(arms, seeds=(1, 2, 3), sets={"dolly": 30}, fact_sets=(), unfinished=tuple(("later", seed) for seed in (1, 2, 3)))
    results = build_study(tmp_path, spec).read()
    start = "- bad against plain fine-tuning (SFT, sft), with {} answers: the difference in ROUGE-L is −"
    bad = _verdicts(results, "bad", tmp_path).splitlines()
    assert [line.startswith(start.format(way)) for way, line in zip(("sampled", "greedy"), bad, strict=True)] == [True, True]
    assert all(re.search(r" Verdict: clearly worse \(p \S+ \S+ after Holm's correction for 8 comparisons\)\.$", line) for line in bad)
    assert " Verdict: undecided. The interval " in _verdicts(results, "kd", tmp_path)
    assert "(sft), with sampled" not in (chain := _verdicts(results, "chain", tmp_path))
    assert "TA path" in chain
    assert "chain against plain fine-tuning (SFT, sft), with greedy answers" in chain
    late = "- later against plain fine-tuning (SFT, sft): undecided, because the two arms have no finished training seed in common."
    assert _verdicts(results, "later", tmp_path) == late
    assert _verdicts(results, "sft", tmp_path) == f"- {against_sft(results)}"
    assert "The study does not compare this arm" in _verdicts(results, "assistant", tmp_path)


def test_a_card_does_not_give_a_comparison_with_fine_tuning_twice(tmp_path):
    arms = [ArmSpec("sft", ("s",), flops=1e15), ArmSpec("kd", ("xl", "s"), gain=9)]
    results = build_study(tmp_path, StudySpec(arms, seeds=(1, 2, 3), sets={"dolly": 30}, fact_sets=())).read()
    said = _verdicts(results, "kd", tmp_path).splitlines()
    assert [line.split(":")[0] for line in said] == [
        "- sft against kd",
        "- kd against plain fine-tuning (SFT, sft), with greedy answers",
    ]


def test_a_card_of_a_seed_that_is_not_evaluated(unfinished):
    card = model_card(unfinished.results, "chain", 10, unfinished.study_dir, "out")
    assert "Seed 10 is not evaluated yet: run `tadistill run recipes/demo.yaml` to evaluate it." in card
    assert "undecided, because it has no finished training seed in common with" in card


def test_what_cannot_be_exported(study, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / ".file").touch()  # `ls` does not show it
    cases = [
        (("nobody", None, tmp_path / "out"), "no arm `nobody`; its arms are direct, chain, direct-long$"),
        (("xl", None, tmp_path / "out"), "direct-long; to export model xl itself, add the arm `xl: xl` to the recipe"),
        (("chain", 99, tmp_path / "out"), "arm chain has no seed 99; its seeds are 10, 20"),
        (("chain", 10, full), r"full is not an empty directory \(it has .file\); give"),
        (("chain", 10, full / ".file"), r"full/.file is not a directory"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            export(study.read(), *arguments)
    key = key_of("distill", ("xl", "l", "s"), 10, "chain")
    (study.store_dir / key[:2] / key / "manifest.json").unlink()
    with pytest.raises(
        StoreError, match=f"arm chain with seed 10 is not trained yet .stage {key}.: run `tadistill run recipes/demo.yaml` to finish it"
    ):
        export(study.read(), "chain", 10, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(study, tmp_path, monkeypatch, there, error):
    """Its folder looked like a model, with a truncated file of weights, and the next export refused it."""
    target = tmp_path / "new" / "out"
    if there:
        target.mkdir(parents=True)

    def copied(_, folder, **__):
        Path(folder, "original").mkdir(parents=True)
        Path(folder, "config.json").touch()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", copied)
        with pytest.raises((StoreError, KeyboardInterrupt)):
            export(study.read(), "chain", 10, target)
    assert [*target.parent.iterdir()] == [target] * there
    assert (export(study.read(), "chain", 10, target) / "README.md").is_file()


def test_a_full_disk_is_one_sentence_without_folders_that_are_deleted(study, tmp_path, monkeypatch):
    def copied(_, folder, **__):
        names = [(f"model/{name}", f"{folder}/{name}", f"[Errno 28] No space left on device: '{folder}/{name}'") for name in "ab"]
        raise shutil.Error(names)

    monkeypatch.setattr(shutil, "copytree", copied)
    with pytest.raises(StoreError, match=r"cannot be copied to \S+/out \(\[Errno 28\] No space left on device\); check its permissions"):
        export(study.read(), "chain", 10, tmp_path / "out")


def test_a_model_whose_folder_was_deleted_is_one_sentence(study, tmp_path):
    key = key_of("distill", ("xl", "l", "s"), 10, "chain")
    folder = study.store_dir / key[:2] / key
    shutil.rmtree(folder / "model")
    with pytest.raises(StoreError, match=f"arm chain with seed 10 is not trained yet .stage {key}.: run `tadistill run recipes/demo.yaml`"):
        export(study.read(), "chain", 10, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {"metrics.jsonl": ""}}))  # names no file of the model
    with pytest.raises(StoreError) as caught:
        export(study.read(), "chain", 10, tmp_path / "out")
    assert str(caught.value) == f"{folder / 'model'} does not exist; delete {folder} and run `tadistill run recipes/demo.yaml` again"


def test_a_model_that_is_loaded_as_it_is_has_nothing_to_export(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, trained=False))
    with pytest.raises(ConfigError, match="arm direct only uses model s and does not train it, so there is nothing to export"):
        export(study.read(), "direct", None, tmp_path / "out")


def test_changed_weights_are_not_exported(study, tmp_path):
    key = key_of("distill", ("xl", "l", "s"), 10, "chain")
    folder = study.store_dir / key[:2] / key
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model/config.json"] = digest(folder / "model" / "config.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    export(study.read(), "chain", 10, tmp_path / "whole")
    (folder / "model" / "config.json").write_text("{}")
    with pytest.raises(StoreError, match=rf"config\.json has changed .*{key}.*delete .*{key} and run `tadistill run recipes"):
        export(study.read(), "chain", 10, tmp_path / "out")
    assert not (tmp_path / "out").exists()
