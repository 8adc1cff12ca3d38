"""Place the names of points and lines in a figure, so that no name covers another name or a point."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot

from tadistill.charts.looks import safe

WIDTHS = (960, 560, 300)
"""Widths of the plot, in pixels, for which labels are placed. The style sheet shows the placement that fits the page."""
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


def place_labels(labels: Sequence[Label], width: int | None, box: tuple[int, int], marks: Sequence[Mark] = ()) -> list[str]:
    """Return the labels as SVG. Each label is beside its point. If there is no room, it is farther away, with a thin line to the point.

    A label is left out if each free place is nearer to a point of another series, because it would seem to be the name of that point.

    Args:
        width: width of the plot in pixels. None places all labels in a column at the right of the plot.
        box: top and bottom of the plot in pixels.
        marks: points and intervals. A label avoids them if there is another place near its point.
    """
    if width is None:
        return _column(labels, box)
    thin = [_Box(mark.x * width - 4, mark.top, mark.x * width + 4, mark.bottom) for mark in marks]
    taken = [_Box(label.x * width - 7, label.y - 7, label.x * width + 7, label.y + 7) for label in labels]
    placed: list[str] = []
    for label in sorted(labels, key=lambda label: label.y):
        others = [(mark.x * width, mark.y) for mark in (*marks, *labels) if mark.name != label.name]
        spots = [spot for spot in _spots(label, width, box) if spot.free(taken) and spot.box.nearest((label.x * width, label.y), others)]
        clear = (spot for spot in spots if abs(spot.y - label.y) <= _NEAR and spot.free(thin))
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

    def meets(self, other: "_Box") -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

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
    inside: bool

    def free(self, taken: Sequence[_Box]) -> bool:
        return self.inside and not any(self.box.meets(other) for other in taken)


def _spots(label: Label, width: int, box: tuple[int, int]) -> list[_Spot]:
    x, wide = label.x * width, text_width(label.text)
    spots: list[_Spot] = []
    for away in range(0, 200, 8):
        for shift in dict.fromkeys((away, -away)):
            y = label.y + shift
            for side, at, left in (("start", x + _GAP, x + _GAP), ("end", x - _GAP, x - _GAP - wide), ("middle", x, x - wide / 2)):
                if side == "middle" and abs(shift) < 16:
                    continue
                around = _Box(left - 2, y - _HIGH / 2, left + wide + 2, y + _HIGH / 2)
                inside = left >= 0 and left + wide <= width + 10 and box[0] <= around.top and around.bottom <= box[1]
                spots.append(_Spot(side, at, y, around, inside))
    return spots


def _drawn(label: Label, spot: _Spot, width: int) -> str:
    moved = abs(spot.y - label.y) > 12
    line = ""
    if moved:
        ends = f'x1="{100 * label.x:.2f}%" y1="{label.y:.1f}" x2="{100 * label.x:.2f}%" y2="{spot.y:.1f}"'
        line = f'<line class="leader" data-arm="{safe(label.name)}" {ends} style="stroke:{label.colour}"/>'
    place = f'x="{100 * label.x:.2f}%" dx="{spot.x - label.x * width:.0f}" y="{spot.y + 4:.1f}" text-anchor="{spot.side}"'
    return f'{line}<text class="label" data-arm="{safe(label.name)}" {place}>{safe(label.text)}</text>'


def _column(labels: Sequence[Label], box: tuple[int, int]) -> list[str]:
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
    over = placed[-1] - box[1] if placed else 0.0
    if over > 0:
        placed = [value - over for value in placed]
    under = box[0] - placed[0] if placed else 0.0
    if under > 0:
        placed = [value + under for value in placed]
    found = [0.0] * len(values)
    for i, value in zip(order, placed, strict=True):
        found[i] = value
    return found
