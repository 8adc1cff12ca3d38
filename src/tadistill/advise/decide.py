"""Turn forecasts into advice. There are three verdicts: run direct distillation; run a chain (distillation through teacher assistants);
or first run experiments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, pi, sqrt
from typing import Literal

from scipy.special import ndtr

from tadistill.advise.history import Candidate, Observation
from tadistill.advise.predict import TINY, Forecast, Predictions, predict
from tadistill.advise.twins import pair_up
from tadistill.metrics import LAST, higher_is_better, metric_title, metric_unit
from tadistill.search.strategies import size_law

SEEDS = 3
"""Number of new training seeds of a proposed experiment. Seeds that history has already come on top."""
PROPOSED = 3
"""Largest number of proposed experiments."""
CONSIDERED = 12
"""Largest number of experiments whose work is computed, because each of them is planned."""

Verdict = Literal["direct", "chain", "inconclusive"]


@dataclass(frozen=True)
class Option:
    """The forecast for one path: by how much its student is better on dev than direct distillation with the same compute. For a metric of
    which lower values are better, such as the loss, it is the negative difference of the metric."""

    path: tuple[str, ...]
    cost: float
    """Training compute of the path, divided by the training compute of the direct path."""
    expected: float
    low: float
    high: float
    """`low` and `high` are the ends of an interval that contains the improvement with probability `Advice.level`."""
    p_better: float
    """Probability that the improvement is above 0."""
    p_matters: float
    """Probability that the improvement is above the margin (the smallest difference that matters)."""
    basis: Literal["reference", "prior", "history"]
    """Source of the forecast. `history`: earlier studies. `prior`: the prior alone. `reference`: there is no forecast, because this is the
    direct path, with which the others are compared."""
    beyond: tuple[str, ...] = ()
    """Measures whose value for this path is outside the range of earlier studies. They make the interval wider."""


def improvement(metric: str) -> str:
    """Return what the forecasts predict, such as "improvement in ROUGE-L" or "decrease of the reference loss". It is positive if the path's
    student is better."""
    if metric == LAST:  # nothing is measured on dev
        return "improvement"
    return f"{'improvement in' if higher_is_better(metric) else 'decrease of the'} {metric_title(metric)}"


def improvement_unit(metric: str) -> str:
    """Return the unit of an improvement, such as ``nats/token``."""
    return "" if metric == LAST else metric_unit(metric)


@dataclass(frozen=True)
class Experiment:
    """A proposed comparison: a chain (path with assistants) against direct distillation with the same compute."""

    path: tuple[str, ...]
    seeds: int
    new: int
    """Number of seeds that history does not have yet."""
    cost: float
    """Training compute of the command's stages that are not finished, divided by the compute of one direct run with one seed."""
    gain: float
    """Expected improvement, because the experiment may lead to a better choice of path."""


@dataclass(frozen=True)
class Work:
    """The seeds and the cost of an experiment. They are explained in `Experiment`."""

    seeds: int
    new: int
    cost: float


def separate_work(chain: Candidate) -> Work:
    """Return the work of an experiment that shares no stage with anything: for each seed, the chain and its baseline."""
    return Work(SEEDS, SEEDS, 2 * SEEDS * chain.cost)


@dataclass(frozen=True)
class Advice:
    """The verdict with its evidence, and the experiments that would make the verdict more certain."""

    verdict: Verdict
    path: tuple[str, ...]
    """The path to run now. If the verdict is `chain`, it is the best chain, otherwise the direct path."""
    options: tuple[Option, ...]
    """All candidates in the given order. The first one is the direct path."""
    hypothesis: tuple[str, ...] | None
    """The chain that a rule on model sizes suggests (`size_law`). None if this chain is no candidate, or if there is evidence
    from earlier studies (`pairs` is above 0)."""
    next: tuple[Experiment, ...]
    """Proposed experiments. The one with the largest `gain / cost` comes first."""
    level: float
    margin: float
    families: int
    """Number of families in the earlier studies. Runs of one family share teacher, data and method."""
    pairs: int
    """Number of chains in earlier studies that were compared with direct distillation at equal compute."""
    used: tuple[str, ...]
    """Measures that the regression used."""
    unused: tuple[str, ...]
    """Measures that the regression could not use: some paths do not have them, or their value is the same for all paths."""
    seed_sd: float
    """Standard deviation over seeds of the difference between a chain and its baseline. It is assumed if no chain has several seeds."""

    @property
    def needed(self) -> float:
        """The smallest `p_better` at which a chain is recommended: 1 - (1 - level) / number of chains (Bonferroni's correction)."""
        return 1 - (1 - self.level) / max(1, len(self.options) - 1)

    @property
    def likeliest(self) -> Option | None:
        """The recommended chain. If none is recommended, the chain with the largest `p_better`. None if there is no chain."""
        chains = self.options[1:]
        recommended = [o for o in chains if o.path == self.path]
        return recommended[0] if recommended else max(chains, key=lambda o: o.p_better, default=None)


def advise(
    candidates: Sequence[Candidate],
    history: Sequence[Observation],
    *,
    margin: float,
    level: float = 0.95,
    family: str | None = None,
    work: Callable[[Candidate], Work | None] = separate_work,
) -> Advice:
    """Decide whether a chain (a path with assistants) is worth running.

    - `chain`: at least one chain is better than direct with a probability of `Advice.needed` or more. The best of them is the path to run.
    - `direct`: no chain is likely to be better by more than `margin` (probability at most 1 - level), or there is no earlier study.
    - `inconclusive`: all other cases. The path to run is then the direct path.

    Args:
        candidates: the direct path, followed by the chains. All paths have the same teacher and the same student.
        history: results of earlier studies, all with the same metric (see `History.on`).
        margin: the smallest difference that matters, in the metric's unit.
        level: the probability that an interval contains the true difference, such as 0.95. The verdict uses it too.
        family: the name of the candidates' family (`family_of`). None if no run in `history` belongs to this family.
        work: returns the seeds and the cost of the experiment that compares a chain with direct at equal compute. None if it cannot be
            proposed.
    """
    direct, *chains = candidates
    pairs = pair_up(history)
    found = predict(chains, direct.edges[0], pairs, margin=margin, family=family)
    return decide(candidates, found, margin=margin, level=level, work=work)


def decide(
    candidates: Sequence[Candidate],
    found: Predictions,
    *,
    margin: float,
    level: float,
    work: Callable[[Candidate], Work | None] = separate_work,
) -> Advice:
    """Turn forecasts into advice. `advise` explains the rule and the arguments."""
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
        next=() if verdict == "chain" else _experiments(chains, found, work),
        level=level,
        margin=margin,
        families=found.families,
        pairs=found.pairs,
        used=found.used,
        unused=found.unused,
        seed_sd=found.seed_sd,
    )


def _verdict(options: Sequence[Option], found: Predictions, level: float) -> tuple[Verdict, tuple[str, ...]]:
    direct, chains = options[0].path, options[1:]
    if not chains or not found.pairs:
        return "direct", direct
    proven = [o for o in chains if o.p_better >= 1 - (1 - level) / len(chains)]
    if proven:
        return "chain", max(proven, key=lambda o: (o.expected, -o.cost)).path
    return ("direct" if all(o.p_matters <= 1 - level for o in chains) else "inconclusive"), direct


def _hypothesis(candidates: Sequence[Candidate]) -> tuple[str, ...] | None:
    sizes = {candidates[0].path[-1]: 1.0}
    for c in candidates:
        for edge in reversed(c.edges):
            if edge.measures.size_ratio is not None and edge.learner in sizes:
                sizes[edge.teacher] = sizes[edge.learner] * edge.measures.size_ratio
    teacher, student = candidates[0].path
    middle = sorted((name for name in sizes if name not in (teacher, student)), key=lambda name: -sizes[name])
    path = size_law(teacher, middle, student, sizes) if teacher in sizes else ()
    return path if len(path) > 2 and path in [c.path for c in candidates] else None


def _experiments(chains: Sequence[Candidate], found: Predictions, work: Callable[[Candidate], Work | None]) -> tuple[Experiment, ...]:
    def gain(i: int, seeds: int) -> float:  # as if the chain were the only experiment
        others = max([0.0, *(f.mean for j, f in enumerate(found.forecasts) if j != i)])
        return _knowledge_gradient(found.forecasts[i], others, found.seed_sd, seeds)

    proposed: list[Experiment] = []
    for i in sorted(range(len(chains)), key=lambda i: -gain(i, SEEDS) / separate_work(chains[i]).cost):
        if len(proposed) < CONSIDERED and (todo := work(chains[i])):
            proposed.append(Experiment(chains[i].path, todo.seeds, todo.new, todo.cost, gain(i, todo.new)))
    return tuple(sorted(proposed, key=lambda e: -e.gain / max(e.cost, TINY))[:PROPOSED])  # what is only evaluated may cost no training


def _knowledge_gradient(forecast: Forecast, others: float, seed_sd: float, seeds: int = SEEDS) -> float:
    moved = forecast.sd**2 / sqrt(forecast.sd**2 + seed_sd**2 / seeds)
    z = -abs(forecast.mean - others) / moved
    density = exp(-z * z / 2) / sqrt(2 * pi)
    return moved * (density + z * float(ndtr(z)))
