"""The lattice of a recipe, what each path through it costs, and the probe stages that measure its models on dev prompts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tadistill.advise.measures import Measures, measure
from tadistill.config import Arm, Recipe
from tadistill.data import datasets
from tadistill.errors import ConfigError, StoreError
from tadistill.paths import count_paths, make_lattice
from tadistill.study.costs import Ledger
from tadistill.study.plan import Plan, ProbePlan, make_plan, original_teacher, plan_probes
from tadistill.study.store import Store

TOP_K = 16
MOST_PATHS = 128


@dataclass(frozen=True)
class Ladder:
    """Models from big to small, the teacher first and the student last, and the paths that may be tried, direct first."""

    sizes: Mapping[str, int]
    paths: tuple[tuple[str, ...], ...]
    inferred: bool
    """Read from the arms, because the recipe has no `search`."""

    @property
    def teacher(self) -> str:
        return next(iter(self.sizes))

    @property
    def student(self) -> str:
        return list(self.sizes)[-1]

    @property
    def assistants(self) -> tuple[str, ...]:
        return tuple(self.sizes)[1:-1]


@dataclass(frozen=True)
class PathCost:
    """Training FLOPs behind a path's student, one seed, and the same as a multiple of the direct path's."""

    flops: float
    multiple: float
    twin: tuple[int, int] | None
    """Updates with which the direct path costs as much, and between its dev evaluations; None for direct itself."""


def ladder(recipe: Recipe) -> Ladder:
    """The models and paths of `recipe.search`, or of the arms: original teacher, the students' end, and what lies between in size.

    Raises:
        ConfigError: models are out of size order, a size is not known, or there is nothing to choose among.
    """
    search = recipe.search
    if search:
        names, most = [search.teacher, *search.assistants, search.student], search.max_assistants
        sizes = _sizes(recipe, names)
        for above, name in pairwise(names):
            if sizes[name] > sizes[above]:
                raise ConfigError(
                    f"search goes from big to small, but {name} has {sizes[name]:,} parameters and {above} before it {sizes[above]:,}; "
                    "order teacher, assistants and student by size"
                )
    else:
        teacher, student = _ends(recipe)
        sizes, most = _sizes(recipe, list(recipe.models)), None
        if sizes[student] > sizes[teacher]:
            raise ConfigError(f"student {student} has more parameters than its teacher {teacher}; a path goes from big to small")
        between = [n for n in recipe.models if n not in (teacher, student) and sizes[student] < sizes[n] < sizes[teacher]]
        names = [teacher, *sorted(between, key=lambda n: -sizes[n]), student]
        if len(names) == 2:
            raise ConfigError(
                f"no model of the recipe lies between {teacher} and {student} in size, so there is nothing to choose; add one"
            )
    if (count := count_paths(len(names) - 2, most)) > MOST_PATHS:
        raise ConfigError(f"{len(names) - 2} assistants make {count} paths, more than {MOST_PATHS}; set search.max_assistants: 1 or 2")
    found = make_lattice(names[0], names[1:-1], names[-1], max_assistants=most)
    return Ladder({n: sizes[n] for n in names}, found.paths, search is None)


def _ends(recipe: Recipe) -> tuple[str, str]:
    teacher = original_teacher(recipe)
    paths = [path for arm in recipe.arms.values() for path in arm.path if len(path) > 1]
    teaching = {model for path in paths for model in path[:-1]}
    students = list(dict.fromkeys(path[-1] for path in paths if path[-1] not in teaching))
    if teacher is None or len(students) != 1:
        what = f"students {', '.join(students)}" if students else "no path"
        raise ConfigError(f"the arms have {what}, and advice is for one; write search: {{teacher: …, assistants: […], student: …}}")
    return teacher, students[0]


def _sizes(recipe: Recipe, names: Sequence[str]) -> dict[str, int]:
    ledger = Ledger(recipe)
    found = {name: ledger.size(name) for name in names}
    unknown = [name for name, size in found.items() if size is None]
    if unknown:
        raise ConfigError(
            f"the size of {', '.join(unknown)} is not known (gpt2, opt, llama, mistral, qwen2, qwen3 are counted), so paths have no cost"
        )
    return {name: size.total for name, size in found.items() if size}


def costs(recipe: Recipe, found: Ladder) -> tuple[Recipe, dict[tuple[str, ...], PathCost]]:
    """What the paths within the budget cost by the study's ledger, and a recipe whose arms are these paths, chains with their twins.

    Raises:
        ConfigError: the budget is too small for any path.
    """
    liked = [model.temper.like for model in recipe.models.values() if model.temper and model.temper.like]
    others = {name: recipe.arms[name] for name in liked}  # a tempered model needs the arm whose entropy it has
    plain = {arm_name(path): Arm(path=(path,)) for path in found.paths}
    planned = {arm.name: arm.flops for arm in make_plan(_with_arms(recipe, found, others | plain)).arms}
    flops = {path: planned[arm_name(path)] for path in found.paths}
    direct = found.paths[0]
    assert all(flops.values()), "ladder() refuses models of unknown size"
    multiples = {path: float(cost or 0) / float(flops[direct] or 1) for path, cost in flops.items()}
    budget = recipe.search.budget if recipe.search and recipe.search.budget else float("inf")
    kept = [path for path in found.paths if multiples[path] <= budget]
    if not kept:
        cheapest = min(multiples, key=lambda path: multiples[path])
        raise ConfigError(
            f"search.budget is {budget:g}, but the cheapest path, {' > '.join(cheapest)}, costs {multiples[cheapest]:.2f} times direct; "
            "raise the budget"
        )
    arms = {arm_name(path): Arm(path=(path,)) for path in kept}
    arms |= {twin_name(path): Arm(path=(direct,), compute=f"as {arm_name(path)}") for path in kept if path != direct}
    limited = _with_arms(recipe, found, others | arms)
    steps = _twins(make_plan(limited))
    return limited, {path: PathCost(float(flops[path] or 0), multiples[path], steps.get(path)) for path in kept}


def _with_arms(recipe: Recipe, found: Ladder, arms: dict[str, Arm]) -> Recipe:
    return recipe.model_copy(update={"arms": arms, "teacher": found.teacher})


def arm_name(path: Sequence[str]) -> str:
    """The name of a path's arm."""
    return "-".join(path)


def twin_name(path: Sequence[str]) -> str:
    """The name of the arm that trains directly with a path's compute."""
    return f"{arm_name(path)}-twin"


def _twins(plan: Plan) -> dict[tuple[str, ...], tuple[int, int]]:
    paths = {arm.name: arm.arm.last for arm in plan.arms}
    twins = [(arm.arm.compute[3:], arm.method) for arm in plan.arms if arm.arm.compute]
    return {paths[of]: (method.optim.steps or 0, method.select.every) for of, method in twins}


def probe_plan(recipe: Recipe, found: Ladder, prompts: int) -> ProbePlan:
    """The stages that measure the lattice on the first dev prompts (all of them where dev has fewer).

    Raises:
        ConfigError: `prompts` is below 2. DataError: there are no dev prompts.
    """
    if prompts < 2:
        raise ConfigError(f"--prompts is {prompts}; a standard error needs at least 2")
    rows = len(datasets.load(recipe.data.dev, "dev", recipe.data))
    return plan_probes(recipe, list(found.sizes), prompts=min(prompts, rows), k=TOP_K)


def read_measures(probes: ProbePlan, store: Store, found: Ladder) -> Measures:
    """What the finished stages of a probe plan say.

    Raises:
        StoreError: a stage is missing or damaged.
    """
    alone = {name: _scores(store, key) for name, key in probes.alone.items()}
    return measure(found.sizes, alone, {names: _scores(store, key) for names, key in probes.beside.items()})


def _scores(store: Store, key: str) -> dict[str, Any]:
    path = store.folder(key) / "scores.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}); delete its folder and run the command again") from error
