"""The result of a search for a path: a table, search.json, and a recipe that tests the chosen path again (confirm.yaml)."""

import functools
import math
import operator
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.markup import escape
from rich.table import Table

from tadistill.config import Recipe
from tadistill.config.arm import ModelPath, path_text
from tadistill.config.common import LONGEST_NAME
from tadistill.config.recipe_files import data_sets
from tadistill.data import tinyworld
from tadistill.data.hub import NAMED
from tadistill.disk import write_json, write_text
from tadistill.plan.paths import with_parents
from tadistill.plan.task import split_entry
from tadistill.runner.local import SEARCH
from tadistill.search.strategies import Round, path_name
from tadistill.statistics import expected_best_of, undominated
from tadistill.text import counted

_SEEDS = 3
"""Minimum number of training seeds in confirm.yaml."""
_SUFFIX = "-confirm"


@dataclass(frozen=True)
class Tried:
    """A path from teacher to student that was trained in full."""

    path: ModelPath
    flops: float | None
    """Training FLOPs of the path for one seed. All stages that the student needs are included."""
    values: tuple[float, ...]
    """The student's dev metric. There is one value for each seed."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


@dataclass(frozen=True)
class Choice:
    """The result of a finished search."""

    study: str
    strategy: str
    metric: str
    sign: int
    """1 if a higher value of the metric is better, else -1."""
    tried: tuple[Tried, ...]
    """All paths that were trained in full, best first. The first path is the chosen one."""
    rounds: tuple[tuple[Round, dict[ModelPath, float]], ...]
    """The rounds of the search. Each has the dev value of the last model of each path, averaged over seeds."""
    direct: float | None
    """Training FLOPs of direct distillation, for one seed."""
    trained: float | None
    """Training FLOPs of the whole search, over all seeds. Fine-tuning of the models is included."""
    discarded: float | None
    """The part of `trained` that the chosen path does not need."""
    distillations: int
    """Number of distillations that the search needed, over all seeds."""
    stages: tuple[str, ...] = ()
    """Keys of all stages of the search. `tadistill clean` does not delete them."""

    @property
    def path(self) -> ModelPath:
        return self.tried[0].path

    @property
    def compared(self) -> int:
        """Number of paths to the student that were compared. Paths that the strategy `halving` dropped are included."""
        return len({path for asked, _ in self.rounds for path in asked.paths if path[-1] == self.path[-1]})

    def cost(self, tried: Tried) -> float | None:
        """Return the FLOPs of a path divided by the FLOPs of the direct path (teacher to student without assistants)."""
        return None if tried.flops is None or self.direct is None else tried.flops / self.direct

    def front(self) -> list[Tried]:
        """Return the Pareto front: the paths for which no other path is at least as good in both cost and quality.

        If several paths are equal in both, one of them is returned.
        """
        return undominated(self.tried, lambda t: (t.flops or 0.0, -self.sign * t.mean))

    def inflation(self) -> float | None:
        """Return the bias of the best value: chance alone makes the best of the compared paths look better. The unit is that of the metric.

        It is an upper bound, because paths that share stages have correlated values. Return None if there is one seed.
        """
        seeds = len(self.tried[0].values)
        if seeds < 2:
            return None
        spread = np.mean([np.var(t.values, ddof=1) for t in self.tried])
        return expected_best_of(self.compared) * float(np.sqrt(spread / seeds))


def write_choice(choice: Choice, recipe: Recipe, directory: Path) -> Path | None:
    """Write search.json. If a path with assistants won, also write confirm.yaml and return its path.

    confirm.yaml is a recipe that compares this path with direct distillation on new seeds.
    """
    write_json(directory / SEARCH, _record(choice))
    confirm = directory / "confirm.yaml"
    if len(choice.path) == 2:
        confirm.unlink(missing_ok=True)  # an earlier search may have left a confirm.yaml
        return None
    write_text(confirm, _confirmation(choice, recipe, directory))
    return confirm


def choice_table(choice: Choice) -> Table:
    """Return the table of the paths that were tried. The best comes first."""
    table = Table(
        title=f"{choice.study}: {choice.strategy}, the best of {counted(choice.compared, 'path')}", title_justify="left", box=None
    )
    several = len(choice.tried[0].values) > 1
    for column in ("path", "trainings", "× direct", f"dev {choice.metric}", *["range over seeds"] * several, "front", ""):
        table.add_column(column, justify="left" if column in ("path", "front", "") else "right")
    front, largest = choice.front(), max(abs(t.mean) for t in choice.tried)
    digits = max(0, 3 - math.floor(math.log10(largest))) if largest else 0  # four digits of the largest, so that the others align with it
    for i, tried in enumerate(choice.tried):
        cost = choice.cost(tried)
        seeds = [f"{min(tried.values):.4g} … {max(tried.values):.4g}"] * several
        marks = ("yes" if tried in front else "", "[bold green]chosen[/]" if i == 0 else "")
        numbers = (str(len(tried.path) - 1), "?" if cost is None else f"{cost:.2f}", f"{tried.mean:.{digits}f}", *seeds)
        table.add_row(escape(path_text(tried.path)), *numbers, *marks)
    return table


def choice_notes(choice: Choice, confirm: Path | None, runs: Path) -> list[str]:
    """Return sentences on the cost of the search, on how reliable its best value is, and on the next command."""
    seeds = len(choice.tried[0].values)
    count = counted(choice.distillations, "distillation")
    over = counted(seeds, "seed")
    notes = [f"The search needed {count} over {over}. Its FLOPs (C_search) are unknown, because the size of a model is unknown."]
    if choice.trained is not None and choice.discarded is not None and choice.direct is not None:
        notes = [
            f"The search cost (C_search) is {choice.trained:.3g} FLOPs over {over}, or {choice.trained / (seeds * choice.direct):.2f} "
            f"× the direct path. It pays for {count} and the stages that they depend on; "
            f"{choice.discarded:.3g} of these FLOPs were for stages that the chosen path does not use."
        ]
    if len(equal := [t for t in choice.tried if t.mean == choice.tried[0].mean]) > 1:
        paths = ", ".join(path_text(t.path) for t in equal)
        notes.append(
            f"{len(equal)} paths have the same dev value: {paths}. The path with fewer models is chosen, or else the one with bigger "
            "assistants."
        )
    k, chance = choice.compared, choice.inflation()
    if k > 1:
        unit = "" if chance is None else f", here up to {chance:.2g}"
        notes.append(
            f"The dev value of the chosen path is too optimistic, because it is the best of {k}: if all paths were equally good, by "
            f"{expected_best_of(k):.2f} standard errors{unit}."
        )
    if confirm is None:
        return [*notes, "The direct path is the best on dev, so there is no path with assistants to confirm."]
    command = shlex.join(["tadistill", "run", str(confirm), "--runs", str(runs)])
    return [*notes, f"Compare the chosen path with direct training of equal compute on new seeds: {command}"]


def _record(choice: Choice) -> dict[str, Any]:
    front = choice.front()
    return {
        "study": choice.study,
        "strategy": choice.strategy,
        "metric": choice.metric,
        "higher_is_better": choice.sign > 0,
        "chosen": list(choice.path),
        "paths": [
            {"path": list(t.path), "flops": t.flops, "cost": choice.cost(t), "values": list(t.values), "mean": t.mean, "front": t in front}
            for t in choice.tried
        ],
        "rounds": [{"share": r.share, "means": {path_name(p): m for p, m in means.items()}} for r, means in choice.rounds],
        "distillations": choice.distillations,
        "stages": list(choice.stages),
        "flops": choice.trained,
        "discarded_flops": choice.discarded,
        "expected_best_of": {"k": choice.compared, "standard_errors": expected_best_of(choice.compared), "value": choice.inflation()},
    }


def _confirmation(choice: Choice, recipe: Recipe, directory: Path) -> str:
    content = _relative(_movable(recipe, directory), recipe, directory)
    for key in ("search", "budgets", "fair"):  # the last two would add arms
        content.pop(key, None)
    first = max(recipe.seeds) + 1
    direct = f"{choice.path[0]} > {choice.path[-1]}"
    chain = path_text(choice.path)
    arms: dict[str, Any] = {"direct": direct, "chain": chain}
    if choice.direct is not None:
        arms["twin"] = {"path": direct, "compute": "as chain"}
    models = with_parents(recipe, choice.path)
    if "resources" in content:
        content["resources"] = {name: of for name, of in content["resources"].items() if split_entry(name)[1] in ("", *models)}
    content |= {
        "study": choice.study[: LONGEST_NAME - len(_SUFFIX)] + _SUFFIX,
        "seeds": list(range(first, first + max(_SEEDS, len(recipe.seeds)))),
        "models": {name: content["models"][name] for name in content["models"] if name in models},
        "teacher": choice.path[0],
        "arms": arms,
    }
    head = (
        f"# Is {chain} worth its compute? `tadistill search` chose it by dev {choice.metric}, as the best of "
        f"{counted(choice.compared, 'path')}.\n"
        "# The seeds are new, so the result does not contain the luck of the search. `twin` is direct training with the chain's FLOPs.\n"
        "# Run it in the folder where the search ran, or in this folder of a copy: relative paths that are not found beside this file are\n"
        "# looked for there, and those of data sets then in `data.root`.\n"
    )
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=140)


def _movable(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Return a recipe as plain data for a file in `directory`.

    Data sets keep their paths, which are a part of stage keys: those beside the recipe are then found by `data.root`. They get new paths,
    relative to `directory`, only if the recipe has another `data.root`, or if the working directory has files with the same paths.
    """
    content = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    beside = {}
    for key, ref in data_sets(recipe):
        there = next((path for path in ref.paths if path.is_file() or any(path.glob("*.json*"))), None)
        if there and there != ref.paths[-1] and ref.load not in (*NAMED, *tinyworld.SPLITS):
            beside[key] = ref, there
    if not (recipe.data.root or os.environ.get("TADISTILL_DATA") or any(ref.paths[-1].exists() for ref, _ in beside.values())):
        folder = next((ref._folder for ref, _ in beside.values()), None)
        return content | ({"data": content["data"] | {"root": _seen_from(directory, str(folder))}} if folder else {})
    for key, (_, there) in beside.items():
        functools.reduce(operator.getitem, key, content)["load"] = _seen_from(directory, str(there))
    return content


def _relative(content: dict[str, Any], recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Return a recipe in which the paths that the user has written relative to the recipe's folder are relative to `directory`. So a copy
    of the whole project works on another machine."""

    def seen(group: Mapping[str, Any], *keys: str) -> dict[str, Any]:
        resolved = {key: path for key in keys if (path := group.get(key)) and os.path.isabs(path)}
        ours = {key: path for key, path in resolved.items() if not os.path.isabs(os.path.expanduser(recipe.written(path) or ""))}
        return {**group, **{key: _seen_from(directory, path) for key, path in ours.items()}}

    models = {name: seen(model, "load", "tokenizer") for name, model in content["models"].items()}
    runtime = {"runtime": seen(content["runtime"], "code")} if "runtime" in content else {}
    return content | {"models": models, "data": seen(content["data"], "root")} | runtime


def _seen_from(directory: Path, path: str) -> str:
    """Return a path relative to `directory`, or the path itself if a link between the two leads elsewhere."""
    found = os.path.relpath(path, directory)
    found = found if found.startswith("..") else f"./{found}"
    whole = os.path.join(directory, found)
    same = all(os.path.realpath(each) == os.path.realpath(path) for each in (whole, os.path.normpath(whole)))
    return found if same else path
