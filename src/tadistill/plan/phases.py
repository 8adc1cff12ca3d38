"""The phases of a distillation: the method of each phase, its number of updates, its position in an arm, and the words for it.

A distillation without `phases` counts as one phase. Each phase gets its share of the updates, rounded to a whole number of rounds
(sampling, then updates). If rounding gives a phase too many updates, the next phase gets fewer.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tadistill.config import Arm, Method, Recipe
from tadistill.config.method import PARTS, MethodPatch
from tadistill.config.method_rules import apply, phases_of
from tadistill.errors import ConfigError, DataError, ModelError, NotHere
from tadistill.text import counted

if TYPE_CHECKING:
    from tadistill.plan.builder import StageBuilder


class PlannedPhase(NamedTuple):
    """One phase of a distillation: a number of updates with their own settings."""

    method: Method
    """The settings of the phase. `optim.steps` is its number of updates."""
    share: float
    """The phase's share of the updates, as set in the recipe. It is 1 for a distillation without phases."""


class Turn(NamedTuple):
    """The position of a distillation among all distillations of the same model in an arm."""

    before: int
    """Number of earlier distillations of the model."""
    teaching: int
    """Number of the teacher among the teachers of the model, counted from 1 in the order in which they teach the model."""
    phase: int
    """Number of the phase among the phases with this teacher, counted from 1."""
    phases: int
    """Number of phases with this teacher."""
    writer: str
    """Name of the arm's last model. With `recorded: true`, this model writes the text on which the first phase trains."""

    def seed(self, seed: int) -> int:
        """Return the seed of this distillation for `seed`, a training seed of the study. The first distillation gets `seed` itself."""
        if self.before == 0:
            return seed
        from tadistill import rng  # not at the top, because numpy is slow to import and few plans need it

        return rng.torch_seed(seed, "then", self.before)

    @property
    def text(self) -> str:
        """The number of the distillation in words, such as ` (turn 2)` or ` (phase 2 of 3)`. Empty for the first distillation."""
        turn = f"turn {self.teaching}" if self.teaching > 1 else ""
        phase = f"phase {self.phase} of {self.phases}" if self.phase > 1 else ""
        return f" ({'; '.join(filter(None, (turn, phase)))})" if turn or phase else ""


def planned_phases(stages: "StageBuilder", name: str, arm: Arm, model: str, scale: float) -> list[PlannedPhase]:
    """Return the phases in which the arm `name` trains `model` with one teacher. A training without a teacher is one phase.

    Args:
        scale: factor on the recipe's number of updates.

    Raises:
        ConfigError: settings of a phase do not fit together, or a setting of the arm has no effect because each phase has its own.
    """
    recipe = stages.recipe
    try:
        patch = arm.patch if arm.learners else arm.patch.model_copy(update={"phases": ()})
        method = apply(recipe.method, recipe.models[model].distill, patch)
        for each, _ in phases_of(method):
            if each.objective.needs_corpus and recipe.data.corpus is None:
                raise ValueError(
                    "objective minillm has `pt_weight` above 0, which needs `data.corpus`; set `data.corpus`, or `pt_weight: 0`"
                )
        if method.phases:
            _check_effects(recipe, model, arm, method)
        return _divided(stages, method, scale, arm)
    except (NotHere, DataError, ModelError):  # not an error of this arm alone
        raise
    except ValueError as error:
        raise ConfigError(f"arms.{name}: {error}") from error


def _divided(stages: "StageBuilder", method: Method, scale: float, arm: Arm) -> list[PlannedPhase]:
    whole = stages.with_steps(method.optim).steps
    assert whole is not None
    parts = phases_of(method)
    if len(parts) > whole:
        raise ConfigError(
            f"`phases` has {len(parts)} phases, but the training has {counted(whole, 'update')}, so a phase would have no "
            "update; raise `optim.steps`, or remove phases"
        )
    found: list[PlannedPhase] = []
    wanted, done = 0.0, 0
    for phase, (of_phase, share) in zip(method.phases or (None,), parts, strict=True):
        wanted += whole * scale * share
        unit = of_phase.round_updates
        steps = max(unit, round((wanted - done) / unit) * unit)
        if phase is None and scale == 1.0:
            steps = whole  # which may end within a round
        done += steps
        own = phase is not None and phase.select is not None and "every" in phase.select.model_fields_set
        every = max(1, round(of_phase.select.every * steps / (whole * share if own else whole)))  # as many checkpoints as without phases
        warmup = of_phase.optim.warmup
        if arm.like and arm.like.times:
            warmup = round(warmup * steps / (whole * share))
        found.append(PlannedPhase(_with_updates(of_phase, steps, every, warmup), share))
    return found


def _with_updates(method: Method, steps: int, every: int, warmup: int) -> Method:
    optim = method.optim.model_copy(update={"steps": steps, "epochs": None, "warmup": warmup})
    return method.model_copy(update={"optim": optim, "select": method.select.model_copy(update={"every": every})})


def _check_effects(recipe: Recipe, model: str, arm: Arm, method: Method) -> None:
    # a setting of the arm is lost if every phase has another value
    phases = phases_of(method)
    for part in PARTS:
        if getattr(arm, part) is None:
            continue
        try:
            base = _base(recipe, model, arm.patch.model_copy(update={part: None}))
            other = method.model_copy(update={part: getattr(base, part)})
            lost = other != method and phases_of(other) == phases
        except ConfigError:  # other settings need this one
            continue
        if lost:
            raise ConfigError(
                f"`{part}` (set in the arm or in its `method`) has no effect, because every phase has its own `{part}`; change it in the "
                "phases, or write `phases: []`"
            )


def _base(recipe: Recipe, model: str, patch: MethodPatch) -> Method:
    patches = (recipe.models[model].distill, patch)
    return apply(recipe.method.model_copy(update={"phases": None}), *(each.model_copy(update={"phases": None}) for each in patches))


# --- in words -------------------------------------------------------------------------------------------------------------


def phases_text(phases: Sequence[PlannedPhase]) -> str:
    """Return the phases in words, such as `cross_entropy (teacher) 30 %, then reverse_kl (student) 70 %`. A single phase has no
    percentage."""
    texts = [f"{method.objective.label} ({method.sampler.label})" for method, _ in phases]
    if len(phases) == 1:
        return texts[0]
    every = zip(texts, phases, own_settings(phases), strict=True)
    return ", then ".join(f"{text}{f', {own},' if own else ''} {100 * phase.share:.3g} %" for text, phase, own in every)


def own_settings(phases: Sequence[PlannedPhase]) -> list[str]:
    """Return a text for each phase, such as `lr 0.001`. It has the settings in which the phase differs from other phases that have the same
    types of objective and sampler."""
    settings = [((method.objective.type, method.sampler.type), _settings(method)) for method, _ in phases]
    found = []
    for types, own in settings:
        alike = [other for of_other, other in settings if of_other == types]
        names = [name for name in own if any(other[name] != own[name] for other in alike)]
        found.append(", ".join(f"{name} {own[name]}" for name in names))
    return found


def _settings(method: Method) -> dict[str, Any]:
    parts = (method.objective, method.sampler, method.optim)
    found = {name: value for part in parts for name, value in part.model_dump().items() if name not in ("steps", "warmup")}
    return found | {"ema": "none" if method.ema is None else method.ema}
