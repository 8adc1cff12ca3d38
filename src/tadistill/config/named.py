"""Methods by name, such as `method: gkd`. `methods.yaml` beside this file has the settings of each, from its paper."""

import difflib
from importlib import resources
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from tadistill.config.objective import Objective
from tadistill.config.sampling import Sampler

METHODS: dict[str, dict[str, Any]] = yaml.safe_load(
    resources.files("tadistill.config").joinpath("methods.yaml").read_text(encoding="utf-8")
)
"""Name -> settings of `objective` and `sampler`."""
_PARTS = {"objective": TypeAdapter(Objective), "sampler": TypeAdapter(Sampler)}


def written_out(value: Any, *, string: str, name: str) -> Any:
    """Return the keys of a method or an arm, with the objective and the sampler of the method that it names, if it names one.

    A part that `value` has too is merged: its keys replace those of the named method, and another `type` replaces the whole part.

    Args:
        value: as the recipe has it. A string stands for the key `string`. Anything else that is no mapping is returned as it is.
        name: the key that names the method; it is left out of the result.

    Raises:
        ValueError: there is no method of this name.
    """
    given = {string: value} if isinstance(value, str) else value
    if not isinstance(given, dict) or given.get(name) is None:
        return given
    return _with_method(given[name], {key: part for key, part in given.items() if key != name})


def _with_method(name: Any, given: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in METHODS:
        close = difflib.get_close_matches(str(name).lower(), METHODS, n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`? The" if close else "the"
        raise ValueError(f"`{name}` is not a method; {hint} methods are {', '.join(METHODS)}")
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
