"""For a terminal: the verdict and the results, as ``tadistill run`` prints them, and answers side by side for ``compare``."""

from pathlib import Path

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tadistill.report import text
from tadistill.report.tables import cost_rows, main_metrics
from tadistill.results.collect import MEAN, Results, read_results
from tadistill.results.samples import samples
from tadistill.results.units import metric_title, ratio_text, summary_text

_STYLES = {"gain": "green", "loss": "red", "caution": "yellow"}


def summary_table(study_dir: Path, store_dir: Path) -> Group:
    """The findings, the verdict first, then one row an arm: the main metrics' mean over sets with intervals, and training
    FLOPs relative to the direct arm ("compute"). It fits 80 columns. An arm that lacks seeds says how many it has.
    """
    results = read_results(study_dir, store_dir)
    findings = [Padding(Text(f"- {finding.text}", style=_STYLES.get(finding.kind, "")), (0, 0, 0, 1)) for finding in text.headline(results)]
    return Group(Text(results.plan.study, style="bold"), *findings, _arms(results))


def _arms(results: Results) -> Table:
    metrics = main_metrics(results)
    rows = cost_rows(results)
    with_compute = any(row.relative is not None for row in rows)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("arm", style="bold", overflow="fold")
    for metric in metrics:
        table.add_column(f"{metric_title(metric)}\nmean [95 %]", justify="right", no_wrap=True)
    if with_compute:
        table.add_column("compute", justify="right", no_wrap=True)
    for row in rows:
        arm = row.arm
        summaries = [(results.summaries.get((arm.name, MEAN, metric)), metric) for metric in metrics]
        cells = ["missing" if s is None else summary_text(s, metric) for s, metric in summaries]
        done, planned = len(results.scores[arm.name]), len(arm.evaluate)
        name = arm.name if done == planned else f"{arm.name} ({done}/{planned} seeds)"
        table.add_row(*map(escape, (name, *cells, *([ratio_text(row.relative)] if with_compute else []))))
    return table


def side_by_side(study_dir: Path, store_dir: Path, show: int) -> Group:
    """The answers of all arms to the first ``show`` prompts of each set, every one with its scores."""
    blocks: list[Text | Table] = []
    for name, prompts in samples(read_results(study_dir, store_dir)).items() if show else ():
        for prompt in prompts[:show]:
            answers = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
            answers.add_column(style="bold", overflow="fold")
            answers.add_column(overflow="fold", ratio=1)
            answers.add_row("reference", escape(prompt["references"][0]))
            for arm, answer in prompt["answers"].items():
                answers.add_row(escape(arm), f"{escape(answer['text'])}\n[dim]{escape(answer['scores'])}[/]")
            blocks += [Text(f"{name}, prompt {prompt['index']}", style="bold"), Text(prompt["prompt"].strip()), answers]
    return Group(*blocks)
