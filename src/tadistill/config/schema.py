"""The JSON schema of recipes. Editors use it for completion, descriptions and checks.

`python -m tadistill.config.schema > recipes/schema.json` writes the copy in the repository. An installed package has this copy beside its
recipes.
"""

import copy
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from tadistill.config.recipe import Recipe
from tadistill.config.recipe_files import recipes_folder
from tadistill.config.reference import Part, reference
from tadistill.config.shorthand import SHORT_KEYS, WHOLE_KEYS


def schema_file() -> Path:
    """Return the path of the schema file. A recipe can name this file in its first line (`# yaml-language-server: $schema=…`)."""
    return recipes_folder() / "schema.json"


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for their long form and their short form.

    The schema accepts every valid recipe. It does not check rules about several keys. For example, it accepts paths with unknown models.
    """
    definitions = Recipe.model_json_schema(ref_template="#/$defs/{model}", schema_generator=_Generator)
    parts = definitions.pop("$defs")
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "Recipe of tadistill",
        "if": {"required": ["student"]},
        "then": {"$ref": "#/$defs/ShortRecipe"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": parts | {"Recipe": definitions} | _short(definitions, parts),
    }


class _Generator(GenerateJsonSchema):
    def model_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().model_schema(schema)
        part = next(part for part in reference() if part.name == schema["cls"].__name__)
        for key in part.keys:
            found["properties"][key.name].pop("title", None)
            found["properties"][key.name]["description"] = key.meaning
        cls = schema["cls"]
        short = [_text(cls, part)] if cls.text_sets else []
        if cls.list_sets:
            short.append(next(form for form in _forms(found["properties"][cls.list_sets]) if form.get("type") == "array"))
        if not short:
            return found
        return {"anyOf": [*short, found], "description": found.pop("description"), "title": found.pop("title")}

    def tagged_union_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().tagged_union_schema(schema)
        return {"anyOf": found["oneOf"]}  # an arm with `method` may change a key of its objective without the `type`


def _forms(value: JsonSchemaValue) -> list[JsonSchemaValue]:
    return value.get("anyOf", [value])


def _text(cls: type[BaseModel], part: Part) -> JsonSchemaValue:
    key = next(key for key in part.keys if key.name == cls.text_sets)  # type: ignore[attr-defined]
    known = {"anyOf": [{"enum": [*key.choices]}, {"type": "string"}]} if key.choices else {}  # a name of `methods` is allowed too
    return {"type": "string", **known, "description": key.meaning}


def _short(recipe: JsonSchemaValue, parts: dict[str, JsonSchemaValue]) -> dict[str, JsonSchemaValue]:
    short, data = copy.deepcopy(recipe), copy.deepcopy(parts["Data"])
    data["required"] = [name for name in data["required"] if name != "dev"]
    for name in WHOLE_KEYS:
        del short["properties"][name]
    for name, meaning in SHORT_KEYS.items():
        short["properties"][name] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/ModelConfig"}], "description": meaning}
    short["properties"]["data"]["anyOf"] = [{"type": "string"}, {"$ref": "#/$defs/ShortData"}]
    del short["properties"]["data"]["$ref"]
    short["required"] = ["study", "student", "data"]  # `method: sft` needs no teacher
    return {"ShortRecipe": short, "ShortData": data}


if __name__ == "__main__":
    print(json.dumps(recipe_schema(), indent=1, ensure_ascii=False))
