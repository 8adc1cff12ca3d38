"""Methods with names of the user's own: the key `methods` of a recipe.

Such a name can be used wherever a recipe accepts the name of a published method: in `method`, in an arm, in `models.X.distill` and in a
phase. Before any check, the name is replaced by the keys of the method. Other keys in the same place override these keys.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from tadistill.config.method import PARTS, MethodPatch
from tadistill.config.shorthand import METHODS, not_a_method


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
        found["method"] = names.named(raw["method"], "method", "method.name", "name")
    if isinstance(arms := raw.get("arms"), dict):
        found["arms"] = {name: names.named(arm, f"arms.{name}", f"arms.{name}.method", "method") for name, arm in arms.items()}
    if isinstance(models := raw.get("models"), dict):
        found["models"] = {name: names.in_model(model, f"models.{name}.distill") for name, model in models.items()}
    if names.wrong:
        raise ValueError("\n".join(names.wrong))
    return found


class _Names:
    def __init__(self, own: dict[str, Any]):
        self.own = own
        self.wrong = [*_refused(own)]

    def in_model(self, model: Any, at: str) -> Any:
        if not isinstance(model, dict) or "distill" not in model:
            return model
        return model | {"distill": self.named(model["distill"], at, f"{at}.name", "name")}

    def named(self, given: Any, at: str, key: str, name: str) -> Any:
        """Return a method or an arm in which the name of one of the recipe's own methods is replaced by the keys of this method.

        Args:
            at: the place of `given` in the recipe, such as `arms.a`.
            key: the place of the name, such as `arms.a.method`, for error messages.
            name: the key of `given` that contains the name.
        """
        value = {"name": given} if isinstance(given, str) and name == "name" else given
        return self._filled(self.phased(value, at), key, name, phased=True)

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
