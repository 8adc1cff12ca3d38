"""Forecast how much a chain (a path with assistants) gains over direct distillation with the same compute.

The forecast comes from a Bayesian ridge regression. Its data are the chains of earlier studies. The gain is the dev metric of the chain
minus that of direct distillation, or the opposite if lower values are better. It is modelled as a sum of five parts:

- an intercept;
- the `contrasts` of the chain, each with a slope. They are standardised over the earlier chains;
- the effect of the family, which is the chain's teacher, data and method (`history.family_of`);
- the effects of the chain's edges (pairs of teacher and learner), weighted by `hop_weights`;
- noise of the training seeds.

Intercept, slopes and effects have normal priors with mean 0. Four hyper-parameters are not known: the ratio of two neighbouring hop
weights; and the standard deviations of slopes, family effects and edge effects. The forecast is an average over a grid of their values,
weighted by marginal likelihood. Intervals are wider for measures outside the range of earlier chains. A measure counts as at most as far
outside this range as the range is wide. Otherwise two earlier chains that are alike would make every other chain infinitely different.
"""
# Hyper-parameters are not maximised: with few families, the maximum often says that families do not differ, and intervals are too narrow.
# The last hop has the largest weight: in figure 5 of TAKD, the last assistant changes the student by 2 points, the path to it by 0.3.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import log

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

from tadistill.advise.history import Candidate, Edge, EdgeMeasures
from tadistill.advise.twins import TwinPair
from tadistill.search.strategies import SIZE_LAW
from tadistill.statistics import seeds_spread

Array = NDArray[np.float64]

CARRIES = {0.1: 0.25, 0.3: 0.5, 0.6: 0.25}
"""Prior probability of each possible value of `carry`, the ratio (weight of a hop / weight of the next hop)."""
SLOPES = (0.1, 0.3, 1.0, 2.0)
"""Possible standard deviations of the part of a difference that contrasts explain, as multiples of `unit` (a difference's typical size)."""
FAMILIES = (0.1, 0.3, 0.6, 1.0)
"""Possible standard deviations of the effect of a family (runs with the same teacher, data and method), as multiples of `unit`."""
EDGES = (0.1, 0.3, 0.8)
"""Possible standard deviations of the effect of an edge (a teacher and its learner), as multiples of `unit`."""
TINY = 1e-9
INTERCEPT = 2.0
"""Standard deviation of the intercept, as a multiple of `unit` (the typical size of a difference)."""
SEED_NOISE, SEED_WEIGHT = 1.9, 2.0
"""Prior of the noise of a difference over training seeds. SEED_NOISE is the noise's standard deviation, as a multiple of the margin.
SEED_WEIGHT is the weight of the prior, in degrees of freedom."""


@lru_cache(maxsize=4096)
def gaps(measures: EdgeMeasures) -> dict[str, float | None]:
    """Return the gap between teacher and learner in each measure. A larger value means that the two models differ more."""
    # history is short, so forward KL, mass and advantage are left out: they resemble reverse KL, overlap and loss
    m = measures
    size = None if m.size_ratio is None else log(m.size_ratio)
    return {
        "size": size,
        "size_law": None if size is None else (size - log(SIZE_LAW)) ** 2,
        "reverse_kl": m.reverse_kl,
        "overlap": None if m.overlap is None else 1 - m.overlap,
        "entropy_gap": m.entropy_gap,
        "loss": None if m.loss_ratio is None else -log(m.loss_ratio),
    }


def hop_weights(hops: int, carry: float) -> list[float]:
    """Return the weights of a path's steps (distillations), in order. The last weight is 1. Each earlier one is `carry` times the next."""
    return [carry ** (hops - 1 - i) for i in range(hops)]


def contrasts(edges: tuple[Edge, ...], direct: Edge, cost: float, carry: float) -> dict[str, float | None]:
    """Return how a path differs from direct distillation in each measure.

    The `gaps` along the path are added up, weighted by `hop_weights`. The gap in direct distillation is then subtracted.

    The result also has an entry `cost`, which is log(cost). The argument `cost` is the path's compute divided by that of the direct path.
    """
    found: dict[str, float | None] = {"cost": log(cost)}
    of_chain, weights = [gaps(e.measures) for e in edges], hop_weights(len(edges), carry)
    for name, base in gaps(direct.measures).items():
        total = -base if base is not None else None
        for weight, gap in zip(weights, of_chain, strict=True):
            value = gap[name]
            total = total + weight * value if total is not None and value is not None else None
        found[name] = total
    return found


@dataclass(frozen=True)
class Forecast:
    """The forecast of the difference between a path and direct distillation at equal compute, as a weighted mixture of normal
    distributions.
    """

    weights: Array
    means: Array
    sds: Array
    beyond: tuple[str, ...]
    """Measures whose value for this path is outside the range of earlier studies. They make the standard deviations larger."""

    @cached_property
    def mean(self) -> float:
        return float(self.weights @ self.means)

    @cached_property
    def sd(self) -> float:
        return float(np.sqrt(self.weights @ (self.sds**2 + self.means**2) - self.mean**2))

    def p_above(self, value: float) -> float:
        """Return the probability that the difference is larger than a value."""
        return float(self.weights @ ndtr((self.means - value) / self.sds))

    def quantile(self, share: float) -> float:
        """Return the quantile: the value x for which P(difference < x) is `share`."""
        low, high = float(np.min(self.means - 10 * self.sds)), float(np.max(self.means + 10 * self.sds))
        return float(brentq(lambda value: 1 - self.p_above(value) - share, low, high))  # type: ignore[arg-type]

    def interval(self, level: float) -> tuple[float, float]:
        """Return the central interval that contains the difference with probability `level`."""
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)


@dataclass(frozen=True)
class Predictions:
    """One forecast for each candidate path, and the evidence behind the forecasts."""

    forecasts: tuple[Forecast, ...]
    used: tuple[str, ...]
    """Measures that the regression used."""
    unused: tuple[str, ...]
    """Measures that the regression could not use: some paths do not have them, or their value is the same for all paths."""
    seed_sd: float
    """Standard deviation of the difference between a chain and its baseline, over training seeds."""
    families: int
    pairs: int


def predict(
    candidates: Sequence[Candidate], direct: Edge, history: Sequence[TwinPair], *, margin: float, family: str | None = None
) -> Predictions:
    """Forecast the difference between each path with assistants and direct distillation at equal compute.

    Args:
        candidates: the paths with assistants (chains).
        direct: the teacher and the student of direct distillation, with their measures. All chains have this teacher and this student.
        history: chains of earlier studies, each with its equal-compute baseline (`pair_up`). All differences are in one metric.
        margin: the smallest difference that matters, in the same metric. It also sets the scale of the prior.
        family: the name of the candidates' family (`family_of`). None if no run in `history` belongs to this family.
    """
    seed_variance = _seed_variance(history, margin)
    unit = max(margin, float(np.sqrt(np.mean([p.mean**2 for p in history]))) if history else 0.0)
    rows = _rows(candidates, direct, history, family)
    noise_NN = _noise(history, seed_variance)
    y_N = np.array([p.mean for p in history])
    parts: list[tuple[Array, Array, Array]] = []
    columns: dict[str, Array] = {}
    beyond: list[tuple[str, ...]] = []
    for carry, prior in CARRIES.items():
        columns = _contrasts(rows, carry)
        if carry == 0.3:  # which measures are outside the range of earlier chains hardly depends on `carry`
            beyond = [_beyond(columns, len(history), len(history) + i) for i in range(len(candidates))]
        x_RK, excess_R = _standardised(columns, len(rows), len(history))
        parts.append(_conditional(_kernels(rows, x_RK, excess_R, carry, unit), y_N, noise_NN, prior))
    log_weights, means, variances = (np.concatenate([p[i] for p in parts]) for i in range(3))
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    sds = np.maximum(np.sqrt(variances), _least(history, float(np.sqrt(seed_variance))))
    forecasts = tuple(Forecast(weights, means[:, i], sds[:, i], names) for i, names in enumerate(beyond))
    used = tuple(columns) if history else ()
    possible = {n for row in rows for n, v in contrasts(row.edges, row.direct, row.cost, 0.3).items() if v is not None}
    unused = tuple(sorted(possible - set(used))) if history else ()
    return Predictions(forecasts, used, unused, float(np.sqrt(seed_variance)), len({p.family for p in history}), len(history))


@dataclass(frozen=True)
class _Row:
    family: str
    edges: tuple[Edge, ...]
    direct: Edge
    cost: float


def _rows(candidates: Sequence[Candidate], direct: Edge, history: Sequence[TwinPair], family: str | None) -> list[_Row]:
    own = family if family is not None else "\0this family"
    return [_Row(p.family, p.edges, p.direct, p.cost) for p in history] + [_Row(own, c.edges, direct, c.cost) for c in candidates]


def _seed_variance(history: Sequence[TwinPair], margin: float) -> float:
    squares = sum(float(np.sum((np.array(p.differences) - p.mean) ** 2)) for p in history)
    freedom = sum(len(p.differences) - 1 for p in history)
    return (squares + SEED_WEIGHT * (SEED_NOISE * margin) ** 2) / (freedom + SEED_WEIGHT)


def _least(history: Sequence[TwinPair], seed_sd: float) -> float:
    best: dict[str, float] = {}
    for p in history:
        own = max(seeds_spread(p.differences), p.reported, seed_sd / np.sqrt(len(p.seeds)))
        best[p.family] = min(own, best.get(p.family, np.inf))
    return float(1 / np.sqrt(sum(sd**-2 for sd in best.values()))) if best else 0.0


def _noise(history: Sequence[TwinPair], seed_variance: float) -> Array:
    noise_NN = np.zeros((len(history), len(history)))
    for i, p in enumerate(history):
        for j, q in enumerate(history):
            if i == j:
                noise_NN[i, j] = seed_variance / len(p.seeds)
            elif p.family == q.family and p.twin == q.twin:
                common = len(set(p.seeds) & set(q.seeds))  # the twin that both share causes half of each difference's variance
                noise_NN[i, j] = seed_variance / 2 * common / (len(p.seeds) * len(q.seeds))
    return noise_NN


def _contrasts(rows: Sequence[_Row], carry: float) -> dict[str, Array]:
    found = [contrasts(row.edges, row.direct, row.cost, carry) for row in rows]
    names = found[0] if found else ()
    values = {name: [f[name] for f in found] for name in names}
    return {name: np.array(v, dtype=np.float64) for name, v in values.items() if all(x is not None for x in v)}


def _standardised(columns: dict[str, Array], rows: int, seen: int) -> tuple[Array, Array]:
    # A contrast that never varies in history is removed from `columns`. A row with another value is one standard deviation outside.
    if seen == 0:
        return np.ones((rows, 1)), np.zeros(rows)
    constant = [name for name, v in columns.items() if np.ptp(v[:seen]) < TINY]
    unknown_R = np.zeros(rows)
    for name in constant:
        column_R = columns.pop(name)
        unknown_R = np.maximum(unknown_R, np.abs(column_R - column_R[0]) > TINY)
    if not columns:
        return np.zeros((rows, 1)), unknown_R
    x_RK = np.stack(list(columns.values()), axis=1)
    x_RK = (x_RK - x_RK[:seen].mean(axis=0)) / x_RK[:seen].std(axis=0)
    low_K, high_K = x_RK[:seen].min(axis=0), x_RK[:seen].max(axis=0)
    x_RK = np.clip(x_RK, 2 * low_K - high_K, 2 * high_K - low_K)  # at most as far outside the range as the range is wide
    excess_RK = np.maximum(low_K - x_RK, 0) + np.maximum(x_RK - high_K, 0)
    return x_RK, np.maximum(excess_RK.max(axis=1), unknown_R)


def _kernels(rows: Sequence[_Row], x_RK: Array, excess_R: Array, carry: float, unit: float) -> Array:
    families = np.array([row.family for row in rows])
    same_RR = (families[:, None] == families[None, :]).astype(np.float64)
    keys = [[(row.family, e.teacher, e.learner, e.measures.size_ratio) for e in row.edges] for row in rows]
    places = {key: i for i, key in enumerate(dict.fromkeys(key for of_row in keys for key in of_row))}
    edges_RE = np.zeros((len(rows), len(places)))
    for i, of_row in enumerate(keys):
        edges_RE[i, [places[key] for key in of_row]] = hop_weights(len(of_row), carry)
    slopes_RR, shared_RR = x_RK @ x_RK.T / x_RK.shape[1], edges_RE @ edges_RE.T
    # Outside the range of history the relation may not be linear. Each row gets its own extra variance, which grows with the distance.
    slopes_RR = slopes_RR + np.diag(excess_R**2)
    grid = np.array(list(product(SLOPES, FAMILIES, EDGES))) ** 2
    parts = np.stack([slopes_RR, same_RR, shared_RR])
    return unit**2 * (INTERCEPT**2 + np.einsum("gp,prs->grs", grid, parts))


def _conditional(kernel_GRR: Array, y_N: Array, noise_NN: Array, prior: float) -> tuple[Array, Array, Array]:
    n = len(y_N)
    prior_variance = np.diagonal(kernel_GRR, axis1=1, axis2=2)[:, n:]
    base = np.full(len(kernel_GRR), np.log(prior / len(kernel_GRR)))
    if n == 0:
        return base, np.zeros_like(prior_variance), prior_variance
    chol = np.linalg.cholesky(kernel_GRR[:, :n, :n] + noise_NN)
    right = np.concatenate([np.broadcast_to(y_N[:, None], (len(chol), n, 1)), kernel_GRR[:, :n, n:]], axis=2)
    solved = np.linalg.solve(chol, right)
    z_GN, k_GNC = solved[:, :, 0], solved[:, :, 1:]
    evidence = -0.5 * (z_GN**2).sum(axis=1) - np.log(np.diagonal(chol, axis1=1, axis2=2)).sum(axis=1)
    return base + evidence, np.einsum("gn,gnc->gc", z_GN, k_GNC), prior_variance - (k_GNC**2).sum(axis=1)


def _beyond(columns: dict[str, Array], seen: int, row: int) -> tuple[str, ...]:
    if not seen:
        return ()
    return tuple(n for n, v in columns.items() if v[row] < v[:seen].min() - TINY or v[row] > v[:seen].max() + TINY)
