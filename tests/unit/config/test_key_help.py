"""`tadistill explain`: what a word in a recipe means."""

import pytest

from tadistill.config.key_help import explain
from tadistill.config.reference import reference
from tadistill.errors import ConfigError


def titles(word: str) -> list[str]:
    return [entry.title for entry in explain(word)]


def test_a_key_has_its_type_default_places_and_page():
    (entry,) = explain("lr")
    assert (entry.title, entry.meaning) == ("method.optim.lr", "Peak learning rate.")
    assert entry.facts == (
        ("type", "number, greater than 0, at most 10"),
        ("default", "0.0005"),
        ("also at", "methods.NAME.optim.lr, arms.NAME.optim.lr, models.NAME.sft.optim.lr, models.NAME.distill.optim.lr, and in phases"),
        ("more in", 'the page "The recipe" of the documentation, section "Method"'),
    )


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("method.optim.lr", ["method.optim.lr"]),
        ("`arms.direct.path=xl > s`", ["arms.NAME.path"]),
        ("arms[2.D].path", ["arms.NAME.path"]),
        ("models.student", ["models.NAME"]),
        ("student.lora", ["models.NAME.lora"]),
        ("teacher.serve.at", ["models.NAME.serve.at"]),
        ("data.test.0.load", ["data.test.load"]),
        ("evaluate.also.greedy.seeds", ["evaluate.also.NAME.seeds"]),
        ("objective.type", ["method.objective.type"]),
        ("optim", ["method.optim", "methods.NAME.optim", "arms.NAME.optim", "method.phases.optim", "models.NAME.sft.optim"]),
        ("beta", ["method.objective.beta", "method.objective.beta"]),
        ("teacher", ["teacher", "teacher", "method.sampler, type teacher"]),
        ("gkd", ["method: gkd"]),
        ("best_prefix", ["search.strategy"]),
    ],
)
def test_words_are_found(word, found):
    assert titles(word) == found


def test_keys_and_types_below_are_listed_once():
    method, arm, *_ = explain("optim")
    assert ("lr", "Peak learning rate.") in method.below
    assert not arm.below
    (kinds,) = explain("objective.type")
    assert ("taid", "Cross-entropy to a target that moves from the student to the teacher during training (Shing et al. 2025, TAID).") in (
        kinds.below
    )


def test_a_key_that_must_be_given_is_required_and_says_who_may_leave_it_out():
    for word in ("seeds", "data.dev"):
        assert dict(explain(word)[0].facts)["required"] == "yes"
        assert "A recipe in the short form (with `student`) may leave" in explain(word)[0].meaning


def test_a_key_of_some_types_names_them():
    (entry,) = explain("start")
    assert ("with type", "taid") in entry.facts


def test_a_key_of_two_forms_has_the_places_of_both():
    entry = explain("data.train.columns")[0]
    assert dict(entry.facts)["also at"] == "data.dev.columns, data.test.columns, data.corpus.columns, data.dev.NAME.columns"


def test_each_place_of_a_key_is_listed_once():
    assert all(len(part.places) == len(set(part.places)) for part in reference())


def test_keys_of_two_forms_are_listed_once():
    (entry,) = explain("data.train")
    assert [name for name, _ in entry.below] == ["load", "split", "revision", "columns", "choices", "instruction", "extra", "weight"]


@pytest.mark.parametrize(
    ("word", "page"),
    [("search", '"Paths" of the documentation'), ("fair", 'section "Controls"'), ("control", 'section "Controls"'), ("dense", '"Paths"')],
)
def test_a_key_names_the_page_that_explains_it(word, page):
    assert all(page in dict(entry.facts)["more in"] for entry in explain(word))


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("learning_rate", "did you mean `lr`?"),
        ("metod.optim", "did you mean `method.optim`?"),
        ("zzz", "explains the parts"),
        ("", "explains the"),
    ],
)
def test_an_unknown_word_gets_a_hint(word, hint):
    with pytest.raises(ConfigError, match=hint):
        explain(word)
