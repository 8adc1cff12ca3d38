"""Figures of a report. This module has what they share: axes, and the looks of arms.

An arm has the same colour and marker in every figure and table.
"""

from collections.abc import Iterable, Mapping

from tadistill.charts import Axis, Look, look, nice_span
from tadistill.metrics import metric_title, metric_unit
from tadistill.results.collect import Results

_SIGNS = {"percentage points": "%", "points": ""}  # how the title of an axis writes a unit
MANY = 12
"""The largest number of arms for which figures show the names of arms beside their lines or points, and a line for each seed."""


def looks(results: Results) -> Mapping[str, Look]:
    """Return the look (colour, marker and dash) of each arm. An arm looks the same in all figures and tables."""
    return {arm.name: look(index) for index, arm in enumerate(results.plan.arms)}


def titled(metric: str) -> str:
    """Return the title of a metric's axis, such as ``fact accuracy (%)``."""
    unit = metric_unit(metric)
    sign = _SIGNS.get(unit, unit)
    return f"{metric_title(metric)} ({sign})" if sign else metric_title(metric)


def rows_axis(count: int) -> Axis:
    """Return the axis of a figure with `count` rows. The rows are at 0, 1, … from the bottom."""
    return Axis(-0.5, count - 0.5, marks={}, grid=False)


def span_axis(values: Iterable[float], title: str, *, zero: bool = False) -> Axis:
    """Return a linear axis that includes the values. With `zero`, it also includes 0."""
    return Axis(*nice_span(values, zero=zero), title)
