"""The paths from a teacher to a student through the assistants between them, and the trainings that paths share.

Models are ordered from big to small: teacher, assistants, student. An edge trains the smaller model with the bigger one as its teacher.
A path holds the names of its models, teacher first. A prefix of a path ends with an assistant and has the same form.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tadistill.config.arm import ModelPath


@dataclass(frozen=True)
class Lattice:
    """Models from big to small, and the paths among them that may be tried."""

    nodes: ModelPath
    """Teacher, assistants, student."""
    paths: tuple[ModelPath, ...]
    """Paths from teacher to student: fewest assistants first, bigger assistants before smaller ones. This order breaks ties."""

    def prefixes(self) -> tuple[ModelPath, ...]:
        """Return every prefix, of two models or more, of a path that may be tried (`trainings` of all paths)."""
        return trainings(self.paths)


@dataclass(frozen=True)
class Concordance:
    """Counts of pairs of equal edges with different histories: does the better checkpoint of the teacher make the better learner?"""

    concordant: int
    discordant: int
    tied: int
    """Pairs with equal teachers or equal learners, which decide nothing."""

    @property
    def share(self) -> float | None:
        """Share of concordant pairs among the decided ones; 1/2 where a teacher's quality has no effect, None without decided pairs."""
        decided = self.concordant + self.discordant
        return self.concordant / decided if decided else None


def path_name(path: ModelPath) -> str:
    """Return the name of a path's arm, such as `xl-l-s`. It needs no quotes in a shell or in an override (`arms.xl-l-s.path=…`)."""
    return "-".join(path)


def make_lattice(
    teacher: str,
    assistants: Sequence[str],
    student: str,
    *,
    max_assistants: int | None = None,
    cost: Callable[[ModelPath], float] | None = None,
    budget: float = math.inf,
) -> Lattice:
    """List all 2^n paths through n assistants (from big to small), or those with few enough assistants that cost at most `budget`.

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
    """Return the number of paths that `make_lattice` lists without a budget."""
    most = assistants if max_assistants is None else min(max_assistants, assistants)
    return sum(math.comb(assistants, k) for k in range(most + 1))


def trainings(paths: Iterable[ModelPath]) -> tuple[ModelPath, ...]:
    """Return each distinct prefix of two models or more: the trainings that these paths need when equal prefixes are trained once.

    With n assistants: 2^(n+1) - 1 for all paths, 2n + 1 for direct and the single assistants, (n+1)(n+2)/2 for the best prefixes.
    Shorter prefixes come first, so a prefix comes after the one that it continues.
    """
    found = dict.fromkeys(path[:end] for path in paths for end in range(2, len(path) + 1))
    return tuple(sorted(found, key=len))


def concordance(quality: Mapping[ModelPath, float]) -> Concordance:
    """Test the Bellman condition, which `best_prefix` relies on, over all pairs of paths that end with the same edge.

    Args:
        quality: quality of every prefix and path, higher is better. A pair counts where both teachers have a quality.
    """
    found = {1: 0, -1: 0, 0: 0}
    for a, b in combinations(quality, 2):
        if len(a) > 2 and len(b) > 2 and a[-2:] == b[-2:] and a[:-1] in quality and b[:-1] in quality:
            found[_sign(quality[a[:-1]] - quality[b[:-1]]) * _sign(quality[a] - quality[b])] += 1
    return Concordance(found[1], found[-1], found[0])


def _sign(x: float) -> int:
    return int(x > 0) - int(x < 0)
