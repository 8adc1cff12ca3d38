"""Simulates families of models and compares what `advise` recommends with the truth and with rules of thumb.

    OMP_NUM_THREADS=1 python benchmarks/advise.py [--json PATH] [--markdown PATH] [--quick]

Each world has one held-out family and, as its history, F families of the same kind with 3 seeds per arm. `advise_worlds.py` describes how
truth and measures are drawn. Regret is the true difference of the best path (direct included) minus that of the chosen path. Finally,
each of the three public tables that list every path is predicted from the other two.
"""

import os
import platform
import runpy
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import page
from advise_page import markdown
from advise_worlds import Family, World, make_family
from scipy.stats import rankdata

from tadistill.advise.decide import Advice, advise, decide
from tadistill.advise.history import Candidate, Edge, EdgeMeasures, Observation
from tadistill.advise.predict import Predictions, predict
from tadistill.advise.twins import pair_up
from tadistill.search import strategies as rules

SEEDS, MARGIN, LEVEL = 3, 0.3, 0.95
HISTORIES = (0, 3, 6, 12)
WORLDS = {
    "null": World("none"),
    "null, scatter": World("none", family_sd=0.3, edge_sd=0.3),
    "constant +1": World("constant", 1.0, family_sd=0.3, edge_sd=0.3),
    "harmful -1": World("constant", -1.0, family_sd=0.3, edge_sd=0.3),
    "curve x1": World("curve", 1.0, family_sd=0.3, edge_sd=0.3),
    "curve x2": World("curve", 2.0, family_sd=0.3, edge_sd=0.3),
    "unrelated": World("unrelated", 1.0, family_sd=0.3, edge_sd=0.3),
}
EFFECTS = (0.0, 0.5, 1.0, 2.0, 3.0)
CHOOSERS = ("advise", "after one experiment", "best expectation", "direct", "size law", "performance mean", "geometric mean", "random")
Chosen = tuple[str, ...]


def forecasts(family: Family, history: Sequence[Observation]) -> Predictions:
    """Return the predictions that `advise` uses."""
    direct, *chains = family.candidates
    return predict(chains, direct.edges[0], pair_up(history), margin=MARGIN, family=family.name)


def decided(family: Family, found: Predictions) -> Advice:
    """Return the advice of `advise`."""
    return decide(family.candidates, found, margin=MARGIN, level=LEVEL)


def experiment(family: Family, path: Chosen) -> tuple[Observation, ...]:
    """Return a chain of the held-out family and its equal-compute baseline, as their runs would be recorded."""
    cost = next(c.cost for c in family.candidates if c.path == path)
    return tuple(o for o in family.observations if o.cost == cost)


def follow(family: Family, history: Sequence[Observation], first: Advice) -> Advice:
    """Return the advice after the first proposed experiment, or the same advice if none was proposed."""
    if not first.next:
        return first
    return decided(family, forecasts(family, [*history, *experiment(family, first.next[0].path)]))


def rule_choices(family: Family, rng: np.random.Generator) -> dict[str, Chosen]:
    """Return the paths that the rules of thumb choose."""
    teacher, *assistants, student = family.sizes
    choices: dict[str, Callable[[], Chosen]] = {
        "direct": lambda: (teacher, student),
        "size law": lambda: rules.size_law(teacher, assistants, student, family.sizes),
        "performance mean": lambda: rules.performance_mean(teacher, assistants, student, family.scores),
        "geometric mean": lambda: rules.geometric_mean(teacher, assistants, student, family.sizes),
        "random": lambda: family.candidates[int(rng.integers(len(family.candidates)))].path,
    }
    return {name: choose() for name, choose in choices.items()}


def cell(world: World, families: int, worlds: int, key: tuple[int, ...]) -> dict[str, Any]:
    """Return percentages, coverage, rank correlation and regrets of one kind of world with one length of history."""
    rng = np.random.default_rng(key)
    verdicts: list[str] = []
    after: list[str] = []
    wrong, inside_80, inside_95, widths, expected, actual = ([] for _ in range(6))
    regrets: dict[str, list[float]] = {name: [] for name in CHOOSERS}
    for _ in range(worlds):
        family, *others = (make_family(rng, world, f"family {i}", SEEDS) for i in range(families + 1))
        history = [o for other in others for o in other.observations]
        found = forecasts(family, history)
        first = decided(family, found)
        second = follow(family, history, first)
        verdicts.append(first.verdict)
        after.append(second.verdict)
        wrong += [a.verdict == "chain" and family.truth[a.path] < 0 for a in (first, second)]
        for option, forecast in zip(first.options[1:], found.forecasts, strict=True):
            truth, (low, high) = family.truth[option.path], forecast.interval(0.8)
            inside_80.append(low <= truth <= high)
            inside_95.append(option.low <= truth <= option.high)
            widths.append(option.high - option.low)
            expected.append(option.expected)
            actual.append(truth)
        best_expected = max(first.options, key=lambda o: o.expected).path
        choices = {"advise": first.path, "after one experiment": second.path, "best expectation": best_expected} | rule_choices(family, rng)
        best = max(family.truth.values())
        for name, path in choices.items():
            regrets[name].append(best - family.truth[path])
    return {
        "families": families,
        **{v: _percent([x == v for x in verdicts]) for v in ("direct", "inconclusive", "chain")},
        **{f"after_{v}": _percent([x == v for x in after]) for v in ("direct", "inconclusive", "chain")},
        "wrong": _percent(wrong[::2]),
        "after_wrong": _percent(wrong[1::2]),
        "coverage_80": _percent(inside_80),
        "coverage_95": _percent(inside_95),
        "width": float(np.mean(widths)),
        "spearman": spearman(expected, actual),
        "regret": {name: float(np.mean(values)) for name, values in regrets.items()},
        "regret_se": {name: float(np.std(values) / np.sqrt(len(values))) for name, values in regrets.items()},
    }


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return the rank correlation, or None if one of them never varies."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1]) if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0 else None


def _percent(values: Sequence[bool]) -> float:
    return 100 * float(np.mean(values))


# --- public tables ----------------------------------------------------------------------------------------------------------


def table_lattices(name: str, table: Mapping[Chosen, float]) -> list[tuple[tuple[Candidate, ...], dict[Chosen, float], list[Observation]]]:
    """Return one lattice per student of a table that has an assistant: candidates, differences to direct, observations.

    The tables have no equal-compute twins, so all paths are given cost 1 and direct stands for its own twin, which flatters chains.
    """
    found = []
    for student in sorted({p[-1] for p in table}, key=lambda layers: -int(layers)):
        qualities = {p: q for p, q in table.items() if p[-1] == student}
        if len(qualities) < 2:
            continue
        paths = sorted(qualities, key=len)
        edges = {p: tuple(Edge(a, b, EdgeMeasures(size_ratio=int(a) / int(b))) for a, b in pairwise(p)) for p in paths}
        candidates = tuple(Candidate(p, 1.0, edges[p]) for p in paths)
        differences = {p: qualities[p] - qualities[paths[0]] for p in paths}
        observations = [Observation(name, p, 0, edges[p], 1.0, qualities[p], "accuracy") for p in paths]
        found.append((candidates, differences, observations))
    return found


def public_tables() -> list[dict[str, Any]]:
    """Predict each public table from the other two, with layers as sizes and a margin of 0.5, the standard error of one accuracy."""
    known = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "unit" / "search" / "tables.py"))
    tables = {"TAKD figure 5": known["TAKD"], "fork CNN": known["FORK_CNN"], "fork ResNet": known["FORK_RESNET"]}
    rows = []
    for name, table in tables.items():
        history = [o for other in tables if other != name for *_, seen in table_lattices(other, tables[other]) for o in seen]
        for candidates, differences, _ in table_lattices(name, table):
            advice = advise(candidates, history, margin=0.5)
            chains = advice.options[1:]
            teacher, student = candidates[0].path
            assistants = sorted({m for c in candidates for m in c.path[1:-1]}, key=lambda layers: -int(layers))
            sizes = {m: float(m) for m in (teacher, *assistants, student)}
            chosen = {
                "advise": advice.path,
                "best expectation": max(advice.options, key=lambda o: o.expected).path,
                "direct": (teacher, student),
                "size law": rules.size_law(teacher, assistants, student, sizes),
                "geometric mean": rules.geometric_mean(teacher, assistants, student, sizes),
            }
            best = max(differences.values())
            regret = {rule: best - differences[path] for rule, path in chosen.items()} | {
                "random": best - float(np.mean([*differences.values()]))
            }
            actual = [differences[o.path] for o in chains]
            rows.append(
                {
                    "table": name,
                    "student": student,
                    "chains": len(chains),
                    "verdict": advice.verdict,
                    "inside_95": sum(o.low <= a <= o.high for o, a in zip(chains, actual, strict=True)),
                    "spearman": spearman([o.expected for o in chains], actual),
                    "regret": regret,
                }
            )
    return rows


def measure(quick: bool, jobs: int) -> dict[str, Any]:
    """Return all rows."""
    start, worlds = time.perf_counter(), 40 if quick else 500
    of_worlds = [({"world": name}, world, (1, i, f)) for i, (name, world) in enumerate(WORLDS.items()) for f in HISTORIES]
    worlds_of = {effect: World("constant", effect, family_sd=0.3, edge_sd=0.3) for effect in EFFECTS}
    of_effects = [({"effect": e}, world, (2, i, f)) for i, (e, world) in enumerate(worlds_of.items()) for f in HISTORIES]
    todo = [*of_worlds, *of_effects]
    with ProcessPoolExecutor(jobs) as pool:
        rows = list(pool.map(cell, *zip(*((world, key[-1], worlds, key) for _, world, key in todo), strict=True)))
    rows = [label | row for (label, *_), row in zip(todo, rows, strict=True)]
    cells, power = rows[: len(of_worlds)], rows[len(of_worlds) :]
    result = {
        "jobs": jobs,
        "worlds": worlds,
        "seeds": SEEDS,
        "margin": MARGIN,
        "level": LEVEL,
        "cells": cells,
        "power": power,
        "tables": public_tables(),
    }
    return {**result, "seconds": time.perf_counter() - start, "python": platform.python_version(), "numpy": np.__version__}


def main() -> None:
    """Measures, shows, writes."""
    parser = page.parser(__doc__, "few worlds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args()
    page.write(options, {"command": page.command("OMP_NUM_THREADS=1 "), **measure(options.quick, options.jobs)}, markdown)


if __name__ == "__main__":
    main()
