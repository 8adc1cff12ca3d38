"""Turn forecasts into advice: run direct, run a chain, or run experiments first. In doubt the advice is direct at equal compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, pi, sqrt
from typing import Literal

from scipy.special import ndtr

from tadistill.advise.history import Candidate, Observation, pair_up
from tadistill.advise.predict import Forecast, Predictions, predict
from tadistill.errors import ConfigError
from tadistill.search.strategies import size_law

SEEDS = 3
"""Training seeds of a proposed experiment."""
PROPOSED = 3
"""Most experiments that are proposed."""

Verdict = Literal["direct", "chain", "inconclusive"]


@dataclass(frozen=True)
class Option:
    """One path; differences are the path's dev metric less that of direct distillation at the path's cost."""

    path: tuple[str, ...]
    cost: float
    """Training compute as a multiple of that of the direct path."""
    expected: float
    low: float
    high: float
    """Ends of the interval at the advice's level."""
    p_better: float
    """Probability that the difference is above 0."""
    p_matters: float
    """Probability that it is above the margin."""
    basis: Literal["reference", "prior", "history"]
    """`reference` for direct, which is compared with itself."""
    beyond: tuple[str, ...] = ()
    """Measures on which the path lies outside the range of history; the interval is wider for that."""


@dataclass(frozen=True)
class Experiment:
    """A chain to run together with its equal-compute twin."""

    path: tuple[str, ...]
    seeds: int
    cost: float
    """Compute of chain and twin with all seeds, in direct runs."""
    gain: float
    """Expected reduction of the decision's regret, in the metric's unit."""


@dataclass(frozen=True)
class Advice:
    """The verdict with its evidence, and the experiments that would make it more certain."""

    verdict: Verdict
    path: tuple[str, ...]
    """The path to run now: the direct path unless the verdict is `chain`."""
    options: tuple[Option, ...]
    """Every candidate in the order given, direct first."""
    hypothesis: tuple[str, ...] | None
    """The chain that the size law chooses, where there is no history; None where that is no candidate."""
    next: tuple[Experiment, ...]
    """Proposed experiments, the largest expected reduction of regret for its compute first."""
    level: float
    margin: float
    scale: str | None
    """The metric of history; None without history."""
    families: int
    """Families in history."""
    pairs: int
    """Chains with an equal-compute twin in history."""
    used: tuple[str, ...]
    """Measures that the regression used."""
    unused: tuple[str, ...]
    """Measures that it could not use, because some paths lack them or they never vary."""
    seed_sd: float
    """Standard deviation of one seed's difference to the twin; assumed where no seeds were repeated."""

    @property
    def needed(self) -> float:
        """The P(better) that one of the chains needs (Bonferroni)."""
        return 1 - (1 - self.level) / max(1, len(self.options) - 1)

    @property
    def likeliest(self) -> Option | None:
        """The recommended chain, or the chain that is most likely better than direct; None without a chain."""
        chains = self.options[1:]
        recommended = [o for o in chains if o.path == self.path]
        return recommended[0] if recommended else max(chains, key=lambda o: o.p_better, default=None)


def advise(
    candidates: Sequence[Candidate], history: Sequence[Observation], *, margin: float, level: float = 0.95, family: str | None = None
) -> Advice:
    """Decide whether a chain is worth running.

    `chain`: for some chain P(Delta > 0) reaches the level, made stricter for k chains to 1 - (1 - level) / k (Bonferroni); among those the
    one with the largest expectation is advised. `direct`: for every chain P(Delta > margin) <= 1 - level, or there is no history.
    Otherwise `inconclusive`; the path to run in the meantime is direct.

    Args:
        candidates: direct first, then the chains; all from one teacher to one student.
        history: finished arms of earlier studies, all on one metric (`History.observations`).
        margin: a difference in the metric's unit that counts as none.
        level: the level of intervals and of the decision.
        family: the candidates' own family, if history may hold runs of it (`family_of`).

    Raises:
        ConfigError: candidates that do not share their ends, a margin or level out of range, or history on two metrics.
    """
    direct, chains = _check(candidates, margin, level)
    scales = sorted({o.scale for o in history})
    if len(scales) > 1:
        raise ConfigError(f"history is on the metrics {', '.join(scales)}, which have different units; choose one of them")
    pairs = pair_up(history)
    found = predict(chains, direct.edges[0], pairs, margin=margin, family=family)
    return decide(candidates, found, scale=scales[0] if pairs else None, margin=margin, level=level)


def decide(candidates: Sequence[Candidate], found: Predictions, *, scale: str | None, margin: float, level: float) -> Advice:
    """Turn forecasts into advice; see `advise` for the rule and the arguments."""
    direct, chains = candidates[0], candidates[1:]
    options = [Option(direct.path, direct.cost, 0.0, 0.0, 0.0, 0.0, 0.0, "reference")]
    for chain, forecast in zip(chains, found.forecasts, strict=True):
        low, high = forecast.interval(level)
        p_better, p_matters = forecast.p_above(0.0), forecast.p_above(margin)
        basis = "history" if found.pairs else "prior"
        options.append(Option(chain.path, chain.cost, forecast.mean, low, high, p_better, p_matters, basis, forecast.beyond))
    verdict, path = _verdict(options, found, level)
    return Advice(
        verdict=verdict,
        path=path,
        options=tuple(options),
        hypothesis=None if found.pairs else _hypothesis(candidates),
        next=() if verdict == "chain" else _experiments(chains, found),
        level=level,
        margin=margin,
        scale=scale,
        families=found.families,
        pairs=found.pairs,
        used=found.used,
        unused=found.unused,
        seed_sd=found.seed_sd,
    )


def _check(candidates: Sequence[Candidate], margin: float, level: float) -> tuple[Candidate, Sequence[Candidate]]:
    if not candidates or len(candidates[0].path) != 2:
        raise ConfigError("the first candidate must be the direct path (teacher > student); chains come after it")
    ends = {(c.path[0], c.path[-1]) for c in candidates}
    if len(ends) > 1:
        raise ConfigError(f"candidates go {', '.join(f'{a} to {b}' for a, b in sorted(ends))}; advice is for one teacher and one student")
    if len({c.path for c in candidates}) < len(candidates):
        raise ConfigError("a path is given twice among the candidates; give each once")
    if not margin > 0:
        raise ConfigError(f"margin is {margin}; it must be positive")
    if not 0.5 < level < 1:
        raise ConfigError(f"level is {level}; it must lie between 0.5 and 1")
    return candidates[0], candidates[1:]


def _verdict(options: Sequence[Option], found: Predictions, level: float) -> tuple[Verdict, tuple[str, ...]]:
    direct, chains = options[0].path, options[1:]
    if not chains or not found.pairs:
        return "direct", direct
    proven = [o for o in chains if o.p_better >= 1 - (1 - level) / len(chains)]
    if proven:
        return "chain", max(proven, key=lambda o: (o.expected, -o.cost)).path
    return ("direct" if all(o.p_matters <= 1 - level for o in chains) else "inconclusive"), direct


def _hypothesis(candidates: Sequence[Candidate]) -> tuple[str, ...] | None:
    """Return the chain that the size law chooses; None where it is not among the candidates."""
    sizes = {candidates[0].path[-1]: 1.0}
    for c in candidates:
        for edge in reversed(c.edges):
            if edge.measures.size_ratio is not None and edge.learner in sizes:
                sizes[edge.teacher] = sizes[edge.learner] * edge.measures.size_ratio
    teacher, student = candidates[0].path
    middle = sorted((name for name in sizes if name not in (teacher, student)), key=lambda name: -sizes[name])
    path = size_law(teacher, middle, student, sizes) if teacher in sizes else ()
    return path if len(path) > 2 and path in [c.path for c in candidates] else None


def _experiments(chains: Sequence[Candidate], found: Predictions) -> tuple[Experiment, ...]:
    """Rank chains to run with their twins by expected reduction of regret for their compute (knowledge gradient, one at a time)."""
    proposed = []
    for i, chain in enumerate(chains):
        others = max([0.0, *(f.mean for j, f in enumerate(found.forecasts) if j != i)])
        cost = 2 * SEEDS * chain.cost
        proposed.append(Experiment(chain.path, SEEDS, cost, _knowledge_gradient(found.forecasts[i], others, found.seed_sd)))
    return tuple(sorted(proposed, key=lambda e: -e.gain / e.cost)[:PROPOSED])


def _knowledge_gradient(forecast: Forecast, others: float, seed_sd: float) -> float:
    """Return the expected improvement of the best decision by an experiment (Frazier et al. 2008), for a normal forecast."""
    moved = forecast.sd**2 / sqrt(forecast.sd**2 + seed_sd**2 / SEEDS)
    z = -abs(forecast.mean - others) / moved
    density = exp(-z * z / 2) / sqrt(2 * pi)
    return moved * (density + z * float(ndtr(z)))
