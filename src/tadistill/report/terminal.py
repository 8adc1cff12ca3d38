"""The results table for a terminal: what ``tadistill run`` prints when a study is done."""

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from tadistill.report import text
from tadistill.report.collect import MEAN, read_results
from tadistill.report.tables import cost_rows, main_metrics


def summary_table(study_dir: Path, store_dir: Path) -> Table:
    """One row an arm: the main metrics' mean over sets with intervals, and training FLOPs relative to the direct arm
    ("compute"); the findings follow as its caption. It fits 80 columns. An arm that lacks seeds says how many it has.
    """
    results = read_results(study_dir, store_dir)
    metrics = main_metrics(results)
    findings = "\n".join(escape(finding.text) for finding in text.headline(results))
    table = Table(title=escape(results.plan.study), caption=findings, box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("arm", style="bold", no_wrap=True)
    for metric in metrics:
        table.add_column(f"{text.metric_title(metric)}\nmean [95 %]", justify="right", no_wrap=True)
    table.add_column("compute", justify="right", no_wrap=True)
    for row in cost_rows(results):
        arm = row.arm
        summaries = [(results.summaries.get((arm.name, MEAN, metric)), metric) for metric in metrics]
        cells = ["missing" if s is None else text.summary_text(s, metric) for s, metric in summaries]
        done, planned = len(results.scores[arm.name]), len(arm.evaluate)
        name = arm.name if done == planned else f"{arm.name} ({done}/{planned} seeds)"
        shown = (name, *cells, text.ratio_text(row.relative))
        table.add_row(*map(escape, shown))
    return table
