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
from tadistill.store import last_run_in

__all__ = ["read_results", "summary_table", "write_report"]


def write_report(results: Results) -> Path:
    """Write report.html, report.md, ``results.json`` and two CSV files into the study's directory. Return the path of report.html.

    Raises:
        StoreError: the report that is there has numbers of stages that are not in the store, and the study was last run with another store,
            or nothing could be reported.
    """
    page, plan, runs = results.study_dir / "report.html", results.plan, results.store.root.parent
    lost, planned = reported(results.study_dir) - set(results.manifests), {stage.key for stage in plan.stages}
    if any(results.scores.values()):  # else all: an empty report says nothing about a report of another plan
        # the report of a study follows its own store: the user may have deleted a damaged stage
        lost = set() if last_run_in(results.study_dir, runs) else lost & planned
    if lost:
        again = f"run `{plan.command}` to make them again, " if lost <= planned else ""
        raise StoreError(
            f"{page.with_name('results.json')} has numbers of stages of study {plan.study} that are not in the store at "
            f"{results.store.root}, so the report is not replaced by one without them; give --runs with the directory that has the study's "
            f"stages, {again}or delete this file"
        )
    write_results(results)
    write_text(page, render_page(results))
    write_text(results.study_dir / "report.md", render_markdown(results))
    return page
