"""Charts: ticks, places, labels that do not meet, and marks that hold their values."""

import json
import re
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tadistill.charts import COLOURS, Axis, Chart, Point, Strip, bar_texts, look, nice_span, script, style
from tadistill.charts.axis import number_text
from tadistill.charts.series import SHAPES, WIDTHS, Label, Mark, place_labels, spread, text_width


def chart(**changes) -> Chart:
    return Chart("figure-x", "a summary", Axis(0, 10, "step"), Axis(0, 4, "nats"), **changes)


def parsed(markup) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r'<svg class="plot".*?</svg>(?=</div>)', str(markup), re.S)[0])


@pytest.mark.parametrize(
    ("axis", "texts"),
    [
        (Axis(0, 10), ["0", "2", "4", "6", "8", "10"]),
        (Axis(-0.31, 0.29), ["\N{MINUS SIGN}0.2", "0", "0.2"]),
        (Axis(-0.05, 0.98), ["0", "0.25", "0.50", "0.75"]),
        (Axis(0, 12), ["0", "2.5", "5.0", "7.5", "10.0"]),
        (Axis(9000, 21000), ["10.0k", "12.5k", "15.0k", "17.5k", "20.0k"]),
        (Axis(10000, 10011), ["10000.0", "10002.5", "10005.0", "10007.5", "10010.0"]),
        (Axis(1e15, 2.2e15), ["1.00e15", "1.25e15", "1.50e15", "1.75e15", "2.00e15"]),
        (Axis(0, 9.9e-5), ["0", "2e\N{MINUS SIGN}5", "4e\N{MINUS SIGN}5", "6e\N{MINUS SIGN}5", "8e\N{MINUS SIGN}5"]),
        (Axis(1e10, 1e13, log=True), ["10B", "30B", "100B", "300B", "1T", "3T", "10T"]),
        (Axis(1e16, 9e17, log=True), ["1e16", "2e16", "5e16", "1e17", "2e17", "5e17"]),
        (Axis(1e12, 1.6e12, log=True), ["1.0T", "1.2T", "1.4T", "1.6T"]),
        (Axis(1, 1e9, log=True), ["1", "100", "10k", "1M", "100M"]),
        (Axis(0, 1, marks={0.5: "half"}), ["half"]),
    ],
)
def test_ticks_are_round_numbers(axis, texts):
    assert list(axis.ticks().values()) == texts


def test_an_axis_has_two_ends():
    for low, high, log in ((1, 1, False), (2, 1, False), (0, 1, True), (0, float("nan"), False)):
        with pytest.raises(ValueError, match="axis"):
            Axis(low, high, log=log)
    assert Axis(1, 100, log=True).place(10) == pytest.approx(0.5)
    assert nice_span([3.0, 5.0], zero=True) == (0.0, 5.25)
    assert nice_span([2.0, 2.0]) == pytest.approx((1.8, 2.2))
    assert number_text(2500.0, 500) == "2500"


def test_marks_are_where_their_values_are():
    found = chart(height=200, head=10)
    found.points("a <b>", [Point(5, 1, 0.5, 2, "a tip")], look(0), label="a <b>")
    found.line("curve", [0, 5, 10], [0, float("nan"), 4], look(1))
    markup = found.html()
    svg = parsed(markup)
    (mark,) = (node for node in svg.iter() if node.get("data-tip") == "a tip")
    assert (mark.get("x"), mark.get("y"), mark.get("data-arm")) == ("50.00%", "160.0", "a <b>")
    (path,) = (node for node in svg.iter() if node.get("class") == "line")
    assert path.get("d") == "M0.0 200.0M1000.0 0.0"  # a gap
    values = json.loads(re.search(r'class="values">(.*?)</script>', markup)[1])
    assert values["points"] == [["a <b>", 5.0, 1.0, 0.5, 2.0, "a tip"]]
    assert values["bars"] == []
    assert values["lines"] == [["curve", None, [0, 10], [0.0, 4.0]]]
    assert "<b>" not in markup


def test_a_point_that_is_moved_aside_keeps_its_value_and_the_figure_says_so():
    found = chart(height=200)
    found.points("a", [Point(5, 1, at=5.2)], look(0))
    values = json.loads(re.search(r'class="values">(.*?)</script>', found.html())[1])
    assert [name_and_place[:2] for name_and_place in values["points"]] == [["a", 5.0]]
    (mark,) = (node for node in parsed(found.html()).iter() if node.get("class") == "at")
    assert mark.get("x") == "52.00%"
    assert "side by side" in found.html()
    found = chart(height=200)
    found.points("a", [Point(5, 1, at=5.001)], look(0))
    assert "side by side" not in found.html()


def test_labels_do_not_meet():
    labels = [Label(0.9 + 0.01 * i, 100 + 2 * i, f"arm-number-{i}", f"a{i}", "red") for i in range(8)]
    for width in WIDTHS:
        nodes = [
            ElementTree.fromstring(text) for svg in place_labels(labels, width, (0, 300)) for text in re.findall("<text.*?</text>", svg)
        ]
        boxes = []
        for node in nodes:
            x = float(node.get("x")[:-1]) / 100 * width + float(node.get("dx"))
            wide = text_width(node.text)
            left = x - {"start": 0, "end": wide, "middle": wide / 2}[node.get("text-anchor")]
            boxes.append((left, float(node.get("y")), left + wide))
        assert all(left >= 0 and right <= width + 12 for left, _, right in boxes)
        for i, (left, y, right) in enumerate(boxes):
            assert not [1 for a, b, c in boxes[:i] if abs(b - y) < 14 and a < right and left < c]


def test_a_page_shows_the_names_that_are_placed_for_a_plot_of_its_width():
    """They were placed for 560 pixels, and shown from 410 on."""
    shown = dict(re.findall(r"@container plot \(min-width: (\d+)px\) .*?\.chart \.at(\d+) \{ display: inline; \}", style()))
    assert shown == {str(width): str(width) for width in WIDTHS}
    assert [*shown] == sorted(shown, key=int)  # the last of the rules that apply wins
    found = chart()
    found.points("a", [Point(5, 2)], look(0), label="an arm")
    places = parsed(found.html()).findall(".//g[@class]")
    assert {place.get("class") for place in places} == {f"labels placed at{width}" for width in WIDTHS}


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (["KL(s ‖ l)", "l → xl", "KL(s ‖ xl)"], ["KL(s ‖ l)\na", "l → xl\nb", "KL(s ‖ xl)\nc"]),
        (
            ["KL(student ‖ assistant)", "assistant → xl", "KL(student ‖ xl)"],
            ["KL(student\n‖ assistant)\na", "assistant\n→ xl\nb", "KL(student\n‖ xl)\nc"],
        ),
        (["KL(s ‖ l)", "l → smollm2-1.7b-instruct", "KL(s ‖ smollm2-1.7b-instruct)"], ["a", "b", "c"]),
    ],
)
def test_texts_below_bars_fit_their_bars(names, texts):
    assert bar_texts(names, ("a", "b", "c"), "‖→") == texts


def test_labels_avoid_intervals_if_there_is_room_beside_them():
    label, interval = Label(0.5, 100, "an arm", "a", "red"), Mark(0.53, 100, 60, 140, "a")
    (alone,), (beside,) = place_labels([label], 560, (0, 300)), place_labels([label], 560, (0, 300), [interval])
    assert 'text-anchor="start"' in alone
    assert 'text-anchor="end"' in beside
    crowd = [Mark(share / 100, 100, 0, 300, "a") for share in range(0, 101, 2)]
    assert place_labels([label], 560, (0, 300), crowd) == [alone]


def test_labels_avoid_horizontal_lines():
    """The line at 0 ran through the name of the only path of an advice."""
    found = chart(height=200)
    found.segment((0, 2), (10, 2), look(1))
    found.points("a > b", [Point(5, 2, 1, 3)], look(0), label="a > b")
    heights = [float(node.get("y")) - 4 for node in parsed(found.html()).iter() if node.get("class") == "label"]
    assert len(heights) == len(WIDTHS)
    line = found._top(2)
    assert all(abs(y - line) > 8 for y in heights)


def test_an_axis_of_zeros_begins_at_zero():
    assert nice_span([0.0, 0.0]) == nice_span([0.0], zero=True) == nice_span([]) == (0.0, 1.0)


def test_the_title_of_an_axis_is_above_its_highest_tick():
    found = Chart("c", "a chart", Axis(0, 1), Axis(0, 1, "percentage points")).html()
    heights = {node.text: float(node.get("y")) for node in parsed(found).iter() if node.get("class") in ("title", "tick") and node.text}
    assert heights["1.0"] - heights["percentage points"] > 12


def test_a_label_is_nearest_to_its_own_point_or_not_drawn():
    long, star = Label(0.98, 100, "a-name-that-is-long", "long", "red"), Label(0.80, 130, "star", "star", "red")
    between = [Mark(0.88, y, 0, 200, "other") for y in range(0, 201, 20)]
    assert len(place_labels([long, star], 300, (0, 200))) == 2
    (only,) = place_labels([long, star], 300, (0, 200), between)  # each place for the long name is nearer to another point
    assert ">star</text>" in only
    shifted = 'y="134.0" text-anchor="end"'  # at the left, because the point of another series is at the right
    assert shifted in place_labels([star], 300, (0, 200), [Mark(0.84, 130, 120, 140, "other")])[0]
    assert place_labels([long], 300, (0, 200), [Mark(0.98, 100, 90, 110, "other")]) == []  # one point hides the other
    assert len(place_labels([long], 300, (0, 200), [Mark(0.9, 100, 90, 110, "long")])) == 1  # another point of the same series


def test_ends_are_spread():
    placed = spread([10, 11, 12, 90], 15, (0, 100))
    assert all(b - a >= 15 - 1e-6 for a, b in pairwise(placed))
    assert spread([99, 98], 15, (0, 100)) == pytest.approx([100, 85])


def test_strips_share_an_axis():
    strip = Strip(Axis(-10, 10), zero=True)
    drawn = strip.interval(5, 0, 40, look(0), tip="five")
    assert 'x="75.00%"' in drawn
    assert 'x2="100.00%"' in drawn  # cut at the end of the axis
    assert 'data-tip="five"' in drawn
    assert 'x="50.00%" width="25.00%"' in strip.bar(5, 4, 6, look(0))


def test_looks_repeat_late():
    assert len({(look(i).colour, look(i).marker) for i in range(COLOURS * len(SHAPES))}) == 156
    assert all(f"--c{i}:" in style() for i in range(COLOURS))


def contrast(a: str, b: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_seen_on_light_and_dark_pages():
    light, dark, printed = style().split(":root {")[1:]
    for rules, page in ((light, "#ffffff"), (dark, "#12161d"), (printed, "#ffffff")):
        colours = re.findall(r"--(c\d+|guide|better|worse|unclear): (#[0-9a-f]{6})", rules.split("}")[0])
        assert len(colours) == COLOURS + 4
        assert {name for name, colour in colours if contrast(colour, page) < 3} == set()


def test_the_pages_have_little_javascript():
    page = files("tadistill.report").joinpath("templates", "report.js").read_text(encoding="utf-8")
    lines = [line for line in (script() + page).splitlines() if line.strip() and not line.strip().startswith("//")]
    assert len(lines) < 270
