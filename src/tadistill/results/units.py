"""Names and units of metrics, and numbers as every output writes them."""

from tadistill.results.collect import Summary
from tadistill.statistics import Difference

MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"

_TITLES = {
    "rouge_l": "ROUGE-L",
    "fact_accuracy": "fact accuracy",
    "exact_match": "exact match",
    "label_accuracy": "label accuracy",
    "loss": "reference loss",
    "perplexity": "perplexity",
    "ece_tokens": "calibration error of tokens",
    "ece_labels": "calibration error of labels",
    "forward_kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "length": "answer length",
    "repetition": "repeated 4-grams",
    "entropy": "entropy",
    "self_bleu": "self-BLEU",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_4": "distinct 4-grams",
}
_POINTS, _PERCENT, _NATS = "points", "percentage points", "nats/token"
_UNITS = {
    "rouge_l": _POINTS,
    "fact_accuracy": _PERCENT,
    "exact_match": _PERCENT,
    "label_accuracy": _PERCENT,
    "loss": _NATS,
    "ece_tokens": _PERCENT,
    "ece_labels": _PERCENT,
    "forward_kl": _NATS,
    "reverse_kl": _NATS,
    "budget": _NATS,
    "length": "tokens",
    "repetition": _PERCENT,
    "entropy": _NATS,
    "self_bleu": _POINTS,
    "distinct_1": _PERCENT,
    "distinct_2": _PERCENT,
    "distinct_4": _PERCENT,
}
_DECIMALS = {"length": 1, "perplexity": 2} | {metric: 1 for metric, unit in _UNITS.items() if unit in (_POINTS, _PERCENT)}
"""Of a value (3 for what is not named); a difference in points shows one more in tables."""


def metric_title(metric: str) -> str:
    """A metric's name for readers; a metric that this module does not know keeps its own."""
    name, _, decoding = metric.partition("@")
    if name.startswith("budget/"):
        hop = name.removeprefix("budget/")
        title = "KL to the last assistant" if hop == "0" else f"error of hop {hop} above it"
    else:
        title = _TITLES.get(name, name)
    return f"{title}, {decoding}" if decoding else title


def metric_unit(metric: str) -> str:
    """The unit of a metric, or an empty string."""
    return _UNITS.get(_base(metric), "")


def _base(metric: str) -> str:
    """The metric without its decoding or its hop."""
    return metric.partition("@")[0].partition("/")[0]


def number(value: float, metric: str, *, more: int = 0) -> str:
    """A value with the metric's number of decimals and a real minus sign."""
    text = f"{value:.{_DECIMALS.get(_base(metric), 3) + more}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def interval(low: float, high: float, metric: str, *, more: int = 0) -> str:
    """``[low, high]``."""
    return f"[{number(low, metric, more=more)}, {number(high, metric, more=more)}]"


def signed(value: float, metric: str, *, more: int = 0) -> str:
    """A value with its sign: ``+0.3``, and ``0.0`` without one."""
    text = number(value, metric, more=more)
    return f"+{text}" if value > 0 and any(digit in text for digit in "123456789") else text


def span(difference: Difference, metric: str) -> str:
    """``+0.3, 95 % −0.4 … +1.0``, as a sentence has it."""
    low, high = (signed(bound, metric) for bound in (difference.low, difference.high))
    return f"{signed(difference.mean, metric)}, 95 % {low} … {high}"


def p_text(p: float) -> str:
    """``p = 0.032``, or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def summary_text(summary: Summary, metric: str) -> str:
    """``24.6 [23.8, 25.4]``."""
    return f"{number(summary.mean, metric)} {interval(summary.low, summary.high, metric)}"


def difference_text(difference: Difference, metric: str) -> str:
    """``+0.83 [0.21, 1.44]`` with the unit."""
    more = 1 if _base(metric) in _DECIMALS else 0
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
