"""Several dev sets, one for each training set: which stages read them with which weights, and mistakes in a recipe."""

import io

import pytest
from rich.console import Console
from tests.unit.plan.test_routes import DATA, MODELS, ROUTE, laid_out, routed, stages

from tadistill.advise.measures import ladder, probe_plan, with_search
from tadistill.data.encoding import Encoded, EvalSet, as_one
from tadistill.data.rows import Example
from tadistill.errors import TadistillError
from tadistill.evaluation.run import over_sets
from tadistill.plan import preview
from tadistill.plan.inputs import Split
from tadistill.store import Store

DEV = {"facts": {"load": "tinyworld_facts", "split": "train"}, "skills": {"load": "tinyworld_skills", "split": "train"}}
SEVERAL = DATA | {"dev": DEV}
LOSS = {"select": {"metric": "loss", "every": 4}}


def test_each_stage_reads_the_dev_sets_of_its_training_sets():
    models = MODELS | {"m": MODELS["m"] | {"sft": {"optim": {"steps": 10}, "sets": ["skills"]} | LOSS}}
    found = routed(models=models, data=SEVERAL, arms={"a": {"path": ROUTE} | LOSS})
    (student,) = stages(found, "distill")
    assert (student.spec.dev.names, student.spec.dev.shares) == (("facts", "skills"), (0.75, 0.25))
    assert [split.ref.load for split in student.spec.dev.splits] == ["tinyworld_facts", "tinyworld_skills"]
    expert = next(stage.spec.dev for stage in stages(found, "sft") if stage.model == "m")
    assert isinstance(expert, Split)
    assert expert.ref.load == "tinyworld_skills"


def test_the_plan_counts_and_names_the_dev_sets():
    few = DATA | {"limit": {"dev": 10}}
    plans = {name: routed(data=few | {"dev": dev}, arms={"a": {"path": ROUTE} | LOSS}) for name, dev in DEV.items()}
    both = routed(data=few | {"dev": DEV}, arms={"a": {"path": ROUTE} | LOSS})
    looks = {name: stages(found, "distill")[0].cost.parts["selection/student"].flops for name, found in plans.items()}
    assert stages(both, "distill")[0].cost.parts["selection/student"].flops == pytest.approx(sum(looks.values()), rel=0.01)
    out = io.StringIO()
    preview.print_plan(both, Store(io.__file__), Console(file=out, width=200))
    assert "Each dev value (loss or metric) is a mean over the dev sets of the same names" in " ".join(out.getvalue().split())


def test_names_and_weights_of_dev_sets_are_in_the_key():
    other = {"x": DATA["train"]["facts"], "y": DATA["train"]["skills"]}
    named = routed(data=DATA | {"train": other, "dev": {"x": DEV["facts"], "y": DEV["skills"]}}, arms={"a": {"path": "xl > s"} | LOSS})
    heavier = DATA["train"] | {"skills": DATA["train"]["skills"] | {"weight": 2}}
    changed = routed(data=SEVERAL | {"train": heavier}, arms={"a": {"path": "xl > s"} | LOSS})
    fewer = routed(data=SEVERAL | {"limit": {"dev": 4}}, arms={"a": {"path": "xl > s"} | LOSS})
    plain = routed(data=SEVERAL, arms={"a": {"path": "xl > s"} | LOSS})
    assert len({stages(found, "distill")[0].key for found in (named, changed, fewer, plain)}) == 4


def test_advice_reads_prompts_in_proportion():
    recipe = with_search(routed(data=SEVERAL, arms={"a": "xl > s"}).recipe)
    probes = probe_plan(recipe, ladder(recipe), 40)
    limits = {tuple(split.limit for split in stage.spec.dev.splits) for stage in stages(probes.plan, "probe", "pair")}
    assert limits == {(30, 10)}


def test_several_sets_are_read_as_one():
    sets = [EvalSet(name, [Example(f"{name}{i}", "", ("a",)) for i in range(3)], [Encoded(row, (1,), (2,)) for row in rows])
            for name, rows in (("x", (0, 2)), ("y", (1,)))]  # fmt: skip
    one = as_one(sets)
    assert [example.instruction for example in one.rows] == ["x0", "x2", "y1"]
    assert as_one(sets[:1]) is sets[0]


def test_means_over_dev_sets():
    measured = {"x": (0.75, {"loss": 1.0, "rouge_l": 20.0}), "y": (0.25, {"loss": 2.0, "rouge_l": 60.0})}
    means = {"loss": 1.25, "rouge_l": 30.0}
    assert over_sets(measured) == means | {"loss/x": 1.0, "loss/y": 2.0, "rouge_l/x": 20.0, "rouge_l/y": 60.0}
    alone = {"loss": 1.0}
    assert over_sets({"x": (1.0, alone)}) is alone


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"dev": {"facts": "tinyworld", "chat": "tinyworld"}},
         "`data.dev` has the set `chat`, but the sets of `data.train` are `facts` and `skills`; use the names of the training sets"),
        ({"dev": {"facts": DEV["facts"]}},
         "`data.dev` has no set `skills`; add the dev set of this training set, or write one dev set for all"),
        ({"dev": {"facts": "tinyworld"}},
         "`data.dev` has no set `skills`; add the dev set of this training set, or write one dev set for all"),
        ({"dev": DEV, "train": "tinyworld"},
         "`data.dev` has sets with names, but `data.train` is one set; write one data set, without names"),
        ({"dev": DEV | {"facts": DEV["facts"] | {"weight": 2}}}, "`data.dev.facts.weight` is not a known key"),
        ({"dev": DEV | {"facts": DEV["facts"] | {"extra": ["note"]}}}, "and a `context` is only used in training; remove `extra`"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(data, sentence):
    with pytest.raises(TadistillError) as caught:
        laid_out(data=DATA | data)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
