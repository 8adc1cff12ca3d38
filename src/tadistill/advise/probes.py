"""The ladder of models that a recipe's paths run through, what each path costs, and the probe stages that measure models on dev prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tadistill.advise.measures import Measures, measure
from tadistill.config import Arm, Recipe
from tadistill.config.arm import Search
from tadistill.data import datasets
from tadistill.disk import read_json
from tadistill.errors import ConfigError
from tadistill.plan.arms import Plan, ProbePlan, make_plan, original_teacher, plan_probes
from tadistill.plan.costs import Ledger
from tadistill.search import ModelPath, path_name
from tadistill.search.command import affordable, check_lattice, check_order, path_arms, path_flops
from tadistill.store import Store

TOP_K = 16


@dataclass(frozen=True)
class Ladder:
    """Models from big to small with their parameters, the teacher first and the student last."""

    sizes: Mapping[str, int]

    @property
    def teacher(self) -> str:
        """The original teacher."""
        return next(iter(self.sizes))

    @property
    def student(self) -> str:
        """The model that paths end with."""
        return list(self.sizes)[-1]

    @property
    def assistants(self) -> tuple[str, ...]:
        """What lies between."""
        return tuple(self.sizes)[1:-1]


@dataclass(frozen=True)
class PathCost:
    """Training FLOPs behind a path's student, one seed, and the same as a multiple of the direct path's."""

    flops: float
    multiple: float
    twin: tuple[int, int] | None
    """Updates with which the direct path costs as much, and between its dev evaluations; None for direct itself."""


def with_search(recipe: Recipe) -> Recipe:
    """The recipe with a `search`: its own, or from the original teacher to the arms' one student through all models between in size.

    Raises:
        ConfigError: there is nothing to choose among, or models are out of size order.
    """
    if recipe.search is None:
        teacher, student = _ends(recipe)
        sizes = _sizes(recipe, list(recipe.models))
        between = [n for n in recipe.models if n not in (teacher, student) and sizes[student] < sizes[n] < sizes[teacher]]
        if not between:
            raise ConfigError(
                f"no model is between {teacher} ({sizes[teacher]:,} parameters) and {student} ({sizes[student]:,}) in size, "
                "so there is nothing to choose; add one, or write search: {teacher: …, assistants: […], student: …}"
            )
        found = Search(teacher=teacher, assistants=tuple(sorted(between, key=lambda n: -sizes[n])), student=student)
        recipe = recipe.model_copy(update={"search": found})
    search = recipe.search
    assert search is not None
    check_lattice(recipe, search)
    check_order(recipe, search)
    return recipe


def ladder(recipe: Recipe) -> Ladder:
    """The models of `recipe.search` with their sizes.

    Raises:
        ConfigError: a size is not known.
    """
    search = recipe.search
    assert search is not None
    return Ladder(_sizes(recipe, (search.teacher, *search.assistants, search.student)))


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


def costs(recipe: Recipe) -> tuple[Recipe, dict[ModelPath, PathCost]]:
    """A recipe whose arms are the paths within the budget, chains with their equal-compute twins, and what these cost by the ledger.

    Raises:
        ConfigError: the budget is too small for any path.
    """
    search = recipe.search
    assert search is not None
    direct = (search.teacher, search.student)
    flops = path_flops(recipe, search)
    kept = affordable(search, flops).paths
    arms = path_arms(kept) | {twin_name(path): Arm(path=(direct,), compute=f"as {path_name(path)}") for path in kept if path != direct}
    limited = recipe.model_copy(update={"arms": arms, "teacher": search.teacher})
    twins, base = _twins(make_plan(limited)), flops[direct]
    assert base, "ladder() refuses models of unknown size"
    return limited, {path: PathCost(float(flops[path] or 0), float(flops[path] or 0) / base, twins.get(path)) for path in kept}


def twin_name(path: ModelPath) -> str:
    """The name of the arm that trains directly with a path's compute."""
    return f"{path_name(path)}-twin"


def _twins(plan: Plan) -> dict[ModelPath, tuple[int, int]]:
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
    return read_json(store.folder(key) / "scores.json", fix="delete its directory and run the command again")
