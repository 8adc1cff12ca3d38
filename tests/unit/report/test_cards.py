"""Exported students and their model cards."""

import json

import pytest
import yaml

from tadistill.errors import ConfigError, StoreError
from tadistill.report.cards import export, model_card
from tadistill.report.text import verdict_text
from tadistill.results.collect import read_results
from tadistill.results.units import number
from tadistill.results.verdict import comparisons

from .builder import SMALL, ArmSpec, StudySpec, build_study, key_of


def test_an_export_is_the_trained_model_with_its_card(study, tmp_path):
    target = export(study.study_dir, study.store_dir, "chain", 20, tmp_path / "out")
    assert json.loads((target / "config.json").read_text()) == {"arm": "chain", "seed": 20}
    card = (target / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "gpt2-s",
        "datasets": ["MiniLLM/dolly"],
        "metrics": ["rouge", "accuracy", "exact_match", "perplexity"],
        "tags": ["distillation", "tadistill"],
    }
    results = read_results(study.study_dir, study.store_dir)
    assert card == model_card(results, "chain", 20)
    assert verdict_text(results, comparisons(results)[0]).replace("<", "&lt;") in card
    own = study.scores["chain", 20]["dolly"]["rouge_l"].mean()
    assert f"| ROUGE-L (points) | dolly | {number(own, 'rouge_l')} [" in card
    assert f"`{key_of('distill', ('xl', 'l'), 20, '')}`" in card  # the assistant's stage too
    assert "tadistill run recipes/demo.yaml" in card
    assert "torch 2.13.0" in card


def test_the_first_seed_is_exported_by_default(study, tmp_path):
    target = export(study.study_dir, study.store_dir, "direct-long", None, tmp_path / "out")
    assert json.loads((target / "config.json").read_text())["seed"] == 10
    assert "against equal-compute direct (direct-long)" in (target / "README.md").read_text(encoding="utf-8")  # a twin's card tells it too


def test_a_card_tells_a_negative_result(tmp_path):
    arms = [ArmSpec("chain", ("xl", "l", "s"), gain=-6), ArmSpec("twin", ("xl", "s"), compute="as chain")]
    study = build_study(tmp_path, StudySpec(arms, seeds=(1, 2, 3), fact_sets=()))
    assert " against equal-compute direct (twin): loss (p " in model_card(read_results(study.study_dir, study.store_dir), "chain", 1)


def test_a_card_of_a_seed_that_is_not_evaluated(unfinished):
    card = model_card(read_results(unfinished.study_dir, unfinished.store_dir), "chain", 10)
    assert "Seed 10 is not evaluated yet: `tadistill run recipes/demo.yaml` does it." in card
    assert "no evidence yet, because it shares no finished seed" in card


def test_what_cannot_be_exported(study, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    cases = [
        (("nobody", None, tmp_path / "out"), "no arm `nobody`; its arms are direct, chain, direct-long"),
        (("chain", 99, tmp_path / "out"), "arm chain has no seed 99; its seeds are 10, 20"),
        (("chain", 10, full), "is not an empty directory"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            export(study.study_dir, study.store_dir, *arguments)
    key = key_of("distill", ("xl", "l", "s"), 10, "chain")
    (study.store_dir / key[:2] / key / "manifest.json").unlink()
    with pytest.raises(
        StoreError, match=f"arm chain with seed 10 is not trained yet .stage {key}.: `tadistill run recipes/demo.yaml` finishes it"
    ):
        export(study.study_dir, study.store_dir, "chain", 10, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_loaded_as_it_is_has_nothing_to_export(tmp_path):
    study = build_study(tmp_path, StudySpec(SMALL, trained=False))
    with pytest.raises(ConfigError, match="arm direct is model s as it is loaded"):
        export(study.study_dir, study.store_dir, "direct", None, tmp_path / "out")
