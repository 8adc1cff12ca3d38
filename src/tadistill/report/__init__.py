"""Reports on a study: ``results.json`` and two CSV files, one self-contained HTML page, Markdown, and a table for the terminal.

    results = read_results(study_dir, store)
    page = write_report(results)
    console.print(summary_table(results))

A report needs only the plan and the files of finished stages. It can therefore be written while a study is still running.
"""

from pathlib import Path

from tadistill.disk import write_text
from tadistill.report.page import render_page
from tadistill.report.plain_text import render_markdown, summary_table
from tadistill.report.results_json import write_results
from tadistill.results.collect import Results, read_results

__all__ = ["read_results", "summary_table", "write_report"]


def write_report(results: Results) -> Path:
    """Write report.html, report.md, ``results.json`` and two CSV files into the study's directory. Return the path of report.html."""
    write_results(results)
    page = results.study_dir / "report.html"
    write_text(page, render_page(results))
    write_text(results.study_dir / "report.md", render_markdown(results))
    return page
