"""The regression against explicit Bayesian linear algebra, chains beside their twins, and what lies beyond history."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from tadistill.advise import predict
from tadistill.advise.history import Candidate, Edge, EdgeMeasures, Observation
from tadistill.advise.twins import pair_up
from tadistill.errors import ConfigError
from tadistill.statistics import spread_claimed


def hops(path, ratios, kls=None):
    return tuple(
        Edge(a, b, EdgeMeasures(size_ratio=ratios[a] / ratios[b], reverse_kl=None if kls is None else kls[a, b])) for a, b in pairwise(path)
    )


SIZES = {"t": 12.0, "a": 5.0, "b": 2.0, "s": 1.0}


def observe(family, path, cost, qualities, sizes=SIZES):
    return [Observation(family, path, seed, hops(path, sizes), cost, q, "rouge_l") for seed, q in enumerate(qualities)]


def test_contrasts_of_direct_are_zero_and_a_chain_is_its_discounted_hops_less_direct():
    kls = {("t", "s"): 0.5, ("t", "a"): 0.2, ("a", "s"): 0.3}
    (direct,) = hops("ts", SIZES, kls)
    assert set(predict.contrasts((direct,), direct, 1.0, 0.3).values()) == {0.0, None}
    found = predict.contrasts(hops("tas", SIZES, kls), direct, 2.0, 0.3)
    assert found["reverse_kl"] == pytest.approx(0.3 + 0.3 * 0.2 - 0.5)
    assert found["size"] == pytest.approx(np.log(5) + 0.3 * np.log(12 / 5) - np.log(12))
    assert found["cost"] == pytest.approx(np.log(2))
    assert found["overlap"] is None


def test_measures_are_checked():
    with pytest.raises(ConfigError, match=r"size_ratio is -1.*positive"):
        EdgeMeasures(size_ratio=-1.0)
    with pytest.raises(ConfigError, match=r"reverse_kl is nan.*finite"):
        EdgeMeasures(reverse_kl=float("nan"))


def test_a_chain_is_compared_with_direct_at_its_own_cost_and_seed():
    observations = [
        *observe("f", ("t", "s"), 1.0, [20.0, 21.0, 22.0]),
        *observe("f", ("t", "s"), 4.0, [24.0, 26.0]),
        *observe("f", ("t", "a", "s"), 4.1, [25.0, 26.5, 99.0]),  # the third seed has no twin
        *observe("f", ("t", "b", "s"), 2.0, [23.0]),  # half-way between 1 and 4 in the log
        *observe("f", ("t", "a", "b", "s"), 9.0, [99.0]),  # dearer than every direct run
        *observe("other", ("t", "a", "s"), 1.0, [99.0]),  # no direct run at all
    ]
    matched, between = pair_up(observations)
    assert (matched.path, matched.seeds, matched.differences, matched.twin) == (("t", "a", "s"), (0, 1), (1.0, 0.5), (4.0,))
    assert (between.path, between.twin) == (("t", "b", "s"), (1.0, 4.0))
    assert between.differences == pytest.approx((23.0 - 22.0,))


def test_two_students_of_one_name_are_not_mixed_up():
    small = {**SIZES, "s": 0.5}
    observations = [
        *observe("f", ("t", "s"), 1.0, [20.0]),
        *observe("f", ("t", "s"), 1.0, [10.0], small),
        *observe("f", ("t", "a", "s"), 1.0, [21.0]),
        *observe("f", ("t", "a", "s"), 1.0, [12.0], small),
    ]
    assert sorted(p.mean for p in pair_up(observations)) == [1.0, 2.0]


def some_pairs(rng, families=4, seeds=3):
    observations = []
    for f in range(families):
        sizes = {"t": rng.uniform(10, 40), "a": rng.uniform(4, 9), "b": rng.uniform(2, 3.5), "s": 1.0}
        for path in ("tas", "tbs", "tabs"):
            cost = rng.uniform(1.5, 3.5)
            observations += observe(f"f{f}", ("t", "s"), cost, 20 + 0.4 * rng.normal(size=seeds), sizes)
            observations += observe(f"f{f}", tuple(path), cost, 20.5 + 0.4 * rng.normal(size=seeds), sizes)
    return pair_up(observations)


@pytest.mark.parametrize("own", [None, "f1"])
def test_forecasts_are_those_of_the_linear_model(monkeypatch, own):
    """At one grid point: latent a, c, u_f and v_fe with diagonal priors, solved by the normal equations instead of kernels."""
    rng = np.random.default_rng(3)
    history = some_pairs(rng)
    carry, slope, family_sd, edge_sd = 0.3, 1.0, 0.6, 0.3
    for name, value in {"CARRIES": {carry: 1.0}, "SLOPES": (slope,), "FAMILIES": (family_sd,), "EDGES": (edge_sd,)}.items():
        monkeypatch.setattr(predict, name, value)
    chains = [Candidate(tuple(p), 2.0, hops(p, {"t": 20.0, "a": 6.0, "b": 2.5, "s": 1.0})) for p in ("tas", "tabs")]
    (direct,) = hops("ts", {"t": 20.0, "s": 1.0})
    found = predict.predict(chains, direct, history, margin=0.3, family=own)

    unit = max(0.3, np.sqrt(np.mean([p.mean**2 for p in history])))
    squares = sum(np.sum((np.array(p.differences) - p.mean) ** 2) for p in history)
    noise = (squares + 2 * (1.9 * 0.3) ** 2) / (sum(len(p.differences) - 1 for p in history) + 2)
    rows = [(p.family, p.edges, p.direct, p.cost) for p in history] + [(own or "new", c.edges, direct, c.cost) for c in chains]
    known = [{k: v for k, v in predict.contrasts(e, d, c, carry).items() if v is not None} for _, e, d, c in rows]
    x = np.array([list(k.values()) for k in known])
    seen = x[: len(history)]
    beyond = np.maximum(seen.min(0) - x, 0) + np.maximum(x - seen.max(0), 0)
    z, beyond = (x - seen.mean(0)) / seen.std(0), beyond / seen.std(0)
    families = sorted({r[0] for r in rows})
    edge_keys = sorted({(r[0], e.teacher, e.learner, e.measures.size_ratio) for r in rows for e in r[1]})
    design = np.zeros((len(rows), 1 + x.shape[1] + len(families) + len(edge_keys)))
    design[:, 0] = 1
    design[:, 1 : 1 + x.shape[1]] = z
    for i, (family, of_row, _, _) in enumerate(rows):
        design[i, 1 + x.shape[1] + families.index(family)] = 1
        for j, e in enumerate(of_row):
            key = (family, e.teacher, e.learner, e.measures.size_ratio)
            design[i, 1 + x.shape[1] + len(families) + edge_keys.index(key)] = carry ** (len(of_row) - 1 - j)
    prior = [2.0, *[slope / np.sqrt(x.shape[1])] * x.shape[1], *[family_sd] * len(families), *[edge_sd] * len(edge_keys)]
    prior = (unit * np.array(prior)) ** 2
    n = len(history)
    precision = np.diag(1 / prior) + design[:n].T @ design[:n] / (noise / 3)
    covariance = np.linalg.inv(precision)
    mean = covariance @ design[:n].T @ np.array([p.mean for p in history]) / (noise / 3)
    for forecast, row, out in zip(found.forecasts, design[n:], beyond[n:], strict=True):
        extra = (unit * slope * out.max()) ** 2
        assert forecast.mean == pytest.approx(row @ mean)
        assert forecast.sd == pytest.approx(np.sqrt(row @ covariance @ row + extra))
    assert found.seed_sd == pytest.approx(np.sqrt(noise))


def test_without_history_the_forecast_is_the_wide_prior():
    (direct,) = hops("ts", SIZES)
    found = predict.predict([Candidate(("t", "a", "s"), 2.0, hops("tas", SIZES))], direct, [], margin=0.3)
    (forecast,) = found.forecasts
    assert forecast.mean == 0
    assert 0.5 < forecast.sd < 1.5
    low, high = forecast.interval(0.95)
    assert low == pytest.approx(-high)
    assert forecast.p_above(0.0) == pytest.approx(0.5)
    assert found.used == ()


def test_quantiles_of_a_mixture():
    one = predict.Forecast(np.array([1.0]), np.array([0.7]), np.array([0.4]), ())
    assert one.interval(0.9) == pytest.approx(stats.norm.interval(0.9, 0.7, 0.4), abs=1e-6)
    two = predict.Forecast(np.array([0.3, 0.7]), np.array([-1.0, 2.0]), np.array([0.5, 1.5]), ())
    share = 0.3 * stats.norm.cdf(two.quantile(0.2), -1, 0.5) + 0.7 * stats.norm.cdf(two.quantile(0.2), 2, 1.5)
    assert share == pytest.approx(0.2, abs=1e-6)
    draws = np.random.default_rng(0).normal(
        *np.array([[-1, 0.5], [2, 1.5]])[(np.random.default_rng(1).random(400_000) < 0.7).astype(int)].T
    )
    assert two.sd == pytest.approx(draws.std(), rel=0.01)


def test_beyond_history_is_named_and_wider():
    history = some_pairs(np.random.default_rng(5))
    (direct,) = hops("ts", {"t": 20.0, "s": 1.0})
    inside = Candidate(("t", "a", "s"), 2.0, hops("tas", {"t": 20.0, "a": 6.0, "s": 1.0}))
    dear = Candidate(("t", "a", "s"), 60.0, inside.edges)
    near, far = (predict.predict([c], direct, history, margin=0.3).forecasts[0] for c in (inside, dear))
    assert near.beyond == ()
    assert far.beyond == ("cost",)
    assert far.sd > 1.5 * near.sd


@pytest.mark.parametrize("alike", [0.0, 1e-7, 1e-4, 1e-2])
def test_two_earlier_chains_that_are_alike_make_no_other_chain_infinitely_different(alike):
    """An interval was 60 times as wide as all differences that were ever seen, because the chains differed by 1e-6."""
    sizes = {"t": 20.0, "a": 6.0, "b": 6.0 * (1 + alike), "s": 1.0}
    runs = observe("f", (*"ts",), 2.0, [20.0, 20.1, 19.9], sizes)
    for path in ("tas", "tbs"):
        runs += observe("f", tuple(path), 2.0, [19.0, 18.9, 19.1], sizes)
    chain, (direct,) = Candidate((*"tabs",), 2.3, hops("tabs", {**sizes, "b": 2.0})), hops("ts", sizes)
    (forecast,) = predict.predict([chain], direct, pair_up(runs), margin=0.3, family="f").forecasts
    low, high = forecast.interval(0.95)
    assert "size" in forecast.beyond or alike == 0
    assert -15 < low < high < 15


def test_a_measure_that_history_lacks_is_named_and_not_used():
    history = some_pairs(np.random.default_rng(5))
    kls = {("t", "s"): 0.5, ("t", "a"): 0.2, ("a", "s"): 0.3}
    sizes = {"t": 20.0, "a": 6.0, "s": 1.0}
    found = predict.predict([Candidate(("t", "a", "s"), 2.0, hops("tas", sizes, kls))], hops("ts", sizes, kls)[0], history, margin=0.3)
    assert found.used == ("cost", "size", "size_law")
    assert found.unused == ("reverse_kl",)


def test_runs_of_the_own_family_count_for_more():
    history = some_pairs(np.random.default_rng(5))
    sizes = {"t": 20.0, "a": 6.0, "s": 1.0}
    own = pair_up(
        [*observe("own", ("t", "s"), 2.0, [20.0, 20.2, 19.8], sizes), *observe("own", ("t", "a", "s"), 2.0, [23.0, 23.1, 22.9], sizes)]
    )
    chain, (direct,) = Candidate(("t", "a", "s"), 2.0, hops("tas", sizes)), hops("ts", sizes)
    as_own, as_other = (predict.predict([chain], direct, [*history, *own], margin=0.3, family=f).forecasts[0] for f in ("own", None))
    assert as_own.sd < as_other.sd
    assert abs(as_own.mean - 3.0) < abs(as_other.mean - 3.0)
    assert as_own.mean > 2.0


@pytest.mark.parametrize("differences", [[-9.0, -6.0, -0.6], [-5.3, -5.2, -5.1], [1.0, 3.0, 8.0]])
def test_one_chain_gives_no_surer_forecast_than_its_own_t_test(differences):
    (direct,) = hops("ts", SIZES)
    chain = Candidate(("t", "a", "s"), 2.0, hops("tas", SIZES))
    history = pair_up([*observe("f", ("t", "s"), 2.0, [20.0] * 3), *observe("f", ("t", "a", "s"), 2.0, [20.0 + d for d in differences])])
    (forecast,) = predict.predict([chain], direct, history, margin=0.3, family="f").forecasts
    low, high = forecast.interval(0.95)
    better = forecast.p_above(0.0)
    own = stats.ttest_1samp(differences, 0.0, alternative="greater")
    own_low, own_high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert high - low >= own_high - own_low
    assert min(own.pvalue, 1 - own.pvalue) <= min(better, 1 - better)


def test_a_forecast_is_no_surer_than_the_report_of_its_chain():
    """The report counts prompts too: -5.5 [-16.9, 5.1], p = 0.3, where the seeds agree by luck."""
    (direct,) = hops("ts", SIZES)
    chain = Candidate(("t", "a", "s"), 2.0, hops("tas", SIZES))
    claimed = spread_claimed(-5.5, 11.0, 0.3)
    runs = [*observe("f", ("t", "s"), 2.0, [20.0] * 3), *observe("f", ("t", "a", "s"), 2.0, [14.5, 14.6, 14.4])]
    history = pair_up([replace(run, reported=claimed if len(run.path) > 2 else 0.0) for run in runs])
    (forecast,) = predict.predict([chain], direct, history, margin=0.3, family="f").forecasts
    low, high = forecast.interval(0.95)
    assert high - low >= 22
    assert forecast.p_above(0.0) >= 0.15 - 1e-6
