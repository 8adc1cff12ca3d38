"""The Markdown report: verdict, results, analysis, paths, commands and stage keys, fit to paste into a README."""

from collections.abc import Iterable, Sequence

from tadistill.report import text
from tadistill.report.details import Table, comparison_table, detail_tables
from tadistill.report.explain import explain
from tadistill.report.tables import ScoreTable, main_metrics, score_table, stage_rows, versions
from tadistill.results.collect import MEAN, Results, Summary, seeds_of
from tadistill.results.units import DASH, metric_title, summary_text


def render_markdown(results: Results) -> str:
    """The whole document, ending in a newline."""
    plan = results.plan
    trained = any(arm.is_trained for arm in plan.arms)
    seeds = f" (training seeds {', '.join(map(str, seeds_of(results)))})" if trained else ""
    blocks = [f"# {escaped(plan.study)}", f"Created {plan.created} by `{plan.command}`{seeds}."]
    blocks.append("\n".join(f"- {escaped(finding.text)}" for finding in text.headline(results)))
    if results.summaries:
        over = "training seeds, prompts and decoding seeds" if trained else "prompts and decoding seeds"
        blocks += ["## Results", f"Mean over {over}, with the 95 % bootstrap interval."]
        for metric in main_metrics(results):
            blocks += [f"### {metric_title(metric)}", _scores(score_table(results, metric))]
        compared = comparison_table(results)
        if compared:
            blocks += [f"### {compared.title}", _plain(compared), escaped(compared.note)]
        blocks += ["### More tables", *map(_collapsed, detail_tables(results))]
        analysis = explain(results)
        blocks += ["## Analysis"] if analysis else []
        for paragraph in analysis:
            blocks += [f"### {escaped(paragraph.title)}", "\n".join(f"- {escaped(s)}" for s in paragraph.sentences)]
    blocks += ["## Paths", _paths(results), "## How it was made", _provenance(results), _stages(results)]
    return "\n\n".join(blocks) + "\n"


def _scores(scores: ScoreTable) -> str:
    header = ["arm", *("mean over sets" if column == MEAN else column for column in scores.columns)]
    body: list[list[str]] = []
    for arm, cells in scores.rows:
        shown = [_summary(cell, scores.metric) for cell in cells]
        body.append([arm.name, *(f"**{c}**" if best == arm.name else c for c, best in zip(shown, scores.best, strict=True))])
    return table(header, body)


def _summary(summary: Summary | None, metric: str) -> str:
    return DASH if summary is None else summary_text(summary, metric)


def _plain(found: Table) -> str:
    header = ["", *(f"{column.title} ({column.unit})" if column.unit else column.title for column in found.columns)]
    return table(header, [[name, *(cell.text for cell in cells)] for name, cells in found.rows])


def _collapsed(found: Table) -> str:
    # GitHub reads Markdown inside <details> only between empty lines
    return f"<details>\n<summary>{escaped(found.title)}</summary>\n\n{escaped(found.note)}\n\n{_plain(found)}\n\n</details>"


def _paths(results: Results) -> str:
    lines: list[str] = []
    for arm in results.plan.arms:
        compute = f", compute {arm.compute}" if arm.compute else ""
        lines.append(f"- **{escaped(arm.name)}**: `{arm.path_text}`, {escaped(arm.method)}{escaped(compute)}")
    return "\n".join(lines)


def _provenance(results: Results) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions(stage_rows(results)).items())
    ran_on = f"\n\nVersions: {packages}." if packages else ""
    # four backticks, so that a recipe may hold a fence of its own
    return f"````sh\n{results.plan.command}\n````\n\n````yaml\n{results.plan.recipe_text.rstrip()}\n````{ran_on}"


def _stages(results: Results) -> str:
    rows = stage_rows(results)
    body = [[f"`{row.stage.key}`", row.stage.label, f"{row.manifest.seconds:.0f} s" if row.manifest else "not finished"] for row in rows]
    return (
        f"<details>\n<summary>{len(rows)} stages, their keys and times</summary>\n\n{table(['stage', 'what', 'time'], body)}\n\n</details>"
    )


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A pipe table; its first column is aligned left, the others right."""
    lines = [_line(header), _line(["---", *("---:" for _ in header[1:])]), *map(_line, body)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"


def escaped(value: str) -> str:
    """Keeps a name from ending its cell or opening an element."""
    return value.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
