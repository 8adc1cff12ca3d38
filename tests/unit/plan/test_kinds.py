"""The specs of stages: their plain form is the one that finished stores were made with, and they refuse what does not belong to them."""

import json
from inspect import signature
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.unit.plan.fakes import spec

from tadistill.config import load
from tadistill.plan.arms import make_plan, plan_probes
from tadistill.plan.inputs import FromStage, Loaded, Output, PrunedDepth, Split, Tempered, stage_of
from tadistill.plan.kinds import KINDS, TRAINING, DistillSpec, GenerateSpec, SftSpec, TrainingSpec
from tadistill.stages.execute import work_of

E2E = Path(__file__).parents[2] / "e2e"
STORED = json.loads(Path(__file__).with_name("stage_contents.json").read_text())
"""Recipe -> label -> key, kind, parents and the `spec` of stage.json, as written when specs were still plain dicts."""
LOADED = Loaded(load="gpt2", revision="main", config={}, tokenizer=None, fingerprint="f")


@pytest.fixture(scope="module")
def planned() -> dict[str, dict]:
    found = {}
    for name in STORED:
        recipe = load(E2E / name)
        probes = plan_probes(recipe, ["xl", "l", "s"], prompts=6, k=4).plan if name == "interrupted.yaml" else None
        stages = [*(probes.stages.values() if probes else ()), *make_plan(recipe).stages.values()]
        found[name] = {stage.label: stage for stage in stages}
    return found


@pytest.mark.parametrize(("recipe", "label"), [(recipe, label) for recipe, stages in STORED.items() for label in stages])
def test_the_plain_form_is_that_of_finished_stores(planned, recipe, label):
    stage, stored = planned[recipe][label], STORED[recipe][label]
    assert json.loads(json.dumps(stage.spec.content())) == stored["spec"]
    assert (stage.key, stage.kind) == (stored["key"], stored["kind"])
    assert list(stage.parents.items()) == list(stored["parents"].items())


def test_every_kind_is_stored():
    elsewhere = {"retokenise", "ask"}  # test_edges, test_asked
    assert {stage["kind"] for stages in STORED.values() for stage in stages.values()} | elsewhere == set(KINDS)


def test_a_spec_survives_pickling(planned):
    import pickle

    for stage in planned["edges.yaml"].values():
        again = pickle.loads(pickle.dumps(stage.spec))
        assert again == stage.spec
        assert again.key == stage.key


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_work(kind):
    """The name leads to a function of one argument, the context."""
    assert list(signature(work_of(KINDS[kind])).parameters) == ["context"]
    assert KINDS[kind].kind == kind


def test_kinds_that_train_and_kinds_that_measure():
    assert {"sft", "distill"} == TRAINING
    assert {kind for kind, spec in KINDS.items() if spec.measures} == {"evaluate", "analyse", "probe", "pair"}
    assert {kind for kind, spec in KINDS.items() if not spec.in_recipes} == {"probe", "pair"}
    assert all(issubclass(spec, TrainingSpec) == spec.trains for spec in KINDS.values())


def test_an_unknown_or_mistyped_field_is_refused(planned):
    sft = next(stage.spec for stage in planned["edges.yaml"].values() if stage.kind == "sft")
    fields = dict(sft)
    assert SftSpec(**fields) == sft
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        SftSpec(**fields, teacher=LOADED)
    with pytest.raises(ValidationError, match="valid integer"):
        SftSpec(**fields | {"seed": "one"})
    with pytest.raises(ValidationError):
        SftSpec(**fields | {"student": Output(stage="ab")})  # not a model
    with pytest.raises(ValidationError, match="Field required"):
        GenerateSpec(**{name: value for name, value in fields.items() if name == "data"})
    with pytest.raises(ValidationError, match="frozen"):
        sft.seed = 3


def test_parents_have_the_role_of_their_field():
    assert spec("distill", "c", "d", student="a", teacher="b", signal="e").parents == {
        "student": "a", "teacher": "b", "signal": "e", "assistant 1": "c", "assistant 2": "d"
    }  # fmt: skip
    assert [*spec("distill", "c", student="a", signal="e").models] == ["student", "assistant 1"]
    assert spec("analyse", teacher="a", model="b", answers="c", teacher_answers="d").parents == {
        "teacher": "a", "model": "b", "answers": "c", "teacher_answers": "d"
    }  # fmt: skip


def test_the_stage_behind_a_model():
    deep = Tempered(temper=0.5, of=PrunedDepth(prune=2, of=FromStage(stage="ab", checkpoint=3)))
    assert stage_of(deep) == "ab"
    assert deep.content() == {"temper": 0.5, "of": {"prune": 2, "of": {"stage": "ab", "checkpoint": 3}}}
    assert stage_of(Tempered(temper=0.5, of=LOADED)) is None
    assert "seed" not in LOADED.content()
    assert LOADED.content()["tokenizer"] is None


def test_a_split_writes_its_limit_beside_it(planned):
    trained = next(stage.spec for stage in planned["edges.yaml"].values() if isinstance(stage.spec, DistillSpec))
    content = trained.model_copy(update={"train": Split(ref="a.jsonl", fingerprint="f", role="train", limit=None)}).content()
    assert content["train"] == {"ref": content["train"]["ref"], "fingerprint": "f"}
    assert content["train_limit"] is None
    assert "train" not in content["train"]
