"""Paths from a teacher to a student through assistants, strategies that find a good path with few trainings, and rules of thumb.

Models are ordered from big to small: teacher, assistants, student. A path is a tuple of model names, teacher first. Each model teaches the
next one. A prefix is the beginning of a path. It ends with an assistant.

    chosen = drive(best_prefix(lattice), measure)      # measure(Round) -> {path: quality, higher is better}

A strategy is a generator. It yields rounds of paths to train, receives the quality of the last model of each path, and returns the chosen
path. Tests, simulations (`benchmarks/search.py`) and real training (`tadistill search`) use the same strategies. If two paths are equally
good, the path with fewer models wins. If they have the same number of models, the path with bigger assistants wins.
"""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from tadistill.config.arm import ModelPath


@dataclass(frozen=True)
class Lattice:
    """The models of a search, and the paths that may be tried."""

    nodes: ModelPath
    """The models from big to small: teacher, assistants, student."""
    paths: tuple[ModelPath, ...]
    """Paths from teacher to student. If two are equally good, the first one wins. Paths with few and big assistants come first."""

    def prefixes(self) -> tuple[ModelPath, ...]:
        """Return the beginnings of paths: the first models of each path, at least two, up to the whole path."""
        return trainings(self.paths)


@dataclass(frozen=True)
class Concordance:
    """Counts of pairs of paths that end with the same two models, a teacher and its learner. Each path has its own checkpoints of the two.

    A pair is concordant if the path with the better checkpoint of the teacher also has the better learner.
    """

    concordant: int
    discordant: int
    tied: int
    """Number of pairs in which the two checkpoints of the teacher, or of the learner, are equally good. `share` ignores these pairs."""

    @property
    def share(self) -> float | None:
        """concordant / (concordant + discordant), or None if all pairs are tied.

        1/2 means that the quality of the teacher has no effect.
        """
        decided = self.concordant + self.discordant
        return self.concordant / decided if decided else None


def path_name(path: ModelPath) -> str:
    """Return a name for a path, such as `xl-l-s`. It needs no quotes in a shell or in a key of a recipe (`arms.xl-l-s.path`)."""
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
    """List all paths through the assistants, which are given from big to small. With n assistants there are 2^n paths.

    With `max_assistants` or `budget`, only paths within these limits are listed.

    Raises:
        ValueError: a model is named twice.
    """
    nodes = (teacher, *assistants, student)
    if len(set(nodes)) < len(nodes):
        raise ValueError(f"a model is named twice in {', '.join(nodes)}; name each model once")
    most = len(assistants) if max_assistants is None else min(max_assistants, len(assistants))
    paths = [(teacher, *chosen, student) for k in range(most + 1) for chosen in combinations(assistants, k)]
    return Lattice(nodes, tuple(p for p in paths if cost is None or cost(p) <= budget))


def count_paths(assistants: int, max_assistants: int | None = None) -> int:
    """Return the number of paths that `make_lattice` lists without a budget."""
    most = assistants if max_assistants is None else min(max_assistants, assistants)
    return sum(math.comb(assistants, k) for k in range(most + 1))


def trainings(paths: Iterable[ModelPath]) -> tuple[ModelPath, ...]:
    """Return the trainings that these paths need. A training is given as the path from the teacher to the trained model.

    A training that several paths share is returned once. Short paths come first.
    """
    found = dict.fromkeys(path[:end] for path in paths for end in range(2, len(path) + 1))
    return tuple(sorted(found, key=len))


def concordance(quality: Mapping[ModelPath, float]) -> Concordance:
    """Count how often the better checkpoint of a teacher made the better learner, over all pairs of paths with the same last two models.

    If this is always so, the strategy `best_prefix` finds the best path (the Bellman condition).

    Args:
        quality: quality of the last model of each path, and of each beginning of a path. Higher is better. A pair of paths counts only if
            the qualities of both checkpoints of the teacher are given.
    """
    found = {1: 0, -1: 0, 0: 0}
    for a, b in combinations(quality, 2):
        if len(a) > 2 and len(b) > 2 and a[-2:] == b[-2:] and a[:-1] in quality and b[:-1] in quality:
            found[_sign(quality[a[:-1]] - quality[b[:-1]]) * _sign(quality[a] - quality[b])] += 1
    return Concordance(found[1], found[-1], found[0])


def _sign(x: float) -> int:
    return int(x > 0) - int(x < 0)


@dataclass(frozen=True)
class Round:
    """Paths to train and measure. A path may end with an assistant instead of the student."""

    paths: tuple[ModelPath, ...]
    share: float = 1.0
    """Share (0 to 1) of each training's updates that are run. It is below 1 in the short trainings of the strategy `halving`."""


Quality = Mapping[ModelPath, float]
Strategy = Generator[Round, Quality, ModelPath]


@dataclass(frozen=True)
class Outcome:
    """The path that a search chose, the qualities that it measured, and the rounds that it trained."""

    path: ModelPath
    quality: dict[ModelPath, float]
    """Quality of each path, and of each beginning of a path, that was trained in full."""
    rounds: tuple[Round, ...]

    @property
    def trainings(self) -> int:
        """Number of trainings in the search. Paths that begin alike share trainings of the same length."""
        shares = {r.share for r in self.rounds}
        return sum(len(trainings(p for r in self.rounds if r.share == share for p in r.paths)) for share in shares)


def drive(strategy: Strategy, measure: Callable[[Round], Quality]) -> Outcome:
    """Run a strategy to its end and return its outcome. `measure` trains the paths of a round and returns their qualities."""
    rounds: list[Round] = []
    quality: dict[ModelPath, float] = {}
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
    """Train every path. With n assistants, this needs 2^(n+1) - 1 trainings."""
    return (yield from _best_of(lattice, lattice.paths))


def single(lattice: Lattice) -> Strategy:
    """Train the direct path and all paths with one assistant. With n assistants, this needs 2n + 1 trainings.

    Raises ValueError if there is no such path.
    """
    paths = tuple(path for path in lattice.paths if len(path) <= 3)
    if not paths:
        raise ValueError(
            "the strategy `single` needs a path with at most one assistant, but no such path is allowed; allow one, or choose another "
            "strategy"
        )
    return (yield from _best_of(lattice, paths))


def best_prefix(lattice: Lattice) -> Strategy:
    """Keep only the best checkpoint of each model as a teacher. With n assistants, this needs (n+1)(n+2)/2 trainings.

    This is a heuristic. It finds the best path if a better teacher always makes a better learner (`concordance` counts how often this is
    so). Otherwise a path through a worse teacher may be better, but it is not tried.
    """
    return (yield from beam(lattice, width=1))


def beam(lattice: Lattice, *, width: int) -> Strategy:
    """Keep the `width` best checkpoints of each model as teachers. With n assistants, this needs at most width * (n+1)(n+2)/2 trainings.

    There is one round for each model, from big to small. In this round, its best checkpoints teach every smaller model.

    Raises:
        ValueError: `width` is below 1, or there is no path.
    """
    if width < 1:
        raise ValueError(f"`width` is {width}; it must be at least 1, because a beam keeps at least one checkpoint of each model")
    allowed = lattice.prefixes()
    teacher, *_, student = lattice.nodes
    ways: dict[str, list[ModelPath]] = {node: [] for node in lattice.nodes}
    ways[teacher].append((teacher,))
    quality: dict[ModelPath, float] = {}
    for node in lattice.nodes[:-1]:
        kept = ways[node] if node == teacher else _ranked(lattice, ways[node], quality)[:width]
        asked = tuple(p for p in allowed if p[:-1] in kept)
        if asked:
            quality |= yield Round(asked)
        for path in asked:
            ways[path[-1]].append(path)
    if not ways[student]:
        raise ValueError("no path from teacher to student is allowed; allow at least one")
    return _ranked(lattice, ways[student], quality)[0]


def halving(lattice: Lattice, *, rungs: Sequence[float]) -> Strategy:
    """Run successive halving (Jamieson & Talwalkar 2016): train all paths for a few updates, keep the better half, and repeat.

    Each repetition is a rung, with longer trainings than the rung before. Every training starts anew, because its learning-rate schedule
    depends on its length.

    Args:
        rungs: the share of a training's updates in each rung. There must be at least two values. They rise, and the last one is 1.

    Raises:
        ValueError: `rungs` breaks one of these rules.
    """
    if len(rungs) < 2 or rungs[-1] != 1 or rungs[0] <= 0 or any(a >= b for a, b in pairwise(rungs)):
        raise ValueError(f"`rungs` is {list(rungs)}; give at least two rising numbers above 0; the last one must be 1")
    paths = list(lattice.paths)
    for share in rungs[:-1]:
        if len(paths) > 1:
            quality = yield Round(tuple(paths), share)
            paths = _ranked(lattice, paths, quality)[: (len(paths) + 1) // 2]
    return (yield from _best_of(lattice, tuple(paths)))


def _best_of(lattice: Lattice, paths: tuple[ModelPath, ...]) -> Strategy:
    quality = yield Round(paths)
    return _ranked(lattice, paths, quality)[0]


def _ranked(lattice: Lattice, paths: Sequence[ModelPath], quality: Quality) -> list[ModelPath]:
    place = {node: i for i, node in enumerate(lattice.nodes)}
    return sorted(paths, key=lambda path: (-quality[path], len(path), [place[node] for node in path]))


# --- rules of thumb, which choose a path from sizes and scores alone: baselines for a search -----------------------------------
# `assistants`: candidates, from big to small. `sizes` (parameters or another capacity) and `scores` (higher is better): a value per model


SIZE_LAW = 2.5
"""Ratio of teacher to learner parameters that the law of capacity gap recommends (Zhang et al. 2025, arXiv 2311.07052)."""


def size_law(
    teacher: str,
    assistants: Sequence[str],
    student: str,
    sizes: Mapping[str, float],
    *,
    max_assistants: int | None = None,
) -> ModelPath:
    """Choose a path in which each teacher is about `SIZE_LAW` times as big as its learner.

    The path is built from the student upwards: the next model is the bigger one whose size is nearest to `SIZE_LAW` times the current size.
    With `max_assistants`, only the smallest assistants are kept.
    """
    path, above = [student], [teacher, *assistants]
    while path[0] != teacher:
        bigger = [name for name in above if sizes[name] > sizes[path[0]]] or [teacher]
        path.insert(0, min(bigger, key=lambda name: abs(sizes[name] - SIZE_LAW * sizes[path[0]])))
    middle = path[1:-1]
    kept = middle if max_assistants is None else middle[len(middle) - min(max_assistants, len(middle)) :]
    return (teacher, *kept, student)


def performance_mean(teacher: str, assistants: Sequence[str], student: str, scores: Mapping[str, float]) -> ModelPath:
    """Return the path through the assistant whose score is nearest to the mean of the teacher's and the student's scores.

    This is the rule of TAKD (Mirzadeh et al. 2020).
    """
    wanted = (scores[teacher] + scores[student]) / 2
    return (teacher, min(assistants, key=lambda name: abs(scores[name] - wanted)), student)


def geometric_mean(teacher: str, assistants: Sequence[str], student: str, sizes: Mapping[str, float]) -> ModelPath:
    """Return the path through the assistant whose size is nearest to the geometric mean of the teacher's and the student's sizes."""
    wanted = (math.log(sizes[teacher]) + math.log(sizes[student])) / 2
    return (teacher, min(assistants, key=lambda name: abs(math.log(sizes[name]) - wanted)), student)


@dataclass(frozen=True)
class Chosen:
    """An assistant that `lambda_tradeoff` chooses for all values of lambda from `low` to `high`."""

    assistant: str
    low: float
    high: float


def lambda_tradeoff(teacher: str, assistants: Sequence[str], scores: Mapping[str, float], sizes: Mapping[str, float]) -> tuple[Chosen, ...]:
    """Return which assistant MiniDisc's rule chooses for each lambda >= 0, in rising order of lambda.

    The rule takes the assistant with the largest score + lambda * (1 - size / size of the teacher). So a larger lambda favours smaller
    models. Scores are from 0 to 1. Source: Zhang et al. 2022, arXiv 2205.14570.
    """
    left = {name: (scores[name], 1 - sizes[name] / sizes[teacher]) for name in assistants}
    at, found = 0.0, []
    now = max(left, key=lambda name: left[name])  # at lambda 0 the best score wins; ties go to the smallest model
    while True:
        score, slope = left[now]
        crossings = {name: (score - s) / (k - slope) for name, (s, k) in left.items() if k > slope}
        if not crossings:
            return (*found, Chosen(now, at, math.inf))
        after = min(crossings, key=lambda name: (crossings[name], -left[name][1]))
        found.append(Chosen(now, at, crossings[after]))
        now, at = after, crossings[after]
