"""The HTML report: one file with its scripts, styles and data, which needs no network.

To add a section: write a function here that returns its data, add a block to ``templates/report.html.j2``, and add a title to `_SECTIONS`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from tadistill.metrics import metric_title
from tadistill.report.analysis import explain
from tadistill.report.explain import cautions
from tadistill.report.figures import behaviour, paths, scores
from tadistill.report.figures.style import arm_legend, looks
from tadistill.report.tables import comparison_table, detail_tables, interval_method, main_metrics, score_table, stage_rows, versions
from tadistill.report.text import answer
from tadistill.results import units
from tadistill.results.collect import MEAN, Results, primary_metric, seeds_of
from tadistill.results.curves import learning_curves
from tadistill.results.samples import judgements, samples, shown_first
from tadistill.visible import visible, visible_parts

# anchor, title, and the template variable that must not be empty for the section to appear
_SECTIONS = (
    ("results", "Results", "tables"),
    ("forest", "Arms compared", "means"),
    ("analysis", "Analysis", "analysis"),
    ("paths", "Paths", "paths"),
    ("plane", "Quality and entropy", "plane"),
    ("budget", "Error budget", "budgets"),
    ("cost", "Quality and cost", "cost"),
    ("curves", "Learning curves", "panels"),
    ("exposure", "Exposure bias and length", "behaviour"),
    ("calibration", "Calibration", "calibration"),
    ("judge", "Judgements", "judged"),
    ("samples", "Samples", "samples"),
    ("details", "All metrics", "details"),
    ("provenance", "Provenance", "stages"),
)


def render_page(results: Results) -> str:
    environment = Environment(
        loader=PackageLoader("tadistill.report"),
        autoescape=True,
        finalize=visible_parts,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(embedded=_embedded, prose=_prose)
    shown = {**_words(results), **_figures(results), **_samples(results), "judged": judgements(results.study_dir)}
    return environment.get_template("report.html.j2").render(
        sections=[(anchor, title) for anchor, title, needs in _SECTIONS if shown[needs]], plotly_js=Markup(get_plotlyjs()), **shown
    )


def _words(results: Results) -> dict[str, Any]:
    stages = stage_rows(results)
    measured = bool(results.summaries)
    return {
        "plan": results.plan,
        "results": results,
        "metric_title": metric_title,
        "units": units,
        "mean": MEAN,
        "primary": primary_metric(results),
        "intervals": interval_method(results),
        "seeds": seeds_of(results),
        "trained": any(arm.is_trained for arm in results.plan.arms),
        "chains": any(arm.has_assistant for arm in results.plan.arms),
        "answer": answer(results),
        "cautions": cautions(results) if measured else [],
        "tables": [score_table(results, metric) for metric in main_metrics(results)],
        "compared": comparison_table(results) if measured else None,
        "details": detail_tables(results) if measured else [],
        "analysis": explain(results) if measured else [],
        "stages": stages,
        "versions": versions(stages),
    }


def _figures(results: Results) -> dict[str, Any]:
    curves = learning_curves(results)
    exposure, lengths = behaviour.exposure_figure(results), behaviour.length_figure(results)
    scored = [name for name, seeds in results.scores.items() if seeds]
    return {
        "looks": looks(results),
        "differences": _markup(scores.difference_figure(results)),
        "means": _markup(scores.means_figure(results)),
        "paths": _markup(paths.lattice_figure(results)),
        "path_legend": paths.lattice_legend(results),
        "plane": _markup(scores.plane_figure(results)),
        "plane_legend": scores.plane_legend(results),
        "budgets": _markups(paths.budget_figures(results)),
        "cost": _markup(scores.pareto_figure(results)),
        "cost_legend": scores.cost_legend(results),
        "longer": bool(scores.direct_longer(results)),
        "panels": _markups(behaviour.curve_figures(curves, results)),
        "legend": behaviour.curve_legend(curves, results),
        "behaviour": exposure or lengths,
        "exposure": _markup(exposure),
        "lengths": _markup(lengths),
        "exposure_legend": arm_legend(results, scored),
        "calibration": _markups(behaviour.calibration_figures(results)),
        "calibration_legend": behaviour.calibration_legend(results),
    }


def _samples(results: Results) -> dict[str, Any]:
    found = samples(results)
    first = set(shown_first(results))
    names = {name for prompts in found.values() for prompt in prompts for name in prompt["answers"]}
    entries = [replace(entry, shown=entry.name in first) for entry in arm_legend(results, names)]
    styles = looks(results).items()
    colours, glyphs = {name: look.colour for name, look in styles}, {name: f"{look.glyph}\ufe0e" for name, look in styles}
    return {"samples": found, "sampled": entries, "colours": colours, "glyphs": glyphs}


def _markup(figure: str | None) -> Markup | None:
    return Markup(figure) if figure else None


def _markups(panels: Mapping[str, str]) -> dict[str, Markup]:
    return {name: Markup(panel) for name, panel in panels.items()}


def _prose(sentence: str) -> Markup:
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(visible(sentence))))
    return Markup(re.sub(r"(\[[^\s\]]+, [^\s\]]+\]|\(\d+ seeds?\)|\S+ … \S+)", r'<span class="unbroken">\1</span>', marked))


def _embedded(value: Any) -> Markup:
    encoded = json.dumps(visible_parts(value), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return Markup(encoded)
