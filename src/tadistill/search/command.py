"""`tadistill search`: look for the best path of a recipe's lattice by training, round by round, with one store.

Each round of a strategy (`tadistill.search.strategies`) is a plan whose arms are the round's paths, of which only the stages that train are
run; paths that begin alike share them, between rounds, strategies and studies. A path's quality is the mean over training seeds of its
last stage's dev value at the selected checkpoint. The test sets are not looked at. Everything follows from the recipe and the store, so
the same command goes on where it stopped, and trains nothing when it is done.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path as File

from rich.console import Console

from tadistill.config import Arm, Method, Recipe
from tadistill.config.method import HIGHER_IS_BETTER, NOT_COMPARABLE, MethodPatch, Optim, Select, apply
from tadistill.errors import ConfigError
from tadistill.plan.arms import make_plan
from tadistill.plan.costs import Ledger
from tadistill.plan.graph import Stage, with_ancestors
from tadistill.runner.study import fetch_models
from tadistill.runner.workers import run_stages
from tadistill.search import (
    Lattice,
    Path,
    Round,
    Strategy,
    beam,
    best_prefix,
    count_paths,
    drive,
    exhaustive,
    halving,
    make_lattice,
    single,
)
from tadistill.search.choice import Choice, Tried, choice_notes, choice_table, path_name, with_parents, write_choice
from tadistill.store import Store

MOST_PATHS = 256


def search(recipe: Recipe, *, runs: File, console: Console) -> Choice:
    """Find a path, print what was tried, and write RUNS/STUDY/search.json and confirm.yaml.

    Raises:
        TadistillError: the recipe is wrong (before anything is trained), or a stage failed.
    """
    metric = check_search(recipe)
    fetch_models(recipe, console)
    check_order(recipe)
    flops = path_flops(recipe)
    lattice = affordable(recipe, flops)
    _check_chains(recipe, lattice, flops)
    training = _Training(recipe, lattice, Store(runs / "store"), console)
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    outcome = drive(_strategy(recipe, lattice), lambda asked: training.measure(asked, sign))
    teacher, *_, student = lattice.nodes
    tried = [Tried(path, flops[path], training.values(path)) for path in outcome.quality if path[-1] == student]
    used = training.used(outcome.path)
    choice = Choice(
        study=recipe.study,
        strategy=_strategy_of(recipe),
        metric=metric,
        sign=sign,
        tried=tuple(sorted(tried, key=lambda t: (t.path != outcome.path, -sign * t.mean))),
        rounds=tuple(training.rounds),
        direct=flops[(teacher, student)],
        trained=_total(training.stages.values()),
        discarded=_total(stage for key, stage in training.stages.items() if key not in used),
        distillations=sum(stage.kind == "distill" for stage in training.stages.values()),
    )
    confirm = write_choice(choice, recipe, runs / recipe.study)
    console.print(choice_table(choice))
    for note in choice_notes(choice, confirm, runs):
        console.print(note, highlight=False, soft_wrap=True)
    return choice


# --- what can be known before any work ----------------------------------------------------------------------------------


def check_search(recipe: Recipe) -> str:
    """The dev metric that paths are compared by.

    Raises:
        ConfigError: there is no search, it has too many paths, or its metric does not compare models of different teachers.
    """
    if recipe.search is None:
        raise ConfigError(
            f"{recipe.study} has no `search`; add search: {{teacher: xl, assistants: [l, m], student: s}} with models of the recipe"
        )
    names = (recipe.search.teacher, *recipe.search.assistants, recipe.search.student)
    for name in sorted(with_parents(recipe, names)):
        temper = recipe.models[name].temper
        if temper and temper.like is not None:
            raise ConfigError(f"search needs {name}, which is tempered like arm {temper.like}, but has no arms; give {name} a fixed tau")
    paths = count_paths(len(recipe.search.assistants), recipe.search.max_assistants)
    if paths > MOST_PATHS:
        raise ConfigError(
            f"{len(recipe.search.assistants)} assistants make {paths:,} paths, and {MOST_PATHS} may be looked at; "
            "lower search.max_assistants, or name fewer"
        )
    compared = names[1:] if recipe.search.strategy in ("best_prefix", "beam") else names[-1:]
    for name in compared:
        metric = _method(recipe, name).select.metric
        if metric in NOT_COMPARABLE:
            raise ConfigError(
                f"{name} is selected by {metric}, which {NOT_COMPARABLE[metric]}, so paths cannot be compared by it; "
                "set select.metric to loss, rouge_l or fact_accuracy"
            )
        student = _method(recipe, names[-1]).select.metric
        if metric != student:
            raise ConfigError(
                f"{name} is selected by {metric} and {names[-1]} by {student}, so what is found of one says nothing of the other; "
                "set the same select.metric for both"
            )
    return _method(recipe, names[-1]).select.metric


def check_order(recipe: Recipe) -> None:
    """Raise where teacher, assistants and student are not from big to small. Models of equal size may follow each other."""
    assert recipe.search is not None
    ledger = Ledger(recipe)
    for above, below in pairwise((recipe.search.teacher, *recipe.search.assistants, recipe.search.student)):
        big, small = ledger.size(above), ledger.size(below)
        if big and small and small.total > big.total:
            raise ConfigError(
                f"search goes from big to small, but {below} ({small.total:,} parameters) follows {above} ({big.total:,}); "
                "order teacher, assistants and student by size"
            )


def path_flops(recipe: Recipe) -> dict[Path, float | None]:
    """Training FLOPs behind the student of every path, for one seed; None where the size of a model is not known."""
    assert recipe.search is not None
    s = recipe.search
    paths = make_lattice(s.teacher, s.assistants, s.student, max_assistants=s.max_assistants).paths
    plan = make_plan(_round_recipe(recipe, paths).model_copy(update={"seeds": recipe.seeds[:1]}))
    return {path: arm.flops for path, arm in zip(paths, plan.arms, strict=True)}


def _check_chains(recipe: Recipe, lattice: Lattice, flops: dict[Path, float | None]) -> None:
    """Raise where the budget leaves nothing to look for."""
    if any(len(path) > 2 for path in lattice.paths):
        return
    assert recipe.search is not None
    costs = {path: cost for path, cost in flops.items() if cost is not None}
    nearest = min((path for path in costs if len(path) > 2), key=costs.__getitem__)
    multiple = costs[nearest] / costs[recipe.search.teacher, recipe.search.student]
    raise ConfigError(
        f"search.budget is {recipe.search.budget:g} × the FLOPs of the direct path, which leaves no path but that one: the cheapest chain, "
        f"{' > '.join(nearest)}, costs {multiple:.2f} × direct; raise the budget"
    )


def affordable(recipe: Recipe, flops: dict[Path, float | None]) -> Lattice:
    """The lattice of the paths that keep to the budget.

    Raises:
        ConfigError: none does, or costs are not known.
    """
    assert recipe.search is not None
    s = recipe.search
    direct = flops[(s.teacher, s.student)]
    costs = {path: cost / direct for path, cost in flops.items() if cost is not None and direct}
    if s.budget is not None and len(costs) < len(flops):
        raise ConfigError(
            f"search.budget is {s.budget:g}, but the size of a model is not known (only gpt2, opt, llama, mistral, qwen2, qwen3 are "
            "counted); leave out the budget"
        )
    if s.budget is None:
        return make_lattice(s.teacher, s.assistants, s.student, max_assistants=s.max_assistants)
    cheapest = min(costs, key=costs.__getitem__)
    lattice = make_lattice(s.teacher, s.assistants, s.student, max_assistants=s.max_assistants, cost=costs.__getitem__, budget=s.budget)
    if not lattice.paths or (s.strategy == "single" and all(len(path) > 3 for path in lattice.paths)):
        raise ConfigError(
            f"search.budget is {s.budget:g} × the FLOPs of the direct path, and no path is that cheap: the cheapest, "
            f"{' > '.join(cheapest)}, costs {costs[cheapest]:.2f} × direct; raise the budget"
        )
    return lattice


def _strategy_of(recipe: Recipe) -> str:
    assert recipe.search is not None
    return f"beam {recipe.search.width}" if recipe.search.strategy == "beam" else recipe.search.strategy


def _strategy(recipe: Recipe, lattice: Lattice) -> Strategy:
    assert recipe.search is not None
    match recipe.search.strategy:
        case "exhaustive":
            return exhaustive(lattice)
        case "single":
            return single(lattice)
        case "best_prefix":
            return best_prefix(lattice)
        case "beam":
            return beam(lattice, width=recipe.search.width)
        case "halving":
            return halving(lattice, rungs=recipe.search.rungs)


# --- training -----------------------------------------------------------------------------------------------------------


class _Training:
    """Trains what a round asks for, and remembers every stage that was needed."""

    def __init__(self, recipe: Recipe, lattice: Lattice, store: Store, console: Console):
        self.recipe, self.lattice, self.store, self.console = recipe, lattice, store, console
        self.stages: dict[str, Stage] = {}
        self.rounds: list[tuple[Round, dict[Path, float]]] = []
        self.finals: dict[Path, list[str]] = {}
        """Of whole runs: the last stage of every seed."""

    @cached_property
    def jobs(self) -> int:
        """Stages at the same time; asks for a check of all that could be trained before the first of it is."""
        from tadistill.runner.preflight import check  # imports transformers: not for a search that is all hits

        return check(_round_recipe(self.recipe, self.lattice.paths))

    def measure(self, asked: Round, sign: int) -> dict[Path, float]:
        """The quality of every path of a round, higher is better."""
        plan = make_plan(_round_recipe(self.recipe, asked.paths, asked.share))
        stages = {key: stage for key, stage in plan.stages.items() if stage.kind not in ("evaluate", "analyse")}
        missing = sum(not self.store.finished(key) for key in stages)
        share = "" if asked.share == 1 else f" at {asked.share:.0%} of their updates"
        count = f"{len(asked.paths)} path{'s' * (len(asked.paths) > 1)}{share}"
        text = f"round {len(self.rounds) + 1}: {count}, {len(stages)} stages, {missing} to run"
        self.console.print(text, highlight=False)
        if missing:
            run_stages(replace(plan, stages=stages), self.store, jobs=self.jobs, console=self.console)
        self.stages |= stages
        finals = {path: [k for k in arm.final.values() if k] for path, arm in zip(asked.paths, plan.arms, strict=True)}
        means = {path: sum(self._values(keys)) / len(keys) for path, keys in finals.items()}
        if asked.share == 1:
            self.finals |= finals
        self.rounds.append((asked, means))
        return {path: sign * mean for path, mean in means.items()}

    def values(self, path: Path) -> tuple[float, ...]:
        """The dev value of every seed."""
        return tuple(self._values(self.finals[path]))

    def used(self, path: Path) -> set[str]:
        """The stages that a path's models stand on."""
        return with_ancestors(self.stages, self.finals[path])

    def _values(self, keys: Sequence[str]) -> list[float]:
        return [float(self.store.manifest(key)["best_value"]) for key in keys]


def _round_recipe(recipe: Recipe, paths: Sequence[Path], share: float = 1.0) -> Recipe:
    """The recipe with these paths as its arms; with a share below 1 every distillation is that much shorter."""
    arms = {path_name(path): Arm(path=(path,)) for path in paths}
    found = recipe.model_copy(update={"arms": arms, "teacher": paths[0][0], "search": None})
    if share == 1:
        return found
    learners = dict.fromkeys(name for path in paths for name in path[1:])
    models = {
        name: model.model_copy(update={"distill": _shortened(recipe, name, share)})
        for name, model in recipe.models.items()
        if name in learners
    }
    return found.model_copy(update={"models": recipe.models | models})


def _shortened(recipe: Recipe, name: str, share: float) -> MethodPatch:
    """What a model changes of the method, with fewer updates and as many looks at dev as in the whole run."""
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
    """How a model is distilled."""
    return apply(recipe.method, recipe.models[name].distill)


def _total(stages: Iterable[Stage]) -> float | None:
    flops = [stage.flops for stage in stages]
    return None if any(f is None for f in flops) else math.fsum(f for f in flops if f is not None)
