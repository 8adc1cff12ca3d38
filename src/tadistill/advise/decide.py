"""From forecasts to advice: direct, one chain, or what to run first. In doubt the advice is direct distillation at equal compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, pi, sqrt
from typing import Literal

from scipy.special import ndtr

from tadistill.advise.edges import Candidate, Observation
from tadistill.advise.pairs import pair_up
from tadistill.advise.predict import Forecast, Predictions, predict
from tadistill.errors import ConfigError
from tadistill.search.strategies import size_law

SEEDS = 3
"""Training seeds of a proposed experiment."""
PROPOSED = 3
"""Most experiments that are proposed."""


@dataclass(frozen=True)
class Option:
    """One path; differences are the path's dev metric less that of direct distillation at the path's cost."""

    path: tuple[str, ...]
    cost: float
    """As a multiple of the direct path's."""
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
    """Measures on which the path lies outside what history has seen; the interval is wider for that."""


@dataclass(frozen=True)
class Experiment:
    """A chain to run beside its equal-compute twin."""

    path: tuple[str, ...]
    seeds: int
    cost: float
    """Of chain and twin with all seeds, in direct runs."""
    gain: float
    """By how much it is expected to lower the regret of the decision, in the metric's unit."""


@dataclass(frozen=True)
class Advice:
    """What to do now, how sure that is, and what would make it surer."""

    verdict: Literal["direct", "chain", "inconclusive"]
    path: tuple[str, ...]
    """What to run now: the direct path unless the verdict is `chain`."""
    options: tuple[Option, ...]
    """Every candidate in the order given, direct first."""
    reason: str
    next: tuple[Experiment, ...]
    """Most regret reduction for its compute first."""
    level: float
    margin: float
    scale: str | None
    """The metric that history is in; None without history."""
    families: int
    pairs: int
    """Families of history, and chains with an equal-compute twin in them."""
    used: tuple[str, ...]
    """Measures that the regression used."""
    unused: tuple[str, ...]
    """Measures that it could not use: not known for every path, or never different."""
    seed_sd: float
    """Standard deviation of one seed's difference to the twin; assumed where no seeds were repeated."""


def advise(
    candidates: Sequence[Candidate],
    history: Sequence[Observation],
    *,
    margin: float,
    level: float = 0.95,
    family: str | None = None,
) -> Advice:
    """Whether a chain is worth running.

    `chain`: for some chain P(Delta > 0) reaches the level, made stricter for k chains to 1 - (1 - level) / k (Bonferroni); of those the one
    with the largest expectation. `direct`: for every chain P(Delta > margin) <= 1 - level, or there is no history. Else `inconclusive`,
    where the path to run in the meantime is direct.

    Args:
        candidates: direct first, then the chains; all from one teacher to one student.
        history: finished arms of earlier studies, all on one metric (`history.History.observations`).
        margin: a difference in the metric's unit that counts as none.
        level: of intervals and of the decision.
        family: the candidates' own family, if history may hold runs of it (`history.family_of`).

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
    """The advice that forecasts lead to; `advise` has the rule and the arguments."""
    direct, chains = candidates[0], candidates[1:]
    options = [Option(direct.path, direct.cost, 0.0, 0.0, 0.0, 0.0, 0.0, "reference")]
    for chain, forecast in zip(chains, found.forecasts, strict=True):
        low, high = forecast.interval(level)
        p_better, p_matters = forecast.p_above(0.0), forecast.p_above(margin)
        basis = "history" if found.pairs else "prior"
        options.append(Option(chain.path, chain.cost, forecast.mean, low, high, p_better, p_matters, basis, forecast.beyond))
    verdict, path, reason = _verdict(options, found, level, margin)
    return Advice(
        verdict=verdict,
        path=path,
        options=tuple(options),
        reason=reason if found.pairs or not chains else reason + _hypothesis(candidates),
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


def _verdict(
    options: Sequence[Option], found: Predictions, level: float, margin: float
) -> tuple[Literal["direct", "chain", "inconclusive"], tuple[str, ...], str]:
    direct, chains = options[0], options[1:]
    if not chains:
        return "direct", direct.path, "There is no other path to compare direct distillation with."
    if not found.pairs:
        return (
            "direct",
            direct.path,
            "No finished study has a chain beside direct distillation at equal compute, so the intervals are the prior's and no measure "
            "has been shown to predict anything: run direct with the compute a chain would cost.",
        )
    on = f"{found.pairs} {'chain' if found.pairs == 1 else 'chains'} of {found.families} {'family' if found.families == 1 else 'families'}"
    strict = 1 - (1 - level) / len(chains)
    proven = [o for o in chains if o.p_better >= strict]
    if proven:
        best = max(proven, key=lambda o: (o.expected, -o.cost))
        return (
            "chain",
            best.path,
            f"{' > '.join(best.path)} is expected to beat direct at equal compute by {best.expected:+.2f} ({best.low:+.2f} to "
            f"{best.high:+.2f}), P(better) {best.p_better:.3f}, where {strict:.3f} is asked of the best of {len(chains)}; from {on}.",
        )
    best = max(chains, key=lambda o: o.p_better)
    text = f"the likeliest, {' > '.join(best.path)}, has {best.expected:+.2f} ({best.low:+.2f} to {best.high:+.2f})"
    if all(o.p_matters <= 1 - level for o in chains):
        return "direct", direct.path, f"No chain is likely to beat direct at equal compute by more than {margin:g}: {text}; from {on}."
    return (
        "inconclusive",
        direct.path,
        f"History neither shows nor rules out a chain that beats direct at equal compute: {text}, P(better) {best.p_better:.2f}, where "
        f"{strict:.3f} is asked; from {on}. Until then run direct with the chain's compute.",
    )


def _hypothesis(candidates: Sequence[Candidate]) -> str:
    """What the size law would try, where it is among the candidates."""
    sizes = {candidates[0].path[-1]: 1.0}
    for c in candidates:
        for edge in reversed(c.edges):
            if edge.measures.size_ratio is not None and edge.learner in sizes:
                sizes[edge.teacher] = sizes[edge.learner] * edge.measures.size_ratio
    teacher, student = candidates[0].path
    middle = sorted((name for name in sizes if name not in (teacher, student)), key=lambda name: -sizes[name])
    path = size_law(teacher, middle, student, sizes) if teacher in sizes else ()
    if len(path) <= 2 or path not in [c.path for c in candidates]:
        return ""
    return f" The size law would try {' > '.join(path)}: a hypothesis, not a finding."


def _experiments(chains: Sequence[Candidate], found: Predictions) -> tuple[Experiment, ...]:
    """Chains to run beside their twins, by expected regret reduction for their compute (knowledge gradient, one experiment at a time)."""
    proposed = []
    for i, chain in enumerate(chains):
        others = max([0.0, *(f.mean for j, f in enumerate(found.forecasts) if j != i)])
        cost = 2 * SEEDS * chain.cost
        proposed.append(Experiment(chain.path, SEEDS, cost, _knowledge_gradient(found.forecasts[i], others, found.seed_sd)))
    return tuple(sorted(proposed, key=lambda e: -e.gain / e.cost)[:PROPOSED])


def _knowledge_gradient(forecast: Forecast, others: float, seed_sd: float) -> float:
    """How much better the best decision is expected to be after an experiment (Frazier et al. 2008), for a normal forecast."""
    moved = forecast.sd**2 / sqrt(forecast.sd**2 + seed_sd**2 / SEEDS)
    z = -abs(forecast.mean - others) / moved
    density = exp(-z * z / 2) / sqrt(2 * pi)
    return moved * (density + z * float(ndtr(z)))
