"""The page in a browser, and the terminal's text: what they show, that they fit, and that names cannot break them."""

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console
from tests.unit.advise.example import report

from tadistill.advise.command import decided, measured, print_advice
from tadistill.advise.history import load_measures
from tadistill.advise.measures import edge_measures, with_earlier
from tadistill.advise.page import render_advice
from tadistill.advise.words import gain_text, reason


@pytest.fixture(scope="module")
def page() -> str:
    return render_advice(report())


def test_the_verdict_is_on_top_and_every_number_is_tagged(page):
    body = page[page.index("<body>") :]
    assert body.index("direct: xl &gt; s") < body.index('id="paths"') < body.index('id="pairs"')
    assert "an &lt;b&gt;example&lt;/b&gt;" in body
    for name in ("measured", "predicted", "assumed"):
        assert f'<span class="tag {name}">' in body
    for figure in ("reverse-kl", "overlap", "entropy-gap", "cost", "lambda", "bias"):
        assert f'id="figure-{figure}"' in body
    assert body.count("tadistill run recipe.yaml") == len(report().steps)
    assert "study x: arm y, seed 1, is not finished" in body


VALUES = "JSON.parse(document.querySelector('#{} .values').textContent)"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, page, tmp_path, width, scheme):
    file = tmp_path / "advice.html"
    file.write_text(page, encoding="utf-8")
    tab = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
    tab.goto(file.as_uri())
    assert errors == []
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert tab.evaluate("[...document.querySelectorAll('svg.plot')].every(p => p.clientWidth > 200 && p.clientWidth <= innerWidth)")
    options = report().advice.options[1:]
    points = [[x, y] for _, x, y, *_ in tab.evaluate(VALUES.format("figure-cost"))["points"]]
    assert points == [pytest.approx([o.cost, o.expected], abs=1e-5) for o in options]
    tab.context.close()


def test_the_budget_bars_end_at_the_whole(browser, page, tmp_path):
    file = tmp_path / "advice.html"
    file.write_text(page, encoding="utf-8")
    tab = browser.new_page()
    tab.goto(file.as_uri())
    ends = {tuple(ys): end for _, _, end, *ys, _ in tab.evaluate(VALUES.format("figure-bias"))["bars"]}  # the last bar of each row
    total = report().measures.pairs["xl", "s"].reverse_kl.mean
    assert list(ends.values()) == [pytest.approx(total, abs=1e-5)] * 3
    tab.close()


def test_the_terminal_fits_80_columns_but_for_commands():
    said = io.StringIO()
    print_advice(report(), Console(file=said, width=80))
    lines = said.getvalue().splitlines()
    commands = [line for line in lines if line.startswith("tadistill run")]
    assert [step.command for step in report().steps] == commands  # whole, so that they can be copied
    assert all(len(line) <= 80 for line in lines if line not in commands)
    for pair in report().measures.pairs.values():
        row = next(line for line in lines if line.strip().startswith(f"{pair.teacher} > {pair.learner} ") and "±" in line)
        assert len(re.findall("±", row)) == 5


def test_an_expected_improvement_says_that_only_the_prior_is_behind_it(page):
    """It was given with three digits, and without this word."""
    found = report()
    said = io.StringIO()
    print_advice(found, Console(file=said, width=80))
    text = "Expected improvement of the chosen path, from the prior alone: about "
    assert f" direct runs of one seed. {text}" in " ".join(said.getvalue().split())
    assert text in page
    assert gain_text(0.00885, found) == f"{text}0.009 points"
    learned = replace(found, metric="loss", advice=replace(found.advice, pairs=1))
    assert gain_text(0.00885, learned) == "Expected improvement of the chosen path: 0.0089 nats/token"


def test_what_is_written_is_what_history_reads(tmp_path):
    found = report()
    edges = edge_measures(found.measures)
    record = measured("s", "c", found.measures, edges) | decided(found)
    (tmp_path / "advice.json").write_text(json.dumps(record, allow_nan=False))
    assert load_measures(tmp_path) == edges
    assert record["advice"]["reason"] == reason(found.advice)
    assert record["lambda_sweeps"]["exp(−loss)"][-1]["high"] is None


def test_measures_of_other_pairs_are_kept(tmp_path):
    """Chains of an earlier plan lost their measures when advice was asked for about other models."""
    edges = edge_measures(report().measures)
    changed = replace(edges["xl", "l"], overlap=0.125)
    old = {("xl", "l"): changed, ("xl", "gone"): changed}
    assert with_earlier(tmp_path, edges) == edges
    (tmp_path / "advice.json").write_text(json.dumps(measured("s", "c", report().measures, old)))
    assert with_earlier(tmp_path, edges) == edges | {("xl", "gone"): changed}
    (tmp_path / "advice.json").write_text("{")
    assert with_earlier(tmp_path, edges) == edges
