"""Shorter ways to write a recipe. They are turned into the long form before any check.

The short form of a whole recipe has one teacher, one student, one method and one evaluation of the trained student. It becomes a recipe
with two models, one arm, one training seed and one way of sampling responses. The student is not compared with the teacher. With the method
`sft`, the teacher can be left out: the recipe then fine-tunes one model.

Methods with names of the user's own are in the key `methods` of a recipe. Such a name can be used wherever a recipe accepts the name of a
published method: in `method`, in an arm, in `models.X.distill` and in a phase. The name is replaced by the keys of the method. Other keys
in the same place override these keys.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from tadistill.config.method import METHODS, PARTS, MethodPatch, not_a_method
from tadistill.errors import ConfigError

WHOLE_KEYS = ("models", "arms", "search")
SHORT_KEYS = {
    "teacher": "The teacher, in the short form of a recipe: the value of a model's `load`, or a group with the keys of a model. Only "
    "`method: sft` works without it.",
    "student": "The student, in the short form of a recipe: the value of a model's `load`, or a group with the keys of a model.",
}
"""The keys of the short form that name models, with their meanings."""


# --- one student ---------------------------------------------------------------------------------------------------------


def is_short(raw: dict[str, Any]) -> bool:
    """Return True if a recipe has a key `student`, or a key `teacher` without the models and arms of the long form."""
    return "student" in raw or ("teacher" in raw and not any(key in raw for key in WHOLE_KEYS))


def whole(raw: dict[str, Any]) -> dict[str, Any]:
    """Turn a recipe in the short form into the long form.

    Raises:
        ConfigError: the recipe also has keys of the long form, or `teacher` or `student` is missing.
    """
    if both := [key for key in WHOLE_KEYS if key in raw]:
        raise ConfigError(f"the recipe has `student` (a key of the short form) and also `{both[0]}`; remove one of these two keys")
    alone = "teacher" not in raw and _is_sft(raw.get("method"))
    if missing := [key for key in SHORT_KEYS if key not in raw and not (alone and key == "teacher")]:
        raise ConfigError(_missing(raw, missing[0]))
    models = {name: {"load": raw[name]} if isinstance(raw[name], str) else raw[name] for name in SHORT_KEYS if name in raw}
    rest = {key: value for key, value in raw.items() if key not in SHORT_KEYS}
    evaluate = rest.pop("evaluate", None) or {}
    data, method = rest.pop("data", None), rest.pop("method", {})
    data = dict.fromkeys(("train", "dev", "test"), data) if isinstance(data, str) else data
    method = {"name": method} if isinstance(method, str) else method
    if isinstance(data, dict) and "dev" not in data:
        test = data.get("test")
        if test and isinstance(test, str | dict | list):
            if not chooses_on_dev({"method": method, "methods": rest.get("methods"), "models": models}):  # else it is missing
                method, models = _method_without_dev(method), {name: _model_without_dev(model) for name, model in models.items()}
                data = data | {"dev": test[0] if isinstance(test, list) else test}  # needed, but nothing is measured on it
        elif data.get("train") and "test" not in data:
            data = data | {"dev": data["train"]}  # the only mistake is then that the test set is missing
    return {
        "seeds": [10],
        "analyse": False,
        **rest,
        "models": models,
        **({} if data is None else {"data": data}),
        "method": method,
        "evaluate": {"seeds": [10], "also": {}} | evaluate if isinstance(evaluate, dict) else evaluate,
        "arms": {"student": {"path": "student", "method": "sft"} if alone else "teacher > student"},
    }


def _missing(raw: dict[str, Any], key: str) -> str:
    # the message for a recipe that has only one of the keys `teacher` and `student`
    close = difflib.get_close_matches(key, [other for other in raw if other not in SHORT_KEYS], n=1, cutoff=0.8)
    fix = f"did you mean it with `{close[0]}`?" if close else f"add the key `{key}` with a model"
    if key == "teacher" and not close:
        fix += ", or write `method: sft` to fine-tune the student without a teacher"
    return f"the recipe has a `{'student' if key == 'teacher' else 'teacher'}` but no `{key}`; {fix}"


def _is_sft(method: Any) -> bool:
    # the arm without a teacher trains with the settings of `sft`, so that all others would be lost
    if not isinstance(method, dict):
        return method == "sft"
    plain = {"sampler": {"type": "dataset"}} | METHODS["sft"]
    others = [part for part in ("phases", *PARTS) if part not in ("optim", "select")]
    return method.get("name") == "sft" and all(method.get(part) in (None, [], plain.get(part)) for part in others)


def chooses_on_dev(recipe: dict[str, Any]) -> str:
    """Return the first key `select` of a recipe in the long form that chooses a checkpoint on dev. Empty if none does."""
    for key, chosen in _selects({part: recipe.get(part) for part in ("method", "methods", "models", "arms")}):
        metric = chosen.get("metric", "loss" if "every" in chosen else "last")  # as in the long form, `every` may stand beside `last`
        if chosen.get("patience") or metric != "last":
            return key
    return ""


def _method_without_dev(method: Any) -> Any:
    if (chosen := _select_of(method)) is None:
        return method
    wrong = {} if _valid({"select": chosen}) else chosen  # the check of the recipe shows the mistake
    return method | {"select": wrong | {"metric": "last"}}


def _model_without_dev(model: Any) -> Any:
    sft = model.get("sft") if isinstance(model, dict) else None
    chosen = _select_of(sft)
    return model if sft is None or chosen is None else model | {"sft": sft | {"select": chosen | {"metric": "last"}}}


def _select_of(part: Any) -> dict[str, Any] | None:
    """Return the key `select` of a method or of a fine-tuning; empty if it is not set, None if one of the two is no group of keys."""
    if not isinstance(part, dict):
        return None
    chosen = {} if part.get("select") is None else part["select"]
    return chosen if isinstance(chosen, dict) else None


def _selects(value: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, part in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        place = f"{at}.{key}".removeprefix(".")
        if key == "select" and isinstance(part, dict):
            yield place, part
        yield from _selects(part, place)


def lines_of_whole(lines: dict[tuple, int | str]) -> dict[tuple, int | str]:
    """Return the line of each key in the long form of a recipe. `lines` has the line of each key in its short form."""
    return {("models", *key) if key and key[0] in SHORT_KEYS else key: line for key, line in lines.items()}


def in_short(sentence: str) -> str:
    """Return a sentence about a recipe in its long form with the keys of its short form."""
    return re.sub(rf"\bmodels\.(?=({'|'.join(SHORT_KEYS)})\b)", "", sentence)


# --- methods of the user's own --------------------------------------------------------------------------------------------


def with_methods(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe as plain data, in which every name of a method in `methods` is replaced by the keys of this method.

    Raises:
        ValueError: a method has the name of a published method, or a key names a method that is unknown or does not fit there. The message
            has one line for each mistake, and the line begins with the key.
    """
    own = raw.get("methods")
    if not isinstance(own, dict) or not own:
        return raw
    names = _Names({name: {"name": entry} if isinstance(entry, str) else entry for name, entry in own.items()})
    found = raw | {"methods": {name: names.phased(entry, f"methods.{name}") for name, entry in names.own.items()}}
    names.own = found["methods"]
    if "method" in raw:
        found["method"] = names.named(raw["method"], "method", "name")
    if isinstance(arms := raw.get("arms"), dict):
        found["arms"] = {name: names.named(arm, f"arms.{name}", "method") for name, arm in arms.items()}
    if isinstance(models := raw.get("models"), dict):
        found["models"] = {**models}
        for name, model in models.items():
            if isinstance(model, dict) and "distill" in model:
                found["models"][name] = model | {"distill": names.named(model["distill"], f"models.{name}.distill", "name")}
    if names.wrong:
        raise ValueError("\n".join(names.wrong))
    return found


class _Names:
    def __init__(self, own: dict[str, Any]):
        self.own = own
        self.wrong = [*_refused(own)]

    def named(self, given: Any, at: str, name: str) -> Any:
        """Return a method or an arm in which the name of one of the recipe's own methods is replaced by the keys of this method.

        Args:
            at: the place of `given` in the recipe, such as `arms.a`.
            name: the key of `given` that contains the name.
        """
        value = {"name": given} if isinstance(given, str) and name == "name" else given
        return self._filled(self.phased(value, at), f"{at}.{name}", name, phased=True)

    def phased(self, value: Any, at: str) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("phases"), list):
            return value
        phases = [{"method": phase} if isinstance(phase, str) else phase for phase in value["phases"]]
        return value | {"phases": [self._filled(phase, f"{at}.phases", "method", phased=False) for phase in phases]}

    def _filled(self, value: Any, key: str, name: str, *, phased: bool) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get(name), str) or value[name] in METHODS:
            return value
        entry: Any = self.own.get(value[name])
        rest = {part: setting for part, setting in value.items() if part != name}
        if value[name] not in self.own:
            self.wrong.append(f"{key} names `{value[name]}`, which {not_a_method(value[name], self.own)}")
        elif not phased and isinstance(entry, dict) and entry.get("phases"):
            self.wrong.append(
                f"{key} names `{value[name]}`, which has phases itself and cannot be a phase; write these phases in place of its name"
            )
        if not _valid(entry):
            return rest
        base = {name if part == "name" else part: setting for part, setting in entry.items()}
        return ({"phases": []} if phased else {}) | base | {part: _changed(part, base.get(part), new) for part, new in rest.items()}


def _refused(own: dict[str, Any]) -> Iterator[str]:
    for name, entry in own.items():
        if name in METHODS:
            yield f"methods.{name} has the name of a published method; choose another name"
        if isinstance(entry, dict) and entry.get("name") in own and entry["name"] not in METHODS:
            yield (
                f"methods.{name}.name is `{entry['name']}`, which is another method of your own; write the name of a published method, or "
                "remove `name`"
            )


def _valid(entry: Any) -> bool:
    try:
        MethodPatch.model_validate(entry)
    except ValidationError:  # the check of `methods` shows the mistake
        return False
    return True


def _changed(part: str, base: Any, new: Any) -> Any:
    same = isinstance(base, dict) and isinstance(new, dict) and new.get("type", base.get("type")) == base.get("type")
    return base | new if same and part in PARTS else new
