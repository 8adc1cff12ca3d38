"""The short form: one teacher, one student, one method, training and one evaluation."""

import re
from pathlib import Path

import pytest

from tadistill.config import load, validate
from tadistill.config.method_parts import Select
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan

MODEL = {
    "load": "scratch:llama",
    "tokenizer": "tinyworld",
    "config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
}
SHORT = {
    "study": "mine",
    "teacher": MODEL,
    "student": MODEL,
    "data": {"train": "tinyworld", "dev": "tinyworld", "test": "tinyworld", "template": "plain"},
    "method": {"name": "gkd", "optim": {"steps": 2}},
}


@pytest.mark.parametrize(("method", "more"), [("gkd", []), ("kd", []), ("seqkd", ["generate"])])
def test_it_trains_once_and_evaluates_once(method, more):
    plan = make_plan(validate(SHORT | {"method": {"name": method, "optim": {"steps": 2}}}))
    assert [stage.kind for stage in plan.stages.values()] == [*more, "distill", "evaluate"]


def test_sft_needs_no_teacher():
    """It is the fine-tuning of a teacher of another study, with the same key."""
    rest = {key: value for key, value in SHORT.items() if key != "teacher"}
    found = validate(rest | {"method": {"name": "sft", "optim": {"steps": 2}}})
    (trained, _) = make_plan(found).stages.values()
    assert ([*found.models], found.arms["student"].text, trained.kind) == (["student"], "student", "sft")
    assert trained.key in make_plan(validate(SHORT | {"teacher": MODEL | {"sft": {"optim": {"steps": 2}}}})).stages
    assert validate(rest | {"method": "sft"}).arms == found.arms
    plain = {"objective": {"type": "cross_entropy"}, "phases": []}
    assert validate(rest | {"method": {"name": "sft", **plain}}).arms == found.arms


@pytest.mark.parametrize(
    "more",
    [
        {"phases": ["kd"]},
        {"objective": {"type": "reverse_kl"}},
        {"sampler": {"type": "student"}},
        {"context": "hi {prompt}"},
        {"dense": {}},
        {"ema": 0},
    ],
)
def test_sft_with_settings_of_a_teacher_needs_one(more):
    with pytest.raises(ConfigError, match="has a `student` but no `teacher`"):
        validate({key: value for key, value in SHORT.items() if key != "teacher"} | {"method": {"name": "sft", **more}})


def test_one_name_is_all_sets_and_settings_may_be_added():
    found = validate(SHORT | {"data": "tinyworld", "seeds": [3], "evaluate": {"temperature": 0}, "student": MODEL | {"seed": 4}})
    assert {found.data.train.load, found.data.dev.load, found.data.test[0].load} == {"tinyworld"}
    assert (found.seeds, found.evaluate.temperature, found.evaluate.seeds, found.evaluate.also) == ((3,), 0, (10,), {})
    assert found.models["student"].seed == 4


def test_without_dev_the_last_weights_are_kept():
    data = {"train": "tinyworld", "test": "tinyworld"}
    assert validate(SHORT | {"data": data, "method": "gkd"}).method.select.metric == "last"
    for method in ({"name": "gkd"}, {"name": "gkd", "select": {"metric": "last", "every": 7}}):
        found = validate(SHORT | {"data": data, "method": method, "student": MODEL | {"sft": {}}})
        assert (found.method.select, found.models["student"].sft.select.metric) == (Select(metric="last"), "last")


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (
            {"patience": 2},
            "`data.dev` is missing, but `{0}` chooses a checkpoint on it; add it. A recipe in the short form",
        ),
        ({"metric": "loss"}, "`data.dev` is missing, but `{0}` chooses a checkpoint on it"),
        ({"every": 50}, "`data.dev` is missing, but `{0}` chooses a checkpoint on it"),
        ({"evry": 50}, "`{0}.evry` is not a known key; did you mean `every`?"),
        ({"metric": "last", "every": 0}, "{0}.every"),
        ({"metric": "last", "patience": "x"}, "`{0}` chooses a checkpoint on it"),
        ([3], "{0}"),
        ([], "{0}"),
    ],
)
@pytest.mark.parametrize("key", ["method.select", "student.sft.select"])
def test_without_dev_select_is_read_and_cannot_choose(key, select, words):
    """It was thrown away unread, and the fine-tuning of a model chose its checkpoint on the test set."""
    change = {"method": {"name": "gkd", "select": select}} if key == "method.select" else {"student": MODEL | {"sft": {"select": select}}}
    with pytest.raises(ConfigError) as error:
        validate(SHORT | {"data": {"train": "tinyworld", "test": "tinyworld"}} | change)
    assert words.format(key) in str(error.value)
    assert "models." not in str(error.value)


def test_one_test_set_needs_no_list_in_both_forms():
    """A recipe that is turned into its long form stays the same study."""
    dev = {"train": "tinyworld", "dev": "tinyworld", "template": "plain"}
    rest = {key: value for key, value in SHORT.items() if key not in ("teacher", "student")}
    long = rest | {
        "seeds": [10],
        "analyse": False,
        "models": {"teacher": MODEL, "student": MODEL},
        "arms": {"student": "teacher > student"},
    }
    long["evaluate"] = {"seeds": [10], "also": {}}
    tests = ("tinyworld", ["tinyworld"], {"load": "tinyworld"}, [{"load": "tinyworld"}])
    keys = [[*make_plan(validate(form | {"data": dev | {"test": test}})).stages] for form in (SHORT, long) for test in tests]
    assert all(found == keys[0] for found in keys)
    without = [validate(SHORT | {"data": {"train": "tinyworld", "test": test}}) for test in tests]
    assert all(found == without[0] for found in without)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {"a": "x"}}, "has `student` .a key of the short form. and also `arms`"),
        ({"teacher": None}, "`teacher` has no value"),
        ({"method": "gdk"}, "did you mean `gkd`"),
        ({"method": None, "data": {"train": "tinyworld", "test": "tinyworld"}}, "`method`"),
        ({"data": {"train": "tinyworld"}}, "`data.test` is missing"),
        ({"student": MODEL | {"lor": 1}}, "did you mean `lora`"),
    ],
)
def test_mistakes(change, words):
    with pytest.raises(ConfigError, match=words):
        validate(SHORT | change)
    with pytest.raises(ConfigError, match="has a `student` but no `teacher`"):
        validate({key: value for key, value in SHORT.items() if key != "teacher"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": None, "studnet": MODEL}, ["recipe: the recipe has a `teacher` but no `student`; did you mean it with `studnet`?"]),
        ({"student": None}, ["recipe: the recipe has a `teacher` but no `student`; add the key `student` with a model"]),
        (
            {"teacher": None},
            [
                "recipe: the recipe has a `student` but no `teacher`; add the key `teacher` with a model, or write "
                "`method: sft` to fine-tune the student without a teacher"
            ],
        ),
        ({"data": {"train": "tinyworld"}}, ["recipe: `data.test` is missing; add it."]),
    ],
)
def test_a_missing_key_is_the_only_mistake_that_is_named(changes, words):
    with pytest.raises(ConfigError) as error:
        validate({key: value for key, value in (SHORT | changes).items() if value is not None})
    assert list(error.value.problems) == words


def test_a_missing_dev_set_is_named_with_all_other_mistakes_and_their_lines(tmp_path):
    """The message had no line, and the other mistakes were shown only when it was mended."""
    (tmp_path / "r.yaml").write_text(
        "study: mine\nteacher: A/B\nstudent: {load: A/C, lora: {lora_alpha: 16}}\ndata: {train: a, test: b}\n"
        "method: {select: {patience: 3}}\n"
    )
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "r.yaml")
    (alpha, dev) = sorted(error.value.problems)
    assert "line 3: `student.lora.lora_alpha` is not a known key; did you mean `alpha`?" in alpha
    assert "line 4: `data.dev` is missing, but `method.select` chooses a checkpoint on it; add it." in dev


def test_a_message_names_the_line(tmp_path):
    (tmp_path / "r.yaml").write_text("study: mine\nteacher: A/B\nstudent:\n  load: A/C\n  lor: 1\ndata: tinyworld\n")
    with pytest.raises(ConfigError, match=r"r.yaml, line 5: .*did you mean `lora`"):
        load(tmp_path / "r.yaml")


def test_the_example_of_the_readme_is_a_recipe(tmp_path):
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(study: my-student\n.*?)```", readme, re.DOTALL)
    assert example is not None
    (tmp_path / "my.yaml").write_text(example[1])
    found = load(tmp_path / "my.yaml")
    assert (found.arms["student"].text, found.method.objective.type) == ("teacher > student", "jensen_shannon")
    assert len(example[1].splitlines()) <= 12
