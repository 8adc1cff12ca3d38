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
from tadistill.report.results_json import reported, write_results
from tadistill.results.collect import Results, read_results
from tadistill.text import counted, form

__all__ = ["read_results", "summary_table", "write_report"]


def write_report(results: Results) -> Path:
    """Write report.html, report.md, ``results.json`` and two CSV files into the study's directory. Return the path of report.html.

    Raises:
        StoreError: the report that is there has numbers of stages that are not in the store.
    """
    page, before, plan = results.study_dir / "report.html", reported(results.study_dir), results.plan
    lost = before - set(results.manifests)
    if any(results.scores.values()):  # else all: an empty report says nothing about a report of another plan
        lost &= {stage.key for stage in plan.stages}
    if lost:
        raise StoreError(
            f"{page.with_name('results.json')} has numbers of {counted(len(lost), 'stage')} of study {plan.study} that "
            f"{form(len(lost), 'is', 'are')} not in the store at {results.store.root}, so the report is not replaced by one without them; "
            f"give --runs with the directory that has the study's stages, run `{plan.command}` to make them again, or delete this file"
        )
    write_results(results)
    write_text(page, render_page(results))
    write_text(results.study_dir / "report.md", render_markdown(results))
    return page
