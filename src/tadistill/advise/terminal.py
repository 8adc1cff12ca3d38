"""The advice in a terminal: the verdict first, then what was measured, what paths cost, and what to run. It fits 80 columns."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tadistill.advise import Advice, Option
from tadistill.advise.measures import Pair
from tadistill.advise.record import Report, plus_minus
from tadistill.results.units import MINUS, TIMES, metric_title, parameters_text

_STYLES = {"chain": "bold green", "direct": "bold", "inconclusive": "bold yellow"}
Columns = tuple[tuple[str, str, int], ...]  # title, measure, decimals
ON_OWN: Columns = (
    *(("KL(q‖p)", "reverse_kl", 3), ("overlap", "overlap", 2), ("mass", "mass", 2)),
    *(("H(p)−H(q)", "entropy_gap", 3), ("bias", "bias", 3)),
)
ON_REFERENCES: Columns = (("KL(p‖q)", "forward_kl", 3), ("loss p/q", "loss_ratio", 3), ("advantage", "advantage", 3))


def verdict_line(advice: Advice) -> str:
    """The verdict and its path in a few words."""
    path = " > ".join(advice.path)
    if advice.verdict == "chain":
        return f"chain: {path}"
    return f"direct: {path}, at a chain's compute" if advice.verdict == "direct" else f"inconclusive: until more is known, direct, {path}"


def basis_line(report: Report) -> str:
    """What history the verdict rests on."""
    advice = report.advice
    if not advice.pairs:
        return "no history: differences are the prior's, which knows of no effect"
    noun, groups = ("chain" if advice.pairs == 1 else "chains"), ("family" if advice.families == 1 else "families")
    studies = ", ".join(report.studies)
    return f"history: {advice.pairs} {noun} beside direct at equal compute, of {advice.families} {groups} ({studies})"


def signed(value: float) -> str:
    """``+0.31`` with a real minus sign."""
    return f"{value:+.2f}".replace("-", MINUS)


def interval(option: Option) -> str:
    """``[−0.50, +0.61]``."""
    return f"[{signed(option.low)}, {signed(option.high)}]"


def show(report: Report, console: Console) -> None:
    """All of it, in the order in which it is read."""
    advice = report.advice
    console.print(Text(f"{report.study}: advice", style="bold"))
    console.print(Text(verdict_line(advice), style=_STYLES[advice.verdict]))
    for text in (advice.reason, f"{basis_line(report)}."):
        console.print(Text(text[0].upper() + text[1:]))
    console.print()
    console.print(_models(report))
    console.print(_pairs(report, "pairs on the learner q's own dev answers, ± standard error (measured)", ON_OWN))
    console.print(_pairs(report, "pairs on the dev references (measured)", ON_REFERENCES))
    console.print(_paths(report))
    for step in report.steps:
        gain = "" if step.gain is None else f", expected to lower regret by {step.gain:.3g}"
        console.print(Text(f"{step.text}: {step.cost:.1f} direct runs{gain}"))
        console.print(Text(step.command, style="cyan"), soft_wrap=True)
    console.print()
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if i else "left", overflow="fold", no_wrap=i > 0, min_width=8 if i == 0 else None)
    return table


def _models(report: Report) -> Table:
    table = _table(f"models on {report.prompts} dev prompts of {report.dev} (measured)", "model", "size", "loss", "ROUGE-L", "entropy")
    for model in report.measures.models:
        cells = (plus_minus(model.loss), plus_minus(model.rouge_l, 1), plus_minus(model.entropy))
        table.add_row(escape(model.name), parameters_text(model.parameters), *cells)
    return table


def _pairs(report: Report, title: str, columns: Columns) -> Table:
    table = _table(title, "p > q", *(name for name, *_ in columns))
    for pair in report.measures.pairs.values():
        table.add_row(escape(f"{pair.teacher} > {pair.learner}"), *_cells(pair, columns))
    return table


def _cells(pair: Pair, columns: Columns) -> list[str]:
    """A measure with its error; the ratio of sizes has none."""
    return [plus_minus(getattr(pair, field), decimals).replace(" ± ", "±") for _, field, decimals in columns]


def _paths(report: Report) -> Table:
    advice = report.advice
    title = f"paths: difference to direct at equal compute, {metric_title(report.metric)} on dev (predicted)"
    table = _table(title, "path", "compute", "Δ", f"{100 * advice.level:.0f} %", "P(better)", "basis")
    for option in advice.options:
        path = escape(" > ".join(option.path))
        if option.basis == "reference":
            table.add_row(path, f"{option.cost:.2f}{TIMES}", "0", "", "", "reference")
            continue
        beyond = " *" if option.beyond else ""
        cells = (signed(option.expected), escape(interval(option)), f"{option.p_better:.2f}", option.basis + beyond)
        table.add_row(path, f"{option.cost:.2f}{TIMES}", *cells)
    if any(option.beyond for option in advice.options):
        table.caption = "* outside what history has seen; the interval is wider for that"
        table.caption_justify = "left"
    return table
