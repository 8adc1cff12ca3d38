"""Shorter ways to write a recipe. They are turned into the long form before any check.

The first way is a method by name, such as `method: gkd`. Its settings come from `methods.yaml`, which has those of its paper. The second
way
is the short form of a whole recipe. It has one teacher, one student, one method and one evaluation of the trained student. It becomes two
models, one arm, one training seed and one decoding. The student is not compared with the teacher.
"""

import difflib
from importlib import resources
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from tadistill.config.objective import Objective
from tadistill.config.sampling import Sampler
from tadistill.errors import ConfigError

METHODS: dict[str, dict[str, Any]] = yaml.safe_load(
    resources.files("tadistill.config").joinpath("methods.yaml").read_text(encoding="utf-8")
)
"""Maps the name of a method to its settings of `objective` and `sampler`."""
MethodName = Annotated[str, Field(json_schema_extra={"enum": [*METHODS]})]
"""The name of a published method."""
_PARTS = {"objective": TypeAdapter(Objective), "sampler": TypeAdapter(Sampler)}
WHOLE_KEYS = ("models", "arms", "search")
SHORT_KEYS = {
    "teacher": "The teacher of the short form: what a model's `load` holds, or an entry with the keys of a model.",
    "student": "The student of the short form: what a model's `load` holds, or an entry with the keys of a model.",
}
"""Models of the short form -> their meanings."""


# --- a method by name ----------------------------------------------------------------------------------------------------


def written_out(value: Any, *, string: str, name: str) -> Any:
    """Replace the name of a method, in the keys of a method or an arm, by the method's objective and sampler.

    If `value` also has an objective or a sampler, its keys replace those of the named method. Another `type` replaces the whole part.

    Args:
        value: the part of the recipe. A string is read as the value of the key `string`. Other values than mappings are returned unchanged.
        name: the key that contains the method's name. The result does not have this key.

    Raises:
        ValueError: there is no method of this name.
    """
    given = {string: value} if isinstance(value, str) else value
    if not isinstance(given, dict) or given.get(name) is None:
        return given
    return _with_method(given[name], {key: part for key, part in given.items() if key != name})


def no_method(name: Any) -> str:
    """Return the error sentence for a name that is not the name of a method."""
    close = difflib.get_close_matches(str(name).lower(), METHODS, n=1, cutoff=0.5)
    hint = f"did you mean `{close[0]}`? The" if close else "the"
    return f"`{name}` is not a method; {hint} methods are {', '.join(METHODS)}"


def _with_method(name: Any, given: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(no_method(name))
    settings = {"sampler": {"type": "dataset"}} | METHODS[name]
    return given | {part: _merged(part, settings[part], given.get(part)) for part in _PARTS}


def _merged(part: str, settings: dict[str, Any], given: Any) -> Any:
    if given is not None and not isinstance(given, dict):
        return given
    if given and given.get("type", settings["type"]) != settings["type"]:
        return given
    merged = settings | (given or {})
    try:
        return _PARTS[part].validate_python(merged).model_dump()  # every field, so that an arm takes nothing from the recipe's own method
    except ValidationError:
        return merged  # the recipe's own validation shows the mistake


# --- one student ---------------------------------------------------------------------------------------------------------


def is_short(raw: dict[str, Any]) -> bool:
    """Return True if a recipe has the key `student`. Only the short form has this key."""
    return "student" in raw


def whole(raw: dict[str, Any]) -> dict[str, Any]:
    """Turn a recipe in the short form into the long form.

    Raises:
        ConfigError: keys of the long form are there too, `teacher` is missing, or a checkpoint is selected without `data.dev`.
    """
    if both := [key for key in WHOLE_KEYS if key in raw]:
        raise ConfigError(f"the recipe has both `student`, a key of the short form, and `{both[0]}`; remove one of them")
    if "teacher" not in raw:
        raise ConfigError("the recipe has a `student` but no `teacher`; add teacher: MODEL")
    models = {name: {"load": raw[name]} if isinstance(raw[name], str) else raw[name] for name in SHORT_KEYS}
    rest = {key: value for key, value in raw.items() if key not in SHORT_KEYS}
    evaluate = rest.pop("evaluate", None)
    data, method = _data(rest.pop("data", None)), rest.pop("method", {})
    method = {"name": method} if isinstance(method, str) else method
    if isinstance(data, dict) and "dev" not in data and isinstance(data.get("test"), list) and data["test"]:
        method = _without_dev(method)
        data = data | {"dev": data["test"][0]}  # a recipe names one, and nothing reads it
    return {
        "seeds": [10],
        "analyse": False,
        **rest,
        "models": models,
        **({} if data is None else {"data": data}),
        "method": method,
        "evaluate": {"seeds": [10], "also": {}} | evaluate if isinstance(evaluate, dict) else evaluate or {"seeds": [10], "also": {}},
        "arms": {"student": "teacher > student"},
    }


def _without_dev(method: Any) -> Any:
    if not isinstance(method, dict):
        return method
    chosen = method.get("select")
    if isinstance(chosen, dict) and (chosen.get("patience") or chosen.get("metric", "last") != "last"):
        raise ConfigError("method.select chooses a checkpoint on dev, but `data.dev` is missing; add `data.dev`, or remove `method.select`")
    return method | {"select": {"metric": "last"}} if chosen is None or isinstance(chosen, dict) else method


def _data(data: Any) -> Any:
    if isinstance(data, str):
        return {"train": data, "dev": data, "test": [data]}
    if isinstance(data, dict) and isinstance(data.get("test"), str | dict):
        return data | {"test": [data["test"]]}
    return data


def lines_of_whole(lines: dict[tuple, int | str]) -> dict[tuple, int | str]:
    """Return the line of each key of the long form. `lines` has the lines of the short form."""
    return {("models", *key) if key and key[0] in SHORT_KEYS else key: line for key, line in lines.items()}
