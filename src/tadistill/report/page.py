"""The HTML report: one file that holds its scripts, styles and data, and asks the network for nothing.

To add a section: a function here that returns its data, a block in ``templates/report.html.j2``.
"""

import json
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from tadistill.report import text
from tadistill.report.collect import MEAN, Results, primary_metric, seeds_of
from tadistill.report.curves import learning_curves
from tadistill.report.figures import arm_colours, curve_figures, forest_figure, legend_entries, path_figure
from tadistill.report.samples import samples
from tadistill.report.tables import cost_rows, main_metrics, other_metrics, score_table, stage_rows, versions


def render_page(results: Results) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=PackageLoader("tadistill.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(embedded=_embedded, prose=_prose)
    template = environment.get_template("report.html.j2")
    return template.render(
        plan=results.plan,
        results=results,
        text=text,
        mean=MEAN,
        primary=primary_metric(results),
        seeds=seeds_of(results),
        colours=arm_colours(results),
        findings=text.headline(results),
        tables=[score_table(results, metric) for metric in main_metrics(results)],
        others=other_metrics(results),
        costs=cost_rows(results),
        samples=samples(results),
        plotly_js=Markup(get_plotlyjs()),
        **_figures(results),
        **_provenance(results),
    )


def _figures(results: Results) -> dict[str, Any]:
    curves = learning_curves(results)
    forest = forest_figure(results)
    return {
        "forest": Markup(forest) if forest else None,
        "panels": {metric: Markup(div) for metric, div in curve_figures(curves, results).items()},
        "legend": legend_entries(curves, results),
        "paths": Markup(path_figure(results)),
    }


def _provenance(results: Results) -> dict[str, Any]:
    stages = stage_rows(results)
    return {"stages": stages, "versions": versions(stages)}


def _prose(sentence: str) -> Markup:
    """A sentence with its `code` marked and its intervals kept on one line."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(sentence)))
    return Markup(re.sub(r"(\[[^\s\]]+, [^\s\]]+\]|\(\d+ seeds?\))", r'<span class="unbroken">\1</span>', marked))


def _embedded(value: Any) -> Markup:
    """JSON for a ``<script>`` element: no ``<`` survives, so no text of a model can end the element."""
    encoded = json.dumps(value, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return Markup(encoded)
