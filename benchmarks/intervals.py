"""Simulates studies: coverage of the 95 % interval, power, errors without effects, and time.

    OMP_NUM_THREADS=1 python benchmarks/intervals.py [--json PATH] [--markdown PATH] [--quick]

A simulated study has S training seeds and N prompts per set. Decoding seeds are averaged, so their noise is part of the prompt x seed
noise. A scenario names the shares of seed, prompt and prompt x seed in the variance of a mean difference. In addition, prompts have
a difficulty that all arms share, as large as the arm's own prompt effects. It widens an arm's interval and cancels in a difference.

Designs: `normal` is one set of 200 prompts with normal effects. `scores` clips to 0-100, with a mean of 20 before clipping; 15 % of the
prompts have effects six times as large as the others. This gives skewed scores, many of them 0, and heavy-tailed differences. `five sets`
is the same with sets of 500, 242, 80, 1694 and 1000 prompts, each at a fifth of its size. The truth is known in closed form.

`shares` are answers that are right or wrong, five for each prompt and seed. Their means lie near a bound and in the middle. The effects of
seeds, prompts and prompt x seed are normal on the logit scale. The prompts differ little (standard deviation 1) or much (3).

`interval_rules.py` has other rules for the interval.
"""

import platform
import resource
import time
from typing import Any, NamedTuple

import numpy as np
import page
from interval_rules import RULES, Scenario, rules_row
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, ndtr

from tadistill.statistics import Difference, holm, macro_difference, macro_interval

Array = NDArray[np.float64]


class Design(NamedTuple):
    """Number of prompts and mean score of every set, and whether scores are clipped to 0-100."""

    sizes: tuple[int, ...]
    means: tuple[float, ...]
    clipped: bool


SCENARIOS = {
    "all seed": Scenario(1, 0, 0),
    "mostly seed": Scenario(1, 0.1, 0.1),
    "seed and noise": Scenario(1, 0, 1),
    "equal": Scenario(1, 1, 1),
    "mostly prompt": Scenario(0.1, 1, 0.1),
    "all prompt": Scenario(0, 1, 0),
    "all prompt x seed noise": Scenario(0, 0, 1),
}
DESIGNS = {
    "normal": Design((200,), (20.0,), False),
    "scores": Design((200,), (20.0,), True),
    "five sets": Design((100, 48, 16, 339, 200), (20.0, 12.0, 30.0, 15.0, 8.0), True),
}
SEEDS = (3, 5, 10)
EFFECT = 3.0
SPREADS, SPREAD_SHARES = np.array([0.4, 2.4]), np.array([0.85, 0.15])
"""Scale of a prompt's effects and how common it is: a mean square of 1."""
SHARES, PROMPTS, ANSWERS = (0.02, 0.10, 0.50, 0.98), 200, 5
SPREADS_ON_LOGITS = {"prompts differ little": (0.1, 1.0, 0.3), "seeds differ": (0.5, 1.0, 0.5), "prompts differ much": (0.3, 3.0, 0.5)}
"""Standard deviations of seeds, prompts, and prompt x seed."""
NORMAL_X, NORMAL_W = np.polynomial.hermite_e.hermegauss(201)


class Effects(NamedTuple):
    """Standard deviations of one arm's effects, and of the difficulty that arms share."""

    seed: float
    prompt: float
    both: float
    difficulty: float


def effects(design: Design, scenario: Scenario, seeds: int) -> Effects:
    """Return standard deviations that give the scenario's shares, 20 points for the largest of a prompt's own."""
    per_prompt = sum(1 / n for n in design.sizes) / len(design.sizes) ** 2
    unit = 400.0 / max(scenario.prompt, seeds * scenario.both, 1.0 * (scenario.prompt == scenario.both == 0))
    variances = (per_prompt * seeds * scenario.seed, scenario.prompt, seeds * scenario.both, scenario.prompt)
    return Effects(*(float(np.sqrt(unit * variance)) for variance in variances))


def simulate(rng: np.random.Generator, design: Design, sd: Effects, seeds: int, shifts: tuple[float, ...]) -> list[list[Array]]:
    """Return the sets' scores of each arm, (seeds, prompts, 1)."""
    arms: list[list[Array]] = [[] for _ in shifts]
    wobbles = rng.normal(0, sd.seed, size=(len(shifts), seeds, 1))  # a seed moves all sets of its arm
    for size, mean in zip(design.sizes, design.means, strict=True):
        scale_N = rng.choice(SPREADS, p=SPREAD_SHARES, size=size) if design.clipped else np.ones(size)
        difficulty_N = rng.normal(0, sd.difficulty, size=size)
        for arm, shift, wobble_S1 in zip(arms, shifts, wobbles, strict=True):
            own_SN = rng.normal(0, sd.prompt, size=size) + rng.normal(0, sd.both, size=(seeds, size))
            scores_SN = mean + shift + difficulty_N + wobble_S1 + scale_N * own_SN
            arm.append((np.clip(scores_SN, 0, 100) if design.clipped else scores_SN)[..., None])
    return arms


def true_mean(design: Design, sd: Effects, shift: float) -> float:
    """Return the expectation of a macro mean."""
    centres = np.array(design.means) + shift
    if not design.clipped:
        return float(centres.mean())
    deviations = np.sqrt(sd.seed**2 + sd.difficulty**2 + SPREADS**2 * (sd.prompt**2 + sd.both**2))

    def above(m: Array) -> Array:  # E max(X, 0) of X ~ N(m, deviations)
        z = m / deviations
        return m * ndtr(z) + deviations * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

    means = above(centres[:, None]) - above(centres[:, None] - 100)
    return float((means @ SPREAD_SHARES).mean())


def coverage(design: Design, scenario: Scenario, seeds: int, studies: int) -> dict[str, float]:
    """Return the percentage of studies whose intervals contain the truth, and mean widths."""
    rng = np.random.default_rng((seeds, *(int(100 * share) for share in scenario), len(design.sizes), design.clipped))
    sd = effects(design, scenario, seeds)
    mean, effect = true_mean(design, sd, EFFECT), true_mean(design, sd, EFFECT) - true_mean(design, sd, 0.0)
    found: list[tuple[float, ...]] = []
    bounds = (0.0, 100.0) if design.clipped else (-np.inf, np.inf)
    for _ in range(studies):
        a, b = simulate(rng, design, sd, seeds, (EFFECT, 0.0))
        low, high = macro_interval(a, bounds=bounds)
        d = macro_difference(a, b, bounds=bounds)
        in_90 = d.low90 <= effect <= d.high90
        found.append((low <= mean <= high, high - low, d.low <= effect <= d.high, d.high - d.low, in_90))
    macro, macro_width, apart, apart_width, apart_90 = np.mean(np.array(found, dtype=np.float64), axis=0)
    return {
        "macro": 100 * macro,
        "macro_width": macro_width,
        "difference": 100 * apart,
        "difference_width": apart_width,
        "difference_90": 100 * apart_90,
    }


def share_of(logit_mean: float, deviation: float) -> float:
    """Return the expectation of expit(X), X normal."""
    return float(NORMAL_W @ expit(logit_mean + deviation * NORMAL_X) / NORMAL_W.sum())


def coverage_of_shares(share: float, spread: tuple[float, float, float], seeds: int, studies: int) -> dict[str, float]:
    """Return the percentage of studies whose intervals contain the true share, and how often they lie above or below it.

    `plain` is the interval without bounds. `difference` compares with an arm whose logit is 0.7 higher.
    """
    rng = np.random.default_rng((3, seeds, int(100 * share), *(int(10 * x) for x in spread)))
    of_seed, of_prompt, of_both = spread
    deviation = float(np.sqrt(of_seed**2 + of_prompt**2 + of_both**2))
    centre = brentq(lambda x: share_of(x, deviation) - share, -30, 30)
    truth, other = 100 * share, 100 * share_of(centre + 0.7, deviation)
    found: list[tuple[float, ...]] = []
    for _ in range(studies):
        common_N = rng.normal(0, np.sqrt(0.5) * of_prompt, size=PROMPTS)
        scores = []
        for shift in (0.0, 0.7):
            own_N = rng.normal(0, np.sqrt(0.5) * of_prompt, size=PROMPTS)
            logits_SN = rng.normal(0, of_seed, size=(seeds, 1)) + common_N + own_N + rng.normal(0, of_both, size=(seeds, PROMPTS))
            right_SN = rng.binomial(ANSWERS, expit(centre + shift + logits_SN))
            scores.append([100 / ANSWERS * right_SN[..., None]])
        low, high = macro_interval(scores[0], bounds=(0, 100))
        plain = macro_interval(scores[0])
        d = macro_difference(scores[1], scores[0], bounds=(0, 100))
        inside = (low <= truth <= high, plain[0] <= truth <= plain[1], d.low <= other - truth <= d.high)
        found.append((*inside, truth < low, truth > high, low < 0 or high > 100))
    names = ("one", "plain", "difference", "too_high", "too_low", "outside")
    return dict(zip(names, (100 * np.mean(np.array(found, dtype=np.float64), axis=0)).tolist(), strict=True))


def null_study(scenario: Scenario, seeds: int, studies: int, arms: int = 12) -> dict[str, float]:
    """Return the percentage of studies of equal arms in which Holm's correction over the comparisons with the first arm finds nothing."""
    design, rng = DESIGNS["five sets"], np.random.default_rng((1, seeds, *(int(100 * share) for share in scenario)))
    sd = effects(design, scenario, seeds)
    nothing, single = 0, 0
    for _ in range(studies):
        first, *others = simulate(rng, design, sd, seeds, (0.0,) * arms)
        p = [macro_difference(other, first).p for other in others]
        nothing += min(holm(p)) >= 0.05
        single += sum(value < 0.05 for value in p)
    return {"finds_nothing": 100 * nothing / studies, "single_below_5": 100 * single / studies / (arms - 1)}


def power(scenario: Scenario, seeds: int, effect: float, studies: int) -> float:
    """Return the percentage of studies whose interval excludes 0, by the size of the effect in true standard errors."""
    design, rng = DESIGNS["normal"], np.random.default_rng((2, seeds, int(10 * effect), *(int(100 * share) for share in scenario)))
    sd = effects(design, scenario, seeds)
    size = design.sizes[0]
    shift = effect * float(np.sqrt(2 * (sd.seed**2 / seeds + sd.prompt**2 / size + sd.both**2 / (seeds * size))))
    hits = 0
    for _ in range(studies):
        a, b = simulate(rng, design, sd, seeds, (shift, 0.0))
        hits += not macro_difference(a, b).covers_zero
    return 100 * hits / studies


# --- speed ---------------------------------------------------------------------------------------------------------------


def speed(arms: int = 12, sets: int = 5, prompts: int = 3000, seeds: int = 5) -> dict[str, float]:
    """Return the seconds for an interval of every arm and the differences from the first, and this process's peak memory."""
    rng = np.random.default_rng(5)
    scores = [[rng.normal(size=(seeds, prompts, 5)) for _ in range(sets)] for _ in range(arms)]
    start = time.perf_counter()
    for strata in scores:
        macro_interval(strata)
    differences = [macro_difference(strata, scores[0]) for strata in scores[1:]]
    assert all(isinstance(d, Difference) for d in differences)
    seconds = time.perf_counter() - start
    own_mb = sum(values.nbytes for strata in scores for values in strata) / 1e6
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"seconds": seconds, "peak_mb": peak_mb, "scores_mb": own_mb}


# --- report --------------------------------------------------------------------------------------------------------------


def measure(quick: bool) -> dict[str, Any]:
    """Return all results, as rows."""
    studies, draws = (40, 400) if quick else (2000, 4000)
    start = time.perf_counter()
    at = [(name, scenario, seeds) for name, scenario in SCENARIOS.items() for seeds in SEEDS]
    result: dict[str, Any] = {
        # first, so that the peak of memory is its own
        "speed": speed(prompts=100) if quick else speed(),
        "studies": studies,
        "binomial_se": 100 * float(np.sqrt(0.95 * 0.05 / studies)),
        "coverage": [
            {"design": title, "scenario": name, "seeds": seeds, **coverage(design, scenario, seeds, studies)}
            for title, design in DESIGNS.items()
            for name, scenario, seeds in at
        ],
        "shares": [
            {"share": share, "spread": name, "seeds": seeds, **coverage_of_shares(share, spread, seeds, studies)}
            for share in SHARES
            for name, spread in SPREADS_ON_LOGITS.items()
            for seeds in SEEDS[:2]
        ],
        "null": [
            {"scenario": name, "seeds": 3, **null_study(SCENARIOS[name], 3, studies)}
            for name in ("equal", "all prompt", "all prompt x seed noise")
        ],
        "power": [
            {"scenario": name, "seeds": seeds, **{str(e): power(SCENARIOS[name], seeds, e, studies) for e in (2.0, 2.8, 4.0)}}
            for name in ("all seed", "equal", "all prompt")
            for seeds in SEEDS
        ],
        "rules": [{"scenario": name, "seeds": seeds, **rules_row(scenario, seeds, draws)} for name, scenario, seeds in at],
    }
    return {**result, "seconds": time.perf_counter() - start, "python": platform.python_version(), "numpy": np.__version__}


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    lowest, highest = (end(row[key] for row in result["coverage"] for key in ("macro", "difference")) for end in (min, max))
    took = result["speed"]
    parts = [
        "# Intervals: coverage, power, time\n",
        "This page shows how often the report's 95 % intervals contain the truth in simulated studies, and which effects they detect.\n",
        f"```\n{result['command']}\n```\n",
        f"{result['studies']:,} simulated studies per cell, one core, {result['seconds']:.0f} s; "
        f"Python {result['python']}, numpy {result['numpy']}. The binomial standard error of a coverage near 95 % is "
        f"{result['binomial_se']:.1f}. `benchmarks/intervals.py` describes the simulation.\n",
        "## Coverage of the 95 % interval\n",
        f"Coverage is {lowest:.1f} to {highest:.1f} % over all cells. *90 %* is the interval of the equivalence test.\n",
        table(
            ("design", "variance", "seeds", "one arm %", "width", "difference %", "width", "90 %"),
            [
                (
                    *(str(row[key]) for key in ("design", "scenario", "seeds")),
                    *(f"{row[key]:.{digits}f}" for key, digits in COVERAGE_COLUMNS.items()),
                )
                for row in result["coverage"]
            ],
        ),
        "## Near the bounds\n\nOne set of 200 prompts, five right or wrong answers for each prompt and seed. *Too high* is the "
        "percentage of intervals above the truth, *too low* of those below. *Without bounds* is the coverage of mean ± t se. "
        f"{max(row['outside'] for row in result['shares']):.0f} % of the intervals left 0 to 100.\n",
        table(
            ("true mean %", "spread", "seeds", "one arm %", "too high", "too low", "without bounds %", "difference %"),
            [
                (
                    *(f"{100 * row['share']:.0f}", row["spread"], str(row["seeds"])),
                    *(f"{row[name]:.1f}" for name in ("one", "too_high", "too_low", "plain", "difference")),
                )
                for row in result["shares"]
            ],
        ),
        "## No effects\n\nTwelve equal arms, five sets, Holm's correction over the eleven comparisons with the first arm.\n",
        table(
            ("variance", "seeds", "studies that find nothing %", "single comparisons with p < 0.05 %"),
            [(row["scenario"], str(row["seeds"]), f"{row['finds_nothing']:.1f}", f"{row['single_below_5']:.1f}") for row in result["null"]],
        ),
        "## Power\n\nPercentage of studies whose interval excludes 0, by the size of the effect in true standard errors. With known "
        "variances, an effect of 2.8 would give 80 %.\n",
        table(
            ("variance", "seeds", "2", "2.8", "4"),
            [(row["scenario"], str(row["seeds"]), *(f"{row[e]:.0f}" for e in ("2.0", "2.8", "4.0"))) for row in result["power"]],
        ),
        "## Other rules\n\nCoverage in percent and mean width in true standard errors, one set of 500 prompts, normal effects.\n",
        table(
            ("variance", "seeds", *RULES),
            [
                (row["scenario"], str(row["seeds"]), *(f"{row[name]['coverage']:.1f} ({row[name]['width']:.1f})" for name in RULES))
                for row in result["rules"]
            ],
        ),
        "## Time\n\n12 intervals and 11 differences, 5 sets of 3,000 prompts, 5 seeds, 5 decoding seeds: "
        f"{took['seconds']:.1f} s; peak memory of the process {took['peak_mb']:.0f} MB, "
        f"of which {took['scores_mb']:.0f} MB are the scores.",
    ]
    return "\n".join(parts) + "\n"


COVERAGE_COLUMNS = {"macro": 1, "macro_width": 2, "difference": 1, "difference_width": 2, "difference_90": 1}


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return page.table(columns, rows, left=("variance", "design", "spread")) + "\n"


def main() -> None:
    options = page.parser(__doc__, "few studies").parse_args()
    page.write(options, {"command": page.command("OMP_NUM_THREADS=1 "), **measure(options.quick)}, markdown)


if __name__ == "__main__":
    main()
