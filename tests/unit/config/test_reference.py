"""The reference of recipe keys has every key, each with a meaning and a page. docs/hooks.py makes a page of it."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from tadistill.config import Recipe
from tadistill.config.reference import Key, Part, reference

DOCS = Path(__file__).parents[3] / "docs"


def classes(annotation: Any) -> set[type[BaseModel]]:
    """Return the configuration classes that an annotation mentions, at any depth."""
    found = {annotation} if isinstance(annotation, type) and issubclass(annotation, BaseModel) else set()
    return found.union(*(classes(part) for part in get_args(annotation)))


def reached(start: type[BaseModel]) -> set[type[BaseModel]]:
    """Return the classes behind a class's fields, with itself."""
    todo, seen = [start], set()
    while todo:
        if (cls := todo.pop()) not in seen:
            seen.add(cls)
            todo += [c for field in cls.model_fields.values() for c in classes(field.annotation)]
    return seen


def key(group: str, name: str) -> Key:
    """Return a key of the reference by the class of its group."""
    return next(k for part in reference() if part.name == group for k in part.keys if k.name == name)


@pytest.mark.parametrize("part", reference(), ids=lambda part: part.name)
def test_every_key_has_a_meaning_and_a_page(part: Part):
    assert part.meaning
    assert all(key.meaning and key.type for key in part.keys)
    page, _, anchor = part.page.partition("#")
    titles = re.findall(r"^#+ (.+)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert not anchor or anchor in {title.lower().replace(" ", "-") for title in titles}


def test_the_reference_has_every_class_once():
    assert {part.name for part in reference()} == {cls.__name__ for cls in reached(Recipe)} | {"Short form"}
    assert len({part.name for part in reference()}) == len(reference())


def test_keys_have_types_values_and_defaults():
    assert key("Optim", "lr") == Key("lr", "Peak learning rate.", "number", "greater than 0, at most 10", "0.0005")
    assert key("Optim", "betas").type == "list of 2 numbers"
    assert key("Init", "from").default == "required"
    assert key("Optim", "steps").allowed == "at least 1"
    assert key("World", "people").allowed == "from 10 to 200"
    assert key("Evaluate", "also").default == "{greedy: {temperature: 0}, t0.5: {temperature: 0.5}}"
    assert key("Arm", "path").type == "text or list of texts or list of lists of texts"
    assert key("Arm", "method").choices[:3] == ("sft", "kd", "seqkd")
    assert key("Recipe", "arms").type == "text or keys by name"
    assert key("Method", "objective").allowed.startswith("`type` is one of cross_entropy, forward_kl")
    assert key("Data", "template").choices == ("alpaca", "chat", "plain")


def test_a_key_has_one_default():
    """`rollouts` of teacher_mixed had the default 256, and the sentence "The default is one batch."; others had none and a sentence."""
    keys = [(part.name, key) for part in reference() for key in part.keys if key.default]
    wrong = [
        (name, k.name)
        for name, k in keys
        if ("The default is " in k.meaning or "By default," in k.meaning) != (k.default == "as described")
    ]
    assert not wrong
    assert key("TeacherMixedSampler", "rollouts").default == "256"
    assert key("StudentSampler", "rollouts").default == key("Runtime", "jobs").default == "as described"


def test_places_are_those_of_a_recipe():
    places = {part.name: part.places for part in reference()}
    phases = "method.phases.optim", "methods.NAME.phases.optim", "arms.NAME.phases.optim", "models.NAME.distill.phases.optim"
    whole = "method.optim", "methods.NAME.optim", "arms.NAME.optim", "models.NAME.sft.optim", "models.NAME.distill.optim"
    assert {*places["Optim"]} == {*whole, *phases}
    assert places["Optim"][0] == "method.optim"
    assert places["OwnMetric"] == ("metrics",)
    assert places["OtherDecoding"] == ("evaluate.also.NAME",)
