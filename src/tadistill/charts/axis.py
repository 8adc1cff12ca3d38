"""Axes of charts: the place of a value on an axis, and ticks at round numbers."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tadistill.text import MINUS

_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def number_text(value: float, step: float | None = None) -> str:
    """Return a number as text for an axis, such as ``0.25``, ``12k`` or ``3e17``.

    `step` is the distance of two ticks. With it, the text has enough decimals to be exact for multiples of `step`.
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15 or size < 1e-4:
        exponent = math.floor(math.log10(size) + 1e-9)
        text = f"{_fixed(value / 10.0**exponent, step and step / 10.0**exponent, 1)}e{exponent}"
    else:
        scale, letter = next((entry for entry in _LARGE if size >= max(entry[0], 1e4)), (1.0, ""))
        if step and step < 0.01 * scale:  # many decimals of thousands are harder to read than all digits
            scale, letter = 1.0, ""
        text = f"{_fixed(value / scale, step and step / scale, 4)}{letter}"
    return text.replace("-", MINUS)


def _fixed(value: float, step: float | None, most: int) -> str:
    if step:
        # a step is 1, 2, 2.5 or 5 times a power of ten
        decimals = next(count for count in range(16) if count == 15 or abs(round(step, count) / step - 1) < 1e-6)
        return f"{value:.{decimals}f}"
    text = f"{value:.{most}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def nice_span(values: Iterable[float], *, zero: bool = False, pad: float = 0.05) -> tuple[float, float]:
    """Return the ends (low, high) of an axis for these values. `pad` is the margin at each end, as a share of the values' range.

    With `zero`, the axis includes 0, and an end at 0 has no margin. If all values are 0, the axis is from 0 to 1.
    """
    known = [value for value in values if math.isfinite(value)]
    if not any(known):
        return 0.0, 1.0
    low, high = min(known), max(known)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = pad * (high - low) or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - room), (high if zero and high == 0 else high + room)


@dataclass(frozen=True)
class Axis:
    """One axis: the values at its ends, its title, and whether its scale is logarithmic.

    `marks` (value -> text) replaces the automatic ticks. `text` is a function that turns the value of a tick into its text. With `grid`, a
    line is drawn at each tick.
    """

    low: float
    high: float
    title: str = ""
    log: bool = False
    marks: Mapping[float, str] | None = None
    text: Callable[[float], str] | None = None
    grid: bool = True

    def __post_init__(self):
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"an axis goes from {self.low} to {self.high}; it must go from a smaller to a larger finite value")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic axis starts at {self.low}; it must start above 0")

    def place(self, value: float) -> float:
        """Return the position of a value: 0 at the lower end of the axis, 1 at the upper end."""
        low, high = (math.log10(end) if self.log else end for end in (self.low, self.high))
        return ((math.log10(max(value, 1e-300)) if self.log else value) - low) / (high - low)

    def ticks(self, count: int = 5) -> dict[float, str]:
        """Return about `count` ticks inside the axis, as {value: text}."""
        if self.marks is not None:
            return dict(self.marks)
        if self.log:
            return self._log_ticks(count)
        step = _nice_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        values = [round(index * step, 12) for index in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return {value: self.text(value) if self.text else number_text(value, step) for value in values}

    def _log_ticks(self, count: int) -> dict[float, str]:
        low, high = math.log10(self.low), math.log10(self.high)
        if high - low < 0.7:  # too narrow for powers of ten: even values
            return Axis(self.low, self.high, text=self.text).ticks(count)
        digits: tuple[int, ...] = (1, 2, 5) if high - low < 2.2 else (1, 3) if high - low < 4 else (1,)
        every = max(1, math.ceil((high - low) / max(1, count))) if digits == (1,) else 1
        exponents = [e for e in range(math.floor(low), math.ceil(high) + 1) if e % every == 0]
        values = [digit * 10.0**e for e in exponents for digit in digits if low - 1e-9 <= math.log10(digit * 10.0**e) <= high + 1e-9]
        return {value: self.text(value) if self.text else number_text(value) for value in values}


def _nice_step(about: float) -> float:
    power = 10.0 ** math.floor(math.log10(about))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= about * 0.999)
