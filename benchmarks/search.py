"""Simulates lattices of paths: the regret of the path that each strategy chooses, and the number of trainings it needs.

    OMP_NUM_THREADS=1 python benchmarks/search.py [--json PATH] [--markdown PATH] [--quick]

The true quality of a path that ends with the edge (u, v) is f(u, v) + 0.3 h. f is a standard normal draw of each edge, so the unit of all
numbers is the spread between last hops. h is the effect of the checkpoint of u: sqrt(1 - rho^2) d + rho e. d is the quality of that
checkpoint relative to the other paths to u (in standard deviations; 0 if there is only one), and e is a standard normal draw of the
path. With rho = 0 a better checkpoint always makes a better learner (the Bellman condition); with rho = 1 it has no effect. The factor 0.3
follows TAKD's figure 5: last hops differ by 1.0 point, paths to the same last hop by 0.3.

A strategy sees the true quality plus `noise` times a standard normal draw of each path (dev set and training seed; all strategies see the
same draws). A run of `halving` with a share r of the updates has (1 - r) / 2 more noise. That is an assumption, because nobody has measured
rankings early in training here. Regret is the true quality of the best of all paths minus that of the chosen one.
"""

import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import page

from tadistill.search import strategies as paths
from tadistill.search.strategies import Lattice, Outcome, Round, Strategy

WITHIN = 0.3
EARLY = 0.5
RUNGS = (0.1, 0.3, 1.0)
STRATEGIES: dict[str, Callable[[Lattice], Strategy]] = {
    "exhaustive": paths.exhaustive,
    "beam 2": lambda lattice: paths.beam(lattice, width=2),
    "best_prefix": paths.best_prefix,
    "halving": lambda lattice: paths.halving(lattice, rungs=RUNGS),
    "single": paths.single,
}


class Cell(NamedTuple):
    """One kind of lattice."""

    assistants: int
    rho: float
    noise: float


def true_qualities(lattice: Lattice, rho: float, rng: np.random.Generator) -> dict[paths.ModelPath, float]:
    """Quality of every prefix."""
    prefixes = lattice.prefixes()
    edge = {pair: rng.normal() for pair in dict.fromkeys(path[-2:] for path in prefixes)}
    quality: dict[paths.ModelPath, float] = {}
    for node in lattice.nodes[1:]:  # a model's teachers come before it
        for path in (p for p in prefixes if p[-1] == node):
            ways = [q for p, q in quality.items() if p[-1] == path[-2]]
            spread = float(np.std(ways)) if len(ways) > 1 else 0.0
            above = (quality[path[:-1]] - float(np.mean(ways))) / spread if spread else 0.0
            quality[path] = edge[path[-2:]] + WITHIN * (np.sqrt(1 - rho**2) * above + rho * rng.normal())
    return quality


def search(strategy: Strategy, quality: dict[paths.ModelPath, float], luck: dict[Any, float], noise: float) -> Outcome:
    """Run a strategy on noisy qualities and return its outcome."""

    def measure(asked: Round) -> dict[paths.ModelPath, float]:
        whole = asked.share == 1
        return {p: quality[p] + noise * luck[p] + (0 if whole else EARLY * (1 - asked.share) * luck[p, asked.share]) for p in asked.paths}

    return paths.drive(strategy, measure)


def whole_trainings(outcome: Outcome) -> float:
    """Count trainings, a short run as the share of a stage that it is."""
    shares = {r.share for r in outcome.rounds}
    return sum(share * len(paths.trainings(p for r in outcome.rounds if r.share == share for p in r.paths)) for share in shares)


def measure_cell(cell: Cell, lattices: int) -> list[dict[str, Any]]:
    """Return mean regret and number of trainings of every strategy."""
    lattice = paths.make_lattice("t", [f"a{i}" for i in range(cell.assistants)], "s")
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in ("direct", "random", *STRATEGIES)}
    shares = []
    for index in range(lattices):
        rng = np.random.default_rng((cell.assistants, index))  # the same draws for every rho and noise
        quality = true_qualities(lattice, cell.rho, rng)
        shares.append(paths.concordance(quality).share or 0.0)
        luck: dict[Any, float] = {key: rng.normal() for path in quality for key in (path, *((path, share) for share in RUNGS[:-1]))}
        best = max(quality[path] for path in lattice.paths)
        found["direct"].append((best - quality["t", "s"], 0.0, 1, 1))
        random = lattice.paths[int(rng.integers(len(lattice.paths)))]
        found["random"].append((best - quality[random], 0.0, len(random) - 1, len(random) - 1))
        outcomes = {name: search(make(lattice), quality, luck, cell.noise) for name, make in STRATEGIES.items()}
        of_single = quality[outcomes["single"].path]
        for name, outcome in outcomes.items():
            mine = quality[outcome.path]
            found[name].append((best - mine, mine - of_single, outcome.trainings, whole_trainings(outcome)))
    rows = []
    for name, values in found.items():
        regret, gain, trainings, full = np.array(values).T
        rows.append(
            {
                **cell._asdict(),
                "concordance": round(float(np.mean(shares)), 3),
                "strategy": name,
                "trainings": round(float(trainings.mean()), 1),
                "whole_trainings": round(float(full.mean()), 1),
                "regret": round(float(regret.mean()), 3),
                "regret_se": round(float(regret.std(ddof=1) / np.sqrt(lattices)), 3),
                "finds_the_best": round(float(np.mean(regret < 1e-9)), 3),
                "above_single": None if name in ("direct", "random") else round(float(gain.mean()), 3),
            }
        )
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """Measure all cells."""
    start, lattices = time.process_time(), 50 if quick else 2000
    cells = [Cell(n, rho, noise) for n in (3, 5) for rho in (0.0, 0.5, 1.0) for noise in (0.0, 0.3, 1.0)]
    rows = [row for cell in cells for row in measure_cell(cell, lattices)]
    machine = {"python": platform.python_version(), "numpy": np.__version__, "seconds": round(time.process_time() - start)}
    return {"lattices": lattices, "machine": machine, "rows": rows}


COLUMNS = ("rho", "concordance", "noise", "strategy", "trainings", "whole", "regret", "finds the best %", "above single")


def markdown(result: dict[str, Any]) -> str:
    """Return the page."""
    machine, rows = result["machine"], result["rows"]
    lines = [
        "# Searching a lattice of paths: regret and trainings",
        "",
        "This page shows how good the path is that each strategy of `tadistill search` chooses in simulated lattices.",
        "",
        f"```\n{result['command']}\n```",
        "",
        f"{result['lattices']:,} simulated lattices per cell, {machine['seconds']} s of one core; Python {machine['python']}, "
        f"numpy {machine['numpy']}. `benchmarks/search.py` describes the simulation; the unit is the spread between last hops. "
        f"Standard errors of the regrets are at most {max(r['regret_se'] for r in rows):.3f}. *Whole* counts a short run by its share of a "
        "whole training. *Concordance*: how often the better checkpoint of a teacher makes the better learner. *Above single*: true "
        "quality of the chosen path minus that of the path chosen by `single`.",
    ]
    for n in dict.fromkeys(r["assistants"] for r in rows):
        cells = [
            (
                *(f"{r['rho']:g}", f"{r['concordance']:.2f}", f"{r['noise']:g}", r["strategy"]),
                *(f"{r['trainings']:g}", f"{r['whole_trainings']:g}", f"{r['regret']:.3f}", f"{100 * r['finds_the_best']:.0f}"),
                "" if r["above_single"] is None else f"{r['above_single']:+.3f}",
            )
            for r in rows
            if r["assistants"] == n
        ]
        lines += ["", f"## {n} assistants, {2**n} paths", "", page.table(COLUMNS, cells, left=("strategy",))]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = page.parser(__doc__, "few lattices").parse_args()
    page.write(options, {"command": page.command("OMP_NUM_THREADS=1 "), **measure(options.quick)}, markdown)


if __name__ == "__main__":
    main()
