"""Reports on a study: ``results.json`` and two CSV files, one self-contained HTML page, Markdown, and a table for the terminal.

    results = read_results(study_dir, store)
    page = write_report(results)
    console.print(summary_table(results))

A report needs only the plan and the files of finished stages. It can therefore be written while a study is still running.
"""

from pathlib import Path

from tadistill.disk import write_text
from tadistill.errors import StoreError
from tadistill.report.page import render_page
from tadistill.report.plain_text import render_markdown, summary_table
from tadistill.report.results_json import has_scores, write_results
from tadistill.results.collect import Results, read_results

__all__ = ["read_results", "summary_table", "write_report"]


def write_report(results: Results) -> Path:
    """Write report.html, report.md, ``results.json`` and two CSV files into the study's directory. Return the path of report.html.

    Raises:
        StoreError: no evaluation is in the store, but the report that is there has scores.
    """
    page = results.study_dir / "report.html"
    if not any(results.scores.values()) and has_scores(results.study_dir):
        raise StoreError(
            f"{page.with_name('results.json')} has scores, but no evaluation of study {results.plan.study} is in the store at "
            f"{results.store.root}, so the report is not replaced by an empty one; give --runs with the directory that has the study's "
            "stages, or delete this file"
        )
    write_results(results)
    write_text(page, render_page(results))
    write_text(results.study_dir / "report.md", render_markdown(results))
    return page
