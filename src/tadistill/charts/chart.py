"""Figures as SVG: a figure with two axes that fits every width (`Chart`), and small plots in the cells of a table (`Strip`).

A `Chart` can have lines, bands, points with intervals, bars and labels. The plots of a `Strip` share one axis.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tadistill.charts.axis import Axis
from tadistill.charts.series import WIDTHS, Label, Look, Mark, glyph, label_column, marker, place_labels, safe, text_width
from tadistill.text import visible_parts

_ACROSS = 1000  # width of the coordinate system of paths; it is stretched to the width in pixels
_VISIBLE = 0.004  # share of the width: a point that is moved by less is not counted as moved
_TITLE, _TICKS, _LINE = 20, 18, 14  # heights in pixels, below the plot: title of the axis, texts of ticks, each further line of these texts
_STRIP = 22  # height in pixels of a plot in a table


@dataclass(frozen=True)
class Point:
    """A value with its interval, and the text that appears when the mouse is over it. Without an interval, `low` and `high` are None.

    `at` is None, or another x at which the point is drawn so that it does not hide its neighbours. A note below the figure then says that
    points were moved. The saved data always have `x`.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""
    at: float | None = None


class Chart:
    """A figure. Add marks, such as `line` or `points`, then call `html`.

    Args:
        name: the id of the HTML element. It is also the name of the file if a reader saves the figure.
        summary: a description for readers who do not see the figure.
        height: height of the plot in pixels, without ticks and titles.
        head: space above the plot for texts, in pixels.
        frame: False leaves out both axes and their lines.
    """

    def __init__(self, name: str, summary: str, x: Axis, y: Axis, *, height: int = 280, head: int = 24, frame: bool = True):
        self.name, self.summary, self.x, self.y = name, summary, x, y
        self.height, self.head, self.frame = height, head, frame
        self._layers: dict[str, list[str]] = {"back": [], "paths": [], "marks": [], "text": []}
        self._labels, self._ends = list[Label](), list[Label]()
        self._points, self._across = list[Mark](), list[float]()  # `_across`: heights of horizontal lines
        self._key, self._moved = list[str](), False
        self._data: dict[str, list[Any]] = {"lines": [], "points": [], "bars": []}

    # --- marks ----------------------------------------------------------------------------------------------------------

    def line(
        self, name: str, xs: Sequence[float], ys: Sequence[float | None], look: Look, *, seed: int | None = None, label: bool = False
    ) -> None:
        """Draw a line, with gaps where y is None or NaN. With `seed`, it shows one training seed and is faint.

        With `label`, the name is written at the right end of the line, or below the figure on a phone.
        """
        known, path, pen = [], [], "M"
        for x, y in zip(xs, ys, strict=True):
            if y is None or not math.isfinite(y):
                pen = "M"
            else:
                known.append((x, y))
                path.append(f"{pen}{self._place(x, y)}")
                pen = "L"
        if not known:
            return
        kind = "line faint" if seed is not None else "line"
        dash = f";stroke-dasharray:{look.dash}" if look.dash else ""
        self._add("paths", f'<path class="{kind}" d="{"".join(path)}" style="stroke:{look.colour}{dash}"/>', name)
        self._data["lines"].append([name, seed, [round(x, 6) for x, _ in known], [_short(y) for _, y in known]])
        if seed is None:
            for point in _spread_out(known):
                self.mark(name, point, look, size=3.4)
        if label:
            x, y = known[-1]
            self._ends.append(Label(self.x.place(x), self._top(y), name, name, look.colour))
            self._key.append(f'<span data-arm="{safe(name)}"><b style="color:{look.colour}">{glyph(look)}</b> {safe(name)}</span>')

    def band(self, name: str, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], look: Look) -> None:
        """Fill the area between two lines, such as the ends of an interval."""
        around = [*zip(xs, highs, strict=True), *reversed([*zip(xs, lows, strict=True)])]
        path = "L".join(self._place(x, y) for x, y in around)
        self._add("paths", f'<path class="band" d="M{path}Z" style="fill:{look.colour}"/>', name)

    def points(self, name: str, points: Iterable[Point], look: Look, *, size: float = 5.0, label: str = "") -> None:
        """Draw points with vertical intervals. `label` is a text beside the first point (see `place_labels`)."""
        for index, point in enumerate(points):
            x = point.x if point.at is None else point.at
            self._moved |= abs(self.x.place(x) - self.x.place(point.x)) > _VISIBLE
            if point.low is not None and point.high is not None:
                ends = self._between((x, point.low), (x, point.high))
                self._add("marks", f'<line class="span" {ends} style="stroke:{look.colour}"/>', name)
            self.mark(name, (x, point.y), look, size=size, tip=point.tip)
            heights = [self._top(y) for y in (point.y, point.low, point.high) if y is not None]
            self._points.append(Mark(self.x.place(x), heights[0], min(heights) - size, max(heights) + size, name))
            self._data["points"].append([name, _short(point.x), _short(point.y), *map(_short, (point.low, point.high)), point.tip])
            if label and not index:
                self._labels.append(Label(self.x.place(x), self._top(point.y), label, name, look.colour))

    def row(self, name: str, y: float, point: tuple[float, float, float], look: Look, *, dots: Sequence[float] = (), tip: str = "") -> None:
        """Draw a mean with a horizontal interval (mean, low, high) at height `y`. `dots` are single values, drawn below the mean."""
        (mean, low, high), below = point, self._top(y) + 9
        ends = self._between((low, y), (high, y))
        self._add("marks", f'<line class="span" {ends} style="stroke:{look.colour}"/>', name)
        for dot in dots:
            self._add("marks", f'<circle class="dot" cx="{self._at(dot)}" cy="{below:.1f}" r="2" style="fill:{look.colour}"/>', name)
        self.mark(name, (mean, y), look, size=5.4, tip=tip)
        self._data["points"].append([name, *map(_short, (mean, y, low, high)), tip])

    def mark(self, name: str, at: tuple[float, float], look: Look, *, size: float = 5.0, tip: str = "") -> None:
        """Draw one marker at (x, y), with `tip` as its hover text. The saved data do not include it."""
        place = f'x="{self._at(at[0])}" y="{self._top(at[1]):.1f}"'
        self._add("marks", f'<svg class="at" {place}{_tip(tip)}>{marker(look, size)}</svg>', name)

    def bar(self, name: str, xs: tuple[float, float], ys: tuple[float, float], look: Look, *, tip: str = "", opacity: float = 0.85) -> None:
        """Draw a rectangle between two values of x and two values of y."""
        left, right = sorted(self.x.place(x) for x in xs)
        top, bottom = sorted(self._top(y) for y in ys)
        size = f'x="{100 * left:.2f}%" width="{100 * (right - left):.2f}%" y="{top:.1f}" height="{max(bottom - top, 0.5):.1f}"'
        self._add("marks", f'<rect class="bar" {size} rx="2" style="fill:{look.colour};opacity:{opacity:g}"{_tip(tip)}/>', name)
        self._data["bars"].append([name, *map(_short, (*xs, *ys)), tip])

    def whisker(self, name: str, at: float, low: float, high: float, *, flat: bool = False) -> None:
        """Draw the interval of a bar: a vertical line at x = `at`. With `flat`, it is a horizontal line at y = `at`."""
        ends = self._between((low, at), (high, at)) if flat else self._between((at, low), (at, high))
        self._add("marks", f'<line class="whisker" {ends}/>', name)

    def segment(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        look: Look,
        *,
        width: float = 1.5,
        name: str = "",
        tip: str = "",
        kind: str = "",
    ) -> None:
        """Draw a straight line between two points (x, y)."""
        self._across += [self._top(start[1])] if start[1] == end[1] else []
        ends, dash = self._between(start, end), f";stroke-dasharray:{look.dash}" if look.dash else ""
        style = f"stroke:{look.colour};stroke-width:{width:g}{dash}"
        self._add("back" if not name else "marks", f'<line class="{kind or "guide"}" {ends} style="{style}"{_tip(tip)}/>', name)

    def rule(self, *, x: float | None = None, y: float | None = None, kind: str = "zero") -> None:
        """Draw a straight line across the whole plot: vertical at `x`, or horizontal at `y`. `kind` is `zero` or `grid`."""
        if x is None:
            assert y is not None
            self._across.append(self._top(y))
            ends = f'x1="0" x2="100%" y1="{self._top(y):.1f}" y2="{self._top(y):.1f}"'
        else:
            ends = f'x1="{self._at(x)}" x2="{self._at(x)}" y1="{self.head}" y2="{self.head + self.height}"'
        self._add("back", f'<line class="{kind}" {ends}/>')

    def area(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        """Shade the plot between two values of x and two values of y."""
        (left, right), (bottom, top) = (min(max(self.x.place(end), 0.0), 1.0) for end in xs), (self._top(y) for y in ys)
        size = f'x="{100 * left:.2f}%" width="{100 * (right - left):.2f}%" y="{top:.1f}" height="{bottom - top:.1f}"'
        self._add("back", f'<rect class="margin" {size}/>')

    def text(
        self,
        x: float | None,
        y: float,
        text: str,
        *,
        side: str = "middle",
        name: str = "",
        kind: str = "",
        shift: tuple[float, float] = (0, 0),
    ) -> None:
        """Write a text at (x, y), moved by `shift` pixels. `side` is the part of the text that is at this point: start, middle or end.

        If `x` is None, `side` selects the place instead: `start` is the left end of the plot, `middle` its centre, and `end` its right end.
        """
        at = {"start": "0%", "middle": "50%", "end": "100%"}[side] if x is None else self._at(x)
        place = f'x="{at}" y="{self._top(y):.1f}" dx="{shift[0]:g}" dy="{shift[1]:g}" text-anchor="{side}"'
        self._add("text", f'<text class="{kind or "note"}" {place}>{safe(text)}</text>', name)

    # --- rendering ------------------------------------------------------------------------------------------------------

    def html(self) -> Markup:
        """Return the figure as one HTML element. It contains its values as JSON, for hover texts and for saving."""
        paths = "".join(self._layers["paths"])
        plot = f'<svg class="paths" y="{self.head - 4}" width="100%" height="{self.height + 8}" viewBox="0 -4 {_ACROSS} {self.height + 8}"'
        inner = [
            self._frame() if self.frame else "",
            *self._layers["back"],
            f'{plot} preserveAspectRatio="none">{paths}</svg>' if paths else "",
            *self._layers["marks"],
            *self._layers["text"],
            *self._named(),
            f'<line class="cursor" y1="{self.head}" y2="{self.head + self.height}"/>',
        ]
        left, right, below = self._margins()
        size = f'width="100%" height="{self.head + self.height + below}"'
        svg = f'<svg class="plot" role="img" aria-label="{safe(self.summary)}" {size}>{"".join(inner)}</svg>'
        notes = f'<p class="key">{"".join(self._key)}</p>' if self._key else ""
        if self._moved:
            notes += '<p class="moved">Points at nearly the same place are drawn side by side; saved values are exact.</p>'
        saves = "".join(
            f'<button type="button" data-save="{kind.lower()}" title="Save {what} as {kind}">{kind}</button>'
            for kind, what in (("SVG", "the figure"), ("PNG", "the figure"), ("CSV", "its values"))
        )
        axis = {"low": self.x.low, "high": self.x.high, "log": self.x.log, "x": self.x.title, "y": self.y.title}
        values = embedded({**axis, **self._data}, separators=(",", ":"))
        return Markup(
            f'<div class="chart" id="{safe(self.name)}"><div class="sides" style="--left:{left}px;--right:{right}px">{svg}</div>{notes}'
            f'<div class="saves">{saves}</div><script type="application/json" class="values">{values}</script></div>'
        )

    def _margins(self) -> tuple[int, int, int]:
        if not self.frame:
            return 8, 8, 4
        left = math.ceil(max((text_width(text) for text in self.y.ticks().values()), default=0)) + 10
        right = 14 + math.ceil(max((text_width(label.text) for label in self._ends), default=0))
        return left, right, (self._below_ticks() or 4) + (_TITLE if self.x.title else 0)

    def _below_ticks(self) -> int:
        texts = self.x.ticks().values()
        return _TICKS + _LINE * max(text.count("\n") for text in texts) if texts else 0

    def _frame(self) -> str:
        parts: list[str] = []
        bottom = self.head + self.height
        for value, text in self.y.ticks().items():
            height = self._top(value)
            parts.append(f'<line class="grid" x1="0" x2="100%" y1="{height:.1f}" y2="{height:.1f}"/>' if self.y.grid else "")
            parts.append(f'<text class="tick" x="0" dx="-6" y="{height + 4:.1f}" text-anchor="end">{safe(text)}</text>')
        for value, text in self.x.ticks().items():
            at = self._at(value)
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{self.head}" y2="{bottom}"/>' if self.x.grid else "")
            rows = "".join(f'<tspan x="{at}" dy="{_LINE if i else 0}">{safe(row)}</tspan>' for i, row in enumerate(text.split("\n")))
            parts.append(f'<text class="tick" x="{at}" y="{bottom + 15}" text-anchor="middle">{rows}</text>')
        parts.append(f'<line class="axis" x1="0" x2="100%" y1="{bottom}" y2="{bottom}"/>')
        if self.x.title:
            at = bottom + self._below_ticks() + 14
            parts.append(f'<text class="title" x="100%" y="{at}" text-anchor="end">{safe(self.x.title)}</text>')
        if self.y.title:
            parts.append(f'<text class="title" x="0" dx="-6" y="11" text-anchor="start">{safe(self.y.title)}</text>')
        return "".join(parts)

    def _named(self) -> list[str]:
        box, marks = (self.head, self.head + self.height), (self._points, self._across)
        placed = {f"placed at{width}": place_labels(self._labels, width, box, *marks) for width in WIDTHS if self._labels}
        placed |= {"ends": label_column(self._ends, box)} if self._ends else {}
        return [f'<g class="labels {kind}">{"".join(labels)}</g>' for kind, labels in placed.items()]

    def _add(self, layer: str, mark: str, name: str = "") -> None:
        if name:
            head, _, rest = mark.partition(" ")
            mark = f'{head} data-arm="{safe(name)}" {rest}'
        self._layers[layer].append(mark)

    def _place(self, x: float, y: float) -> str:
        return f"{_ACROSS * self.x.place(x):.1f} {self.height * (1 - self.y.place(y)):.1f}"

    def _top(self, y: float) -> float:
        return self.head + self.height * (1 - self.y.place(y))

    def _at(self, x: float) -> str:
        return f"{100 * self.x.place(x):.2f}%"

    def _between(self, start: tuple[float, float], end: tuple[float, float]) -> str:
        # the attributes of a line between two points (x, y)
        (x1, y1), (x2, y2) = start, end
        return f'x1="{self._at(x1)}" x2="{self._at(x2)}" y1="{self._top(y1):.1f}" y2="{self._top(y2):.1f}"'


def embedded(value: Any, **form: Any) -> Markup:
    """Return a value as JSON that can stand inside a ``<script>`` element. `form` has further arguments of `json.dumps`."""
    encoded = json.dumps(visible_parts(value), ensure_ascii=False, **form)
    for character in "<>&\u2028\u2029":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return Markup(encoded)


def _tip(text: str) -> str:
    return f' data-tip="{safe(text)}"' if text else ""


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def _spread_out(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return list(points) if len(points) <= 4 else [points[round(index * (len(points) - 1) / 3)] for index in range(4)]


@dataclass(frozen=True)
class Strip:
    """The small plots in one column of a table, all with one axis. With `zero`, each plot has a line at 0."""

    axis: Axis
    zero: bool = False

    def interval(self, mean: float, low: float, high: float, look: Look, *, tip: str = "") -> Markup:
        """Draw a mean with its interval. `tip` is the hover text."""
        line = f'<line class="span" {self._span(low, high)} style="stroke:{look.colour}"/>'
        mark = f'<svg class="at" x="{self._at(mean)}" y="{_STRIP // 2}">{marker(look, 4.4)}</svg>'
        return self._drawn(line + mark, tip)

    def bar(self, value: float, low: float, high: float, look: Look, *, tip: str = "") -> Markup:
        """Draw a bar from 0 to the value. The interval is a line over the bar. `tip` is the hover text."""
        start, end = sorted((self.axis.place(min(max(0.0, self.axis.low), self.axis.high)), self.axis.place(value)))
        size = f'x="{_percent(start)}" width="{_percent(end - start)}" y="4" height="{_STRIP - 8}"'
        bar = f'<rect class="bar" {size} rx="1.5" style="fill:{look.colour}"/>'
        whisker = f'<line class="whisker" {self._span(low, high)}/>'
        return self._drawn(bar + whisker, tip)

    def empty(self) -> Markup:
        """Draw a plot without marks, for a value that was not measured."""
        return self._drawn("", "")

    def ruler(self) -> Markup:
        """Draw the ticks of the axis, for the heading of the column."""
        texts = ""
        for value, text in self.axis.ticks(4).items():
            place = self.axis.place(value)
            side = "start" if place < 0.04 else "end" if place > 0.96 else "middle"
            texts += f'<text class="tick" x="{self._at(value)}" y="10" text-anchor="{side}">{text}</text>'
        return Markup(f'<svg class="strip ruler" width="100%" height="14" aria-hidden="true">{texts}</svg>')

    def _drawn(self, marks: str, tip: str) -> Markup:
        behind = "".join(f'<line class="grid" x1="{self._at(v)}" x2="{self._at(v)}" y1="0" y2="{_STRIP}"/>' for v in self.axis.ticks(4))
        if self.zero:
            behind += f'<line class="zero" x1="{self._at(0)}" x2="{self._at(0)}" y1="0" y2="{_STRIP}"/>'
        return Markup(f'<svg class="strip" width="100%" height="{_STRIP}" aria-hidden="true"{_tip(tip)}>{behind}{marks}</svg>')

    def _span(self, low: float, high: float) -> str:
        return f'x1="{self._at(low)}" x2="{self._at(high)}" y1="{_STRIP // 2}" y2="{_STRIP // 2}"'

    def _at(self, value: float) -> str:
        return _percent(min(max(self.axis.place(value), 0.0), 1.0))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
