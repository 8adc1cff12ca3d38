"""The advice as a page: one HTML file with its scripts, styles, data and figures. It looks like the report of a study."""

from collections.abc import Iterable, Sequence
from typing import Any

from tadistill import charts
from tadistill.advise.decide import improvement
from tadistill.advise.measures import TOP_K, Mean, Measures
from tadistill.advise.words import (
    Report,
    basis_line,
    cost_text,
    gain_text,
    measure_name,
    option_interval,
    plus_minus,
    reason,
    signed_number,
    sweep_text,
    verdict_line,
)
from tadistill.charts import GREY, PLAIN, Axis, Chart, Look, Point, look, nice_span
from tadistill.config.arm import path_text
from tadistill.glossary import GLOSSARY
from tadistill.report.page import markup
from tadistill.results import number_text

_COLUMNS = (
    ("KL(q ‖ p)", "nats/token", "reverse_kl"),
    ("overlap", f"of the {TOP_K} most likely tokens", "overlap"),
    ("mass", f"on p's {TOP_K} most likely tokens", "mass"),
    ("entropy gap", "H(p) − H(q), nats", "entropy_gap"),
    ("bias", "E[log p − log p_T], nats", "bias"),
    ("KL(p ‖ q)", "references, nats/token", "forward_kl"),
    ("loss ratio", "p / q, references", "loss_ratio"),
    ("advantage", "references, nats/token", "advantage"),
)
_HEATMAPS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("reverse_kl", "Initial KL(q ‖ p), nats/token", "0: both models are the same", {}),
    ("overlap", f"Overlap of the {TOP_K} most likely tokens", "1: both models have the same top tokens", {"most": 1.0, "decimals": 2}),
    ("entropy_gap", "Entropy gap H(p) − H(q), nats", "red: the teacher has the lower entropy", {"two_sided": True}),
)
_BLUE, _RED, _GREEN = Look("var(--c0)"), Look("var(--worse)"), Look("var(--better)")


def render_advice(report: Report) -> str:
    looks = {path_text(path): found for path, found in path_looks(report).items()}
    filters = {"signed": signed_number, "estimate": plus_minus, "names": _names, "few": _few}
    environment = charts.html_templates("tadistill.advise", "tadistill.report", **filters)
    return environment.get_template("advice.html.j2").render(
        report=report,
        advice=report.advice,
        looks=looks,
        glyphs={path: charts.glyph(found) for path, found in looks.items()},
        glossary=GLOSSARY,
        charts=charts,
        verdict=verdict_line(report.advice),
        reason=reason(report.advice),
        basis=basis_line(report),
        interval=option_interval,
        units=number_text,
        improvement=improvement(report.metric),
        cost_text=cost_text,
        gain_text=gain_text,
        columns=_COLUMNS,
        heatmaps=[(title, hint, heatmap(report.measures, field, **how).html()) for field, title, hint, how in _HEATMAPS],
        cost=markup(cost_figure(report)),
        sweep=markup(lambda_figure(report)),
        bias=bias_figure(report).html(),
    )


def _names(measures: Iterable[str]) -> str:
    return ", ".join(map(measure_name, measures))


def _few(measures: Sequence[str]) -> str:
    more = f" and {len(measures) - 3} more" if len(measures) > 3 else ""
    return _names(measures[:3]) + more


# --- figures ------------------------------------------------------------------------------------------------------------


def heatmap(measures: Measures, field: str, *, two_sided: bool = False, most: float | None = None, decimals: int = 3) -> Chart:
    """Draw one measure of all pairs, with teachers in rows and learners in columns. Each cell has the mean and its standard error.

    Args:
        two_sided: show values below 0 in red and values above 0 in blue.
        most: the value with the strongest colour; by default the largest absolute mean.
        decimals: number of decimals in the text.
    """
    names = [m.name for m in measures.models]
    teachers, learners = names[:-1], names[1:]
    found = {pair: getattr(measures.pairs[pair], field) for pair in measures.pairs}
    most = most or max(abs(e.mean) for e in found.values()) or 1.0
    x = Axis(-0.5, len(learners) - 0.5, "learner", marks={float(i): name for i, name in enumerate(learners)}, grid=False)
    rows = {float(len(teachers) - 1 - i): name for i, name in enumerate(teachers)}
    y = Axis(-0.5, len(teachers) - 0.5, "teacher", marks=rows, grid=False)
    summary = "; ".join(f"{teacher} teaches {learner}: {plus_minus(e, decimals)}" for (teacher, learner), e in found.items())
    chart = Chart(f"figure-{field.replace('_', '-')}", summary, x, y, height=52 * len(teachers), head=22)
    for (teacher, learner), e in found.items():
        at, row = learners.index(learner), len(teachers) - 1 - teachers.index(teacher)
        mean, _, error = plus_minus(e, decimals).partition(" ± ")
        strength = min(abs(e.mean) / most, 1.0)
        colour = _RED if two_sided and e.mean < 0 else _BLUE
        chart.bar(f"{teacher} > {learner}", (at - 0.48, at + 0.48), (row - 0.47, row + 0.47), colour, opacity=0.04 + 0.5 * strength)
        chart.text(at, row, mean, kind="name", shift=(0, 0 if error else 4))
        if error:
            chart.text(at, row, f"± {error}", shift=(0, 14))
    return chart


def path_looks(report: Report) -> dict[tuple[str, ...], Look]:
    """Return the colour and the marker of each path in the figures. The direct path is grey."""
    direct, *chains = (option.path for option in report.advice.options)
    return {direct: PLAIN, **{path: look(i) for i, path in enumerate(chains)}}


def cost_figure(report: Report) -> Chart | None:
    """Draw one point for each path with assistants. Return None if there is no such path.

    x is the path's compute. y is its predicted improvement over direct distillation at the same compute, with an error bar.
    """
    advice, looks = report.advice, path_looks(report)
    chains = advice.options[1:]
    if not chains:
        return None
    right = max(o.cost for o in advice.options)
    room = 0.08 * max(right - 1, 0.25)
    title = improvement(report.metric)
    y = Axis(*nice_span([v for o in chains for v in (o.low, o.high, -advice.margin, advice.margin)]), title)
    x = Axis(1 - room, right + room, "training compute, in direct runs")
    texts = {o.path: f"{o.expected:+.2f} [{o.low:+.2f}, {o.high:+.2f}] at {o.cost:.2f} times direct compute, {o.basis}" for o in chains}
    chart = Chart("figure-cost", "; ".join(f"{path_text(p)}: {text}" for p, text in texts.items()), x, y, height=300, head=24)
    chart.bar("no difference", (x.low, x.high), (-advice.margin, advice.margin), PLAIN, opacity=0.14)
    chart.segment((x.low, 0), (x.high, 0), PLAIN, width=2.5, name=path_text(advice.options[0].path), tip="direct, trained longer")
    for option in chains:
        name = path_text(option.path)
        point = Point(option.cost, option.expected, option.low, option.high, f"{name}: {texts[option.path]}")
        chart.points(name, [point], looks[option.path], size=6, label=name if len(chains) <= 12 else "")
    return chart


def lambda_figure(report: Report) -> Chart | None:
    """Draw the assistant that MiniDisc's rule chooses for each value of its parameter lambda. A larger lambda favours smaller models.

    Return None if there are fewer than two assistants.
    """
    assistants = report.ladder.assistants
    if len(assistants) < 2:
        return None
    switches = [c.high for chosen in report.sweeps.values() for c in chosen if c.high != float("inf")]
    right = max(1.0, 1.25 * max(switches, default=1.0))
    x, rows = Axis(0, right, "lambda (a larger value favours smaller models)"), len(report.sweeps)
    summary = "; ".join(f"{name}: {sweep_text(chosen)}" for name, chosen in report.sweeps.items())
    chart = Chart("figure-lambda", summary, x, Axis(-0.4, rows - 0.35, marks={}, grid=False), height=66 * rows, head=4)
    for y, (name, chosen) in enumerate(reversed(list(report.sweeps.items()))):
        for c in chosen:
            high = min(c.high, right)
            tip = f"{name}: {c.assistant} for lambda from {c.low:.3g} to {c.high:.3g}"
            chart.bar(c.assistant, (c.low, high), (y - 0.25, y + 0.25), look(assistants.index(c.assistant)), tip=tip, opacity=0.6)
            if high - c.low > 0.06 * right:
                chart.text((c.low + high) / 2, y, c.assistant, kind="name", shift=(0, 4))
        chart.text(None, y + 0.3, f"{name}: {sweep_text(chosen)}", side="start", shift=(0, -2))
    return chart


def bias_figure(report: Report) -> Chart:
    """Draw a bar for each model p that is bigger than the student q. The bar has two parts: KL(q ‖ p), and the bias of p (`Pair.bias`).

    Their sum is the KL from q to the original teacher.
    """
    ladder, pairs = report.ladder, report.measures.pairs
    total = pairs[ladder.teacher, ladder.student].reverse_kl
    rows = [(name, pairs[name, ladder.student]) for name in reversed([ladder.teacher, *ladder.assistants])]
    ends = [end for _, pair in rows for end in (pair.reverse_kl.mean, *_span(pair.reverse_kl.mean, pair.bias))]
    x = Axis(*nice_span([*ends, total.mean], zero=True), f"nats/token on the answers of {ladder.student}")
    details = {n: f"KL {plus_minus(p.reverse_kl)}" + ("" if n == ladder.teacher else f", bias {plus_minus(p.bias)}") for n, p in rows}
    summary = "; ".join(f"{name}: {text}" for name, text in details.items())
    chart = Chart("figure-bias", summary, x, Axis(-0.4, len(rows) - 0.3, marks={}, grid=False), height=60 * len(rows), head=4)
    for y, (name, pair) in enumerate(rows):
        kl, bias = pair.reverse_kl, pair.bias
        chart.bar(name, (0, kl.mean), (y - 0.23, y + 0.23), _BLUE, tip=f"KL(q ‖ {name}): {plus_minus(kl)} nats/token")
        if name != ladder.teacher:
            tip = f"bias of {name}: {plus_minus(bias)} nats/token"
            chart.bar(name, (kl.mean, kl.mean + bias.mean), (y - 0.23, y + 0.23), _RED if bias.mean > 0 else _GREEN, tip=tip)
            chart.whisker(name, y, *_span(kl.mean, bias), flat=True)
        chart.text(None, y + 0.27, f"{name}  {details[name]}", side="start", shift=(0, -2))
    chart.segment((total.mean, -0.4), (total.mean, len(rows) - 0.3), Look(GREY, "circle", "5 4"))
    return chart


def _span(base: float, value: Mean) -> tuple[float, float]:
    half = 1.96 * (value.se or 0.0)
    return base + value.mean - half, base + value.mean + half
