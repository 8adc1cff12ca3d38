"""Numbers as text, for reports and terminal tables."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tadistill.metrics import metric_of, metric_title, metric_unit
from tadistill.results.collect import Summary
from tadistill.results.measured import UsedRows
from tadistill.statistics import Difference
from tadistill.text import MINUS, listed

DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
ALL_ZERO = "all paired differences are 0"
ONE_PROMPT = "no interval: a test set has only one prompt"


def number(value: float, metric: str, *, more: int = 0) -> str:
    """Return a value as text, rounded to the decimals of its metric (and `more` decimals), and with the character U+2212 as minus sign."""
    text = f"{value:.{metric_of(metric).decimals + more}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def interval(low: float, high: float, metric: str, *, more: int = 0) -> str:
    """Return an interval as text: ``[low, high]``. An interval without a width is unknown, and its text is empty."""
    return "" if low == high else f"[{number(low, metric, more=more)}, {number(high, metric, more=more)}]"


def signed(value: float, metric: str, *, more: int = 0) -> str:
    """Return a value with its sign, such as ``+0.3``. Zero has no sign."""
    text = number(value, metric, more=more)
    return f"+{text}" if value > 0 and any(digit in text for digit in "123456789") else text


def interval_of(difference: Difference, metric: str, *, more: int = 0) -> str:
    """Return the 95 % interval of a difference for a table: ``[low, high]``, or why there is none, such as ``(all paired differences are
    0)``."""
    missing = _no_interval(difference)
    return f"({missing})" if missing else interval(difference.low, difference.high, metric, more=more)


def spoken_interval(difference: Difference, metric: str) -> str:
    """Return the 95 % interval of a difference for a sentence: ``95 % interval −0.4 to 1.0``, or why there is none."""
    low, high = (number(bound, metric) for bound in (difference.low, difference.high))
    return _no_interval(difference) or f"95 % interval {low} to {high}"


def _no_interval(difference: Difference) -> str:
    return ALL_ZERO if difference.all_zero else ONE_PROMPT if difference.one_prompt else ""


def span(difference: Difference, metric: str, *, unit: bool = False) -> str:
    """Return a difference with its 95 % interval for a sentence: ``+0.3 (95 % interval −0.4 to 1.0)``. With `unit`, its unit is added."""
    size = signed(difference.mean, metric)
    return f"{with_unit(size, metric) if unit else size} ({spoken_interval(difference, metric)})"


def size_text(difference: Difference, metric: str) -> str:
    """Return the size of a difference, such as "+0.3 points of ROUGE-L (95 % interval −0.4 to 1.0)"."""
    return f"{with_unit(signed(difference.mean, metric), metric)} of {metric_title(metric)} ({spoken_interval(difference, metric)})"


def gap_text(difference: Difference, metric: str) -> str:
    """Return a difference with its 95 % interval for a table: ``+0.3 [−0.4, 1.0]``."""
    return f"{signed(difference.mean, metric)} {interval_of(difference, metric)}".rstrip()


def detectable_text(effect: float | None, metric: str) -> str:
    """Return the smallest detectable difference as text, such as ``0.31`` or ``< 0.01``, with one more decimal than its metric. None
    becomes a dash."""
    if effect is None:
        return DASH
    text = number(effect, metric, more=1)
    return text if float(text) else f"< {10.0 ** -(metric_of(metric).decimals + 1):g}"


def with_unit(text: str, metric: str) -> str:
    """Return a number in text form with the unit of its metric, such as ``29.2 percentage points``."""
    return f"{text} {metric_unit(metric)}".rstrip()


def p_text(p: float) -> str:
    """Return a p-value as text: ``p = 0.032``, or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def summary_text(summary: Summary, metric: str) -> str:
    """Return a mean with its interval as text: ``24.6 [23.8, 25.4]``, or only the mean if the interval is unknown."""
    return f"{number(summary.mean, metric)} {interval(summary.low, summary.high, metric)}".rstrip()


def parameters_text(count: int) -> str:
    """Return a number of parameters as text, such as ``124 M`` or ``1.56 B``. A count of 0 means that it is unknown, and becomes ``?``."""
    if not count:
        return "?"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            scaled = count / size
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {letter}"
    return str(count)


def flops_text(flops: float | None) -> str:
    """Return FLOPs as text, such as ``3.1e17``. None becomes a dash."""
    if flops is None:
        return DASH
    if flops == 0:
        return "0"
    mantissa, exponent = f"{flops:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def ratio_text(ratio: float | None) -> str:
    """Return a ratio as text, such as ``2.47×``. None becomes a dash."""
    return DASH if ratio is None else f"{ratio:.2f}{TIMES}"


def rows_text(used: Sequence[UsedRows]) -> str:
    """Describe in one sentence all splits with rows that were left out or cut. The result is empty if there is no such split."""
    found = [text for split in used if (text := split.text)]
    apart = any(split.compared < split.counts.used for split in used)
    whole = " Metrics with one value per set use all rows that a model answered." if apart else ""
    return f"Rows left out, cut or divided: {'. '.join(found)}.{whole}" if found else ""


def one_row_text(compared: Mapping[str, NDArray[np.int64]], arms: int) -> str:
    """Return a caution that names the test sets of which only one row is compared. The result is empty if there is no such set."""
    sets = [name for name, rows in compared.items() if len(rows) == 1]
    if not sets:
        return ""
    has, it, them = ("has", "it", "it") if len(sets) == 1 else ("have", "each", "them")
    return (
        f"{listed(sets)} {has} only one row{' that all arms answered' * (arms > 1)}. How scores vary between rows is then unknown, so "
        f"means with {them} have no interval, and nothing is claimed about them. Give {it} at least two rows, or leave {them} out."
    )
