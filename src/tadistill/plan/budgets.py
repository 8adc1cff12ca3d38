"""The two budgets of an arm: its training FLOPs, and the number of answer tokens that the original teacher writes or scores for it.

The keys `compute` and `teacher_budget` of an arm name another arm. Each budget is set relative to the cost of that arm. The plan changes
the number of updates or of prompts, so that the cost of the arm equals its budget. The two keys change different numbers, so an arm can
have both:

    the teacher only writes text (SeqKD)
        `teacher_budget`    changes the number of prompts
        `compute`           changes the updates of all students
    the teacher runs during training
        `teacher_budget`    changes the updates of the students that the original teacher teaches
        `compute`           changes the updates of all other students

Each cost grows linearly with the number of updates and with the number of prompts. So one or two trial plans show the factor by which a
number must change.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from tadistill.config import Arm
from tadistill.config.arm import routed
from tadistill.errors import ConfigError, NotHere
from tadistill.models.shapes import COUNTED
from tadistill.plan.builder import StageBuilder
from tadistill.plan.graph import Graph, Stage, behind, with_ancestors
from tadistill.plan.inputs import FromStage
from tadistill.plan.kinds import DistillSpec, SftSpec, TrainingSpec
from tadistill.plan.paths import given_teachers, original_teacher
from tadistill.text import form

if TYPE_CHECKING:
    from tadistill.plan.arms import PlannedArm


class Budget(NamedTuple):
    """The numbers of updates and prompts that an arm gets from its keys `compute` and `teacher_budget`."""

    updates: float = 1.0
    """Factor by which the number of updates is multiplied."""
    taught: float | None = None
    """Factor on the updates of the models that the original teacher teaches. None if it equals `updates`."""
    rows: int | None = None
    """Number of training prompts that the original teacher answers. None if it answers all of them."""


class Trial(NamedTuple):
    """A plan of one arm for one seed, from which the cost of a budget is computed."""

    graph: Graph
    trained: list[str]
    """Keys of the stages of the last training, one for each phase. Empty if the arm trains no model."""

    @property
    def final(self) -> str | None:
        """Key of the stage that makes the arm's model."""
        return self.trained[-1] if self.trained else None


class Budgets:
    """Computes the budgets of arms."""

    def __init__(self, stages: StageBuilder, trial: Callable[[str, Arm, Budget], Trial]):
        """`trial` plans an arm with a budget. The graph of `stages` has the stages of the arms that are planned already."""
        self.recipe, self.graph, self.ledger, self.trial = stages.recipe, stages.graph, stages.ledger, trial
        # the plan may not need the stages of this builder
        self._apart = StageBuilder(stages.recipe, Graph(), stages.ledger, stages.of_arm, stages.tokens, stages.sets)

    def of(self, name: str, arm: Arm, done: Mapping[str, "PlannedArm"]) -> Budget:
        """Return the budget of an arm. `done` contains the planned arms that `compute` and `teacher_budget` can name.

        Raises:
            ConfigError: the arm cannot have this budget.
            NotHere: a cost is not known, because a model or a data set is not on this disk.
        """
        budget = self._asked(name, arm, done[arm.asks_like]) if arm.asks_like else Budget()
        return budget._replace(updates=self._updates(name, arm, done[arm.like.arm], budget)) if arm.like else budget

    def share(self, arm: Arm, final: str | None, done: Mapping[str, "PlannedArm"]) -> float | None:
        """Return an arm's FLOPs divided by those that its `compute` sets, once the arm is in the graph. `given_teachers` says whose own
        training is not counted. `final` is the key of the stage that makes the arm's model.

        Return None if the arm has no `compute`, or if FLOPs are not known."""
        if arm.like is None:
            return None
        times, like, total = arm.like.times or 1.0, done[arm.like.arm], self.graph.flops(final)
        if total is None or like.flops is None:
            return None
        of_given, of_given_there = self._of_given_teachers(arm, like, self.graph, final)
        own, theirs = total - of_given, like.flops - of_given_there
        return own / (times * theirs) if own > 0 and theirs > 0 else None

    # --- the teacher ----------------------------------------------------------------------------------------------------

    def _asked(self, name: str, arm: Arm, like: "PlannedArm") -> Budget:
        teacher = original_teacher(self.recipe)
        assert teacher is not None
        given, final = f"arms.{name} has `teacher_budget: {arm.teacher_budget}`, but", like.final[self.recipe.first_seed]
        if routed((*arm.path, *like.arm.path)):
            raise ConfigError(f"{given} a route has several teachers; remove `teacher_budget`, or use `compute`")
        trial = self.trial(name, arm, Budget())
        target, total = self.graph.asked(final, teacher), trial.graph.asked(trial.final, teacher)
        if target is None or total is None:
            raise self._unknown_cost(name, f"teacher_budget: {arm.teacher_budget}")
        for who, tokens in ((like.name, target), (name, total)):
            if not tokens:
                raise ConfigError(f"{given} {teacher} writes or scores no answer for `{who}`; remove `teacher_budget`")
        stages = behind(trial.graph.stages, trial.final).values()
        taught = [stage.cost for stage in stages if isinstance(stage.spec, DistillSpec) and stage.teachers[0] == teacher]
        live = sum(cost.asked for cost in taught if cost is not None)  # tokens that it writes or scores during training
        if not live:
            return Budget(rows=self._rows(given, teacher, target / total))
        if target <= total - live:
            raise ConfigError(
                f"{given} {teacher} writes or scores {total - live:,.0f} answer tokens for `{name}` before training, and only "
                f"{target:,.0f} in all for `{like.name}`; name an arm for which {teacher} writes or scores more tokens"
            )
        return Budget(taught=(target - (total - live)) / live)

    def _rows(self, given: str, teacher: str, share: float) -> int:
        rows, most = round(share * self.ledger.rows), self.ledger.rows
        if self.recipe.data.several:
            raise ConfigError(
                f"{given} `teacher_budget` sets the number of prompts of one training set, and the recipe has several; remove this key"
            )
        if not 1 <= rows <= most:
            needs, fix = (f"{rows:,} answers", "name an arm with fewer answers") if rows else ("less than one answer", "name another arm")
            has = f"{most:,} {form(most, 'prompt', 'prompts')}"
            raise ConfigError(f"{given} this budget requires {needs} from {teacher}, but the training set has {has}; {fix}")
        return rows

    # --- training FLOPs -------------------------------------------------------------------------------------------------

    def _updates(self, name: str, arm: Arm, like: "PlannedArm", budget: Budget) -> float:
        # the factor by which the updates are multiplied, so that the arm costs as many FLOPs as its `compute` says
        assert arm.like is not None
        times = arm.like.times
        if times is None and (len(arm.path) > 1 or len(arm.last) != 2):
            raise ConfigError(f"arms.{name} has `compute`, which needs a path of two models, but its path is {arm.text}; remove `compute`")
        if not arm.learners and not arm.objective:
            raise ConfigError(f"arms.{name} trains no model, so `compute: {arm.compute}` has no effect; remove `compute`")
        trial = self.trial(name, arm, budget)
        self._check_patience(name, arm, like, trial)
        target, total, scaled = like.flops, trial.graph.flops(trial.final), self._scaled(name, arm, budget, trial)
        if target is None or total is None or scaled is None:
            raise self._unknown_cost(name, f"compute: {arm.compute}")
        if not scaled:
            raise ConfigError(
                f"arms.{name} has `compute` and `teacher_budget`, but the original teacher runs in every update of the arm, so both keys "
                "would set the number of updates; remove one of the two keys"
            )
        fixed = total - scaled
        own, theirs = self._of_given_teachers(arm, like, trial.graph, trial.final)
        if times is not None or own != theirs:  # with `as`, equal costs cancel
            fixed, target = fixed - own, (times or 1.0) * (target - theirs)
        if target <= fixed:
            spent = f"the budget of {target:.3g} FLOPs is" if times else f"arm {like.name} costs"
            fix = "raise the budget" if times else "remove `compute`"
            raise ConfigError(
                f"arms.{name} has `compute: {arm.compute}`, but {spent} less than the {fixed:.3g} FLOPs that `{name}` needs "
                f"before its distillation; {fix}"
            )
        return (target - fixed) / scaled

    def _scaled(self, name: str, arm: Arm, budget: Budget, trial: Trial) -> float | None:
        # the part of the trial's FLOPs that grows with the updates; None if it is not known
        assert arm.like is not None
        if arm.like.times is None and budget.taught is None:
            parts = [trial.graph.stages[key].flops for key in trial.trained]
            return None if None in parts else sum(part for part in parts if part is not None)
        twice = self.trial(name, arm, budget._replace(updates=2.0))
        total, doubled = trial.graph.flops(trial.final), twice.graph.flops(twice.final)
        return None if total is None or doubled is None else doubled - total

    def _of_given_teachers(self, arm: Arm, like: "PlannedArm", graph: Graph, final: str | None) -> tuple[float, float]:
        # the FLOPs of the given teachers' own training, if the model `final` of the arm depends on it, and the same for the arm `like`
        given, ends = given_teachers(self.recipe, arm, like.arm), ((graph, final), (self.graph, like.final[self.recipe.first_seed]))
        own, theirs = (math.fsum(of.stages[key].flops or 0.0 for key in self._making(given, of, end)) for of, end in ends)
        return own, theirs

    def _making(self, names: set[str], graph: Graph, final: str | None) -> set[str]:
        # the keys of the stages of these teachers' own training, if this model depends on it
        handles = [self._apart.trained(name, self.recipe.first_seed) for name in names]
        own = {handle.stage for handle in handles if isinstance(handle, FromStage)}
        above = own & (with_ancestors(graph.stages, [final]) if final else set())
        return with_ancestors(graph.stages, above, without="like")

    def _unknown_cost(self, name: str, key: str) -> ConfigError | NotHere:
        if unknown := self.ledger.unknown():
            return NotHere(
                f"arms.{name} has `{key}`, which needs the sizes of models that are not on this disk ({', '.join(unknown)}); run "
                "`tadistill fetch RECIPE`"
            )
        self.ledger.rows  # noqa: B018  raises NotHere if the texts are not here
        return ConfigError(
            f"arms.{name} has `{key}`, but the size of one of its models is not known; run `tadistill fetch RECIPE`, "
            f"and use only the families {', '.join(COUNTED)}"
        )

    def _check_patience(self, name: str, arm: Arm, like: "PlannedArm", trial: Trial) -> None:
        # a stage that both arms share stops at the same update in both, and `compute` leaves out the own training of the given teachers
        given = given_teachers(self.recipe, arm, like.arm)

        def counted(graph: Graph, final: str | None) -> dict[str, Stage]:
            left_out = self._making(given, graph, final)
            return {key: stage for key, stage in behind(graph.stages, final).items() if key not in left_out}

        theirs, own = counted(self.graph, like.final[self.recipe.first_seed]), counted(trial.graph, trial.final)
        stages = [stage for key, stage in (theirs | own).items() if key not in theirs or key not in own]
        early = next((s for s in stages if isinstance(s.spec, TrainingSpec) and s.spec.select.patience), None)
        if early:
            phases = " and for each of their phases" if len(like.phases) > 1 or len(trial.trained) > 1 else ""
            fix = f"select: {{patience: null}} for {like.name} and {name}{phases}"
            if isinstance(early.spec, SftSpec):
                fix = f"models.{early.model}.sft.select: {{patience: null}}"
            raise ConfigError(
                f"arms.{name} has `compute: {arm.compute}`, but `{early.label}` may stop early (select.patience), so its FLOPs are not "
                f"known in advance; set {fix}"
            )
