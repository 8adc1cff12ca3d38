"""How much a chain will differ from direct distillation at equal compute: a Bayesian ridge regression with family and edge effects.

For chain p of family f, with Delta its dev metric less that of its equal-compute twin:

    Delta_fp = a + c . x_p + u_f + sum_e b^h(e) v_fe + seed noise / sqrt(seeds)

x_p are the contrasts of `tadistill.advise.edges` (every hop's gap, times b for each hop between it and the student, less the direct hop's),
centred and scaled by what history has seen; u_f is the family's own effect, v_fe an edge's, shared by the chains of a family that use it.
a, c, u and v are normal with mean 0, so that everything is a Gaussian process over rows. The four hyper-parameters (b, and the standard
deviations of c, u and v) are averaged over a grid with the marginal likelihood as weights rather than maximised: with few families the
maximum often says that families do not differ, and intervals become too narrow. The seed noise is pooled from repeated seeds.

Variance is carried along the path by b^h: the last hop dominates (takd.md, section 1.2: how an assistant was trained moves the student by
0.3 points, which assistant it is by 2). Beyond the range that history has seen, standard deviations are widened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from tadistill.advise.edges import Candidate, Edge, contrasts, hop_weights
from tadistill.advise.pairs import Pair

Array = NDArray[np.float64]

CARRIES = {0.1: 0.25, 0.3: 0.5, 0.6: 0.25}
"""b and its prior weight."""
SLOPES = (0.1, 0.3, 1.0, 2.0)
"""Standard deviation of all slopes together, in units."""
FAMILIES = (0.1, 0.3, 0.6, 1.0)
"""Standard deviation of a family's effect, in units."""
EDGES = (0.1, 0.3, 0.8)
"""Standard deviation of an edge's effect, in units."""
TINY = 1e-9
INTERCEPT = 2.0
"""Standard deviation of a, in units."""
SEED_NOISE, SEED_WEIGHT = 1.9, 2.0
"""Standard deviation of one seed's difference before any is seen, in margins (0.4 points an arm at a margin of 0.3), and its weight."""


@dataclass(frozen=True)
class Forecast:
    """A chain's difference to its equal-compute twin: a mixture of normals, one for each point of the grid."""

    weights: Array
    means: Array
    sds: Array
    beyond: tuple[str, ...]
    """Measures on which the chain lies outside what history has seen; its standard deviations are widened for that."""

    @cached_property
    def mean(self) -> float:
        """The expected difference."""
        return float(self.weights @ self.means)

    @cached_property
    def sd(self) -> float:
        """Its standard deviation."""
        return float(np.sqrt(self.weights @ (self.sds**2 + self.means**2) - self.mean**2))

    def p_above(self, value: float) -> float:
        """The probability that the difference is larger than a value."""
        return float(self.weights @ ndtr((self.means - value) / self.sds))

    def quantile(self, share: float) -> float:
        """The value that the difference stays below with a probability, by bisection."""
        low, high = (float(f(self.means + s * 10 * self.sds)) for f, s in ((np.min, -1), (np.max, 1)))
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if 1 - self.p_above(middle) < share else (low, middle)
        return (low + high) / 2

    def interval(self, level: float) -> tuple[float, float]:
        """The central interval that holds the difference with a probability."""
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)


@dataclass(frozen=True)
class Predictions:
    """One forecast a candidate, and what they rest on."""

    forecasts: tuple[Forecast, ...]
    used: tuple[str, ...]
    """Measures that the regression could use."""
    unused: tuple[str, ...]
    """Measures that some path has and another lacks, or that never vary."""
    seed_sd: float
    """Standard deviation of one seed's difference."""
    families: int
    pairs: int


def predict(
    candidates: Sequence[Candidate], direct: Edge, history: Sequence[Pair], *, margin: float, family: str | None = None
) -> Predictions:
    """Forecasts for chains that start and end where `direct` does.

    Args:
        candidates: the chains, without the direct path.
        direct: the pair that direct distillation would use.
        history: chains of earlier studies beside their twins (`pairs.pair_up`), all in the margin's unit.
        margin: a difference that counts as none; the prior is measured in it.
        family: the family the candidates belong to, if history may hold runs of it.
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
        if carry == 0.3:  # which measures lie beyond history hardly depends on b
            beyond = [_beyond(columns, len(history), len(history) + i) for i in range(len(candidates))]
        x_RK, excess_R = _standardised(columns, len(rows), len(history))
        parts.append(_conditional(_kernels(rows, x_RK, excess_R, carry, unit), y_N, noise_NN, prior))
    log_weights, means, variances = (np.concatenate([p[i] for p in parts]) for i in range(3))
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    forecasts = tuple(Forecast(weights, means[:, i], np.sqrt(variances[:, i]), names) for i, names in enumerate(beyond))
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


def _rows(candidates: Sequence[Candidate], direct: Edge, history: Sequence[Pair], family: str | None) -> list[_Row]:
    """History's pairs, then the candidates."""
    own = family if family is not None else "\0this family"
    return [_Row(p.family, p.edges, p.direct, p.cost) for p in history] + [_Row(own, c.edges, direct, c.cost) for c in candidates]


def _seed_variance(history: Sequence[Pair], margin: float) -> float:
    """Of one seed's difference, pooled over pairs, with a prior worth `SEED_WEIGHT` seeds."""
    squares = sum(float(np.sum((np.array(p.differences) - p.mean) ** 2)) for p in history)
    freedom = sum(len(p.differences) - 1 for p in history)
    return (squares + SEED_WEIGHT * (SEED_NOISE * margin) ** 2) / (freedom + SEED_WEIGHT)


def _noise(history: Sequence[Pair], seed_variance: float) -> Array:
    """Covariance of the pairs' means: half of a difference's variance is the twin's, which chains may share."""
    noise_NN = np.zeros((len(history), len(history)))
    for i, p in enumerate(history):
        for j, q in enumerate(history):
            if i == j:
                noise_NN[i, j] = seed_variance / len(p.seeds)
            elif p.family == q.family and p.twin == q.twin:
                common = len(set(p.seeds) & set(q.seeds))
                noise_NN[i, j] = seed_variance / 2 * common / (len(p.seeds) * len(q.seeds))
    return noise_NN


def _contrasts(rows: Sequence[_Row], carry: float) -> dict[str, Array]:
    """The contrasts that every row has."""
    found = [contrasts(row.edges, row.direct, row.cost, carry) for row in rows]
    names = found[0] if found else ()
    values = {name: [f[name] for f in found] for name in names}
    return {name: np.array(v, dtype=np.float64) for name, v in values.items() if all(x is not None for x in v)}


def _standardised(columns: dict[str, Array], rows: int, seen: int) -> tuple[Array, Array]:
    """Contrasts centred and scaled by history, (rows, contrasts), and how far each row's farthest lies outside history's range, (rows,).

    Drops from `columns` what history never varied: nothing can be learnt of it, and a row that differs in it counts as one standard
    deviation outside. Without history every row does.
    """
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
    excess_RK = np.maximum(x_RK[:seen].min(axis=0) - x_RK, 0) + np.maximum(x_RK - x_RK[:seen].max(axis=0), 0)
    return x_RK, np.maximum(excess_RK.max(axis=1), unknown_R)


def _kernels(rows: Sequence[_Row], x_RK: Array, excess_R: Array, carry: float, unit: float) -> Array:
    """(grid, rows, rows): the prior covariance of Delta at each point of the grid."""
    families = np.array([row.family for row in rows])
    same_RR = (families[:, None] == families[None, :]).astype(np.float64)
    keys = [[(row.family, e.teacher, e.learner, e.measures.size_ratio) for e in row.edges] for row in rows]
    places = {key: i for i, key in enumerate(dict.fromkeys(key for of_row in keys for key in of_row))}
    edges_RE = np.zeros((len(rows), len(places)))
    for i, of_row in enumerate(keys):
        edges_RE[i, [places[key] for key in of_row]] = hop_weights(len(of_row), carry)
    slopes_RR, shared_RR = x_RK @ x_RK.T / x_RK.shape[1], edges_RE @ edges_RE.T
    # beyond history's range the line may bend: as much again as all slopes together could make of the distance, for each row by itself
    slopes_RR = slopes_RR + np.diag(excess_R**2)
    grid = np.array(list(product(SLOPES, FAMILIES, EDGES))) ** 2
    parts = np.stack([slopes_RR, same_RR, shared_RR])
    return unit**2 * (INTERCEPT**2 + np.einsum("gp,prs->grs", grid, parts))


def _conditional(kernel_GRR: Array, y_N: Array, noise_NN: Array, prior: float) -> tuple[Array, Array, Array]:
    """Log weight of each grid point, and means and variances (grid, candidates) of the candidates given history."""
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
    """The contrasts in which a row lies outside history's range."""
    if not seen:
        return ()
    return tuple(n for n, v in columns.items() if v[row] < v[:seen].min() - TINY or v[row] > v[:seen].max() + TINY)
