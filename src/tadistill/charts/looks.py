"""Colours, markers and dashes of series. A series has the same look in all figures and tables of a page."""

from dataclasses import dataclass

from markupsafe import Markup, escape

from tadistill.safe_text import visible

COLOURS = 12
"""Number of colours; `charts.css` has their values for light and dark pages."""
GREY = "var(--guide)"
DASHES = ("", "7 4", "2 3", "8 3 2 3", "12 4")
_SHAPES = {  # around the origin, in a circle with the radius 1; the second item is the character for text
    "circle": ("M1 0A1 1 0 1 1 -1 0A1 1 0 1 1 1 0Z", "●"),
    "square": ("M-.86 -.86H.86V.86H-.86Z", "■"),
    "diamond": ("M0 -1.2L1.2 0L0 1.2L-1.2 0Z", "◆"),
    "up": ("M0 -1.1L1.1 .85H-1.1Z", "▲"),
    "down": ("M0 1.1L1.1 -.85H-1.1Z", "▼"),
    "star": ("M0 -1.3L.36 -.42L1.24 -.4L.56 .18L.8 1.05L0 .54L-.8 1.05L-.56 .18L-1.24 -.4L-.36 -.42Z", "★"),
    "cross": ("M-.4 -1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z", "✚"),
    "open circle": ("M1 0A1 1 0 1 1 -1 0A1 1 0 1 1 1 0Z", "○"),
    "open square": ("M-.86 -.86H.86V.86H-.86Z", "□"),
    "open diamond": ("M0 -1.2L1.2 0L0 1.2L-1.2 0Z", "◇"),
    "open up": ("M0 -1.1L1.1 .85H-1.1Z", "△"),
    "open down": ("M0 1.1L1.1 -.85H-1.1Z", "▽"),
    "open star": ("M0 -1.3L.36 -.42L1.24 -.4L.56 .18L.8 1.05L0 .54L-.8 1.05L-.56 .18L-1.24 -.4L-.36 -.42Z", "☆"),
}
SHAPES = tuple(_SHAPES)  # 13 shapes and 12 colours have no common factor, so the pairs repeat only after 156 series


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
    return _SHAPES[found.marker][1]


def marker(found: Look, size: float) -> str:
    """Return a marker as an SVG path around the point (0, 0). `size` is its radius in pixels."""
    path = _SHAPES[found.marker][0]
    style = "fill:var(--page);stroke:" if found.marker.startswith("open ") else "fill:"
    return f'<path d="{path}" transform="scale({size:g})" vector-effect="non-scaling-stroke" style="{style}{found.colour}"/>'


def safe(text: str) -> Markup:
    """Make a text safe for SVG: escape markup, and replace hidden characters by visible codes."""
    return escape(visible(text))
