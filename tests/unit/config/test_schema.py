"""The committed JSON schema is that of the code, accepts every recipe, and refuses what the configuration classes refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tadistill.config.load import validate
from tadistill.config.recipe_files import contents
from tadistill.config.schema import recipe_schema, schema_file
from tadistill.errors import ConfigError

ROOT = Path(__file__).parents[3]
RECIPES = sorted([*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "tests" / "e2e").glob("*.yaml")])
SCHEMA = Draft202012Validator(recipe_schema())
SHORT = {
    "study": "mine",
    "teacher": "gpt2-xl",
    "student": {"load": "gpt2"},
    "data": {"train": "t.jsonl", "test": "t.jsonl"},
    "method": "gkd",
}
WHOLE = {
    "study": "mine",
    "seeds": [10],
    "models": {"xl": {"load": "gpt2-xl"}, "s": {"init": {"from": "xl", "layers": 2}}},
    "data": {"train": "dolly", "dev": {"load": "dolly", "split": "dev"}, "test": ["dolly"]},
    "arms": {"direct": "xl > s", "gkd": {"path": [["xl", "s"]], "method": "gkd", "objective": {"beta": 0.2}}},
    "metrics": ["mine:score"],
}


def test_the_committed_schema_is_that_of_the_code():
    committed = json.loads(schema_file().read_text(encoding="utf-8"))
    assert committed == recipe_schema(), "run `python -m tadistill.config.schema > recipes/schema.json`"
    Draft202012Validator.check_schema(committed)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_the_schema(path):
    SCHEMA.validate(contents(path.read_text(encoding="utf-8"), path.name)[0])


@pytest.mark.parametrize(
    "given",
    [SHORT, SHORT | {"data": "dolly"}, WHOLE, WHOLE | {"budgets": [1, 2]}],
    ids=["short", "short data", "whole", "budgets"],
)
def test_what_a_recipe_may_write_shorter_fits_the_schema(given):
    validate(given)
    SCHEMA.validate(given)


@pytest.mark.parametrize(
    ("base", "wrong"),
    [
        (SHORT, {"models": WHOLE["models"]}),
        (SHORT, {"metod": "gkd"}),
        (WHOLE, {"seed": 10}),
        (WHOLE, {"method": 3}),
        (WHOLE, {"budgets": "1, 2"}),
        (WHOLE, {"method": {"optim": {"lr": 0}}}),
        (WHOLE, {"data": {"train": "dolly", "test": ["dolly"]}}),
        (WHOLE, {"evaluate": {"also": {"cold": {"temperature": "low"}}}}),
        (WHOLE, {"arms": {"direct": {"path": "xl > s", "objective": {"type": "gkd"}}}}),
    ],
)
def test_mistakes_do_not_fit_the_schema(base: dict[str, Any], wrong: dict[str, Any]):
    with pytest.raises(ConfigError):
        validate(base | wrong)
    assert not SCHEMA.is_valid(base | wrong)


def test_every_property_is_described():
    def described(schema: Any) -> None:
        for name, value in schema.items() if isinstance(schema, dict) else ():
            if name == "properties":
                assert all(property_["description"] for property_ in value.values())
            described(value)

    described(recipe_schema())
