"""Simulates families of models whose true differences between chains and equal-compute direct distillation are known.

A family has a teacher, one or two assistants and a student, which is 4 to 40 times smaller than the teacher. The latent gap of a pair is
k_family log(size ratio) with 20 % noise, where k_family = exp(0.3 z). Reverse KL, forward KL, overlap and loss ratio are noisy
measurements of that gap; the entropy gap is noise. A chain costs the sum of N_teacher + 2.55 N_learner over its hops, which fits the
GPT-2 ladder's 1.67, 2.47 and 3.14.

The true difference of a chain is  effect x shape(path) + family effect + sum over edges of 0.3^hops x violation:

    none       shape 0
    constant   1 for every chain (harmful: with a negative effect)
    curve      loss(T, S) - sum_hops 0.3^h loss(hop) - 0.2 log(N_T / N_A) - 0.1 log(cost), with loss(g) = max(0, g - 1.6):
               chains help across wide gaps and harm across narrow ones
    unrelated  a standard normal draw for every chain of every family, related to no measure

A violation is an edge's own deviation: a better assistant then does not always make a better student (the Bellman condition fails).
Every arm's measured quality has seed noise. Each chain has its own equal-compute baseline.
"""

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from tadistill.advise.history import Candidate, Edge, EdgeMeasures, Observation

Path = tuple[str, ...]
CARRY = 0.3


@dataclass(frozen=True)
class World:
    """Parameters of the true differences, in points."""

    shape: Literal["none", "constant", "curve", "unrelated"]
    effect: float = 0.0
    family_sd: float = 0.0
    edge_sd: float = 0.0
    seed_sd: float = 0.4
    """Standard deviation between the seeds of an arm."""


@dataclass(frozen=True)
class Family:
    """A family with its true differences and the records of a finished study of it."""

    name: str
    sizes: dict[str, float]
    """From big to small."""
    scores: dict[str, float]
    """Quality of each model without distillation."""
    candidates: tuple[Candidate, ...]
    truth: dict[Path, float]
    """Difference of each path to its equal-compute baseline; 0 for direct."""
    observations: tuple[Observation, ...]


def make_family(rng: np.random.Generator, world: World, name: str, seeds: int) -> Family:
    """Return a random family of a world."""
    names: list[str] = ["t", *"ab"[: int(rng.integers(1, 3))], "s"]
    top = rng.uniform(np.log(4), np.log(40))
    inner = np.sort(rng.uniform(0.15, 0.85, size=len(names) - 2))[::-1] * top
    sizes: dict[str, float] = dict(zip(names, np.exp([top, *inner, 0.0]).tolist(), strict=True))
    k = np.exp(0.3 * rng.normal())
    gap = {(u, v): float(k * np.log(sizes[u] / sizes[v]) * np.exp(0.2 * rng.normal())) for u, v in combinations(names, 2)}
    edges = {pair: Edge(*pair, _measures(rng, sizes[pair[0]] / sizes[pair[1]], g)) for pair, g in gap.items()}
    paths = [(names[0], *middle, names[-1]) for n in range(len(names) - 1) for middle in combinations(names[1:-1], n)]
    base = sizes[names[0]] + 2.55
    costs = {p: sum(sizes[u] + 2.55 * sizes[v] for u, v in pairwise(p)) / base for p in paths}
    candidates = tuple(Candidate(p, costs[p], tuple(edges[hop] for hop in pairwise(p))) for p in paths)
    truth = _truth(rng, world, candidates, gap, sizes)
    scores = {n: 40 + 2 * float(np.log(size)) + 0.3 * rng.normal() for n, size in sizes.items()}
    observations = _observations(rng, world, name, candidates, truth, seeds)
    return Family(name, sizes, scores, candidates, truth, observations)


def _measures(rng: np.random.Generator, ratio: float, gap: float) -> EdgeMeasures:
    z = rng.normal(size=5)
    return EdgeMeasures(
        size_ratio=ratio,
        reverse_kl=0.1 * gap * float(np.exp(0.1 * z[0])),
        forward_kl=0.15 * gap * float(np.exp(0.3 * z[1])),
        overlap=float(np.exp(-0.25 * gap * np.exp(0.2 * z[2]))),
        entropy_gap=0.2 * float(z[3]),
        loss_ratio=float(np.exp(-0.1 * np.log(ratio) + 0.03 * z[4])),
    )


def _truth(
    rng: np.random.Generator, world: World, candidates: tuple[Candidate, ...], gap: dict[tuple[str, str], float], sizes: dict[str, float]
) -> dict[Path, float]:
    own, violation = world.family_sd * rng.normal(), {pair: world.edge_sd * rng.normal() for pair in gap}
    truth = {candidates[0].path: 0.0}
    for c in candidates[1:]:
        hops = list(pairwise(c.path))
        weights = [CARRY ** (len(hops) - 1 - i) for i in range(len(hops))]
        if world.shape == "curve":
            losses = sum(w * max(0.0, gap[hop] - 1.6) for w, hop in zip(weights, hops, strict=True))
            weaker = 0.2 * np.log(sizes[c.path[0]] / sizes[c.path[-2]])
            shape = max(0.0, gap[c.path[0], c.path[-1]] - 1.6) - losses - weaker - 0.1 * np.log(c.cost)
        else:
            shape = {"none": 0.0, "constant": 1.0, "unrelated": rng.normal()}[world.shape]
        truth[c.path] = float(world.effect * shape + own + sum(w * violation[hop] for w, hop in zip(weights, hops, strict=True)))
    return truth


def _observations(
    rng: np.random.Generator, world: World, name: str, candidates: tuple[Candidate, ...], truth: dict[Path, float], seeds: int
) -> tuple[Observation, ...]:
    """Return observations of direct and of every chain with its equal-compute baseline."""
    direct, *chains = candidates
    runs = [(direct.path, direct.edges, 1.0, 0.0)]
    for c in chains:
        level = 0.5 * float(np.log(c.cost))  # longer training helps direct
        runs += [(direct.path, direct.edges, c.cost, level), (c.path, c.edges, c.cost, level + truth[c.path])]
    return tuple(
        Observation(name, path, seed, edges, cost, 30 + quality + world.seed_sd * rng.normal(), "rouge_l")
        for path, edges, cost, quality in runs
        for seed in range(seeds)
    )
