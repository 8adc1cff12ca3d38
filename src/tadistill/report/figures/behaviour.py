"""How models behave: exposure bias, answers by the length of their reference, and calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from tadistill.report.figures.style import GREY, GRID, LegendEntry, arm_group, arm_legend, axes, div, escaped, line, looks
from tadistill.results.buckets import BUCKETS, bucket_size, bucket_summary, bucket_title
from tadistill.results.collect import MEAN, Results
from tadistill.results.files import load_corpus, load_exposure
from tadistill.results.units import metric_title, number, summary_text

FEW = 10  # answers: below this a position says little
_LONGEST = 256  # positions drawn

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Exposure:
    """ExAccErr in per cent by position (from 1): the mean over seeds and each seed. From `solid` positions on, fewer than `FEW`
    answers of some seed are that long.
    """

    mean: Array
    seeds: Mapping[int, Array]
    solid: int


def exposures(results: Results) -> Mapping[str, Exposure]:
    """Arm -> its exposure bias, over all sets together: each position is weighted by how many answers reach it."""
    found: dict[str, Exposure] = {}
    for arm in results.plan.arms:
        by_seed: dict[int, Array] = {}
        solid: list[int] = []
        for seed in (seed for seed in sorted(results.scores[arm.name]) if seed in arm.analyse):
            by_set = load_exposure(results.store_dir, arm.analyse[seed])
            (student, n_student), (teacher, n_teacher) = (
                _pooled([entry[who] for entry in by_set.values()]) for who in ("student", "teacher")
            )
            length = min(len(student), len(teacher), _LONGEST)
            by_seed[seed] = accumulated_error(student[:length], teacher[:length])
            solid.append(int(np.argmin(np.append(np.minimum(n_student[:length], n_teacher[:length]), 0) >= FEW)))
        length = min(map(len, by_seed.values()), default=0)
        if length:
            mean = np.mean([values[:length] for values in by_seed.values()], axis=0)
            found[arm.name] = Exposure(mean, by_seed, min(*solid, length))
    return found


def accumulated_error(student_L: Array, teacher_L: Array) -> Array:
    """ExAccErr(l) = 100 (R(l) - E(l)) / E(l), with R and E the sums up to l of the KL on the student's and the teacher's prefixes.

    MiniLLM, section 3.6; E(l) is the paper's l eps(l). Positions before the teacher's sum is positive are left out by NaN.
    """
    risk, expected = np.cumsum(student_L), np.cumsum(teacher_L)
    positive = expected > 0
    return np.where(positive, 100 * (risk - expected) / np.where(positive, expected, 1.0), np.nan)


def _pooled(entries: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Array, Array]:
    """KL and count by position over several sets; positions that no answer reaches are cut off."""
    length = max(len(entry["kl"]) for entry in entries)
    total, count = np.zeros(length), np.zeros(length)
    for entry in entries:
        n = np.asarray(entry["count"], dtype=np.float64)
        total[: len(n)] += n * np.asarray(entry["kl"], dtype=np.float64)
        count[: len(n)] += n
    reached = int(np.argmin(np.append(count, 0) > 0))
    return total[:reached] / count[:reached], count[:reached]


def exposure_figure(results: Results) -> str | None:
    """ExAccErr by position per arm: mean over seeds, faint seeds, dotted where few answers are that long."""
    found, styles = exposures(results), looks(results)
    if not found:
        return None
    figure = go.Figure()
    for name, exposure in found.items():
        look, group = styles[name], arm_group(name)
        if len(exposure.seeds) > 1:
            for values in exposure.seeds.values():
                thin = {"color": look.colour, "width": 1}
                xs, ys = _points(values, 0, exposure.solid)
                figure.add_scatter(
                    x=xs, y=ys, mode="lines", opacity=0.25, hoverinfo="skip", line=thin, legendgroup=group, meta=[name, "seed"]
                )
        spans = [(0, exposure.solid, "exposure", look.dash, 1.0), (max(exposure.solid - 1, 0), len(exposure.mean), "few", "dot", 0.45)]
        for start, end, what, dash, opacity in spans:
            xs, ys = _points(exposure.mean, start, end)
            if len(xs) > (what == "few"):
                figure.add_scatter(
                    x=xs,
                    y=ys,
                    name=escaped(name),
                    mode="lines+markers" if what == "exposure" else "lines",
                    opacity=opacity,
                    line={"color": look.colour, "width": 2.2, "dash": dash},
                    marker={"symbol": look.marker, "size": 8, "maxdisplayed": 5},
                    hovertemplate=f"{escaped(name)}, position %{{x}}: %{{y:.1f}} %<extra></extra>",
                    legendgroup=group,
                    meta=[name, what],
                )
    line(figure, colour=GREY, xref="paper", x0=0, x1=1, y0=0, y1=0)
    axes(figure, "position in the response (tokens)", "ExAccErr (%)")
    return div(figure, "figure-exposure", height=360)


def _points(values: Array, start: int, end: int) -> tuple[list[int], list[float | None]]:
    shown = values[start:end]
    return list(range(start + 1, start + 1 + len(shown))), [round(float(v), 4) if np.isfinite(v) else None for v in shown]


def exposure_legend(results: Results) -> list[LegendEntry]:
    """Its legend."""
    return arm_legend(results, exposures(results))


@dataclass(frozen=True)
class Reliability:
    """Bins over all sets and seeds of an arm that hold something: mean confidence and share of correct predictions, in per cent."""

    confidence: Array
    correct: Array
    count: Array


def reliabilities(results: Results, what: str) -> Mapping[str, Reliability]:
    """Arm -> its bins of `what`: ``tokens`` (the next token of the reference) or ``labels`` (the chosen answer)."""
    found: dict[str, Reliability] = {}
    for arm in results.plan.arms:
        tables = [
            of_set["calibration"][what]
            for seed in sorted(results.scores[arm.name])
            for of_set in load_corpus(results.store_dir, arm.evaluate[seed]).values()
            if what in of_set.get("calibration", {})
        ]
        if not tables:
            continue
        count, confidence, correct = (
            np.array([table[part] for table in tables], dtype=np.float64) for part in ("count", "confidence", "correct")
        )
        total = count.sum(axis=0)
        held = total > 0
        sure, right = (100 * (count * part).sum(axis=0)[held] / total[held] for part in (confidence, correct))
        found[arm.name] = Reliability(sure, right, total[held])
    return found


def calibration_figures(results: Results) -> Mapping[str, str]:
    """``tokens`` and ``labels`` -> reliability diagram, for what was measured."""
    panels: dict[str, str] = {}
    styles = looks(results)
    for what in ("tokens", "labels"):
        found = reliabilities(results, what)
        if not found:
            continue
        figure = go.Figure()
        line(figure, colour=GREY, width=1.5, dash="dash", x0=0, y0=0, x1=100, y1=100)
        for name, bins in found.items():
            look, ece = styles[name], results.averages.get((name, MEAN, f"ece_{what}"))
            error = f", ECE {number(ece.mean, f'ece_{what}')}" if ece else ""
            figure.add_scatter(
                x=bins.confidence.round(3).tolist(),
                y=bins.correct.round(3).tolist(),
                customdata=bins.count.tolist(),
                mode="lines+markers",
                legendgroup=arm_group(name),
                line={"color": look.colour, "width": 1.5, "dash": look.dash},
                marker={"symbol": look.marker, "size": 7},
                hovertemplate=f"{escaped(name)}{error}<br>sure %{{x:.0f}} %, right %{{y:.0f}} %, %{{customdata:.0f}} {what}<extra></extra>",
                meta=[name, what],
            )
        axes(figure, "confidence (%)", "correct (%)")
        figure.update_xaxes(range=[-2, 102])
        figure.update_yaxes(range=[-2, 102], gridcolor=GRID)
        panels[what] = div(figure, f"figure-calibration-{what}", height=400)
    return panels


def calibration_legend(results: Results) -> list[LegendEntry]:
    """One legend for both diagrams; each arm with its expected calibration error."""
    names = {name for what in ("tokens", "labels") for name in reliabilities(results, what)}
    return [LegendEntry(e.group, e.name + _errors(results, e.name), e.look) for e in arm_legend(results, names)]


def _errors(results: Results, name: str) -> str:
    found = {what: results.averages.get((name, MEAN, f"ece_{what}")) for what in ("tokens", "labels")}
    known = [f"{number(ece.mean, f'ece_{what}')} ({what})" for what, ece in found.items() if ece is not None]
    return f" · ECE {', '.join(known)}" if known else ""


def length_figure(results: Results) -> str | None:
    """ROUGE-L by the length of the reference: each arm with its 95 % intervals, moved aside a little from its neighbours."""
    metric, styles = "rouge_l", looks(results)
    buckets = [bucket for bucket in BUCKETS if bucket_size(results, metric, bucket)]
    names = [arm.name for arm in results.plan.arms if results.scores[arm.name]]
    if len(buckets) < 2 or not names:
        return None
    figure = go.Figure()
    for index, name in enumerate(names):
        summaries = [bucket_summary(results, name, metric, bucket) for bucket in buckets]
        aside = min(0.62 / max(1, len(names) - 1), 0.1) * (index - (len(names) - 1) / 2)
        known = [(x, s) for x, s in enumerate(summaries) if s is not None]
        look = styles[name]
        figure.add_scatter(
            x=[x + aside for x, _ in known],
            y=[s.mean for _, s in known],
            mode="markers",
            legendgroup=arm_group(name),
            marker={"color": look.colour, "symbol": look.marker, "size": 9, "line": {"width": 2 if "open" in look.marker else 0}},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [s.high - s.mean for _, s in known],
                "arrayminus": [s.mean - s.low for _, s in known],
                "thickness": 1.2,
                "width": 0,
            },
            customdata=[summary_text(s, metric) for _, s in known],
            hovertemplate=f"{escaped(name)}: %{{customdata}}<extra></extra>",
            meta=[name, "length"],
        )
    for x in range(len(buckets) - 1):
        line(figure, x0=x + 0.5, x1=x + 0.5, yref="paper", y0=0, y1=1)
    axes(figure, "length of the first reference (tokens)", metric_title(metric))
    ticks = [f"{bucket_title(b)}<br>{bucket_size(results, metric, b)} prompts" for b in buckets]
    figure.update_xaxes(tickvals=list(range(len(buckets))), ticktext=ticks, range=[-0.5, len(buckets) - 0.5], showgrid=False)
    return div(figure, "figure-lengths", height=360, bottom=64)
