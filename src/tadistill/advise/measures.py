"""Measures of teachers and learners on dev prompts, the sizes and costs of a recipe's models and paths, and the arguments that add paths.

Each measure is a mean over dev prompts with its standard error. In shapes, N is the number of prompts.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tadistill.advise.history import EdgeMeasures, load_measures
from tadistill.config import Arm, Recipe
from tadistill.config.added_arms import budget_of
from tadistill.config.arm import ModelPath, path_text
from tadistill.config.method import PARTS
from tadistill.config.recipe import Search
from tadistill.data import datasets
from tadistill.disk import read_json
from tadistill.errors import ConfigError, StoreError
from tadistill.models.shapes import COUNTED
from tadistill.plan.arms import Plan, ProbePlan, make_plan, plan_probes
from tadistill.plan.costs import Ledger
from tadistill.plan.paths import original_teacher
from tadistill.search.command import affordable, check_lattice, check_order, path_arms, path_flops
from tadistill.search.strategies import path_name
from tadistill.store import Store

Array = NDArray[np.float64]
TOP_K = 16


@dataclass(frozen=True)
class Mean:
    """A mean over n prompts and its standard error `se`. `se` is None if there is only one prompt."""

    mean: float
    se: float | None
    n: int


@dataclass(frozen=True)
class Model:
    """Measures of one model on dev prompts."""

    name: str
    parameters: int
    loss: Mean
    """Negative log-likelihood of the reference answers, in nats per token."""
    rouge_l: Mean
    """ROUGE-L of the model's own sampled answers, 0 to 100."""
    entropy: Mean
    """Entropy of the model on its own answers, in nats per token."""


@dataclass(frozen=True)
class Pair:
    """Measures of two models before any distillation, as in `EdgeMeasures`. p is the bigger model, a possible teacher. q is the smaller
    one, the learner."""

    teacher: str
    learner: str
    size_ratio: float
    reverse_kl: Mean
    """KL(q ‖ p). It is the loss at the start of on-policy distillation."""
    forward_kl: Mean
    overlap: Mean
    mass: Mean
    entropy_gap: Mean
    loss_ratio: Mean
    advantage: Mean
    bias: Mean
    """Mean of log p - log p_T, where p_T is the original teacher. So the bias is 0 if p is p_T."""


@dataclass(frozen=True)
class Measures:
    """Measures of all models, from big to small, and of all pairs (bigger, smaller)."""

    models: tuple[Model, ...]
    pairs: Mapping[tuple[str, str], Pair]


def estimate(values: ArrayLike) -> Mean:
    """Return the mean of one value per prompt (N,), with its standard error."""
    found = np.asarray(values, float)
    se = float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else None
    return Mean(float(found.mean()), se, len(found))


def ratio(above: ArrayLike, below: ArrayLike) -> Mean:
    """Return mean(above) / mean(below) of two arrays (N,), with its standard error (delta method). It is infinite if mean(below) is 0."""
    a, b = np.asarray(above, float), np.asarray(below, float)
    if b.mean() == 0:
        return Mean(float("inf"), None, len(a))
    value = a.mean() / b.mean()
    return Mean(float(value), estimate((a - value * b) / b.mean()).se, len(a))


def measure(
    sizes: Mapping[str, int],
    alone: Mapping[str, Mapping[str, Sequence[float]]],
    beside: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
) -> Measures:
    """Estimate all measures from scores per prompt.

    Args:
        sizes: the number of parameters of each model, from big to small. The first model is the original teacher.
        alone: for each model and score (loss, rouge_l, entropy), one value per prompt.
        beside: for each (bigger model, smaller model) and score (reverse_kl, forward_kl, overlap, mass, entropy_gap), one value per prompt.
    """
    root = next(iter(sizes))
    models = tuple(
        Model(name, size, **{m: estimate(alone[name][m]) for m in ("loss", "rouge_l", "entropy")}) for name, size in sizes.items()
    )
    pairs: dict[tuple[str, str], Pair] = {}
    for (teacher, learner), scores in beside.items():
        of_teacher, of_learner = (np.asarray(alone[name]["loss"], float) for name in (teacher, learner))
        # at every token, KL(q ‖ p_T) - KL(q ‖ p) equals the expectation of log p - log p_T under q
        to_root = np.asarray(beside[root, learner]["reverse_kl"], float)
        pairs[teacher, learner] = Pair(
            teacher,
            learner,
            sizes[teacher] / sizes[learner],
            **{name: estimate(scores[name]) for name in ("reverse_kl", "forward_kl", "overlap", "mass", "entropy_gap")},
            loss_ratio=ratio(of_teacher, of_learner),
            advantage=estimate(of_learner - of_teacher),
            bias=estimate(to_root - np.asarray(scores["reverse_kl"], float)),
        )
    return Measures(models, pairs)


def edge_measures(measures: Measures) -> dict[tuple[str, str], EdgeMeasures]:
    """Return the mean of each measure for each pair (teacher, learner). A loss ratio becomes None if it is infinite or not above 0."""
    found: dict[tuple[str, str], EdgeMeasures] = {}
    for names, pair in measures.pairs.items():
        means = {field.name: getattr(pair, field.name).mean for field in fields(EdgeMeasures) if field.name != "size_ratio"}
        if not 0 < means["loss_ratio"] < float("inf"):
            means["loss_ratio"] = None
        found[names] = EdgeMeasures(size_ratio=pair.size_ratio, **means)
    return found


def with_earlier(study: Path, known: Mapping[tuple[str, str], EdgeMeasures]) -> dict[tuple[str, str], EdgeMeasures]:
    """Return the given measures of pairs, and those of other pairs from the study's last advice: chains of earlier plans may have them."""
    with suppress(StoreError):  # a damaged file is written again
        return load_measures(study) | dict(known)
    return dict(known)


# --- the models and paths of a recipe, and the stages that measure them --------------------------------------------------


@dataclass(frozen=True)
class Ladder:
    """The models of a search with their numbers of parameters, from big to small. The teacher comes first, the student last."""

    sizes: Mapping[str, int]

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
    """Training FLOPs of a path for one seed, and these FLOPs divided by the FLOPs of the direct path."""

    flops: float
    multiple: float
    twin: tuple[int, int] | None
    """Direct distillation of equal compute, as (number of updates, updates between two dev evaluations). None for the direct path."""


def with_search(recipe: Recipe) -> Recipe:
    """Return a recipe whose section `search` names a teacher, assistants and a student. An existing section is kept.

    A new section has the original teacher and the student. The assistants are all models whose size is between theirs.

    Raises:
        ConfigError: no model can be an assistant, there are too many paths, or models are not in order of size.
    """
    if recipe.search is None:
        teacher, student = _ends(recipe)
        sizes = _sizes(recipe, list(recipe.models))
        between = [n for n in recipe.models if n not in (teacher, student) and sizes[student] < sizes[n] < sizes[teacher]]
        if not between:
            raise ConfigError(
                f"no model has a size between teacher {teacher} ({sizes[teacher]:,} parameters) and student {student} "
                f"({sizes[student]:,}); add such a model, or add search: {{teacher: …, assistants: […], student: …}}"
            )
        found = Search(teacher=teacher, assistants=tuple(sorted(between, key=lambda n: -sizes[n])), student=student)
        recipe = recipe.model_copy(update={"search": found})
    search = recipe.search
    assert search is not None
    check_lattice(recipe, search)
    check_order(recipe, search)
    return recipe


def ladder(recipe: Recipe) -> Ladder:
    """Return the models of `recipe.search` with their sizes. Raises ConfigError if a size is not known."""
    search = recipe.search
    assert search is not None
    return Ladder(_sizes(recipe, search.models))


def _ends(recipe: Recipe) -> tuple[str, str]:
    teacher = original_teacher(recipe)
    paths = [path for arm in recipe.arms.values() for path in arm.path if len(path) > 1]
    teaching = {model for path in paths for model in path[:-1]}
    students = list(dict.fromkeys(path[-1] for path in paths if path[-1] not in teaching))
    if teacher is None or len(students) != 1:
        what = f"students {', '.join(students)}" if students else "no path"
        raise ConfigError(
            f"the arms have {what}, but advice needs exactly one student; add search: {{teacher: …, assistants: […], student: …}}"
        )
    return teacher, students[0]


def _sizes(recipe: Recipe, names: Sequence[str]) -> dict[str, int]:
    ledger = Ledger(recipe)
    found = {name: ledger.size(name) for name in names}
    unknown = [name for name, size in found.items() if size is None]
    if unknown:
        raise ConfigError(
            f"the size of {', '.join(unknown)} is not known, so the cost of a path cannot be computed; use models of the "
            f"families {', '.join(COUNTED)}"
        )
    return {name: size.total for name, size in found.items() if size}


def costs(recipe: Recipe) -> tuple[Plan, dict[ModelPath, PathCost]]:
    """Plan a copy of the recipe with arms for all paths. Return this plan and the cost of each path.

    The copy has an arm for each path within `search.budget`. For each path with assistants, it also has an arm of direct distillation with
    the same compute.

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
    plan, base = make_plan(limited), flops[direct]
    assert base, "ladder() refuses models of unknown size"
    paths, twins = {arm.name: arm.arm.last for arm in plan.arms}, dict[ModelPath, tuple[int, int]]()
    for arm in plan.arms:
        if arm.arm.like:
            methods = [phase.method for phase in arm.phases]
            twins[paths[arm.arm.like.arm]] = sum(method.optim.steps or 0 for method in methods), methods[-1].select.every
    return plan, {path: PathCost(float(flops[path] or 0), float(flops[path] or 0) / base, twins.get(path)) for path in kept}


def twin_name(path: ModelPath) -> str:
    """Return the name of a path's equal-compute baseline (direct distillation with the same compute)."""
    return f"{path_name(path)}-twin"


def probe_plan(recipe: Recipe, found: Ladder, prompts: int) -> ProbePlan:
    """Plan the measurements of models and pairs of models on the first `prompts` dev prompts.

    Raises:
        ConfigError: `prompts` is below 2.
        DataError: there are no dev prompts.
    """
    if prompts < 2:
        raise ConfigError(f"--prompts is {prompts}, but a standard error needs at least 2 prompts; raise --prompts")
    data = recipe.data
    shares = data.shares if isinstance(data.dev, dict) else {data.dev.name: 1.0}
    rows = min(int(len(datasets.load(ref, "dev", data)) / shares[name]) for name, ref in data.dev_sets().items())
    return plan_probes(recipe, list(found.sizes), prompts=min(prompts, rows), k=TOP_K)


def read_measures(probes: ProbePlan, store: Store, found: Ladder) -> Measures:
    """Read the stored scores and estimate all measures. Raises StoreError if a file is missing or damaged."""
    alone = {name: _scores(store, key) for name, key in probes.alone.items()}
    return measure(found.sizes, alone, {names: _scores(store, key) for names, key in probes.beside.items()})


def _scores(store: Store, key: str) -> dict[str, Any]:
    return read_json(store.folder(key) / "scores.json", fix="delete its directory and run the command again")


# --- the arguments of commands that add paths to a recipe ----------------------------------------------------------------


def with_seeds(recipe: Recipe, arms: list[str], seeds: int) -> list[str]:
    """Return all KEY=VALUE arguments with which a recipe trains some arms with a number of seeds. `arms` are those that add the arms."""
    first = max(recipe.seeds) + 1
    chosen = [*recipe.seeds[:seeds], *range(first, first + seeds - len(recipe.seeds))]
    return [*arms, *_unbudgeted(recipe, arms), f"seeds={chosen}".replace(" ", "")]


def _unbudgeted(recipe: Recipe, arms: list[str]) -> list[str]:
    if recipe.budgets is None:
        return []
    made = {name: of.arm for name, arm in recipe.arms.items() if (of := budget_of(name, arm.compute))}
    named = {*(model.temper.like for model in recipe.models.values() if model.temper)}
    named |= {other for arm in recipe.arms.values() for other in arm.budgets.values()}
    if not named & made.keys():
        return ["budgets=null"]
    own = {setting.split(".path=")[0].removeprefix("arms.").removeprefix("arms[").removesuffix("]") for setting in arms}
    kept = [name for name in dict.fromkeys(made.values()) if name not in own]  # other arms need their budgets
    return [f"budgets={json.dumps(recipe.budgets.model_dump(exclude_none=True) | {'arms': kept})}"]


def chain_settings(recipe: Recipe, path: ModelPath) -> list[str]:
    """Return the KEY=VALUE arguments that add a path and direct distillation of equal compute to a recipe."""
    chain, twin = _key(path_name(path)), _key(twin_name(path))
    ends = f"{path[0]} > {path[-1]}"
    return [*_direct(recipe, path), f"{chain}.path={path_text(path)}", f"{twin}.path={ends}", f"{twin}.compute=as {path_name(path)}"]


def direct_settings(recipe: Recipe, path: ModelPath, cost: PathCost) -> list[str]:
    """Return the KEY=VALUE arguments that add direct distillation with the compute of a path to a recipe."""
    if cost.twin is None:
        return _direct(recipe, path)
    twin, (updates, every) = _key(twin_name(path)), cost.twin
    more = [f"{twin}.path={path[0]} > {path[-1]}", f"{twin}.optim.steps={updates}", f"{twin}.select.every={every}"]
    return [*_direct(recipe, path), *more]


def _direct(recipe: Recipe, path: ModelPath) -> list[str]:
    ends = (path[0], path[-1])
    changed = (*PARTS, "phases", "compute", "control")
    plain = any(a.path == (ends,) and not a.init and not any(getattr(a, name) for name in changed) for a in recipe.arms.values())
    return [] if plain else [f"{_key(path_name(ends))}.path={path_text(ends)}"]


def _key(arm: str) -> str:
    return f"arms[{arm}]" if "." in arm else f"arms.{arm}"
