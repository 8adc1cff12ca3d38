"""Reports on a study: ``results.json`` and ``results.csv``, one self-contained HTML page, Markdown, and a table for the terminal.

Reads files only (the plan, and the finished stages of the store) and imports no torch, so that it also works on a
login node and while a study is still running.
"""

from pathlib import Path

from tadistill.disk import write_text
from tadistill.report.markdown import render_markdown
from tadistill.report.output import collect
from tadistill.report.page import render_page
from tadistill.report.terminal import summary_table
from tadistill.results.collect import Missing, Results, Row, Summary, primary_metric

__all__ = [
    "Missing",
    "Results",
    "Row",
    "Summary",
    "collect",
    "primary_metric",
    "summary_table",
    "write_report",
]


def write_report(study_dir: Path, store_dir: Path) -> Path:
    """Writes ``results.json``, ``results.csv``, ``report.html`` and ``report.md`` beside the plan; returns the HTML's path."""
    results = collect(study_dir, store_dir)
    page = study_dir / "report.html"
    write_text(page, render_page(results, study_dir))
    write_text(study_dir / "report.md", render_markdown(results))
    return page
