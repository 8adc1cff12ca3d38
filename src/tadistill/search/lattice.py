"""The paths from a teacher to a student through any of the assistants between them, and what they share.

Models are ordered from big to small, M0 = T, M1 … Mn, M(n+1) = S; an edge trains the smaller model with the bigger one as its teacher.
A path is a tuple of names, teacher first. The same names serve for a prefix, which ends with an assistant.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

Path = tuple[str, ...]


@dataclass(frozen=True)
class Lattice:
    """Models from big to small, and the paths among them that may be tried."""

    nodes: Path
    """Teacher, assistants, student."""
    paths: tuple[Path, ...]
    """From teacher to student: fewest assistants first, bigger assistants before smaller ones. The order breaks ties."""

    def prefixes(self) -> tuple[Path, ...]:
        """Every prefix of a path that may be tried, of two models or more (`trainings` of all paths)."""
        return trainings(self.paths)


@dataclass(frozen=True)
class Concordance:
    """Pairs of equal edges with different histories: does the better checkpoint of the teacher make the better learner?"""

    concordant: int
    discordant: int
    tied: int
    """Equal teachers or equal learners: they say nothing."""

    @property
    def share(self) -> float | None:
        """Concordant pairs among those that are decided; 1/2 is what a teacher's quality without any effect gives. None without pairs."""
        decided = self.concordant + self.discordant
        return self.concordant / decided if decided else None


def make_lattice(
    teacher: str,
    assistants: Sequence[str],
    student: str,
    *,
    max_assistants: int | None = None,
    cost: Callable[[Path], float] | None = None,
    budget: float = math.inf,
) -> Lattice:
    """All 2^n paths through n assistants (from big to small), or those with few enough assistants that cost no more than `budget`.

    Raises:
        ValueError: a model is named twice.
    """
    nodes = (teacher, *assistants, student)
    if len(set(nodes)) < len(nodes):
        raise ValueError(f"the models {', '.join(nodes)} are not all different")
    most = len(assistants) if max_assistants is None else min(max_assistants, len(assistants))
    paths = [(teacher, *chosen, student) for k in range(most + 1) for chosen in combinations(assistants, k)]
    return Lattice(nodes, tuple(p for p in paths if cost is None or cost(p) <= budget))


def count_paths(assistants: int, max_assistants: int | None = None) -> int:
    """How many paths `make_lattice` would list without a budget."""
    most = assistants if max_assistants is None else min(max_assistants, assistants)
    return sum(math.comb(assistants, k) for k in range(most + 1))


def trainings(paths: Iterable[Path]) -> tuple[Path, ...]:
    """What has to be trained for these paths when equal prefixes are trained once: each distinct prefix of two models or more.

    For n assistants: 2^(n+1) - 1 for all paths, 2n + 1 for direct and the single assistants, (n+1)(n+2)/2 for the best prefixes.
    Shorter prefixes come first, so a prefix stands behind the one it continues.
    """
    found = dict.fromkeys(path[:end] for path in paths for end in range(2, len(path) + 1))
    return tuple(sorted(found, key=len))


def concordance(quality: Mapping[Path, float]) -> Concordance:
    """Count over all pairs of paths that end with the same edge: the Bellman condition of `search.best_prefix`, tested on a table.

    Args:
        quality: of every prefix and path, higher is better. A pair counts where both teachers have a quality.
    """
    found = {1: 0, -1: 0, 0: 0}
    for a, b in combinations(quality, 2):
        if len(a) > 2 and len(b) > 2 and a[-2:] == b[-2:] and a[:-1] in quality and b[:-1] in quality:
            found[_sign(quality[a[:-1]] - quality[b[:-1]]) * _sign(quality[a] - quality[b])] += 1
    return Concordance(found[1], found[-1], found[0])


def last_hop_means(quality: Mapping[Path, float], student: str) -> dict[str, float]:
    """The mean quality of the paths to `student` by the model that teaches it."""
    groups: dict[str, list[float]] = {}
    for path, value in quality.items():
        if len(path) > 1 and path[-1] == student:
            groups.setdefault(path[-2], []).append(value)
    return {teacher: sum(values) / len(values) for teacher, values in groups.items()}


def _sign(x: float) -> int:
    return int(x > 0) - int(x < 0)
