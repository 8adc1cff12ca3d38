"""Two shorter ways to write a recipe. They are turned into the long form before any check.

One way is a method by name, such as `method: gkd`. Its settings are those of its paper, and `methods.yaml` contains them. The other way is
the short form of a whole recipe. It has one teacher, one student, one method and one evaluation of the trained student. It becomes a recipe
with two models, one arm, one training seed and one way of sampling responses. The student is not compared with the teacher.
"""

import difflib
from collections.abc import Iterable, Iterator
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
"""Maps the name of a published method to its settings of `objective` and `sampler`."""
MethodName = Annotated[str, Field(json_schema_extra={"anyOf": [{"enum": [*METHODS]}, {"type": "string"}]})]
"""The name of a published method, or of an entry of the recipe's `methods`."""
_PARTS = {"objective": TypeAdapter(Objective), "sampler": TypeAdapter(Sampler)}
WHOLE_KEYS = ("models", "arms", "search")
SHORT_KEYS = {
    "teacher": "The teacher, in the short form of a recipe: the value of a model's `load`, or a group with the keys of a model.",
    "student": "The student, in the short form of a recipe: the value of a model's `load`, or a group with the keys of a model.",
}
"""The keys of the short form that name models, with their meanings."""


# --- a method by name ----------------------------------------------------------------------------------------------------


def written_out(value: Any, *, string: str, name: str, phased: bool = True) -> Any:
    """Return a method, an arm or a phase in which the name of a method is replaced by the objective and the sampler of this method.

    If `value` also has an `objective` or a `sampler`, its keys override the keys of the named method's objective or sampler. If the `type`
    differs, it replaces that objective or sampler. If `phased` is true and `value` has no key `phases`, the result has `phases: []`.

    Args:
        value: the method, arm or phase in the recipe. Anything except a string or a dict is returned unchanged.
        string: the key to use if `value` is only a string. The string becomes the value of this key.
        name: the key that contains the method's name. The result does not have this key.
        phased: True if `value` is a method or an arm, which may have the key `phases`. False if it is a phase.

    Raises:
        ValueError: there is no method of this name.
    """
    given = {string: value} if isinstance(value, str) else value
    if not isinstance(given, dict) or given.get(name) is None:
        return given
    rest = {key: part for key, part in given.items() if key != name}
    return ({"phases": []} if phased else {}) | _with_method(given[name], rest)


def no_method(name: Any) -> str:
    """Return the error sentence for an unknown method."""
    return f"`{name}` {not_a_method(name)}"


def not_a_method(name: Any, own: Iterable[str] = ()) -> str:
    """Return the error sentence for an unknown method, without the name at its beginning. `own` has the names of the recipe's methods."""
    names = [*own, *METHODS]
    close = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean `{close[0]}`? The" if close else "the"
    return f"is not a method; {hint} methods are {', '.join(names)}"


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
    """Return True if a recipe has a key `student`, or a key `teacher` without the models and arms of the long form."""
    return "student" in raw or ("teacher" in raw and not any(key in raw for key in WHOLE_KEYS))


def whole(raw: dict[str, Any]) -> dict[str, Any]:
    """Turn a recipe in the short form into the long form.

    Raises:
        ConfigError: the recipe also has keys of the long form, `teacher` or `student` is missing, or a checkpoint is chosen
            without `data.dev`.
    """
    if both := [key for key in WHOLE_KEYS if key in raw]:
        raise ConfigError(f"the recipe has `student` (a key of the short form) and also `{both[0]}`; remove one of these two keys")
    if missing := [key for key in ("teacher", "student") if key not in raw]:
        other = "student" if missing == ["teacher"] else "teacher"
        close = difflib.get_close_matches(missing[0], [key for key in raw if key not in SHORT_KEYS], n=1, cutoff=0.8)
        fix = f"did you mean it with `{close[0]}`?" if close else f"add the key `{missing[0]}` with a model"
        raise ConfigError(f"the recipe has a `{other}` but no `{missing[0]}`; {fix}")
    models = {name: {"load": raw[name]} if isinstance(raw[name], str) else raw[name] for name in SHORT_KEYS}
    rest = {key: value for key, value in raw.items() if key not in SHORT_KEYS}
    evaluate = rest.pop("evaluate", None)
    data, method = _data(rest.pop("data", None)), rest.pop("method", {})
    method = {"name": method} if isinstance(method, str) else method
    if isinstance(data, dict) and "dev" not in data and isinstance(data.get("test"), list) and data["test"]:
        method = _without_dev(method, rest.get("methods"))
        data = data | {"dev": data["test"][0]}  # a recipe needs a dev set, but this recipe measures nothing on it
    elif isinstance(data, dict) and data.get("train") and not ("dev" in data or "test" in data):
        data = data | {"dev": data["train"]}  # the only mistake is then that the test set is missing
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


def _without_dev(method: Any, methods: Any) -> Any:
    if any(chosen.get("patience") or chosen.get("metric", "last") != "last" for chosen in _selects([method, methods])):
        raise ConfigError("method.select chooses a checkpoint on dev, but `data.dev` is missing; add `data.dev`, or remove `method.select`")
    if not isinstance(method, dict):
        return method
    chosen = method.get("select")
    return method | {"select": {"metric": "last"}} if chosen is None or isinstance(chosen, dict) else method


def _selects(value: Any) -> Iterator[dict[str, Any]]:
    for key, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if key == "select" and isinstance(part, dict):
            yield part
        yield from _selects(part)


def _data(data: Any) -> Any:
    if isinstance(data, str):
        return {"train": data, "dev": data, "test": [data]}
    if isinstance(data, dict) and isinstance(data.get("test"), str | dict):
        return data | {"test": [data["test"]]}
    return data


def lines_of_whole(lines: dict[tuple, int | str]) -> dict[tuple, int | str]:
    """Return the line of each key in the long form of a recipe. `lines` has the line of each key in its short form."""
    return {("models", *key) if key and key[0] in SHORT_KEYS else key: line for key, line in lines.items()}
