"""Simulated lattices: how much worse than the best path is the one that each strategy chooses, and after how many trainings?

    OMP_NUM_THREADS=1 python benchmarks/search.py [--json PATH] [--markdown PATH] [--quick]

The true quality of a path that ends with the edge (u, v) is f(u, v) + 0.3 h. f is a standard normal draw of each edge: the unit of all
numbers is the spread between last hops. h says how the checkpoint of u matters: sqrt(1 - rho^2) d + rho e, where d is how far that
checkpoint stands above the other ways to u (in standard deviations; 0 where there is one way) and e is a standard normal draw of the
path. So with rho = 0 a better checkpoint always makes a better learner (the Bellman condition), and with rho = 1 it has no say. 0.3 is
the size that TAKD's figure 5 has: last hops differ by 1.0 point, ways to the same last hop by 0.3.

A strategy sees the true quality plus `noise` times a standard normal draw of each path (dev set and training seed; all strategies see the
same draws). A run of `halving` with a share r of the updates has (1 - r) / 2 more of it: an assumption, as rankings early in training are
nobody's measurement here. Regret: true quality of the best of all paths less that of the chosen one.
"""

import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import page

from tadistill import search as paths
from tadistill.search import Lattice, Outcome, Round, Strategy

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


def true_qualities(lattice: Lattice, rho: float, rng: np.random.Generator) -> dict[paths.Path, float]:
    """Of every prefix."""
    prefixes = lattice.prefixes()
    edge = {pair: rng.normal() for pair in dict.fromkeys(path[-2:] for path in prefixes)}
    quality: dict[paths.Path, float] = {}
    for node in lattice.nodes[1:]:  # a model's teachers come before it
        for path in (p for p in prefixes if p[-1] == node):
            ways = [q for p, q in quality.items() if p[-1] == path[-2]]
            spread = float(np.std(ways)) if len(ways) > 1 else 0.0
            above = (quality[path[:-1]] - float(np.mean(ways))) / spread if spread else 0.0
            quality[path] = edge[path[-2:]] + WITHIN * (np.sqrt(1 - rho**2) * above + rho * rng.normal())
    return quality


def search(strategy: Strategy, quality: dict[paths.Path, float], luck: dict[Any, float], noise: float) -> Outcome:
    """A strategy that sees noisy qualities."""

    def measure(asked: Round) -> dict[paths.Path, float]:
        whole = asked.share == 1
        return {p: quality[p] + noise * luck[p] + (0 if whole else EARLY * (1 - asked.share) * luck[p, asked.share]) for p in asked.paths}

    return paths.drive(strategy, measure)


def measure_cell(cell: Cell, lattices: int) -> list[dict[str, Any]]:
    """Mean regret and trainings of every strategy."""
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
            found[name].append((best - mine, mine - of_single, outcome.trainings, outcome.full_trainings))
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
    """All cells."""
    start, lattices = time.process_time(), 50 if quick else 2000
    cells = [Cell(n, rho, noise) for n in (3, 5) for rho in (0.0, 0.5, 1.0) for noise in (0.0, 0.3, 1.0)]
    rows = [row for cell in cells for row in measure_cell(cell, lattices)]
    machine = {"python": platform.python_version(), "numpy": np.__version__, "seconds": round(time.process_time() - start)}
    return {"lattices": lattices, "machine": machine, "rows": rows}


def markdown(result: dict[str, Any], command: str) -> str:
    """The page."""
    machine, rows = result["machine"], result["rows"]
    lines = [
        "# Searching a lattice of paths: regret and trainings",
        "",
        f"```\n{command}\n```",
        "",
        f"{result['lattices']:,} simulated lattices a cell, {machine['seconds']} s of one core; Python {machine['python']}, "
        f"numpy {machine['numpy']}. What is simulated is said in `benchmarks/search.py`; the unit is the spread between last hops. "
        f"Standard errors of the regrets are at most {max(r['regret_se'] for r in rows):.3f}. *Whole* counts a short run as the share of a "
        "training that it is. *Concordance*: how often the better checkpoint of a teacher makes the better learner. *Above single*: true "
        "quality of the chosen path less that of the single-assistant sweep's.",
    ]
    for n in dict.fromkeys(r["assistants"] for r in rows):
        lines += ["", f"## {n} assistants, {2**n} paths", ""]
        lines += ["| rho | concordance | noise | strategy | trainings | whole | regret | finds the best % | above single |"]
        lines += ["| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
        for r in (r for r in rows if r["assistants"] == n):
            above = "" if r["above_single"] is None else f"{r['above_single']:+.3f}"
            numbers = f"{r['trainings']:g} | {r['whole_trainings']:g} | {r['regret']:.3f} | {100 * r['finds_the_best']:.0f} | {above}"
            lines.append(f"| {r['rho']:g} | {r['concordance']:.2f} | {r['noise']:g} | {r['strategy']} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, shows, writes."""
    parser = page.parser(__doc__, "few lattices")
    options = parser.parse_args()
    page.write(options, "OMP_NUM_THREADS=1 python benchmarks/search.py", measure(options.quick), markdown)


if __name__ == "__main__":
    main()
