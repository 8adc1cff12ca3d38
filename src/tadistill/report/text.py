"""Numbers and findings in words: what the page, the Markdown file and the terminal say alike.

The rule behind the sentences: a difference is only called one when its paired 95 % interval excludes 0, a chain is only
compared with the direct arm of equal compute, and fewer than three training seeds are called too few.
"""

from dataclasses import dataclass
from typing import Literal

from tadistill.report.collect import MEAN, Results, Summary, compare, primary_metric, sets_with, twin_of
from tadistill.report.files import Arm
from tadistill.statistics import Difference

SEEDS_FOR_A_CLAIM = 3
MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"

_TITLES = {
    "rouge_l": "ROUGE-L",
    "fact_accuracy": "fact accuracy",
    "loss": "reference loss",
    "forward_kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "length": "answer length",
}
_UNITS = {
    "rouge_l": "points",
    "fact_accuracy": "percentage points",
    "loss": "nats/token",
    "forward_kl": "nats/token",
    "reverse_kl": "nats/token",
    "length": "tokens",
}
_DECIMALS = {"rouge_l": 1, "fact_accuracy": 1, "length": 1}  # of a value; a difference shows one more


@dataclass(frozen=True)
class Finding:
    """One sentence of the headline; `kind` only decides how a page marks it."""

    kind: Literal["best", "gain", "loss", "none", "caution"]
    text: str


def metric_title(metric: str) -> str:
    """A metric's name for readers; a metric that this module does not know keeps its own."""
    return _TITLES.get(metric, metric)


def metric_unit(metric: str) -> str:
    """The unit of a metric, or an empty string."""
    return _UNITS.get(metric, "")


def number(value: float, metric: str, *, more: int = 0) -> str:
    """A value with the metric's number of decimals and a real minus sign."""
    text = f"{value:.{_DECIMALS.get(metric, 3) + more}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def interval(low: float, high: float, metric: str, *, more: int = 0) -> str:
    """``[low, high]``."""
    return f"[{number(low, metric, more=more)}, {number(high, metric, more=more)}]"


def summary_text(summary: Summary, metric: str) -> str:
    """``24.6 [23.8, 25.4]``."""
    return f"{number(summary.mean, metric)} {interval(summary.low, summary.high, metric)}"


def difference_text(difference: Difference, metric: str) -> str:
    """``+0.83 [0.21, 1.44]`` with the unit."""
    more = 1 if metric in _DECIMALS else 0
    sign = "+" if difference.mean > 0 else ""
    value = sign + number(difference.mean, metric, more=more)
    return f"{value} {interval(difference.low, difference.high, metric, more=more)} {metric_unit(metric)}".rstrip()


def parameters_text(count: int) -> str:
    """``124 M``, ``1.56 B``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            scaled = count / size
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {letter}"
    return str(count)


def flops_text(flops: float | None) -> str:
    """``3.1e17``, or a dash when the plan could not tell."""
    if flops is None:
        return DASH
    if flops == 0:
        return "0"
    mantissa, exponent = f"{flops:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def ratio_text(ratio: float | None) -> str:
    """``2.47`` and a multiplication sign, or a dash."""
    return DASH if ratio is None else f"{ratio:.2f}{TIMES}"


def headline(results: Results) -> list[Finding]:
    """The study in sentences: the best arm, every chain against its equal-compute twin, and the cautions."""
    metric = primary_metric(results)
    if not results.summaries:
        findings = [Finding("caution", "No arm has been evaluated yet.")]
    else:
        chains = [arm for arm in results.plan.arms if arm.is_chain]
        findings = [*_best(results, metric), *(_against_twin(results, arm, metric) for arm in chains)]
        findings += _too_few_seeds(results)
    if results.missing:
        findings.append(Finding("caution", missing_text(results)))
    return findings


def missing_text(results: Results) -> str:
    """Which evaluations are not finished, and what finishes them."""
    by_arm: dict[str, list[int]] = {}
    for entry in results.missing:
        by_arm.setdefault(entry.arm, []).append(entry.seed)
    total = sum(len(arm.evaluate) for arm in results.plan.arms)
    listed = "; ".join(f"{arm} (seed {', '.join(map(str, seeds))})" for arm, seeds in by_arm.items())
    return f"{len(results.missing)} of {total} evaluations are not finished: {listed}. `{results.plan.command}` continues where it stopped."


def _best(results: Results, metric: str) -> list[Finding]:
    """One sentence for each student size: arms that end in different models do not compete."""
    n_sets = len(sets_with(results, metric))
    over = f"mean over {n_sets} sets" if n_sets > 1 else f"on {sets_with(results, metric)[0]}"
    findings: list[Finding] = []
    students = dict.fromkeys(arm.model for arm in results.plan.arms if arm.model != results.plan.teacher)
    for model in students:
        scored = [
            (results.summaries[arm.name, MEAN, metric], arm)
            for arm in results.plan.arms
            if arm.model == model and (arm.name, MEAN, metric) in results.summaries
        ]
        scored.sort(key=lambda pair: -pair[0].mean)
        if not scored:
            continue
        summary, arm = scored[0]
        size = parameters_text(results.plan.parameters[model])
        text = f"{arm.name} ({arm.path_text}), {summary_text(summary, metric)} {metric_title(metric)}, {over}"
        if len(scored) == 1:
            findings.append(Finding("best", f"The only arm that ends in {model} ({size}) is {text}."))
        else:
            next_best = _against_next(results, arm, scored[1][1], metric)
            findings.append(Finding("best", f"Highest mean for {model} ({size}): {text}. {next_best}"))
    return findings


def _against_next(results: Results, arm: Arm, other: Arm, metric: str) -> str:
    compared = compare(results, arm.name, other.name, metric)
    if compared is None:
        return f"It shares no finished seed with the next, {other.name}."
    difference, _ = compared
    verdict = "No evidence of a difference from" if difference.covers_zero else "Ahead of"
    return f"{verdict} the next, {other.name}: {difference_text(difference, metric)}."


def _against_twin(results: Results, chain: Arm, metric: str) -> Finding:
    name = f"{chain.name} ({chain.path_text})"
    twin = twin_of(results, chain)
    if twin is None:
        return Finding(
            "caution",
            f"{name} has no equal-compute twin (an arm with `compute: as {chain.name}`), so nothing it gains can be credited to its path.",
        )
    compared = compare(results, chain.name, twin.name, metric)
    if compared is None:
        return Finding("caution", f"{name} and its equal-compute twin {twin.name} share no finished seed yet.")
    difference, seeds = compared
    numbers = f"{difference_text(difference, metric)} ({_seeds(len(seeds))})"
    versus = f"its equal-compute twin {twin.name}"
    if difference.covers_zero:
        return Finding("none", f"{name}: no evidence of a difference from {versus}, {numbers}.")
    if difference.mean > 0:
        return Finding("gain", f"{name} scores higher than {versus}: {numbers}.")
    return Finding("loss", f"{name} scores lower than {versus}: {numbers}.")


def _too_few_seeds(results: Results) -> list[Finding]:
    fewest = min(len(seeds) for seeds in results.scores.values() if seeds)
    if fewest >= SEEDS_FOR_A_CLAIM:
        return []
    return [Finding("caution", f"{_seeds(fewest)}: too few for a claim ({SEEDS_FOR_A_CLAIM} are the least).")]


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"
