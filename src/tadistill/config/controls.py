"""Controls: arms that show how much of an arm's result comes from the teacher's knowledge.

`control: KIND of ARM` makes an arm a control of the arm ARM: it trains the same student with the same settings and the same compute, but
with another teacher or none. `fair: true` adds all controls of every chain (a path through assistants). This module writes the settings of
all controls into the recipe before the recipe is checked.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast, get_args

from tadistill.config.method import PARTS
from tadistill.config.route import is_route
from tadistill.config.sampling import StudentSampler

Kind = Literal["no_teacher", "tempered", "random_teacher"]
_WRITTEN = re.compile(rf"({'|'.join(get_args(Kind))}) of (.+)")
_COPIED = ("method", *(part for part in PARTS if part not in ("dense", "ema")), "phases")
"""The keys that a control copies from its arm. `dense` and `ema` are not copied: a control has one teacher, whose weights do not change."""


class Control(NamedTuple):
    """The kind of a control, and the name of the arm with which it is compared."""

    kind: Kind
    arm: str

    @property
    def words(self) -> str:
        """A phrase for reports: how the control trains its student, and the arm with which the control is compared."""
        teacher = {
            "no_teacher": "trained without a teacher",
            "tempered": "taught by the teacher, whose temperature is set so that its mean entropy equals the assistant's",
            "random_teacher": "taught by a teacher with random weights",
        }
        return f"{teacher[self.kind]} (control of {self.arm})"


def read_control(text: str) -> Control | None:
    """Return the control that `KIND of ARM` names, or None if the text has another form."""
    found = _WRITTEN.fullmatch(text)
    return Control(cast(Kind, found[1]), found[2]) if found else None


def with_controls(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe as plain data, in which each control has the path, the settings and the compute of its arm.

    With `fair: true`, each path through assistants also gets an equal-compute baseline and one control of each kind, unless the recipe has
    them.

    Raises:
        ValueError: a control names no arm, or an arm that cannot have this control. There is one line for each mistake.
    """
    arms = raw.get("arms")
    if not isinstance(arms, dict):
        return raw
    arms = {name: {"path": arm} if isinstance(arm, str) else arm for name, arm in arms.items()}
    if not all(isinstance(arm, dict) for arm in arms.values()):
        return raw  # the check of `arms` shows the mistake
    fair = raw.get("fair") is True
    if fair:
        added = [*_fair(arms)]
        if problems := _fair_problems(arms, [name for name, _ in added]):
            raise ValueError("\n".join(problems))
        arms = dict(added)
    elif not any(arm.get("control") for arm in arms.values()):
        return raw
    if raw.get("budgets") is not None:
        key = "fair" if fair else next(f"arms.{name}.control" for name, arm in arms.items() if arm.get("control"))
        raise ValueError(f"{key} sets the compute of an arm, but `budgets` set it too; remove one of these two keys")
    written: dict[str, Any] = {}
    wrong: list[str] = []
    for name, arm in arms.items():
        control = read_control(given) if isinstance(given := arm.get("control"), str) else None
        if problem := control and _problem(name, control, arms):
            wrong.append(problem)
        written[name] = _control(arm, control, arms[control.arm], raw) if control and not problem else arm
    if wrong:
        raise ValueError("\n".join(wrong))
    return raw | {"arms": written}


def _fair(arms: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    # each chain is followed by its baseline and its controls
    given = {arm["control"] for arm in arms.values() if isinstance(arm.get("control"), str)}
    equal = {arm.get("compute") for arm in arms.values() if len(_models(arm)) == 2 and not arm.get("control")}
    for name, arm in arms.items():
        yield name, arm
        if not _is_chain(arm):
            continue
        if f"as {name}" not in equal:
            yield f"{name}-equal-compute", _copy(arm) | {"path": _ends(arm), "compute": f"as {name}"}
        for kind in get_args(Kind):
            if (control := f"{kind} of {name}") not in given:
                yield f"{name}-{kind.replace('_', '-')}", {"control": control}


def _is_chain(arm: dict[str, Any]) -> bool:
    # `fair: true` adds a baseline and controls to such an arm
    return len(_models(arm)) > 2 and not (arm.get("control") or arm.get("init") or arm.get("compute"))


def _fair_problems(arms: dict[str, Any], names: list[str]) -> list[str]:
    found = [
        f"fair adds the controls `tempered` and `random_teacher` to arms.{name}, but these need one teacher, and the arm's path begins "
        f"with several (`{_models(arm)[0]}`); remove `fair`, and write the arms that you want, such as {{control: no_teacher of {name}}}"
        for name, arm in arms.items()
        if _is_chain(arm) and is_route(_models(arm)[0])
    ]
    twice = [name for name in arms if names.count(name) > 1]
    return found + [f"fair adds an arm `{name}`, but the recipe already has an arm of this name; rename the recipe's arm" for name in twice]


def _problem(name: str, control: Control, arms: dict[str, Any]) -> str | None:
    at, base = f"arms.{name}.control is `{control.kind} of {control.arm}`", arms.get(control.arm)
    if base is None:
        return f"{at}, but `{control.arm}` is not an arm; choose one of {', '.join(other for other in arms if other != name)}"
    if base.get("control"):
        return f"{at}, but `{control.arm}` is a control itself; name the arm that `{control.arm}` is a control of"
    if len(_models(base)) < 2 or base.get("init"):
        return f"{at}, but a control needs an arm with one path of at least two models and no `init`; name such an arm"
    if control.kind == "tempered" and len(_models(base)) < 3:
        return f"{at}, but it needs the entropy of an assistant, and `{control.arm}` has none; name an arm such as A > B > C"
    if control.kind == "tempered" and base.get("compute"):
        return f"{at}, but `{control.arm}` has `compute`, so the updates of its assistant are not known yet; name an arm without `compute`"
    if "path" in arms[name] and _models(arms[name]) != _models({"path": _ends(base)}):
        return f"{at}, so arms.{name}.path must be `{_ends(base)}`, but it is another path; remove `path`"
    return None


def _control(arm: dict[str, Any], control: Control, base: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    changed = {
        key: base[key] | arm[key] for key in ("optim", "select") if isinstance(base.get(key), dict) and isinstance(arm.get(key), dict)
    }
    found = {"path": _ends(base), "compute": f"as {control.arm}"} | _copy(base) | arm | changed
    if control.kind != "no_teacher":
        return found
    samplers = [part.get("sampler") for part in (raw.get("method"), base, arm) if isinstance(part, dict)]
    kept = {key: value for each in samplers if isinstance(each, dict) for key, value in each.items() if key in StudentSampler.model_fields}
    found = {key: value for key, value in found.items() if key not in ("method", "context", "phases")}
    found["sampler"] = kept | {"type": "student", "recorded": False, "signal": None}
    return found | {"objective": arm.get("objective") or {"type": "no_teacher"}, "phases": []}


def _copy(arm: dict[str, Any]) -> dict[str, Any]:
    return {key: arm[key] for key in _COPIED if key in arm}


def _models(arm: dict[str, Any]) -> list[str]:
    # empty if the arm has several paths, or no valid path
    path = arm.get("path")
    if isinstance(path, str):
        return [] if " then " in path else [model.strip() for model in path.split(">")]
    if isinstance(path, list) and len(path) == 1 and isinstance(path[0], list):
        path = path[0]
    return path if isinstance(path, list) and all(isinstance(model, str) for model in path) else []


def _ends(arm: dict[str, Any]) -> str:
    models = _models(arm)
    return f"{models[0]} > {models[-1]}"
