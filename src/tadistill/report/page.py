"""The HTML report: one file with its scripts, styles, data and figures, which needs no network.

The first screen has the question, the answer, one figure and a table of arms. Each section below begins with its main finding. Tables and
definitions are closed until the reader opens them.

Long parts are packed, and ``templates/unpack.js`` unpacks them while the browser parses the page: that of 200 arms has 1 MB in place of 9.

To add a section, add three things: its heading and its entry in `findings.sections`; its block in ``templates/report.html.j2``; and its
numbers, which `results_json` collects.
"""

import base64
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from tadistill import charts
from tadistill.charts import Axis, Chart, Look, Strip, nice_span
from tadistill.config.arm import members
from tadistill.constants import SEEDS_FOR_A_CLAIM
from tadistill.glossary import GLOSSARY, metric_text
from tadistill.metrics import MEAN, metric_title
from tadistill.plan.kinds import KINDS
from tadistill.report import findings
from tadistill.report.against_sft import student_of
from tadistill.report.analysis import MARKS, Analysis, Row, analyses, published
from tadistill.report.answer import answer
from tadistill.report.explain import cautions, verdict_text
from tadistill.report.figures import MANY, behaviour, compute, looks, paths, scores, titled
from tadistill.report.path_words import arm_words, route, steps
from tadistill.report.tables import (
    CostRow,
    best_arms,
    comparison_table,
    cost_rows,
    counted_text,
    detail_tables,
    interval_method,
    main_metrics,
    score_table,
    stage_rows,
    versions,
)
from tadistill.results import number_text
from tadistill.results.collect import Results, Summary, primary_metric, seeds_of
from tadistill.results.curves import learning_curves
from tadistill.results.sample_answers import Samples, judgements, references, samples, shown_first
from tadistill.results.study import ArmRecord
from tadistill.results.verdict import comparisons
from tadistill.text import counted, visible

_LONG = 250_000  # characters


@dataclass(frozen=True)
class ArmRow:
    """One arm in the table of the first screen, with its mean of the primary metric.

    `best` is True if no arm that trains the same model has an equal or higher mean. It is False if there is no arm to compare with, or if
    the study trains nothing.
    """

    cost: CostRow
    summary: Summary | None
    plot: Markup
    best: bool
    words: str
    """A short description of the arm, such as "taught by xl through l"."""
    done: str
    """The number of finished seeds, such as ``1/3 seeds``. Empty if all are finished."""


@dataclass(frozen=True)
class ArmGroup:
    """The arms that train one model. The best arm comes first."""

    model: str
    role: str
    size: str
    rows: tuple[ArmRow, ...]


def render_page(results: Results) -> str:
    environment = charts.html_templates("tadistill.report", embedded=charts.embedded, prose=_prose, packed=_packed)
    shown = {**_first(results), **_sections(results), **_samples(results, samples(results))}
    return environment.get_template("report.html.j2").render(charts=charts, **shown)


# --- the first screen -------------------------------------------------------------------------------------------------


def _first(results: Results) -> dict[str, Any]:
    metric, student = primary_metric(results), student_of(results)
    figure = compute.cost_figure(results, student)
    groups = arm_groups(results)
    return {
        "plan": results.plan,
        "results": results,
        "metric": metric,
        "metric_title": metric_title,
        "titled": titled,
        "metric_text": metric_text,
        "decoded": f"sampled at temperature {t:g}" if (t := results.plan.recipe["evaluate"].get("temperature", 1.0)) else "greedy",
        "units": number_text,
        "mean": MEAN,
        "answer": answer(results),
        "cautions": cautions(results) if results.summaries else [],
        "counted": counted_text(results),
        "seeds": seeds_of(results),
        "many": len(results.plan.arms) > MANY,
        "trained": any(arm.is_trained for arm in results.plan.arms),
        "seeds_for_a_claim": SEEDS_FOR_A_CLAIM,
        "groups": groups,
        "beside": _beside(results),
        "ruler": _strip(results).ruler() if results.summaries else None,
        "relative": any(row.cost.relative is not None for group in groups for row in group.rows),
        "looks": looks(results),
        "glyphs": {name: charts.glyph(look) for name, look in looks(results).items()},
        "student": student,
        "cost": markup(figure),
        "means": None if figure else markup(scores.means_figure(results)),
        "roles": roles(results),
        "progress": _progress(results) if not results.summaries else [],
        "glossary": GLOSSARY,
        "pruned": any(route(arm).starts for arm in results.plan.arms),
        "phased": any(arm.is_phased for arm in results.plan.arms),
    }


def arm_groups(results: Results) -> list[ArmGroup]:
    """Group the arms by the model that they train. The student comes first, then the other models from small to big."""
    metric, strip = primary_metric(results), _strip(results)
    costs, words = {row.arm.name: row for row in cost_rows(results)}, arm_words(results)
    parameters, student = results.plan.parameters, student_of(results)
    if not any(arm.is_trained for arm in results.plan.arms):  # nothing is trained: one list of models, the best first
        words = {arm.name: f"{number_text.parameters_text(parameters[arm.model])} parameters" for arm in results.plan.arms}
        rows = [_arm_row(results, costs[arm.name], words[arm.name], strip, best=False) for arm in _ranked(results, results.plan.arms)]
        return [ArmGroup("", "", "", tuple(rows))]
    groups, best = list[ArmGroup](), best_arms(results, MEAN, metric)
    for model in sorted(dict.fromkeys(arm.model for arm in results.plan.arms), key=lambda model: (model != student, parameters[model])):
        arms = _ranked(results, [arm for arm in results.plan.arms if arm.model == model])
        rows = [_arm_row(results, costs[arm.name], words.get(arm.name, ""), strip, best=arm.name in best) for arm in arms]
        groups.append(ArmGroup(model, roles(results).get(model, ""), number_text.parameters_text(parameters[model]), tuple(rows)))
    return groups


def _ranked(results: Results, arms: Iterable[ArmRecord]) -> list[ArmRecord]:
    found = {arm.name: results.summaries.get((arm.name, MEAN, primary_metric(results))) for arm in arms}
    return sorted(arms, key=lambda arm: -(s.mean if (s := found[arm.name]) else -1e9))


def _arm_row(results: Results, cost: CostRow, words: str, strip: Strip, *, best: bool) -> ArmRow:
    name, metric = cost.arm.name, primary_metric(results)
    s, done, planned = results.summaries.get((name, MEAN, metric)), len(results.scores[name]), len(cost.arm.evaluate)
    tip = f"{name}: {number_text.summary_text(s, metric)}" if s else ""
    plot = strip.bar(s.mean, s.low, s.high, looks(results)[name], tip=tip) if s else strip.empty()
    return ArmRow(cost, s, plot, best, words, "" if done == planned else f"{done}/{counted(planned, 'seed')}")


def _beside(results: Results) -> list[tuple[str, Markup, str]]:
    # name, plot and mean of each model that is no arm
    metric, strip, beside = primary_metric(results), _strip(results), references(results)
    found = [(arm.name, beside.summaries.get((arm.name, MEAN, metric))) for arm in beside.plan.arms] if beside else []
    grey = Look("var(--soft)")
    return [
        (
            name,
            strip.bar(s.mean, s.low, s.high, grey, tip=f"{name}: {number_text.summary_text(s, metric)}"),
            number_text.number(s.mean, metric),
        )
        for name, s in found
        if s
    ]


def _strip(results: Results) -> Strip:
    every = (results, beside) if (beside := references(results)) else (results,)
    shown = MEAN, primary_metric(results)
    found = [s for of in every for (_, *where), s in of.summaries.items() if (*where,) == shown]
    low, high = nice_span([v for s in found for v in (s.low, s.high)], zero=True, pad=0.02)
    return Strip(Axis(low, high), zero=low < 0)


def roles(results: Results) -> dict[str, str]:
    """Map each model to its role: teacher, assistant or student. The result is empty in a study that distils nothing."""
    found: dict[str, str] = {}
    taught = [arm for arm in results.plan.arms if arm.is_taught]
    for arm in taught:
        for model in arm.assistants:
            found.setdefault(model, "assistant")
    for arm in taught:
        found.setdefault(arm.model, "student")
    for arm in taught:
        if arm.is_routed or results.plan.teacher is None:  # the plan does not name one teacher, so the paths do
            found = dict.fromkeys(members(arm.path[0]), "teacher") | found
    if results.plan.teacher and found:
        found[results.plan.teacher] = "teacher"
    return {model: found[model] for model in results.plan.from_big(found)}


def _progress(results: Results) -> list[tuple[str, int, int]]:
    done = {stage.key for stage in results.plan.stages if results.store.finished(stage.key)}
    kinds = {kind: [stage.key in done for stage in results.plan.stages if stage.kind == kind] for kind in KINDS}
    rows = [(kind, sum(found), len(found)) for kind, found in kinds.items() if found]
    return [*rows, ("all stages", len(done), len(results.plan.stages))]


# --- the sections -----------------------------------------------------------------------------------------------------


def _sections(results: Results) -> dict[str, Any]:
    measured, stages = bool(results.summaries), stage_rows(results)
    lattice, budgets = paths.lattice_figure(results), paths.budget_figures(results)
    exposure, lengths, plane = behaviour.exposure_figure(results), behaviour.length_figure(results), scores.plane_figure(results)
    over_budgets = compute.curves_figure(results) if measured else None
    panels, judged = behaviour.curve_figures(learning_curves(results), results), judgements(results)
    return {
        "sections": findings.sections(results),
        "differences": markup(scores.difference_figure(results)) if measured else None,
        "verdicts": [verdict_text(results, c) for c in comparisons(results)] if measured else [],
        "analysis": [(a, [(row, _row_plot(a, row)) for row in a.rows]) for a in analyses(results)] if measured else [],
        "marks": MARKS,
        "published": published(results) if measured else [],
        "tables": [score_table(results, m) for m in main_metrics(results)],
        "compared": comparison_table(results) if measured else None,
        "details": detail_tables(results) if measured else [],
        "over_budgets": markup(over_budgets),
        "budget_gaps": markup(compute.gaps_figure(results)) if measured else None,
        "budget_sentences": compute.curve_sentences(results) if over_budgets else [],
        "lattice": markup(lattice),
        "lattice_notes": paths.lattice_notes(results) if lattice else [],
        "methods": paths.line_looks(results),
        "budget_notes": paths.budget_notes(results),
        "budgets": _markups(budgets),
        "panels": _markups(panels),
        "judged": judged,
        "plane": markup(plane),
        "exposure": markup(exposure),
        "lengths": markup(lengths),
        "calibration": _markups(behaviour.calibration_figures(results)),
        "intervals": interval_method(results),
        "steps": steps,
        "stages": stages,
        "versions": versions(stages),
    }


def _row_plot(analysis: Analysis, row: Row) -> Markup:
    if row.difference is None:
        return Markup("")
    alike = [r.difference for r in analysis.rows if r.metric == row.metric and r.difference]
    most = 1.04 * max(max(abs(d.low), abs(d.high)) for d in alike) or 1.0
    look = Look({"better": "var(--better)", "worse": "var(--worse)"}.get(row.mark, "var(--unclear)"))
    d = row.difference
    return Strip(Axis(-most, most, marks={}), zero=True).interval(d.mean, d.low, d.high, look, tip=number_text.span(d, row.metric))


def _samples(results: Results, found: Samples) -> dict[str, Any]:
    names = {name for prompts in found.values() for prompt in prompts for name in prompt["answers"]}
    sampled = [arm.name for arm in results.plan.arms if arm.name in names]
    colours = {name: look.colour for name, look in looks(results).items() if name in names}
    return {"samples": found, "sampled": sampled, "colours": colours, "shown": [name for name in shown_first(results) if name in names]}


def markup(figure: Chart | None) -> Markup | None:
    """Return the HTML of a figure, or None if there is no figure."""
    return figure.html() if figure else None


def _packed(part: str) -> str:
    """Return the DEFLATE of a long part in base64, or an empty text for a short one, which stands in the page as it is."""
    return base64.b64encode(zlib.compress(part.encode(), wbits=-zlib.MAX_WBITS)).decode() if len(part) > _LONG else ""


def _markups(panels: Mapping[str, Chart]) -> dict[str, Markup]:
    return {name: panel.html() for name, panel in panels.items()}


def _prose(sentence: str) -> Markup:
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(visible(sentence))))
    return Markup(
        re.sub(
            r"(\[[^\s\]]+, [^\s\]]+\]|\(\d+ seeds?\)|[\d.]+ [kMB](?: parameters)?|\d+ % (?:interval|chance)|[−\d.]+ to [−\d.]+)",
            r'<span class="unbroken">\1</span>',
            marked,
        )
    )
