"""What a score was bought with: the entropy-metric plane and the cost-quality plot."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from tadistill.report.figures.style import GREY, LegendEntry, Look, arm_group, arm_legend, axes, div, escaped, line, looks
from tadistill.results.collect import MEAN, Results, primary_metric, sets_with
from tadistill.results.files import Arm
from tadistill.results.units import flops_text, metric_title, number, summary_text

Point = tuple[float, float, str]  # entropy, metric, decoding

MAIN = "main decoding"
_PLAIN = Look(GREY, "line-ew", "┅", "dash")


def entropy_curves(results: Results) -> Mapping[str, tuple[Point, ...]]:
    """Arm -> its points, by entropy (nats/token of the decoding distribution); both means over the sets of the primary metric."""
    metric = primary_metric(results)
    found: dict[str, tuple[Point, ...]] = {}
    for arm in results.plan.arms:
        points: list[Point] = []
        for name, suffix in ((MAIN, ""), *((name, f"@{name}") for name in results.plan.decodings)):
            summary = results.summaries.get((arm.name, MEAN, f"{metric}{suffix}"))
            sets = sets_with(results, f"{metric}{suffix}")
            entropies = [results.summaries.get((arm.name, s, f"entropy{suffix}")) for s in sets]
            known = [e.mean for e in entropies if e is not None]
            if summary is not None and len(known) == len(sets):
                points.append((float(np.mean(known)), summary.mean, name))
        if points:
            found[arm.name] = tuple(sorted(points))
    return found


def plane_figure(results: Results) -> str | None:
    """Each arm a curve through its decodings; None when no arm has a second decoding to make a curve of."""
    metric, styles, curves = primary_metric(results), looks(results), entropy_curves(results)
    if not any(len(points) > 1 for points in curves.values()):
        return None
    figure = go.Figure()
    for name, points in curves.items():
        look, main = styles[name], [decoding == MAIN for *_, decoding in points]
        summary = results.summaries[name, MEAN, metric]
        figure.add_scatter(
            x=[x for x, *_ in points],
            y=[y for _, y, _ in points],
            mode="lines+markers",
            legendgroup=arm_group(name),
            customdata=[decoding for *_, decoding in points],
            line={"color": look.colour, "width": 1.6, "dash": look.dash},
            marker={"symbol": look.marker, "size": [12 if at else 8 for at in main], "line": {"width": 2 if "open" in look.marker else 0}},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [summary.high - summary.mean if at else 0 for at in main],
                "arrayminus": [summary.mean - summary.low if at else 0 for at in main],
                "thickness": 1,
                "width": 3,
            },
            hovertemplate=f"{escaped(name)}, %{{customdata}}: {metric_title(metric)} %{{y:.2f}}, %{{x:.2f}} nats/token<extra></extra>",
            meta=[name, "plane"],
        )
    axes(figure, "entropy of the decoding (nats/token)", metric_title(metric))
    _name_decodings(figure, list(curves.values()))
    return div(figure, "figure-plane", height=440, top=34)


def _name_decodings(figure: go.Figure, curves: Sequence[tuple[Point, ...]]) -> None:
    """The decodings' names above the plot at their mean entropy; neighbours take turns in height."""
    by_name: dict[str, list[float]] = {}
    for points in curves:
        for x, _, decoding in points:
            by_name.setdefault(decoding, []).append(x)
    places = sorted((float(np.mean(xs)), name) for name, xs in by_name.items())
    for index, (x, name) in enumerate(places):
        line(figure, dash="dot", x0=x, x1=x, yref="paper", y0=0, y1=1)
        figure.add_annotation(
            x=x, y=1, yref="paper", yanchor="bottom", yshift=13 * (index % 2), text=escaped(name), showarrow=False, font_size=11
        )


def plane_legend(results: Results) -> list[LegendEntry]:
    """Its legend."""
    return arm_legend(results, entropy_curves(results))


def cost_points(results: Results) -> list[tuple[Arm, float, float, float, float]]:
    """Arms with known training FLOPs: arm, FLOPs of one seed, and the primary metric's mean, low and high."""
    metric = primary_metric(results)
    found: list[tuple[Arm, float, float, float, float]] = []
    for arm in results.plan.arms:
        summary = results.summaries.get((arm.name, MEAN, metric))
        if summary is not None and arm.flops is not None:
            found.append((arm, arm.flops, summary.mean, summary.low, summary.high))
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, quality) that no cheaper or equally cheap point beats, by cost."""
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def direct_longer(results: Results) -> list[tuple[float, float]]:
    """What training the direct arm longer buys: it and its equal-compute twins, by FLOPs, for the first student that has some."""
    arms = [(arm, flops, mean) for arm, flops, mean, *_ in cost_points(results) if flops > 0 and len(arm.path) == 2]
    for first in (arm for arm, *_ in arms if arm.compute is None):
        curve = [(f, m) for a, f, m in arms if a.name == first.name or (a.compute and (a.path, a.method) == (first.path, first.method))]
        if len(curve) > 1:
            return sorted(curve)
    return []


def pareto_figure(results: Results) -> str | None:
    """Training FLOPs against the primary metric, the front, and the direct arm's curve; None without two trained arms."""
    points = cost_points(results)
    trained = [point for point in points if point[1] > 0]
    if len(trained) < 2:
        return None
    metric, styles = primary_metric(results), looks(results)
    figure = go.Figure()
    front = pareto_front([(flops, mean) for _, flops, mean, *_ in trained])
    rightmost = max(flops for _, flops, *_ in trained)
    _guide(figure, [*front, (rightmost, front[-1][1])], "front", {"shape": "hv", "dash": "solid", "width": 1.5})
    longer = direct_longer(results)
    if longer:
        _guide(figure, longer, "direct longer", {"dash": "dash", "width": 2.5})
    for arm, flops, mean, low, high in trained:
        look = styles[arm.name]
        text = f"{escaped(arm.name)}: {summary_text(results.summaries[arm.name, MEAN, metric], metric)}, {flops_text(flops)} FLOPs"
        figure.add_scatter(
            x=[flops],
            y=[mean],
            mode="markers",
            legendgroup=arm_group(arm.name),
            marker={"color": look.colour, "symbol": look.marker, "size": 12, "line": {"width": 2 if "open" in look.marker else 0}},
            error_y={"type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low], "thickness": 1.3, "width": 4},
            hovertemplate=f"{text}<extra></extra>",
            meta=[arm.name, "cost"],
        )
    for arm, flops, mean, *_ in points:
        if flops == 0:
            line(figure, colour=GREY, dash="dot", xref="paper", x0=0, x1=1, y0=mean, y1=mean)
            label = f"{escaped(arm.name)} (not trained here) {number(mean, metric)}"
            figure.add_annotation(xref="paper", x=0.01, xanchor="left", y=mean, yanchor="bottom", text=label, showarrow=False, font_size=11)
    axes(figure, "training FLOPs of one seed", f"{metric_title(metric)}, mean over sets")
    spread = np.log10([flops for _, flops, *_ in trained])
    pad = max(0.06, 0.08 * float(np.ptp(spread)))
    ticks = [m * 10.0**e for e in range(int(spread.min()) - 1, int(spread.max()) + 2) for m in ((1, 2, 5) if np.ptp(spread) < 2 else (1,))]
    figure.update_xaxes(type="log", range=[float(spread.min()) - pad, float(spread.max()) + pad], tickangle=0)
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:.0e}".replace("e+", "e") for tick in ticks])
    return div(figure, "figure-cost", height=420)


def _guide(figure: go.Figure, points: Sequence[tuple[float, float]], name: str, style: Mapping[str, object]) -> None:
    xs, ys = zip(*points, strict=True)
    figure.add_scatter(
        x=list(xs), y=list(ys), mode="lines", line={"color": GREY, **style}, hoverinfo="skip", legendgroup=name, meta=["", name]
    )


def cost_legend(results: Results) -> list[LegendEntry]:
    """Its legend: the arms and the two guide lines."""
    entries = arm_legend(results, [arm.name for arm, flops, *_ in cost_points(results) if flops > 0])
    guides = [LegendEntry("front", "best for its cost", Look(GREY, "line-ew", "━", "solid"))]
    guides += [LegendEntry("direct longer", "direct, trained longer", _PLAIN)] if direct_longer(results) else []
    return [*entries, *guides]
