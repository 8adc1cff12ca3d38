"""Small plots in the cells of a table, such as a mean with its interval. All rows of a column share one axis."""

from dataclasses import dataclass

from markupsafe import Markup

from tadistill.charts.axis import Axis
from tadistill.charts.looks import Look, marker, safe

_HEIGHT = 22  # pixels of a row's plot


@dataclass(frozen=True)
class Strip:
    """The small plots in one column of a table, all with one axis. With `zero`, each plot has a line at 0."""

    axis: Axis
    zero: bool = False

    def interval(self, mean: float, low: float, high: float, look: Look, *, tip: str = "") -> Markup:
        """Draw a mean with its interval. `tip` is the hover text."""
        middle = _HEIGHT // 2
        line = f'<line class="span" x1="{self._at(low)}" x2="{self._at(high)}" y1="{middle}" y2="{middle}" style="stroke:{look.colour}"/>'
        mark = f'<svg class="at" x="{self._at(mean)}" y="{middle}">{marker(look, 4.4)}</svg>'
        return self._drawn(line + mark, tip)

    def bar(self, value: float, low: float, high: float, look: Look, *, tip: str = "") -> Markup:
        """Draw a bar from 0 to the value. The interval is a line over the bar. `tip` is the hover text."""
        start, end = sorted((self.axis.place(min(max(0.0, self.axis.low), self.axis.high)), self.axis.place(value)))
        size = f'x="{_percent(start)}" width="{_percent(end - start)}" y="4" height="{_HEIGHT - 8}"'
        bar = f'<rect class="bar" {size} rx="1.5" style="fill:{look.colour}"/>'
        middle = _HEIGHT // 2
        bar += f'<line class="whisker" x1="{self._at(low)}" x2="{self._at(high)}" y1="{middle}" y2="{middle}"/>'
        return self._drawn(bar, tip)

    def empty(self) -> Markup:
        """Draw a plot without marks, for a value that was not measured."""
        return self._drawn("", "")

    def ruler(self, count: int = 4) -> Markup:
        """Draw the ticks of the axis, for the heading of the column."""
        places = (
            (f'x="{self._at(v)}" y="10" text-anchor="{_anchor(self.axis.place(v))}"', text) for v, text in self.axis.ticks(count).items()
        )
        texts = "".join(f'<text class="tick" {place}>{text}</text>' for place, text in places)
        return Markup(f'<svg class="strip ruler" width="100%" height="14" aria-hidden="true">{texts}</svg>')

    def _drawn(self, marks: str, tip: str) -> Markup:
        behind = "".join(f'<line class="grid" x1="{self._at(v)}" x2="{self._at(v)}" y1="0" y2="{_HEIGHT}"/>' for v in self.axis.ticks(4))
        if self.zero:
            behind += f'<line class="zero" x1="{self._at(0)}" x2="{self._at(0)}" y1="0" y2="{_HEIGHT}"/>'
        hover = f' data-tip="{safe(tip)}"' if tip else ""
        return Markup(f'<svg class="strip" width="100%" height="{_HEIGHT}" aria-hidden="true"{hover}>{behind}{marks}</svg>')

    def _at(self, value: float) -> str:
        return _percent(min(max(self.axis.place(value), 0.0), 1.0))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _anchor(place: float) -> str:
    return "start" if place < 0.04 else "end" if place > 0.96 else "middle"
