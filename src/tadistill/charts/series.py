"""Series in figures: their colours, markers and dashes, and the places of their names.

A series has the same look in all figures and tables of a page. No name covers another name or a point.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot

from markupsafe import Markup, escape

from tadistill.text import visible

COLOURS = 12
"""Number of colours; `charts.css` has their values for light and dark pages."""
GREY = "var(--guide)"
DASHES = ("", "7 4", "2 3", "8 3 2 3", "12 4")
_SHAPES = {  # a path around the origin in a circle with the radius 1, and the characters for text: filled, and open if it has an open form
    "circle": ("M1 0A1 1 0 1 1 -1 0A1 1 0 1 1 1 0Z", "●○"),
    "square": ("M-.86 -.86H.86V.86H-.86Z", "■□"),
    "diamond": ("M0 -1.2L1.2 0L0 1.2L-1.2 0Z", "◆◇"),
    "up": ("M0 -1.1L1.1 .85H-1.1Z", "▲△"),
    "down": ("M0 1.1L1.1 -.85H-1.1Z", "▼▽"),
    "star": ("M0 -1.3L.36 -.42L1.24 -.4L.56 .18L.8 1.05L0 .54L-.8 1.05L-.56 .18L-1.24 -.4L-.36 -.42Z", "★☆"),
    "cross": ("M-.4 -1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z", "✚"),
}
SHAPES = (*_SHAPES, *(f"open {name}" for name, (_, characters) in _SHAPES.items() if len(characters) == 2))
"""Names of the markers. 13 shapes and 12 colours have no common factor, so the pairs repeat only after 156 series."""


@dataclass(frozen=True)
class Look:
    """The look of a series: its colour in CSS, its marker, and the dash of its lines (empty for a solid line)."""

    colour: str
    marker: str = "circle"
    dash: str = ""


PLAIN = Look(GREY)
"""The look of guides and of everything else that is not a series."""


def look(index: int) -> Look:
    """Return the look of the series with this index."""
    return Look(f"var(--c{index % COLOURS})", SHAPES[index % len(SHAPES)], DASHES[index // 3 % len(DASHES)])


def glyph(found: Look) -> str:
    """Return the marker as a character, for text beside the figures."""
    return _SHAPES[found.marker.removeprefix("open ")][1][found.marker.startswith("open ")]


def marker(found: Look, size: float) -> str:
    """Return a marker as an SVG path around the point (0, 0). `size` is its radius in pixels."""
    path = _SHAPES[found.marker.removeprefix("open ")][0]
    style = "fill:var(--page);stroke:" if found.marker.startswith("open ") else "fill:"
    return f'<path d="{path}" transform="scale({size:g})" vector-effect="non-scaling-stroke" style="{style}{found.colour}"/>'


def safe(text: str) -> Markup:
    """Make a text safe for SVG: escape markup, and replace hidden characters by visible codes."""
    return escape(visible(text))


# --- names of points and lines -------------------------------------------------------------------------------------------


WIDTHS = (960, 560, 480, 400, 300)
"""Widths of the plot, in pixels, for which labels are placed. A page shows the placement for the largest of them that its plot has."""
_HIGH, _GAP = 15, 9  # pixels: the height of a line of text, and the gap between a point and its label
_NEAR = 48  # pixels: a label moves up or down by at most this distance to avoid points and intervals


@dataclass(frozen=True)
class Label:
    """A text for the point at (`x`, `y`). `x` is a share of the width, and `y` is in pixels from the top."""

    x: float
    y: float
    text: str
    name: str
    colour: str


def text_width(text: str) -> float:
    """Return the approximate width of a text in pixels, at a font size of 12."""
    return sum(3.6 if c in "iljtfrI.,:;|' " else 9.6 if c in "mwMW" else 8.2 if c.isupper() else 6.7 for c in text)


@dataclass(frozen=True)
class Mark:
    """A point of the series `name` with its interval, which is a vertical line. `x` is a share of the width. The rest is in pixels."""

    x: float
    y: float
    top: float
    bottom: float
    name: str


def bar_texts(names: Sequence[str], kinds: Sequence[str], breaks: str) -> list[str]:
    """Return the texts below bars of the same width. Each has the bar's name and, in the next line, its kind.

    If a name is too wide for its bar in the narrowest plot, a new line begins before each of the signs `breaks`. If that is not enough,
    the texts have the kinds only.
    """
    room = min(WIDTHS) / len(names)
    broken = [re.sub(rf" (?=[{breaks}])", "\n", name) for name in names]
    for found in (names, broken):
        if all(text_width(line) <= room for name in found for line in name.split("\n")):
            return [f"{name}\n{kind}" for name, kind in zip(found, kinds, strict=True)]
    return list(kinds)


def place_labels(
    labels: Sequence[Label], width: int, box: tuple[int, int], marks: Sequence[Mark] = (), across: Sequence[float] = ()
) -> list[str]:
    """Return the labels as SVG. Each label is beside its point. If there is no room, it is farther away, with a thin line to the point.

    A label is left out if each free place is nearer to a point of another series, because it would seem to be the name of that point.

    Args:
        width: width of the plot in pixels.
        box: top and bottom of the plot in pixels.
        marks: points and intervals. A label avoids them if there is another place near its point.
        across: heights of horizontal lines in pixels. A label avoids them too.
    """
    thin = [_Box(mark.x * width - 4, mark.top, mark.x * width + 4, mark.bottom) for mark in marks]
    thin += [_Box(0, y - 1, width, y + 1) for y in across]
    taken = [_Box(label.x * width - 7, label.y - 7, label.x * width + 7, label.y + 7) for label in labels]
    placed: list[str] = []
    for label in sorted(labels, key=lambda label: label.y):
        point, others = (label.x * width, label.y), [(mark.x * width, mark.y) for mark in (*marks, *labels) if mark.name != label.name]
        spots = [spot for spot in _spots(label, width, box) if not spot.box.meets(taken) and spot.box.nearest(point, others)]
        clear = (spot for spot in spots if abs(spot.y - label.y) <= _NEAR and not spot.box.meets(thin))
        spot = next(clear, None) or next(iter(spots), None)
        if spot is not None:
            taken.append(spot.box)
            placed.append(_drawn(label, spot, width))
    return placed


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, others: Sequence["_Box"]) -> bool:
        return any(
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom for other in others
        )

    def nearest(self, point: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
        """Return True if this box is nearer to `point` than to each of `others`."""
        return all(self._distance(point) < self._distance(other) for other in others)

    def _distance(self, point: tuple[float, float]) -> float:
        x, y = point
        return hypot(max(self.left - x, x - self.right, 0.0), max(self.top - y, y - self.bottom, 0.0))


@dataclass(frozen=True)
class _Spot:
    side: str  # start, middle or end: the part of the text at (x, y)
    x: float
    y: float
    box: _Box


def _spots(label: Label, width: int, box: tuple[int, int]) -> Iterator[_Spot]:
    """Yield the places for a label inside the plot, the nearest first."""
    x, wide = label.x * width, text_width(label.text)
    for away in range(0, 200, 8):
        for y in dict.fromkeys((label.y + away, label.y - away)):
            for side, at, left in (("start", x + _GAP, x + _GAP), ("end", x - _GAP, x - _GAP - wide), ("middle", x, x - wide / 2)):
                around = _Box(left - 2, y - _HIGH / 2, left + wide + 2, y + _HIGH / 2)
                inside = left >= 0 and left + wide <= width + 10 and box[0] <= around.top and around.bottom <= box[1]
                if inside and (side != "middle" or away >= 16):
                    yield _Spot(side, at, y, around)


def _drawn(label: Label, spot: _Spot, width: int) -> str:
    line = ""
    if abs(spot.y - label.y) > 12:
        ends = f'x1="{100 * label.x:.2f}%" y1="{label.y:.1f}" x2="{100 * label.x:.2f}%" y2="{spot.y:.1f}"'
        line = f'<line class="leader" data-arm="{safe(label.name)}" {ends} style="stroke:{label.colour}"/>'
    place = f'x="{100 * label.x:.2f}%" dx="{spot.x - label.x * width:.0f}" y="{spot.y + 4:.1f}" text-anchor="{spot.side}"'
    return f'{line}<text class="label" data-arm="{safe(label.name)}" {place}>{safe(label.text)}</text>'


def label_column(labels: Sequence[Label], box: tuple[int, int]) -> list[str]:
    """Return the labels as SVG, in a column at the right of the plot. `box` is the top and the bottom of the plot in pixels."""
    heights = spread([label.y for label in labels], _HIGH, box)
    return [
        f'<text class="label" data-arm="{safe(label.name)}" x="100%" dx="8" y="{y + 4:.1f}">{safe(label.text)}</text>'
        for label, y in zip(labels, heights, strict=True)
    ]


def spread(values: Sequence[float], apart: float, box: tuple[float, float]) -> list[float]:
    """Return the values, moved apart until the distance of any two is at least `apart`. They stay inside `box` if it is large enough."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = [values[i] for i in order]
    for _ in range(60):
        moved = False
        for i in range(1, len(placed)):
            short = apart - (placed[i] - placed[i - 1])
            if short > 1e-6:
                placed[i - 1], placed[i], moved = placed[i - 1] - short / 2, placed[i] + short / 2, True
        if not moved:
            break
    over = max(placed[-1] - box[1], 0.0)
    placed = [value - over for value in placed]
    under = max(box[0] - placed[0], 0.0)
    return [value + under for _, value in sorted(zip(order, placed, strict=True))]
