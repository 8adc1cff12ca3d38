"""Arms that a recipe does not write out: controls, and arms at several budgets.

A control shows how much of an arm's result comes from the teacher's knowledge. `control: KIND of ARM` makes an arm a control of the arm
ARM: it trains the same student with the same settings and the same compute, but with another teacher or none. `fair: true` adds all
controls of every chain (a path through assistants). `with_controls` writes the settings of all controls into the recipe before the recipe
is checked.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, ClassVar, NamedTuple, get_args

from pydantic import Field, field_validator

from tadistill.config.arm import CONTROLS, Arm, Control, Kind, is_route, read_compute, read_control
from tadistill.config.common import Strict
from tadistill.config.method import PARTS
from tadistill.config.sampling import StudentSampler

_COPIED = ("method", *(part for part in PARTS if part not in ("dense", "ema")), "phases")
"""The keys that a control copies from its arm. `dense` and `ema` are not copied: a control has one teacher, whose weights do not change."""


# --- controls -------------------------------------------------------------------------------------------------------------


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
        added = [*_fair(arms, raw.get("teacher"))]
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
        given = arm.get("control")
        control = read_control(given) if isinstance(given, str) else None
        if isinstance(given, str) and control is None:
            wrong.append(f"arms.{name}.control is `{given}`; write {CONTROLS}")
        elif problem := control and _problem(name, control, arms):
            wrong.append(problem)
        written[name] = _control(arm, control, arms[control.arm], raw) if control and not wrong else arm
    if wrong:
        raise ValueError("\n".join(wrong))
    return raw | {"arms": written}


def _fair(arms: dict[str, Any], teacher: str | None) -> Iterator[tuple[str, Any]]:
    # each chain is followed by its baseline and its controls
    given = {arm["control"] for arm in arms.values() if isinstance(arm.get("control"), str)}
    able = [arm for arm in arms.values() if not any(arm.get(key) for key in ("control", "init", "context"))]
    equal = [(_models(arm), read_compute(arm["compute"])) for arm in able if isinstance(arm.get("compute"), str)]
    for name, arm in arms.items():
        yield name, arm
        if not _is_chain(arm):
            continue
        first, *_, student = _models(arm)
        twins = [([start, student], (times, name)) for start in (first, teacher) for times in (None, 1.0)]
        if not any(twin in equal for twin in twins):
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


# --- budgets -----------------------------------------------------------------------------------------------------------------


class Budgets(Strict):
    """Training budgets (FLOPs) at which arms are compared. Each arm is trained once for each budget, with scaled updates and warmup.

    For example, a recipe has the arms `direct` and `chain`. `times: [1, 2]` and `of: direct` turn these two into four arms: `direct`,
    `direct-2x`, `chain-1x` and `chain-2x`. The arm `direct` defines the budget 1x.
    """

    list_sets: ClassVar[str] = "times"
    times: tuple[Annotated[float, Field(ge=0.001, le=1e6)], ...] = Field(min_length=2)
    """The budgets, as multiples of the training FLOPs of the arm in `of`. The original teacher's own training is not counted."""
    of: str | None = None
    """Name of the arm whose training FLOPs are the budget 1x. The default is the first arm with a path of two models,
    `teacher > student`."""
    arms: tuple[str, ...] | None = None
    """Names of the arms that are trained at each budget. The default is all arms that train a model and have no `compute`."""

    @field_validator("times")
    @classmethod
    def _rising(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"budgets are [{', '.join(f'{t:g}' for t in times)}]; write them in rising order, such as [1, 2, 4, 8]")
        return times

    def expand(self, arms: dict[str, Arm]) -> dict[str, Arm]:
        """Return the recipe's arms, with one arm per budget in place of each arm in `self.arms`. All other arms are not changed.

        Raises:
            ValueError: an arm in `of` or `arms` is missing, has `compute` or trains no model; or a new arm's name is already used.
        """
        able = [name for name, arm in arms.items() if arm.compute is None and (arm.learners or arm.objective)]
        of = self._reference(arms, able)
        for name in self.arms or ():
            if name not in able and at_budget(name, self.times[0]) not in arms:
                raise ValueError(
                    f"budgets.arms names `{name}`, whose budget cannot change; name only arms that train a model and have no "
                    f"`compute` (such arms: {', '.join(able)})"
                )
        chosen = able if self.arms is None else self.arms
        found: dict[str, Arm] = {}
        for name, arm in arms.items():
            if name == of or name not in chosen:
                found[name] = arm
            if name in chosen:
                found |= self._at_each_budget(name, of, arms)
        return found

    def _reference(self, arms: dict[str, Arm], able: list[str]) -> str:
        # the arm that defines the budget 1x; `able` has the names of the arms that can
        of = self.of or next((name for name in able if len(arms[name].learners) == 1 and len(arms[name].last) == 2), None)
        if of is not None and of in able:
            return of
        missing = "the budget 1x is the compute of an arm `teacher > student`, but there is no such arm"
        what = f"budgets.of is `{of}`, which defines no budget" if of else missing
        raise ValueError(
            f"{what}; set budgets.of to an arm that trains a model and has no `compute` (such arms: {', '.join(able) or 'none'})"
        )

    def _at_each_budget(self, name: str, of: str, arms: dict[str, Arm]) -> Iterator[tuple[str, Arm]]:
        # the arm `of` is itself the one at the budget 1x
        for times in self.times:
            if name == of and times == 1:
                continue
            new, compute = at_budget(name, times), f"{times:g}x {of}"
            if new in arms and arms[new].compute != compute:
                raise ValueError(f"budgets add an arm `{new}`, but the recipe already has an arm of this name; rename the recipe's arm")
            yield new, arms[name].model_copy(update={"compute": compute, "published": None})


class BudgetOf(NamedTuple):
    """The training budget of an arm that `Budgets.expand` made from the recipe's arm `arm`. The budget is the training FLOPs of the arm
    `reference`, multiplied by the factor `times`."""

    arm: str
    times: float
    reference: str


def budget_of(name: str, compute: str | None) -> BudgetOf | None:
    """Return the training budget of an arm, given its name and its key `compute`. Return None if `Budgets.expand` did not make the arm."""
    found = read_compute(compute or "")
    if found is None or found.times is None:
        return None
    suffix = at_budget("", found.times)
    return BudgetOf(name.removesuffix(suffix), found.times, found.arm) if name.endswith(suffix) else None


def at_budget(arm: str, times: float) -> str:
    """Return the name of an arm at a budget. For example, the arm `chain` at the budget 4x has the name `chain-4x`."""
    return f"{arm}-{times:g}x"
