"""`tadistill search`: train paths from teacher to student, round by round, until a strategy has chosen one.

The quality of a path is the dev value of its last model, averaged over training seeds. Test sets are not read. Paths that begin with the
same models share the training of these models. If a search is interrupted, the same command continues it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from tadistill.config import Arm, Method, Recipe
from tadistill.config.arm import ModelPath, path_text
from tadistill.config.method import MethodPatch
from tadistill.config.method_parts import Optim, Select
from tadistill.config.method_rules import apply
from tadistill.config.recipe import Search
from tadistill.config.recipe_files import placed
from tadistill.errors import ConfigError
from tadistill.metrics import NOT_COMPARABLE, higher_is_better
from tadistill.models.shapes import COUNTED
from tadistill.plan.arms import make_plan
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Stage, total_flops, with_ancestors
from tadistill.plan.paths import with_parents
from tadistill.runner.local import result_written
from tadistill.runner.run_study import fetch_models
from tadistill.runner.schedule import check_first, run_stages
from tadistill.search import strategies
from tadistill.search.choice import Choice, Tried, choice_notes, choice_table, write_choice
from tadistill.search.strategies import Lattice, Round, Strategy, count_paths, drive, make_lattice, path_name
from tadistill.store import Store, store_of
from tadistill.terminal import Terminal
from tadistill.text import counted

MOST_PATHS = 256


@placed
def find_path(recipe: Recipe, *, runs: Path, console: Terminal) -> Choice:
    """Search for the best path of a recipe, print the paths that were tried, and write RUNS/STUDY/search.json and confirm.yaml.

    Raises:
        TadistillError: the recipe is wrong (raised before any training), or a stage failed.
    """
    if recipe.search is None:
        raise ConfigError(
            f"study {recipe.study} has no `search`; add search: {{teacher: xl, assistants: [l, m], student: s}} with models of the recipe"
        )
    search = recipe.search
    check_lattice(recipe, search)
    metric = _check_metric(recipe, search)
    fetch_models(recipe, console)
    check_order(recipe, search)
    flops = path_flops(recipe, search)
    lattice = affordable(search, flops)
    _check_chains(search, lattice, flops)
    training = _Training(recipe, lattice, store_of(runs), console)
    sign = 1 if higher_is_better(metric) else -1
    outcome = drive(_strategy(search, lattice), lambda asked: training.measure(asked, sign))
    tried = [Tried(path, flops[path], training.values(training.finals[path])) for path in outcome.quality if path[-1] == search.student]
    used = with_ancestors(training.stages, training.finals[outcome.path])
    choice = Choice(
        study=recipe.study,
        strategy=f"beam {search.width}" if search.strategy == "beam" else search.strategy,
        metric=metric,
        sign=sign,
        tried=tuple(sorted(tried, key=lambda t: (t.path != outcome.path, -sign * t.mean))),
        rounds=tuple(training.rounds),
        direct=flops[search.teacher, search.student],
        trained=total_flops(training.stages.values()),
        discarded=total_flops(stage for key, stage in training.stages.items() if key not in used),
        stages=tuple(training.stages),
        distillations=sum(stage.kind == "distill" for stage in training.stages.values()),
    )
    confirm = write_choice(choice, recipe, runs / recipe.study)
    result_written(runs / recipe.study, "search")
    console.print(choice_table(choice))
    for note in choice_notes(choice, confirm, runs):
        console.say(note)
    return choice


# --- checks before any training -----------------------------------------------------------------------------------------


def check_lattice(recipe: Recipe, search: Search) -> None:
    """Raise a ConfigError if a search has too many paths, or if a model takes its temperature from an arm."""
    for name in sorted(with_parents(recipe, search.models)):
        temper = recipe.models[name].temper
        if temper and temper.like is not None:
            raise ConfigError(
                f"model {name} takes its temperature from arm {temper.like}, but a search has no arms; set its `temper.tau`, or "
                "remove the model from the search"
            )
    paths = count_paths(len(search.assistants), search.max_assistants)
    if paths > MOST_PATHS:
        raise ConfigError(
            f"{len(search.assistants)} assistants make {paths:,} paths, but a search supports at most {MOST_PATHS}; lower "
            "`search.max_assistants`, or name fewer assistants"
        )


def _check_metric(recipe: Recipe, search: Search) -> str:
    """Return the dev metric with which paths are compared.

    Raises:
        ConfigError: the metric cannot compare students of different teachers, or the models use different metrics.
    """
    student = _method(recipe, search.student).select.metric
    compared = (*search.assistants, search.student) if search.strategy in ("best_prefix", "beam") else (search.student,)
    for name in compared:
        metric = _method(recipe, name).select.metric
        if metric in NOT_COMPARABLE:
            raise ConfigError(
                f"the checkpoint of model {name} is selected by `{metric}`, which {NOT_COMPARABLE[metric]}, so paths cannot be compared; "
                "set `select.metric` to `loss`, `rouge_l` or `fact_accuracy`"
            )
        if metric != student:
            raise ConfigError(
                f"the checkpoint of model {name} is selected by `{metric}`, but that of {search.student} by `{student}`, so their values "
                "cannot be compared; set the same `select.metric` for both"
            )
    return student


def check_order(recipe: Recipe, search: Search) -> None:
    """Raise a ConfigError if a model is bigger than the model before it in the search. Neighbours may have equal sizes."""
    ledger = Ledger(recipe)
    for above, below in pairwise(search.models):
        big, small = ledger.size(above), ledger.size(below)
        if big and small and small.total > big.total:
            raise ConfigError(
                f"the models of a search must be ordered from big to small, but {below} ({small.total:,} parameters) comes after {above} "
                f"({big.total:,}); change their order"
            )


def path_arms(paths: Sequence[ModelPath]) -> dict[str, Arm]:
    """Return an arm (entry of a recipe) for each path, by name. Raises ConfigError if two paths have the same name."""
    arms: dict[str, Arm] = {}
    for path in paths:
        if (name := path_name(path)) in arms:
            raise ConfigError(f"the paths {arms[name].text} and {path_text(path)} both have the name {name}; rename one of their models")
        arms[name] = Arm(path=(path,))
    return arms


def path_flops(recipe: Recipe, search: Search) -> dict[ModelPath, float | None]:
    """Return the training FLOPs of each path for one seed. All stages that the student needs are included.

    The value is None if the size of a model is unknown.
    """
    paths = _lattice(search).paths
    plan = make_plan(_round_recipe(recipe, paths).model_copy(update={"seeds": recipe.seeds[:1]}))
    return {path: arm.flops for path, arm in zip(paths, plan.arms, strict=True)}


def affordable(search: Search, flops: Mapping[ModelPath, float | None]) -> Lattice:
    """Return the paths within the budget of the search. Raises ConfigError if there is none, or if a cost is unknown."""
    if search.budget is None:
        return _lattice(search)
    direct = flops[search.teacher, search.student]
    costs = {path: cost / direct for path, cost in flops.items() if cost is not None and direct}
    if len(costs) < len(flops):
        raise ConfigError(
            f"search.budget is {search.budget:g}, but the cost of a path cannot be computed, because the size of a model is unknown; use "
            f"only models of the families {', '.join(COUNTED)}, or remove `search.budget`"
        )
    lattice = _lattice(search, cost=costs.__getitem__, budget=search.budget)
    if not lattice.paths or (search.strategy == "single" and all(len(path) > 3 for path in lattice.paths)):
        cheapest = min(costs, key=costs.__getitem__)
        raise ConfigError(
            f"search.budget is {search.budget:g} × the FLOPs of the direct path, but the cheapest allowed path, {path_text(cheapest)}, "
            f"costs {costs[cheapest]:.2f} × these FLOPs; raise `search.budget`"
        )
    return lattice


def _check_chains(search: Search, lattice: Lattice, flops: Mapping[ModelPath, float | None]) -> None:
    if any(len(path) > 2 for path in lattice.paths):
        return
    costs = {path: cost for path, cost in flops.items() if cost is not None}
    nearest = min((path for path in costs if len(path) > 2), key=costs.__getitem__)
    multiple = costs[nearest] / costs[search.teacher, search.student]
    raise ConfigError(
        f"search.budget is {search.budget:g} × the FLOPs of the direct path, but the cheapest path with an assistant, "
        f"{path_text(nearest)}, costs {multiple:.2f} × these FLOPs; raise `search.budget`"
    )


def _lattice(search: Search, cost: Callable[[ModelPath], float] | None = None, budget: float = math.inf) -> Lattice:
    most = search.max_assistants
    return make_lattice(search.teacher, search.assistants, search.student, max_assistants=most, cost=cost, budget=budget)


def _strategy(search: Search, lattice: Lattice) -> Strategy:
    match search.strategy:
        case "exhaustive":
            return strategies.exhaustive(lattice)
        case "single":
            return strategies.single(lattice)
        case "best_prefix":
            return strategies.best_prefix(lattice)
        case "beam":
            return strategies.beam(lattice, width=search.width)
        case "halving":
            return strategies.halving(lattice, rungs=search.rungs)


# --- training -----------------------------------------------------------------------------------------------------------


class _Training:
    """Trains the paths of each round, and collects all stages that the search needed."""

    def __init__(self, recipe: Recipe, lattice: Lattice, store: Store, console: Terminal):
        self.recipe, self.lattice, self.store, self.console = recipe, lattice, store, console
        self.stages: dict[str, Stage] = {}
        self.rounds: list[tuple[Round, dict[ModelPath, float]]] = []
        self.finals: dict[ModelPath, list[str]] = {}
        """Keys of the last stage of a path, one for each seed. Only paths that were trained in full are included."""

    @cached_property
    def jobs(self) -> int:
        """Number of stages that run at the same time. The first access also checks all paths, before any stage runs."""
        plan = make_plan(_round_recipe(self.recipe, self.lattice.paths))
        stages = [stage for stage in plan.stages.values() if not stage.spec.measures]
        return check_first(plan, self.store, self.console, stages)

    def measure(self, asked: Round, sign: int) -> dict[ModelPath, float]:
        plan = make_plan(_round_recipe(self.recipe, asked.paths, asked.share))
        stages = {key: stage for key, stage in plan.stages.items() if not stage.spec.measures}
        missing = sum(not self.store.finished(key) for key in stages)
        share = "" if asked.share == 1 else f" at {asked.share:.0%} of their updates"
        count = f"{counted(len(asked.paths), 'path')}{share}"
        text = f"round {len(self.rounds) + 1}: {count}, {counted(len(stages), 'stage')}, {missing} to run"
        self.console.note(text)
        if missing:
            run_stages(replace(plan, stages=stages), self.store, jobs=self.jobs, console=self.console, needs=self.stages)
        self.stages |= stages
        finals = {path: [k for k in arm.final.values() if k] for path, arm in zip(asked.paths, plan.arms, strict=True)}
        means = {path: sum(self.values(keys)) / len(keys) for path, keys in finals.items()}
        if asked.share == 1:
            self.finals |= finals
        self.rounds.append((asked, means))
        return {path: sign * mean for path, mean in means.items()}

    def values(self, keys: Sequence[str]) -> tuple[float, ...]:
        return tuple(float(self.store.manifest(key)["best_value"]) for key in keys)


def _round_recipe(recipe: Recipe, paths: Sequence[ModelPath], share: float = 1.0) -> Recipe:
    found = recipe.model_copy(update={"arms": path_arms(paths), "teacher": paths[0][0], "search": None})
    if share == 1:
        return found
    learners = dict.fromkeys(name for path in paths for name in path[1:])
    models = {name: recipe.models[name].model_copy(update={"distill": _shortened(recipe, name, share)}) for name in learners}
    return found.model_copy(update={"models": recipe.models | models})


def _shortened(recipe: Recipe, name: str, share: float) -> MethodPatch:
    patch, method = recipe.models[name].distill, _method(recipe, name)
    whole = method.optim.steps
    if whole is None:
        whole = max(1, round((method.optim.epochs or 0) * Ledger(recipe).rows / method.optim.batch))
    unit = method.round_updates
    steps = max(unit, round(whole * share / unit) * unit)
    optim = {**(patch.optim.model_dump(exclude_unset=True) if patch.optim else {}), "steps": steps, "epochs": None}
    select = patch.select.model_dump(exclude_unset=True) if patch.select else {}
    select["every"] = max(1, round(method.select.every * steps / whole))
    return patch.model_copy(update={"optim": Optim.model_validate(optim), "select": Select.model_validate(select)})


def _method(recipe: Recipe, name: str) -> Method:
    return apply(recipe.method, recipe.models[name].distill)
