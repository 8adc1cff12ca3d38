"""The Markdown report: headline, results, paths, commands and stage keys, fit to paste into a README."""

from collections.abc import Iterable, Sequence

from tadistill.report import text
from tadistill.report.collect import MEAN, Results, Summary, seeds_of
from tadistill.report.tables import (
    ScoreTable,
    cost_rows,
    main_metrics,
    other_metrics,
    score_table,
    stage_rows,
    versions,
)


def render_markdown(results: Results) -> str:
    """The whole document, ending in a newline."""
    plan = results.plan
    seeds = ", ".join(map(str, seeds_of(results)))
    blocks = [f"# {plan.study}", f"Created {plan.created} by `{plan.command}` (training seeds {seeds})."]
    blocks.append("\n".join(f"- {_cell(finding.text)}" for finding in text.headline(results)))
    if results.summaries:
        blocks.append("## Results")
        blocks.append("Mean over training seeds, prompts and decoding seeds, with the 95 % bootstrap interval.")
        for metric in main_metrics(results):
            blocks += [f"### {text.metric_title(metric)}", _scores(score_table(results, metric))]
        blocks += ["### Other metrics (mean over sets) and cost", _costs(results)]
    blocks += ["## Paths", _paths(results), "## How it was made", _provenance(results), _stages(results)]
    return "\n\n".join(blocks) + "\n"


def _scores(table: ScoreTable) -> str:
    header = ["arm", *("mean over sets" if column == MEAN else column for column in table.columns)]
    body: list[list[str]] = []
    for arm, cells in table.rows:
        shown = [_summary(cell, table.metric) for cell in cells]
        body.append([arm.name, *(f"**{c}**" if best == arm.name else c for c, best in zip(shown, table.best, strict=True))])
    return _table(header, body)


def _costs(results: Results) -> str:
    metrics = other_metrics(results)
    header = ["arm", *map(text.metric_title, metrics), "parameters", "training FLOPs a seed", "relative to direct"]
    body: list[list[str]] = []
    for row in cost_rows(results):
        shown = [_summary(cell, metric) for cell, metric in zip(row.others, metrics, strict=True)]
        relative = text.ratio_text(row.relative) + (f" {row.direct}" if row.relative is not None else "")
        size = text.parameters_text(row.parameters)
        body.append([row.arm.name, *shown, size, text.flops_text(row.flops), relative])
    return _table(header, body)


def _summary(summary: Summary | None, metric: str) -> str:
    return text.DASH if summary is None else text.summary_text(summary, metric)


def _paths(results: Results) -> str:
    lines: list[str] = []
    for arm in results.plan.arms:
        compute = f", compute {arm.compute}" if arm.compute else ""
        lines.append(f"- **{_cell(arm.name)}**: `{arm.path_text}`, {_cell(arm.method)}{_cell(compute)}")
    return "\n".join(lines)


def _provenance(results: Results) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions(stage_rows(results)).items())
    ran_on = f"\n\nVersions: {packages}." if packages else ""
    # four backticks, so that a recipe may hold a fence of its own
    return f"````sh\n{results.plan.command}\n````\n\n````yaml\n{results.plan.recipe_text.rstrip()}\n````{ran_on}"


def _stages(results: Results) -> str:
    body = [
        [f"`{row.stage.key}`", row.stage.label, f"{row.manifest.seconds:.0f} s" if row.manifest else "not finished"]
        for row in stage_rows(results)
    ]
    return _table(["stage", "what", "time"], body)


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [_line(header), _line(["---", *("---:" for _ in header[1:])]), *map(_line, body)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(value: str) -> str:
    """Keeps a name from ending its cell or opening an element."""
    return value.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
