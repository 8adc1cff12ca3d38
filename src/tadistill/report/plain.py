"""The reports that need no browser: results.json, results.csv, the Markdown file and the terminal's tables."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from tadistill.disk import write_json, write_text
from tadistill.metrics import metric_title
from tadistill.report.analysis import explain
from tadistill.report.explain import cautions, undecided_text, verdict_text
from tadistill.report.tables import (
    ScoreTable,
    Table,
    comparison_table,
    cost_rows,
    detail_tables,
    interval_method,
    main_metrics,
    score_table,
    stage_rows,
    versions,
)
from tadistill.report.text import answer
from tadistill.results.collect import MEAN, Results, Row, Summary, seeds_of
from tadistill.results.samples import samples
from tadistill.results.units import DASH, number, ratio_text, summary_text
from tadistill.results.verdict import Comparison, comparisons, pairs
from tadistill.statistics import Difference
from tadistill.visible import guarded, one_line, visible


def write_results(results: Results) -> None:
    content = {
        "study": results.plan.study,
        "created": results.plan.created,
        "command": results.plan.command,
        "data": [split.record for split in results.used],
        "rows": [asdict(row) for row in results.rows],
        "comparisons": [_comparison(comparison) for comparison in comparisons(results)],
        "verdicts": verdicts(results),
    }
    write_json(results.study_dir / "results.json", content, allow_nan=False)
    write_text(results.study_dir / "results.csv", _csv(results))


def verdicts(results: Results) -> list[dict[str, str | None]]:
    """Return the verdicts of a study. Each pair of compared arms has a verdict and a sentence."""
    decided = {(c.arm, c.other): c for c in comparisons(results)}
    found: list[dict[str, str | None]] = []
    for pair in pairs(results):
        other = pair.other.name if pair.other else None
        comparison = decided.get((pair.arm.name, other or ""))
        word = comparison.word if comparison else "no evidence"
        sentence = verdict_text(results, comparison) if comparison else undecided_text(pair)
        credit = comparison.credit if comparison else None
        found.append({"arm": pair.arm.name, "other": other, "verdict": word, "credit": credit, "sentence": sentence})
    return found


def _comparison(c: Comparison) -> dict[str, Any]:
    why = c.mechanism
    controls = {} if why is None else {n: getattr(why, n) for n in ("forward_kl", "reverse_kl", "entropy", "greedy", "matched")}
    return {
        "arm": c.arm,
        "other": c.other,
        "against": c.against,
        "metric": c.metric,
        "sets": c.n_sets,
        "prompts": c.n_prompts,
        "seeds": list(c.seeds),
        **_difference(c.difference),
        "p": _rounded(c.difference.p),
        "p_holm": _rounded(c.p_holm),
        "comparisons": c.family,
        "sign_flip": None if c.sign_flip is None else asdict(c.sign_flip),
        "margin": c.margin,
        "equivalent": c.equivalent,
        "detectable": None if c.detectable is None else _rounded(c.detectable),
        "per_seed": {str(seed): _rounded(value) for seed, value in c.per_seed.items()},
        "verdict": c.word,
        "credit": c.credit,
        "controls": {name: None if d is None else _difference(d) for name, d in controls.items()},
        "matched_entropy": None if why is None or why.at_entropy is None else _rounded(why.at_entropy),
        "selection": None if c.selection is None else asdict(c.selection),
        "decoding_seeds": list(c.decoding_seeds),
    }


def _difference(d: Difference) -> dict[str, float]:
    return {name: _rounded(value) for name, value in (("mean", d.mean), ("low", d.low), ("high", d.high))}


def _rounded(value: float) -> float:
    return round(float(value), 6) + 0.0


def _csv(results: Results) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in results.rows:
        writer.writerow({name: guarded(cell) if isinstance(cell, str) else cell for name, cell in asdict(row).items()})
    return text.getvalue()


def render_markdown(results: Results) -> str:
    plan = results.plan
    trained = any(arm.is_trained for arm in plan.arms)
    seeds = f" (training seeds {', '.join(map(str, seeds_of(results)))})" if trained else ""
    blocks = [f"# {escape_markdown(plan.study)}", f"Created {plan.created} by {code(plan.command)}{seeds}."]
    found = answer(results)
    blocks += [f"**{escape_markdown(found.question)}**", f"**{found.badge}.** {escape_markdown(found.answer)}"]
    blocks += [escape_markdown(sentence) for sentence in found.sentences[1:]]
    limits = cautions(results) if results.summaries else []
    blocks += ["\n".join(f"- {escape_markdown(caution)}" for caution in limits)] if limits else []
    if results.summaries:
        over = "training seeds, prompts and decoding seeds" if trained else "prompts and decoding seeds"
        blocks += ["## Results", f"Mean over {over}, with its 95 % interval. {interval_method(results)}"]
        for metric in main_metrics(results):
            blocks += [f"### {metric_title(metric)}", _scores(score_table(results, metric))]
        compared = comparison_table(results)
        if compared:
            blocks += [f"### {compared.title}", _plain(compared), escape_markdown(compared.note)]
        blocks += ["### More tables", *map(_collapsed, detail_tables(results))]
        analysis = explain(results)
        blocks += ["## Analysis"] if analysis else []
        for paragraph in analysis:
            blocks += [f"### {escape_markdown(paragraph.title)}", "\n".join(f"- {escape_markdown(s)}" for s in paragraph.sentences)]
    blocks += ["## Paths", _paths(results), "## How it was made", _provenance(results), _stages(results)]
    return "\n\n".join(blocks) + "\n"


def _scores(scores: ScoreTable) -> str:
    header = ["arm", *("mean over sets" if column == MEAN else column for column in scores.columns)]
    body: list[list[str]] = []
    for arm, cells in scores.rows:
        shown = [_summary(cell, scores.metric) for cell in cells]
        body.append([arm.name, *(f"**{c}**" if best == arm.name else c for c, best in zip(shown, scores.best, strict=True))])
    return pipe_table(header, body)


def _summary(summary: Summary | None, metric: str) -> str:
    return DASH if summary is None else summary_text(summary, metric)


def _plain(found: Table) -> str:
    header = ["", *(f"{column.title} ({column.unit})" if column.unit else column.title for column in found.columns)]
    return pipe_table(header, [[name, *(cell.text for cell in cells)] for name, cells in found.rows])


def _collapsed(found: Table) -> str:
    # GitHub reads Markdown inside <details> only between empty lines
    return f"<details>\n<summary>{escape_markdown(found.title)}</summary>\n\n{escape_markdown(found.note)}\n\n{_plain(found)}\n\n</details>"


def _paths(results: Results) -> str:
    lines: list[str] = []
    for arm in results.plan.arms:
        compute = f", compute {arm.compute}" if arm.compute else ""
        lines.append(f"- **{escape_markdown(arm.name)}**: {code(arm.path_text)}, {escape_markdown(arm.method)}{escape_markdown(compute)}")
    return "\n".join(lines)


def _provenance(results: Results) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions(stage_rows(results)).items())
    ran_on = f"\n\nVersions: {packages}." if packages else ""
    return f"{code(results.plan.command, 'sh')}\n\n{code(results.plan.recipe_text, 'yaml')}{ran_on}"


def _stages(results: Results) -> str:
    rows = stage_rows(results)
    body = [[f"`{row.stage.key}`", row.stage.label, f"{row.manifest.seconds:.0f} s" if row.manifest else "not finished"] for row in rows]
    found = pipe_table(["stage", "what", "time"], body)
    return f"<details>\n<summary>{len(rows)} stages, their keys and times</summary>\n\n{found}\n\n</details>"


def pipe_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. Its first column is aligned left, the others right."""
    lines = [_line(header), _line(["---", *("---:" for _ in header[1:])]), *map(_line, body)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"


def escape_markdown(value: str) -> str:
    """Escape a name, so that it cannot end its cell, open an element or a link, or hide characters."""
    return visible(value).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(").replace("\n", " ")


def code(text: str, language: str = "") -> str:
    """Return text as code, in a line with `language` empty, else as a block, behind more backticks than it holds itself."""
    most = max((len(run) for run in re.findall("`+", text)), default=0)
    if language:
        fence = "`" * max(4, most + 1)
        return f"{fence}{language}\n{visible(text.rstrip())}\n{fence}"
    ticks, pad = "`" * (most + 1), " " if most else ""
    return f"{ticks}{pad}{one_line(text)}{pad}{ticks}"


# --- terminal ---------------------------------------------------------------------------------------------------------


_STYLES = {"gain": "green", "loss": "red", "equivalent": "", "open": "yellow"}


def summary_table(results: Results) -> Group:
    """Return the answer for the terminal, and a table with one row per arm. The table fits into 80 columns.

    It shows the main metrics with intervals, and the training FLOPs relative to the direct arm. If an arm has unfinished seeds, its row
    shows the number of finished seeds.
    """
    found = answer(results)
    said = Text.assemble((f"{found.badge}. ", f"bold {_STYLES[found.kind]}".strip()), found.answer)
    above = [Text(found.question, style="bold"), said, *([Text(found.against_sft)] if found.against_sft else [])]
    below = [Text(caution, style="yellow") for caution in (cautions(results) if results.summaries else [])]
    below += [Text(found.next)] if found.next else []
    above, below = ([Padding(text, (0, 0, 0, 1)) for text in texts] for texts in (above, below))
    return Group(Text(results.plan.study, style="bold"), *above, _ArmTable(results), *below)


class _ArmTable:
    """The table of arms, as wide as the terminal allows: a narrow one has fewer intervals, then fewer columns."""

    def __init__(self, results: Results):
        self.results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        metrics = main_metrics(self.results)
        compute = any(row.relative is not None for row in cost_rows(self.results))
        forms = [(metrics, len(metrics), compute), (metrics, 1, compute), (metrics[:1], 1, compute), (metrics[:1], 1, False)]
        tables = [_arm_table(self.results, *form, names=max(12, options.max_width // 3)) for form in forms]
        sizes = [console.measure(table, options=options.update(width=1000)).maximum for table in tables]
        yield next((table for table, size in zip(tables, sizes, strict=True) if size <= options.max_width), tables[-1])


def _arm_table(results: Results, metrics: Sequence[str], intervals: int, compute: bool, *, names: int) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD)
    table.add_column("arm", style="bold", overflow="fold", max_width=names)
    for i, metric in enumerate(metrics):
        table.add_column(metric_title(metric) + ("\nmean [95 %]" if i < intervals else "\nmean"), justify="right", no_wrap=True)
    if compute:
        table.add_column("compute", justify="right", no_wrap=True)
    for row in cost_rows(results):
        arm = row.arm
        summaries = [(results.summaries.get((arm.name, MEAN, metric)), metric) for metric in metrics]
        cells = [
            "missing" if s is None else summary_text(s, metric) if i < intervals else number(s.mean, metric)
            for i, (s, metric) in enumerate(summaries)
        ]
        done, planned = len(results.scores[arm.name]), len(arm.evaluate)
        name = arm.name if done == planned else f"{arm.name} ({done}/{planned} seeds)"
        table.add_row(*map(escape, (name, *cells, *([ratio_text(row.relative)] if compute else []))))
    return table


def side_by_side(results: Results, show: int) -> Group:
    """Return the answers of all arms to the first ``show`` prompts of each set, with their scores."""
    blocks: list[Text | RichTable] = []
    for name, prompts in samples(results).items() if show else ():
        for prompt in prompts[:show]:
            answers = RichTable(box=box.SIMPLE, show_header=False, padding=(0, 1))
            answers.add_column(style="bold", overflow="fold")
            answers.add_column(overflow="fold", ratio=1)
            answers.add_row("reference", escape(prompt["references"][0]))
            for arm, said in prompt["answers"].items():
                answers.add_row(escape(arm), f"{escape(said['text'])}\n[dim]{escape(said['scores'])}[/]")
            blocks += [Text(f"{name}, prompt {prompt['index']}", style="bold"), Text(prompt["prompt"].strip()), answers]
    return Group(*blocks)
