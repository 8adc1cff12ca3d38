"""What to run now and next, as commands of `tadistill run` on the same recipe: arms are added, so finished stages are reused."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tadistill.advise import Advice
from tadistill.advise.probes import PathCost, twin_name
from tadistill.config import Recipe
from tadistill.search import path_name


@dataclass(frozen=True)
class Step:
    """Something to run, in words and as a command."""

    text: str
    command: str
    cost: float
    """In direct runs of one seed."""
    gain: float | None
    """Expected fall of the decision's regret, in the metric's unit; None for what is done anyway."""


def steps(
    recipe: Recipe, source: str, overrides: Sequence[str], advice: Advice, costs: Mapping[tuple[str, ...], PathCost]
) -> tuple[Step, ...]:
    """What to do now, then the experiments that would tell most for their compute.

    Args:
        source: the recipe's path; `overrides`: what the call changed of it.
    """

    def command(arms: list[str], seeds: int) -> str:
        return shlex.join(["tadistill", "run", source, *overrides, *arms, f"seeds={list(_seeds(recipe, seeds))}".replace(" ", "")])

    seeds, found = len(recipe.seeds), []
    chains = [path for path in costs if len(path) > 2]
    if advice.verdict == "chain":
        text = f"now: {_shown(advice.path)}, and beside it direct at equal compute, which it has to beat on the test sets"
        found.append(Step(text, command(_chain(recipe, advice.path), seeds), 2 * costs[advice.path].multiple * seeds, None))
    elif chains:
        wanted = advice.next[0].path if advice.next else chains[0]
        multiple = costs[wanted].multiple
        text = f"now: direct with the compute that {_shown(wanted)} would take ({multiple:.2f} times the recipe's direct run)"
        found.append(Step(text, command(_longer(recipe, wanted, costs[wanted]), seeds), multiple * seeds, None))
    for e in advice.next:
        text = f"to know more: {_shown(e.path)} beside direct at equal compute, {e.seeds} seeds"
        found.append(Step(text, command(_chain(recipe, e.path), e.seeds), e.cost, e.gain))
    return tuple(found)


def _shown(path: Sequence[str]) -> str:
    return " > ".join(path)


def _chain(recipe: Recipe, path: tuple[str, ...]) -> list[str]:
    """Overrides that add a chain, its twin and, where the recipe has none, the direct arm that costs are multiples of."""
    chain, twin = _key(path_name(path)), _key(twin_name(path))
    ends = f"{path[0]} > {path[-1]}"
    return [*_direct(recipe, path), f"{chain}.path={_shown(path)}", f"{twin}.path={ends}", f"{twin}.compute=as {path_name(path)}"]


def _longer(recipe: Recipe, path: tuple[str, ...], cost: PathCost) -> list[str]:
    """Overrides that add a chain's twin without the chain; its stages are those that `compute: as` would give it."""
    if cost.twin is None:
        return _direct(recipe, path)
    twin, (updates, every) = _key(twin_name(path)), cost.twin
    more = [f"{twin}.path={path[0]} > {path[-1]}", f"{twin}.optim.steps={updates}", f"{twin}.select.every={every}"]
    return [*_direct(recipe, path), *more]


def _direct(recipe: Recipe, path: tuple[str, ...]) -> list[str]:
    ends = (path[0], path[-1])
    changed = ("objective", "sampler", "optim", "select", "dense", "compute")
    plain = any(a.path == (ends,) and not a.init and not any(getattr(a, name) for name in changed) for a in recipe.arms.values())
    return [] if plain else [f"{_key(path_name(ends))}.path={_shown(ends)}"]


def _key(arm: str) -> str:
    return f"arms[{arm}]" if "." in arm else f"arms.{arm}"


def _seeds(recipe: Recipe, count: int) -> tuple[int, ...]:
    """The recipe's first seeds, and after them new ones."""
    more = range(max(recipe.seeds) + 1, max(recipe.seeds) + 1 + max(0, count - len(recipe.seeds)))
    return (*recipe.seeds[:count], *more)
