"""The short form of a recipe: one teacher, one student, one method, and one evaluation of the trained student.

It becomes a whole recipe before anything is checked: two models, one arm, one training seed, one decoding. Nothing is compared with the
teacher.
"""

from typing import Any

from tadistill.errors import ConfigError

_WHOLE = ("models", "arms", "search")
_MODELS = ("teacher", "student")


def is_short(raw: dict[str, Any]) -> bool:
    """Return True if a recipe has the key `student`, which only the short form has."""
    return "student" in raw


def whole(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a short form.

    Raises:
        ConfigError: keys of the whole form are there too, `teacher` is missing, or something is selected without `data.dev`.
    """
    if both := [key for key in _WHOLE if key in raw]:
        raise ConfigError(f"the recipe has both `student`, which belongs to the short form, and `{both[0]}`; remove one of them")
    if "teacher" not in raw:
        raise ConfigError("the recipe has a `student` and no `teacher`; add teacher: MODEL")
    models = {name: {"load": raw[name]} if isinstance(raw[name], str) else raw[name] for name in _MODELS}
    rest = {key: value for key, value in raw.items() if key not in _MODELS}
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
        raise ConfigError("method.select chooses a checkpoint on dev, but there is no data.dev; add data.dev, or remove select")
    return method | {"select": {"metric": "last"}} if chosen is None or isinstance(chosen, dict) else method


def _data(data: Any) -> Any:
    if isinstance(data, str):
        return {"train": data, "dev": data, "test": [data]}
    if isinstance(data, dict) and isinstance(data.get("test"), str | dict):
        return data | {"test": [data["test"]]}
    return data


def lines_of_whole(lines: dict[tuple, int]) -> dict[tuple, int]:
    """Return the line of each key of the whole recipe, from the lines of the short form."""
    return {("models", *key) if key and key[0] in _MODELS else key: line for key, line in lines.items()}
