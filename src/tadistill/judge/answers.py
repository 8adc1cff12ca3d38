"""The answers that are judged: the same prompts of a study for every arm, each with the arms' answers and the reference.

Only the answers of an evaluation's first decoding seed are used. Arms whose evaluation is not finished are left out and named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tadistill.config.judge import REFERENCE
from tadistill.data.templates import split_prompt
from tadistill.errors import ConfigError, DataError, StoreError
from tadistill.results.study import ArmRecord, StudyPlan, load_plan, load_predictions
from tadistill.store import Store


@dataclass(frozen=True)
class Item:
    """One prompt. `answers` maps an arm (or `REFERENCE`) to its answer for each training seed, in the order of `Answers.seeds`."""

    set: str
    index: int
    instruction: str
    input: str
    answers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Answers:
    """Everything that is judged, and the arms that have no answers yet."""

    plan: StudyPlan
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    items: tuple[Item, ...]
    unfinished: tuple[str, ...]


def read_answers(
    study_dir: Path,
    store: Store,
    *,
    arms: Sequence[str] = (),
    sets: Sequence[str] = (),
    all_seeds: bool = False,
    limit: int | None = None,
) -> Answers:
    """Read the chosen prompts with the answers of the chosen arms (by default all arms of the study).

    Args:
        all_seeds: read every training seed for which all these arms are evaluated, instead of only the first one.
        limit: prompts of each set, taken at even distances and the same for all arms.

    Raises:
        ConfigError: an arm or a set does not exist, or an arm that was named has no answers yet.
        DataError: there is nothing to judge.
        StoreError: a file cannot be read.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: it must be at least 1 prompt of each set; leave it out to take all")
    if not (study_dir / "plan.json").is_file():
        raise ConfigError(f"{study_dir} is not a study (it holds no plan.json): `tadistill run RECIPE` makes one")
    plan = load_plan(study_dir)
    first = _first_seed(plan, store)
    chosen, unfinished = _choose(plan, store, arms, first)
    seeds = (first,)
    if all_seeds:
        everywhere = dict.fromkeys(seed for arm in chosen for seed in arm.evaluate)
        seeds = tuple(seed for seed in everywhere if all(store.finished(arm.evaluate.get(seed, "")) for arm in chosen))
    names = tuple(arm.name for arm in chosen)
    tables = {(arm.name, seed): _first_answers(store, arm.evaluate[seed]) for arm in chosen for seed in seeds}
    return Answers(plan, names, seeds, _items(tables, names, seeds, sets, limit), unfinished)


def _first_seed(plan: StudyPlan, store: Store) -> int:
    """Return the first training seed, in the recipe's order, with a finished evaluation; the recipe's first one where none has any."""
    seeds = list(dict.fromkeys(seed for arm in plan.arms for seed in arm.evaluate))
    finished = (seed for seed in seeds if any(store.finished(arm.evaluate.get(seed, "")) for arm in plan.arms))
    return next(finished, seeds[0])


def _choose(plan: StudyPlan, store: Store, wanted: Sequence[str], seed: int) -> tuple[list[ArmRecord], tuple[str, ...]]:
    known = {arm.name: arm for arm in plan.arms}
    if REFERENCE in known:
        raise ConfigError(f"the study {plan.study} has an arm named `{REFERENCE}`, which means the reference answers here; rename it")
    for name in wanted:
        if name not in known:
            raise ConfigError(f"the study {plan.study} has no arm `{name}`; it has {', '.join(known)}")
    arms = [known[name] for name in dict.fromkeys(wanted)] or list(plan.arms)
    unfinished = tuple(arm.name for arm in arms if seed not in arm.evaluate or not store.finished(arm.evaluate[seed]))
    if wanted and unfinished:
        raise ConfigError(
            f"arm `{unfinished[0]}` has no answers under training seed {seed} yet: `{plan.command}` evaluates it, or leave it out"
        )
    if len(unfinished) == len(arms):
        raise DataError(f"the study {plan.study} has no answers under training seed {seed} yet: `{plan.command}` makes them")
    return [arm for arm in arms if arm.name not in unfinished], unfinished


def _first_answers(store: Store, key: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Map (set, index) to the row of the set's first decoding seed."""
    rows = load_predictions(store, key)
    lowest: dict[str, int] = {}
    try:
        for row in rows:
            lowest[row["set"]] = min(lowest.get(row["set"], row["seed"]), row["seed"])
        found = {(row["set"], row["index"]): row for row in rows if row["seed"] == lowest[row["set"]]}
        for row in found.values():
            _ = (row["references"][0], row["prompt"] + row["prediction"])  # these fields are read later
    except (KeyError, TypeError, IndexError) as error:
        path = store.folder(key) / "predictions.jsonl"
        reason = f"a row is not a prediction: {type(error).__name__} {error}"
        raise StoreError(f"{path} cannot be read ({reason}): delete its directory and run the recipe again") from error
    return found


def _items(
    tables: Mapping[tuple[str, int], Mapping[tuple[str, int], Mapping[str, Any]]],
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    sets: Sequence[str],
    limit: int | None,
) -> tuple[Item, ...]:
    rows = next(iter(tables.values()))
    known = tuple(dict.fromkeys(name for name, _ in rows))
    for name in sets:
        if name not in known:
            raise ConfigError(f"the study has no answers to a set `{name}`; it has {', '.join(known) or 'none'}")
    items: list[Item] = []
    for name in dict.fromkeys(sets or known):
        shared = sorted(index for of, index in rows if of == name and all((name, index) in table for table in tables.values()))
        count = min(limit or len(shared), len(shared))
        for index in (shared[i * len(shared) // count] for i in range(count)):
            row = rows[name, index]
            answers = {arm: tuple(tables[arm, seed][name, index]["prediction"] for seed in seeds) for arm in arms}
            answers[REFERENCE] = (row["references"][0],) * len(seeds)
            # evaluations of earlier versions stored the rendered prompt alone
            task = (row["instruction"].strip(), row["input"].strip()) if "instruction" in row else split_prompt(row["prompt"])
            items.append(Item(name, index, *task, answers))
    if not items:
        raise DataError(f"the arms {', '.join(arms)} share no prompt: judge fewer arms, or evaluate them on the same sets")
    return tuple(items)
