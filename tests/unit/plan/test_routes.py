"""Several training sets and a teacher for each: stages, keys, costs that equal the metered ones, and mistakes found before a run."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from tests.e2e.inprocess import run_here
from tests.unit.plan.test_plan import model, plan

from tadistill.config import validate
from tadistill.data import datasets
from tadistill.data.batch import references
from tadistill.data.encoding import EvalSet, encode
from tadistill.data.encoding_rules import Rules
from tadistill.errors import TadistillError
from tadistill.evaluation.run import dev_metrics
from tadistill.evaluation.token_scores import Subject, entropy, means
from tadistill.models.loading import load_model, load_tokenizer
from tadistill.plan import preview
from tadistill.plan.arms import make_plan
from tadistill.plan.inputs import FromStage
from tadistill.plan.notes import off_budget
from tadistill.plan.task import layout
from tadistill.store import Store

SETS = {"facts": {"load": "tinyworld_facts", "weight": 3}, "skills": {"load": "tinyworld_skills", "weight": 1}}
DATA = {"train": SETS, "dev": "tinyworld", "test": ["tinyworld"], "template": "plain"}
MODELS = {"xl": model(64, seed=1), "m": model(48, seed=1), "l": model(32, seed=1), "s": model(16)}
MODELS["w"] = model(48, config=MODELS["m"]["config"] | {"intermediate_size": 64})
OPD = {"objective": {"type": "reverse_kl"}, "sampler": {"type": "student", "max_new_tokens": 8}, "optim": {"steps": 8, "batch": 8}}
ROUTE = "m on facts + xl on skills > s"


def routed(**changes):
    base = {"seeds": [1], "models": MODELS, "data": DATA, "method": OPD, "teacher": "xl", "arms": {"a": ROUTE}}
    return plan(**base | changes)


def stages(found, *kinds: str):
    return [stage for stage in found.stages.values() if stage.kind in kinds]


def names(found, handles) -> list[str]:
    return [found.stages[handle.stage].model for handle in handles]


def test_each_set_has_its_teacher_and_each_teacher_one_stage():
    found = routed(arms={"a": ROUTE, "b": "m on skills + xl on facts > s", "one": "xl > s"})
    a, b, one = stages(found, "distill")
    assert a.label == "distill m on facts + xl on skills -> s, reverse_kl on student, 8 updates, seed 1"
    assert [split.ref.name for split in a.spec.sets] == ["facts", "skills"]
    assert names(found, (a.spec.teacher, *a.spec.assistants)) == ["m", "xl"]
    assert names(found, (b.spec.teacher, *b.spec.assistants)) == ["m", "xl"]
    assert (a.spec.route, b.spec.route, one.spec.route) == ((0, 1), (1, 0), ())
    assert a.spec.weights == one.spec.weights == (0.75, 0.25)
    assert sorted(stage.label for stage in stages(found, "sft")) == ["sft m, seed 1", "sft s, seed 1", "sft xl, seed 1"]
    assert len({a.key, b.key, one.key}) == 3


def test_only_proportions_of_weights_and_no_names_are_in_the_key():
    other = {"x": SETS["facts"] | {"weight": 0.75}, "y": SETS["skills"] | {"weight": 0.25}}
    keys = {tuple(found.stages) for found in (routed(arms={"a": "xl > s"}), routed(data=DATA | {"train": other}, arms={"a": "xl > s"}))}
    assert len(keys) == 1
    heavier = DATA | {"train": SETS | {"skills": SETS["skills"] | {"weight": 2}}}
    assert tuple(routed(data=heavier, arms={"a": "xl > s"}).stages) not in keys


def test_one_teacher_for_all_sets_is_no_route():
    found = routed(arms={"a": "xl on facts + xl on skills > s", "b": "xl > s"})
    assert found.arms[0].final == found.arms[1].final


def test_fine_tuning_on_some_sets():
    tuned = {"optim": {"steps": 10}, "sets": ["skills"]}
    found = routed(models=MODELS | {"m": MODELS["m"] | {"sft": tuned}, "xl": MODELS["xl"] | {"sft": {"optim": {"epochs": 1, "batch": 10}}}})
    by_model = {stage.model: stage for stage in stages(found, "sft")}
    assert by_model["m"].label == "sft m on skills, seed 1"
    assert [split.ref.name for split in by_model["m"].spec.sets] == ["skills"]
    assert by_model["m"].spec.weights == ()
    whole = plan(seeds=[1], models={"xl": MODELS["xl"] | {"sft": {"optim": {"epochs": 1, "batch": 10}}}}, arms={"a": "xl"})
    assert by_model["xl"].steps == stages(whole, "sft")[0].steps  # the two halves have the rows of the whole


@pytest.mark.parametrize("recorded", [False, True])
def test_texts_and_recordings_are_of_each_teachers_own_sets(recorded):
    sampler = {"type": "student", "recorded": True, "signal": {"type": "hidden"}} if recorded else {"type": "teacher"}
    method = OPD | {"sampler": sampler | {"max_new_tokens": 8}} | ({} if recorded else {"objective": {"type": "cross_entropy"}})
    found = routed(method=method)
    writer = {"facts": "s" if recorded else "m", "skills": "s" if recorded else "xl"}
    texts = stages(found, "generate")
    assert [stage.label for stage in texts] == [f"generate with {writer[name]} on {name}, seed 1" for name in SETS]
    (student,) = stages(found, "distill")
    assert [student.spec.responses, *student.spec.assistant_responses] == [type(student.spec.responses)(stage=s.key) for s in texts]
    signals = stages(found, "signal")
    expected = [f"hidden signal of {name} on the text of s on {on}, seed 1" for name, on in (("m", "facts"), ("xl", "skills"))]
    assert [stage.label for stage in signals] == (expected if recorded else [])
    assert [stage.spec.responses.stage for stage in signals] == [stage.key for stage in texts][: len(signals)]


@pytest.mark.parametrize(
    "arm",
    [
        "m on facts + xl on skills > l > s",
        "l > s then m on facts + xl on skills > s",
        {"path": ROUTE, "phases": [{"method": "seqkd"}, {}]},
        {"path": ROUTE, "context": "{output} {prompt}"},
        {"path": "m on facts + xl on skills > w", "init": {"w": "m"}},
        {"path": ROUTE, "method": "minillm", "sampler": {"type": "student"}, "objective": {"pt_weight": 0}},
        {"path": ROUTE, "method": "distillm-2"},
        {"path": ROUTE, "method": "gkd"},
    ],
)
def test_a_route_works_with(arm):
    found = routed(arms={"a": arm})
    first = next(stage for stage in stages(found, "distill") if stage.spec.route)
    assert first.spec.route == (0, 1)
    assert found.arms[0].flops


def test_budgets_and_equal_compute_leave_the_teachers_own_training_out():
    """The teachers of the two arms have trained with very different FLOPs, so both must be left out."""
    costly = MODELS | {"m": MODELS["m"] | {"sft": {"optim": {"steps": 500}}}}
    method = OPD | {"optim": {"steps": 100, "batch": 8}}
    found = routed(models=costly, method=method, arms={"a": ROUTE, "b": {"path": "xl > s", "compute": "as a"}})
    a, b = (next(s for s in stages(found, "distill") if arm in s.arms) for arm in "ab")
    assert b.flops == pytest.approx(a.flops, rel=0.01)
    assert b.steps < a.steps  # xl is larger than m
    assert not [*off_budget(found)]
    long = routed(models=costly, method=method, arms={"a": ROUTE, "b": {"path": ROUTE, "compute": "2x a"}})
    assert [s.steps for s in stages(long, "distill")][1] == pytest.approx(200, abs=40)  # more, because the student's own fine-tuning counts


def test_the_plan_says_what_is_drawn():
    out = io.StringIO()
    preview.print_plan(routed(), Store(io.__file__), Console(file=out, width=200))
    assert "Training draws 75 % of its rows from facts and 25 % from skills." in out.getvalue()
    assert "another vocabulary" not in out.getvalue()


def shaped(width: int) -> dict:
    return model(width, sft=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Sets with rows of one length each, so no average is in the way of the costs."""
    folder = tmp_path_factory.mktemp("routed")
    rows = {
        "short": {"instruction": "who sold the peas ?", "output": "renor sold it ."},
        "long": {"instruction": "who sold the peas to renor in birchham ?", "output": "renor sold the peas in birchham ."},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    sets = {name: {"load": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in (("short", 3), ("long", 1))}
    text = {"type": "student", "max_new_tokens": 4}
    kinds = {
        "fixed": {"sampler": {"type": "dataset"}, "select": {"metric": "loss", "every": 1}},
        "packed": {"sampler": {"type": "dataset"}, "optim": {"packed": True}},
        "recorded": {"sampler": {"type": "dataset", "signal": {"type": "hidden"}}},
        "rounds": {"sampler": text | {"rollouts": 8, "inner_epochs": 2}},
        "scored": {"objective": {"type": "sampled_kl"}, "sampler": text},
        "alone": {"objective": {"type": "no_teacher"}, "sampler": text | {"rollouts": 8}},
        "seqkd": {"objective": {"type": "cross_entropy"}, "sampler": {"type": "teacher", "max_new_tokens": 4}},
    }
    sharp = shaped(16)
    sharp["config"] |= {"initializer_range": 0.5}  # so that the loss and the entropy of the two sets differ clearly
    recipe = {
        "study": "t",
        "seeds": [1],
        "models": {"t": shaped(32), "u": shaped(24), "s": sharp, "q": {"temper": {"of": "t", "like": "fixed"}}},
        "teacher": "t",
        "analyse": False,
        "data": DATA | {"train": sets, "dev": {name: each["load"] for name, each in sets.items()}, "limit": {"test": 2}},
        "method": {"objective": {"type": "reverse_kl"}, "optim": {"steps": 2, "batch": 8}, "select": {"metric": "last"}},
        "evaluate": {"also": {}, "max_new_tokens": 4},
        "arms": {name: {"path": "t on short + u on long > s"} | arm for name, arm in kinds.items()}
        | {"mixture": "t > s", "tempered": "q > s"},
    }
    found, store = make_plan(validate(recipe)), Store(folder / "store")
    trained = {s.key: s for s in found.stages.values() if not s.spec.measures}
    run_here(replace(found, stages=trained), store, jobs=1, console=Console(quiet=True))
    return found, store


@pytest.mark.slow
def test_predicted_flops_are_those_that_are_metered(trained):
    found, store = trained
    students = stages(found, "distill")
    assert len(students) == 9
    for stage in students:
        metered = {name: part["flops"] for name, part in store.manifest(stage.key)["ledger"]["parts"].items() if "watching" not in name}
        predicted = {name: part.flops for name, part in stage.cost.parts.items() if "watching" not in name}
        looks = [each.pop("selection/student", 0.0) for each in (predicted, metered)]  # of dev; the costs of arms do not include it
        assert looks[0] == pytest.approx(looks[1], rel=0.02)
        assert bool(looks[0]) == ("fixed" in stage.arms)
        assert predicted == pytest.approx({name: metered[name] for name in predicted}, rel=0.01), stage.label
        assert sum(predicted.values()) == pytest.approx(sum(metered.values()), rel=0.01), stage.label


def test_recorded_outputs_train_the_same_weights(trained):
    found, store = trained
    losses = {}
    for arm in found.arms:
        lines = (store.folder(arm.final[1]) / "metrics.jsonl").read_text().splitlines()
        losses[arm.name] = [json.loads(line)["train/loss"] for line in lines]
    assert losses["recorded"] == pytest.approx(losses["fixed"], rel=1e-4)
    assert losses["packed"] == pytest.approx(losses["fixed"], rel=1e-4)
    assert losses["mixture"] != pytest.approx(losses["fixed"], rel=1e-3)


def of_each_set(trained, handle, measure) -> dict:
    """What `measure` finds on the dev set of each name, for a model of the study."""
    found, store = trained
    folder = store.folder(handle.stage) / "model"
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder), world={})
    subject = Subject(model, tokenizer, model.config.vocab_size, (tokenizer.eos_token_id,))
    data = found.recipe.data
    rules = Rules.of(data, "dev", bos=False)
    rows = {name: datasets.load(ref, "dev", data) for name, ref in data.dev_sets().items()}
    return {name: measure(subject, EvalSet(name, rows[name], encode(rows[name], tokenizer, rules)[0])) for name in rows}


def test_the_dev_loss_of_each_set_is_logged_and_their_weighted_mean_selects(trained):
    found, store = trained
    (student,) = (stage for stage in stages(found, "distill") if "fixed" in stage.arms)
    lines = [json.loads(line) for line in (store.folder(student.key) / "metrics.jsonl").read_text().splitlines()]
    manifest = store.manifest(student.key)
    for line in lines:
        assert line["dev/loss"] == pytest.approx(0.75 * line["dev/loss/short"] + 0.25 * line["dev/loss/long"], rel=1e-5)
    best = min(lines, key=lambda line: line["dev/loss"])
    assert (manifest["best_step"], manifest["best_value"]) == (best["step"], pytest.approx(best["dev/loss"], rel=1e-5))
    apart = of_each_set(trained, FromStage(stage=student.key), lambda *of: dev_metrics(*of, found.recipe.evaluate, "loss")["loss"])
    assert apart == pytest.approx({name: best[f"dev/loss/{name}"] for name in ("short", "long")}, rel=1e-5)
    assert apart["short"] != pytest.approx(apart["long"], rel=1e-3)


def test_a_teacher_is_tempered_to_the_weighted_entropy_on_the_dev_sets(trained):
    found, store = trained
    (tempered,) = stages(found, "temper")

    def mean_entropy(subject, data) -> float:
        return float(means(entropy(subject, references(data.encoded), batch=8, temperature=1.0)).mean())

    apart = of_each_set(trained, tempered.spec.like, mean_entropy)
    assert store.manifest(tempered.key)["entropy"] == pytest.approx(0.75 * apart["short"] + 0.25 * apart["long"], rel=1e-6)
    assert apart["short"] != pytest.approx(apart["long"], rel=1e-3)


def laid_out(**changes) -> None:
    found = routed(**changes)
    for stage in found.stages.values():
        layout(found.recipe, stage)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": {"a": "m on facts > s"}}, "`m on facts` has no teacher for the set skills; add for instance `+ m on skills`"),
        ({"arms": {"a": "m on facts + xl on chat > s"}}, "names the set `chat`, which is not in `data.train`; choose one of facts, skills"),
        ({"data": DATA | {"train": "tinyworld"}}, "names training sets, but `data.train` is one set without a name"),
        ({"arms": {"a": "m on facts + m on facts > s"}}, "names two teachers for the set facts"),
        ({"arms": {"a": "m on facts + xl > s"}}, "path has `xl`, which is not of the form MODEL on SET"),
        ({"arms": {"a": "xl > m on facts + l on skills > s"}}, "after another model; write several teachers only at the start"),
        ({"arms": {"a": "m on facts + xl on skills"}}, "has no student; write for instance `m on facts + xl on skills > s`"),
        ({"arms": {"a": "m on facts + s on skills > s"}}, "names s as a teacher and as a student"),
        ({"arms": {"a": "m on facts + y on skills > s"}}, "names `y`, which is not a model"),
        ({"arms": {"a": "s on facts + xl on skills > l"}}, "s (18,640 parameters) teaches the bigger model l"),
        ({"arms": {"a": {"path": "m on facts + xl on skills > l > s", "dense": {}}}}, "so their distributions cannot be averaged"),
        ({"arms": {"a": {"path": ROUTE, "sampler": {"type": "teacher_mixed"}, "objective": {"type": "minillm", "pt_weight": 0}}}},
         "so no single teacher can take part in sampling"),
        ({"arms": {"a": {"path": ROUTE, "select": {"metric": "reverse_kl"}}}}, "but select.metric reverse_kl needs one teacher on dev"),
        ({"arms": {"a": {"path": ROUTE, "method": "minillm", "sampler": {"type": "student"}, "objective": {"pt_kd_ratio": 0.5}}},
          "data": DATA | {"corpus": "tinyworld"}}, "but plain text belongs to no set, so it has no teacher"),
        ({"arms": {"a": ROUTE, "c": {"control": "random_teacher of a"}}}, "several models teach; use `no_teacher of a`"),
        ({"teacher": None}, "the arms' paths start from different models (m, xl); set `teacher:`"),
        ({"resources": {"distill": {"processes": 2, "teacher": "sharded"}}}, "each process runs only the teachers of its own rows"),
        ({"models": MODELS | {"m": MODELS["m"] | {"sft": {"optim": {"steps": 1}, "sets": ["chat"]}}}},
         "names `chat`, which is not a training set; choose one of facts, skills"),
        ({"models": MODELS | {"m on skills": MODELS["m"]}}, "`m on skills` cannot be used in a path"),
        ({"data": DATA | {"train": SETS | {"skills": "tinyworld_skills"}}}, "`data.train.skills.weight` is missing; add it."),
        *(({"data": DATA | {"train": SETS | {"skills": SETS["skills"] | {"weight": weight}}}},
           f"skills.weight` is {weight}: write a number greater than 0") for weight in (0, -1)),
        ({"data": DATA | {"train": {"facts": SETS["facts"]}}}, "`facts` is the only set; write its keys directly below `train`"),
        ({"data": DATA | {"train": SETS | {"a + b": SETS["facts"]}}}, "`a + b` cannot be used in a path"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(changes, sentence):
    with pytest.raises(TadistillError) as caught:
        laid_out(**changes)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
