"""Turn a recipe's arms and seeds into a graph of stages. Arms that begin with the same stages share them.

An arm is a named path of models, such as `A > B > C`. A stage is one step of a study, such as one training. Each stage writes a folder on
disk, and later stages read it. A stage's key is a hash of its settings and inputs.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from tadistill.config import Arm, Method, Recipe, Sft
from tadistill.config.arm import ModelPath, flat, is_route, routed
from tadistill.config.recipe import distillations
from tadistill.config.recipe_files import placed
from tadistill.config.sampling import DatasetSampler
from tadistill.errors import ConfigError, NotHere
from tadistill.plan.budgets import Budget, Budgets, Trial
from tadistill.plan.builder import StageBuilder
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Graph, Stage
from tadistill.plan.inputs import FromStage, Handle, is_served
from tadistill.plan.paths import check_compared, check_edge, check_itself, check_route, check_sizes, original_teacher, teaching
from tadistill.plan.phases import PlannedPhase, Turn, planned_phases
from tadistill.plan.remote import check_measured, check_not_run, check_teaching, from_files
from tadistill.plan.study_tokens import StudyTokens
from tadistill.plan.task import check_entries, check_sources
from tadistill.plan.training_texts import StudySets


@dataclass(frozen=True)
class PlannedArm:
    """One arm of the recipe (a named path such as `A > B > C`), with the keys of its stages for each seed."""

    name: str
    arm: Arm
    phases: tuple[PlannedPhase, ...]
    """The phases of the arm's last training. A phase is a part of the updates with its own settings. Without `phases`, there is one."""
    final: dict[int, str | None]
    """Key of the stage that makes the arm's model, by seed. None if no stage trains it."""
    evaluate: dict[int, str]
    analyse: dict[int, str]
    """Key of the `analyse` stage by seed. Empty if the arm's model is not compared with the original teacher."""
    also: dict[str, dict[int, str]]
    """Keys of the evaluations with another decoding (`evaluate.also`), by the decoding's name and by seed."""
    flops: float | None
    """Training FLOPs of the final model and all models from which it was made, for one seed. None if a size is not known."""
    asked: float | None
    """Number of answer tokens that the original teacher writes or scores for the final model and all models from which it was made, for one
    seed. None if it is not known."""
    of_budget: float | None
    """The arm's FLOPs divided by those that its `compute` sets, without the original teacher's own training. None if it has no `compute`,
    or if FLOPs are not known."""

    @property
    def method(self) -> Method:
        """The method of the arm's last phase."""
        return self.phases[-1].method

    @property
    def taught_with(self) -> object:
        """For each phase: its objective, its sampler and its share of the updates. Two arms with equal values have the same method."""
        return tuple((method.objective, method.sampler, share) for method, share in self.phases)


@dataclass
class Plan:
    """All stages and arms of a study."""

    recipe: Recipe
    teacher: str | None
    stages: dict[str, Stage]
    """Stages by key, parents before children."""
    arms: list[PlannedArm]
    tokens: StudyTokens
    """The tokenizer of each model, and the tokens that end an answer."""
    absent: dict[str, str] = field(default_factory=dict)
    """Arms that the plan leaves out, each with the reason. Empty, unless `make_plan` was called with `partial`."""
    unknown: list[str] = field(default_factory=list)
    """Models whose config.json is not on this disk, as `NAME (SOURCE)`. Empty, unless `make_plan` was called with `partial`."""


@dataclass(frozen=True)
class ProbePlan:
    """The stages of `tadistill advise`, which measure models on dev prompts before any distillation."""

    plan: Plan
    alone: dict[str, str]
    """Key of the `probe` stage of each model."""
    beside: dict[tuple[str, str], str]
    """Key of the `pair` stage of each (bigger, smaller) pair of models."""


@placed
def make_plan(recipe: Recipe, *, partial: bool = False) -> Plan:
    """Turn a recipe into its stages and arms.

    With `partial`, an arm is left out if it needs a model or data set that is not on this disk. `Plan.absent` gives the reasons.

    Raises:
        ConfigError, DataError, ModelError: the recipe has an error that can be found without loading a model.
    """
    check_sources(recipe)
    return _planner(recipe, Ledger(recipe, partial=partial)).plan()


def _planner(recipe: Recipe, ledger: Ledger) -> "_Planner":
    check_entries(recipe)
    teacher = original_teacher(recipe) if recipe.analyse else None
    return _Planner(recipe, teacher, ledger, StudyTokens(recipe, teacher), StudySets(recipe))


class _Made(NamedTuple):
    path: list[Handle]
    """The models of the arm's path, in the order of the path. For an arm with several paths, these are the models of its last path."""
    phases: list[PlannedPhase]
    """The phases of the last training in the arm."""
    stages: list[str]
    """Key of the stage of each phase."""


class _Planner:
    def __init__(self, recipe: Recipe, teacher: str | None, ledger: Ledger, tokens: StudyTokens, sets: StudySets):
        self.recipe, self.teacher, self.ledger, self.tokens, self.graph = recipe, teacher, ledger, tokens, Graph()
        self.stages = StageBuilder(recipe, self.graph, ledger, lambda arm, seed: self._path_of(arm, seed)[-1], tokens, sets)
        self.budgets = Budgets(self.stages, self._trial)
        self.making: list[str] = []  # arms that are being planned; each sets a temperature for the arm before it

    def plan(self) -> Plan:
        # in the recipe's order, except that an arm with `compute: as X` or `teacher_budget: as X` is planned after arm X
        done: dict[str, PlannedArm] = {}
        absent: dict[str, str] = {}
        waiting = dict(self.recipe.arms)
        while waiting:
            todo = len(waiting)
            for name, arm in list(waiting.items()):
                missing = next((key for key, other in arm.budgets.items() if other in absent), None)
                if missing:
                    absent[name] = f"`{missing}: {getattr(arm, missing)}` needs arm {arm.budgets[missing]}, which is left out too"
                elif all(other in done for other in arm.budgets.values()):
                    try:
                        done[name] = self._arm(name, arm, done)
                    except NotHere as error:
                        if not self.ledger.partial:
                            raise
                        absent[name] = str(error)
                else:
                    continue
                del waiting[name]
            if len(waiting) == todo:
                names = ", ".join(waiting)
                raise ConfigError(f"arms need each other's budgets (`compute`, `teacher_budget`): {names}; remove one of these keys")
        stages = {key: s for key, s in self.graph.stages.items() if s.arms} if absent else self.graph.stages
        arms = [done[name] for name in self.recipe.arms if name in done]
        unknown = [*self.ledger.unknown().values()] if self.ledger.partial else []
        return Plan(self.recipe, self.teacher, stages, arms, self.tokens, absent, unknown)

    def _arm(self, name: str, arm: Arm, done: dict[str, PlannedArm]) -> PlannedArm:
        budget = self.budgets.of(name, arm, done)
        made = {seed: self._models(name, arm, seed, budget) for seed in self.recipe.seeds}
        models = {seed: found.path for seed, found in made.items()}
        last, main = arm.last[-1], self.recipe.evaluate
        evaluate = {seed: self.stages.evaluate(last, of_path[-1], seed, main) for seed, of_path in models.items()}
        also = {
            other: {seed: self.stages.evaluate(last, of_path[-1], seed, main.other(other), other) for seed, of_path in models.items()}
            for other in (main.also if self.recipe.data.test else ())  # tasks of lm-eval decode by their own rules
        }
        analyse = {}
        if self.teacher and self.recipe.data.test and self._comparable(self.teacher, last):
            # without a chain of assistants from the original teacher, only the last model is compared
            alone = arm.controls or routed(arm.path) or not all(self.tokens.alike(self.teacher, name) for name in flat(arm.last))
            compared = {seed: of_path[-1:] if alone else of_path for seed, of_path in models.items()}
            analyse = {seed: self.stages.analyse(last, compared[seed], seed, evaluate[seed], self.teacher) for seed in models}
        for measured in (evaluate, analyse, *also.values()):
            for key in measured.values():
                self.graph.mark(key, name)
        final, first = {seed: _stage(of_path[-1]) for seed, of_path in models.items()}, self.recipe.first_seed
        teacher, key = original_teacher(self.recipe) if self.teacher or arm.teacher_budget else None, final[first]
        asked = self.graph.asked(key, teacher) if teacher else None
        share = self.budgets.share(arm, key, done)
        return PlannedArm(name, arm, tuple(made[first].phases), final, evaluate, analyse, also, self.graph.flops(key), asked, share)

    def _comparable(self, teacher: str, model: str) -> bool:
        # a teacher with another tokenizer must score texts, which it cannot do on a server or behind an API
        if self.tokens.alike(teacher, model):
            return True
        return not (self.recipe.models[teacher].api or is_served(self.stages.trained(teacher, self.recipe.first_seed)))

    def _models(self, name: str, arm: Arm, seed: int, budget: Budget) -> _Made:
        check_not_run(self.recipe, name, self.teacher)
        check_sizes(self.ledger, name, arm)
        if arm.dense and all(len(path) < 3 for path in arm.path):
            raise ConfigError(
                f"arms.{name} has `dense`, but in `{arm.text}` no model has two teachers; remove `dense`, or write a path such as A > B > C"
            )
        if not arm.learners:
            return self._single(name, arm, seed, budget)
        made, phases, trained = _ArmModels(self.stages, arm, seed), list[PlannedPhase](), list[str]()
        taught, turns, handles = list[str](), list[str](), list[Handle]()  # a turn with one teacher has one or several phases
        for path in arm.path:
            first = teaching(self.stages, name, arm, path[0], made, seed, self._path_of)
            handles = [handle for _, handle in first[:1]]
            for i, model in enumerate(path[1:], 1):
                stages, scale = self._asking(arm, path[:i], model, budget)
                phases, trained = planned_phases(stages, name, arm, model, scale / arm.learners.count(model)), []
                for number, (method, _) in enumerate(phases, 1):
                    teachers = first if i == 1 else list(zip(path, handles, strict=False))[0 if method.dense else i - 1 :]
                    names, route = [m for m, _ in teachers], path[0] if i == 1 and is_route(path[0]) else ""
                    check_route(self.tokens, name, path, method)
                    check_teaching(self.ledger, name, names, method)
                    check_itself(self.recipe, name, arm, path[i - 1], model, method)
                    check_edge(self.tokens, name, names, model, method)
                    turn = Turn(taught.count(model), turns.count(model) + 1, number, len(phases), arm.last[-1])
                    made[model] = new = stages.distill(teachers, model, made[model], method, seed, turn, route)
                    taught.append(model)
                    trained.append(new.stage)
                handles.append(made[model])  # a model that teaches itself is in the path twice
                turns.append(model)
        return _Made(handles, phases, trained)

    def _asking(self, arm: Arm, above: ModelPath, model: str, budget: Budget) -> tuple[StageBuilder, float]:
        # the builder and the factor on the updates for a model that learns from the last model of `above`, or from all of them
        if arm.teacher_budget is None:
            return self.stages, budget.updates
        dense = any(method.dense for method, _, learner in distillations(self.recipe, arm) if learner == model)
        if original_teacher(self.recipe) not in (above if dense else above[-1:]):
            return self.stages, budget.updates
        stages = copy.copy(self.stages)
        stages.rows = budget.rows
        return stages, budget.updates if budget.taught is None else budget.taught

    def _path_of(self, arm: str, seed: int) -> list[Handle]:
        if arm in self.making:
            raise ConfigError(
                f"a model has `temper.like: {arm}`, but arm {arm} needs this model; in `temper.like`, name an arm that does not need it"
            )
        for key in self.recipe.arms[arm].budgets:
            given = f"{key}: {getattr(self.recipe.arms[arm], key)}"
            raise ConfigError(
                f"a model has `temper.like: {arm}`, but arm {arm} has `{given}`; in `temper.like`, name an arm without `{key}`"
            )
        self.making.append(arm)
        try:
            return self._models(arm, self.recipe.arms[arm], seed, Budget()).path
        finally:
            self.making.pop()

    def _single(self, name: str, arm: Arm, seed: int, budget: Budget) -> _Made:
        # an arm without a teacher: the model as it is, or after more training
        self._check_single(name, arm)
        only = arm.last[0]
        model = self.stages.trained(only, seed)
        if arm.objective is None:
            return _Made([model], [PlannedPhase(self.recipe.method, 1.0)], [])
        phases = planned_phases(self.stages, name, arm, only, budget.updates)
        more = Sft(optim=phases[0].method.optim, select=phases[0].method.select)
        longer = self.stages.sft(only, model, more, self.stages.seed(only, seed), continues=True)
        return _Made([longer], phases, [longer.stage])

    @staticmethod
    def _check_single(name: str, arm: Arm) -> None:
        # it may only train further with cross-entropy on the data set
        if arm.phases:
            raise ConfigError(
                f"arms.{name} has `phases`, but its path `{arm.text}` has no teacher; write a path such as A > B, or remove `phases`"
            )
        if arm.objective is None and (arm.optim or arm.select or arm.sampler or arm.context):
            raise ConfigError(
                f"arms.{name} trains no model, so its settings have no effect; add objective: {{type: cross_entropy}} to continue the "
                "model's training"
            )
        if arm.objective is not None and arm.objective.needs_teacher:
            raise ConfigError(
                f"arms.{name} has no teacher in its path, but objective {arm.objective.type} needs a teacher; use cross_entropy"
            )
        if arm.sampler is not None and not isinstance(arm.sampler, DatasetSampler):
            raise ConfigError(
                f"arms.{name} has no teacher in its path, so sampler {arm.sampler.type} cannot be used; use sampler: {{type: dataset}}"
            )

    def _trial(self, name: str, arm: Arm, budget: Budget) -> Trial:
        planner = _Planner(self.recipe, self.teacher, self.ledger, self.tokens, self.stages.sets)
        return Trial(planner.graph, planner._models(name, arm, self.recipe.first_seed, budget).stages)


class _ArmModels(dict[str, Handle]):
    # the current model for each name: at first after its own fine-tuning, later after the arm's distillation

    def __init__(self, stages: StageBuilder, arm: Arm, seed: int):
        self.stages, self.arm, self.seed = stages, arm, seed

    def __missing__(self, model: str) -> Handle:
        source = self.arm.init.get(model)
        start = None if source is None else self.stages.cut_to(model, source, from_files(self[source]))
        self[model] = self.stages.trained(model, self.seed, start)
        return self[model]


def plan_probes(recipe: Recipe, models: Sequence[str], *, prompts: int, k: int) -> ProbePlan:
    """Plan the stages of `tadistill advise`. A `probe` stage measures one model on dev prompts, and a `pair` stage compares two models.

    Args:
        models: names from big to small. Each model is used after its own fine-tuning with the study's first seed.
        prompts: number of dev rows to use, from the first row.
        k: number of most likely tokens that a `pair` stage compares at each position.
    """
    check_measured(recipe, models)
    planner = _planner(recipe, Ledger(recipe))
    check_compared(planner.tokens, models)
    stages, seed = planner.stages, recipe.first_seed
    handles = {name: stages.trained(name, seed) for name in models}
    alone = {name: stages.probe(name, handle, seed, prompts) for name, handle in handles.items()}
    beside = {
        (above, name): stages.pair((above, handles[above]), (name, handles[name]), alone[name], seed, prompts, k)
        for above, name in combinations(models, 2)
    }
    return ProbePlan(Plan(recipe, planner.teacher, planner.graph.stages, [], planner.tokens), alone, beside)


def _stage(handle: Handle) -> str | None:
    # None if the model is only loaded, pruned or tempered
    return handle.stage if isinstance(handle, FromStage) else None
