"""Strategies that find a path by training few: generators that ask for rounds and are told qualities.

    chosen = drive(best_prefix(lattice), measure)      # measure(Round) -> {path: quality, higher is better}

A strategy yields a `Round` of paths, which can be trained side by side, is sent the quality of each path's last model, and returns the
path it chooses. The same code is driven by a table (tests), by a simulation (`benchmarks/search.py`) and by real training
(`tadistill search`).

Ties, everywhere: the path with fewer models, then the one with the bigger assistants (`Lattice.paths` has that order).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tadistill.search.lattice import Lattice, Path, trainings


@dataclass(frozen=True)
class Round:
    """Paths to train and measure; they may end with an assistant."""

    paths: tuple[Path, ...]
    share: float = 1.0
    """Of every stage's updates: below 1 in the short runs of `halving`."""


Quality = Mapping[Path, float]
Strategy = Generator[Round, Quality, Path]


@dataclass(frozen=True)
class Outcome:
    """What a search chose, what it measured, and what it asked for."""

    path: Path
    quality: dict[Path, float]
    """Of whole runs (share 1), prefixes included where the strategy looked at them."""
    rounds: tuple[Round, ...]

    @property
    def trainings(self) -> int:
        """Stages trained, equal prefixes once; a short run counts as one more stage."""
        shares = {r.share for r in self.rounds}
        return sum(len(trainings(p for r in self.rounds if r.share == share for p in r.paths)) for share in shares)

    @property
    def full_trainings(self) -> float:
        """The same, a short run counted as the share of a stage that it is."""
        shares = {r.share for r in self.rounds}
        return sum(share * len(trainings(p for r in self.rounds if r.share == share for p in r.paths)) for share in shares)


def drive(strategy: Strategy, measure: Callable[[Round], Quality]) -> Outcome:
    """Run a strategy to its end, answering each round with `measure`."""
    rounds: list[Round] = []
    quality: dict[Path, float] = {}
    try:
        asked = next(strategy)
        while True:
            found = measure(asked)
            rounds.append(asked)
            if asked.share == 1:
                quality |= {path: found[path] for path in asked.paths}
            asked = strategy.send(found)
    except StopIteration as end:
        return Outcome(end.value, quality, tuple(rounds))


def exhaustive(lattice: Lattice) -> Strategy:
    """Every path: 2^(n+1) - 1 trainings."""
    return (yield from _best_of(lattice, lattice.paths))


def single(lattice: Lattice) -> Strategy:
    """The direct path and every single assistant: 2n + 1 trainings.

    Raises:
        ValueError: the lattice has no path with fewer than two assistants.
    """
    paths = tuple(path for path in lattice.paths if len(path) <= 3)
    if not paths:
        raise ValueError("no path with at most one assistant may be tried")
    return (yield from _best_of(lattice, paths))


def best_prefix(lattice: Lattice) -> Strategy:
    """Of each model the best checkpoint is kept, and only this one teaches: (n+1)(n+2)/2 trainings.

    A heuristic. It finds the best path if a better checkpoint of a teacher makes a better learner on every edge (the Bellman condition,
    which `lattice.concordance` counts); where that fails, a path through a worse checkpoint may be better and is never looked at. With
    `max_assistants` or a budget, the best checkpoint of a model may stand at the end of a path too long or too dear to go on from.
    """
    return (yield from beam(lattice, width=1))


def beam(lattice: Lattice, *, width: int) -> Strategy:
    """As `best_prefix`, with the `width` best checkpoints of each model kept: at most width (n+1)(n+2)/2 trainings.

    Round by round, from big to small, a model's kept checkpoints teach every smaller model; so the direct path is in the first round.
    """
    if width < 1:
        raise ValueError(f"width is {width}; a beam keeps at least one checkpoint of each model")
    allowed = lattice.prefixes()
    teacher, *_, student = lattice.nodes
    ways: dict[str, list[Path]] = {node: [] for node in lattice.nodes}
    ways[teacher].append((teacher,))
    quality: dict[Path, float] = {}
    for node in lattice.nodes[:-1]:
        kept = ways[node] if node == teacher else _ranked(lattice, ways[node], quality)[:width]
        asked = tuple(p for p in allowed if p[:-1] in kept)
        if asked:
            quality |= yield Round(asked)
        for path in asked:
            ways[path[-1]].append(path)
    if not ways[student]:
        raise ValueError("no path to the student was reached")
    return _ranked(lattice, ways[student], quality)[0]


def halving(lattice: Lattice, *, rungs: Sequence[float]) -> Strategy:
    """Successive halving (Jamieson & Talwalkar 2016): short runs of every path, of which the better half goes on to a longer rung.

    Rankings can turn around early in training, so there are at least two rungs. A run does not continue the shorter one: its schedule of
    learning rates has another length. Ends early where one path is left, with a whole run of it.

    Args:
        rungs: rising shares of every stage's updates, ending with 1.
    """
    if len(rungs) < 2 or rungs[-1] != 1 or rungs[0] <= 0 or any(a >= b for a, b in pairwise(rungs)):
        raise ValueError(f"rungs are {list(rungs)}; give at least two rising shares that end with 1")
    paths = list(lattice.paths)
    for share in rungs[:-1]:
        if len(paths) > 1:
            quality = yield Round(tuple(paths), share)
            paths = _ranked(lattice, paths, quality)[: (len(paths) + 1) // 2]
    return (yield from _best_of(lattice, tuple(paths)))


def _best_of(lattice: Lattice, paths: tuple[Path, ...]) -> Strategy:
    quality = yield Round(paths)
    return _ranked(lattice, paths, quality)[0]


def _ranked(lattice: Lattice, paths: Sequence[Path], quality: Quality) -> list[Path]:
    """Best first."""
    place = {node: i for i, node in enumerate(lattice.nodes)}
    return sorted(paths, key=lambda path: (-quality[path], len(path), [place[node] for node in path]))
