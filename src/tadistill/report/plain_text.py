"""Reports as plain text: the Markdown file and the tables in the terminal."""

import re
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from tadistill.metrics import MEAN, metric_title
from tadistill.report.analysis import MARKS, Analysis, analyses, published
from tadistill.report.answer import answer
from tadistill.report.explain import cautions
from tadistill.report.path_words import steps
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
from tadistill.results.collect import Results, Summary, seeds_of
from tadistill.results.number_text import DASH, gap_text, number, ratio_text, summary_text
from tadistill.results.sample_answers import references, samples
from tadistill.text import counted, one_line, visible


def render_markdown(results: Results) -> str:
    plan = results.plan
    trained = any(arm.is_trained for arm in plan.arms)
    seeds = f" (training seeds {', '.join(map(str, seeds_of(results)))})" if trained else ""
    blocks = [f"# {escape_markdown(plan.study)}", f"Created {plan.created} by {code(plan.command)}{seeds}."]
    found = answer(results)
    blocks += [f"**{escape_markdown(found.question)}**", f"**{found.badge}.** {escape_markdown(found.answer)}"]
    blocks += [escape_markdown(sentence) for sentence in found.sentences[1:]]
    blocks += [escape_markdown(plan.drawn)] if plan.drawn else []
    if results.summaries and (limits := cautions(results)):
        blocks.append(bullets(limits))
    if results.summaries:
        over = f"{'training seeds, ' * (trained and len(seeds_of(results)) > 1)}prompts and decoding seeds"
        blocks += ["## Results", f"Mean over {over}, with its 95 % interval. {interval_method(results)}"]
        for metric in main_metrics(results):
            blocks += [f"### {metric_title(metric)}", _scores(score_table(results, metric))]
        compared = comparison_table(results)
        if compared:
            blocks += [f"### {compared.title}", _plain(compared), escape_markdown(compared.note)]
        blocks += ["### More tables", *map(_collapsed, detail_tables(results))]
        found = analyses(results)
        if found:
            corrected = "`better` and `worse` rest on the 95 % interval of the row alone, which is not corrected for the number of rows."
            blocks += ["## Analysis", corrected]
        for entry in found:
            blocks += [f"### {escape_markdown(entry.arm)} against {escape_markdown(entry.other)}", _analysis(entry)]
            sentences = [sentence for said in entry.explanations.values() for sentence in said]
            blocks += [bullets(sentences)] if sentences else []
        if values := published(results):
            blocks += ["### Published values", bullets(values)]
    blocks += ["## Paths", _paths(results), "## How it was made", _provenance(results), _stages(results)]
    return "\n\n".join(blocks) + "\n"


def _scores(scores: ScoreTable) -> str:
    header = ["arm", *("mean over sets" if column == MEAN else column for column in scores.columns)]
    body: list[list[str]] = []
    for arm, cells in scores.rows:
        shown = [_summary(cell, scores.metric) for cell in cells]
        body.append([arm.name, *(f"**{c}**" if arm.name in best else c for c, best in zip(shown, scores.best, strict=True))])
    return pipe_table(header, body)


def _analysis(found: Analysis) -> str:
    body: list[list[str]] = []
    for row in found.rows:
        d, metric = row.difference, row.metric
        value = gap_text(d, metric) if d else DASH
        body.append([metric_title(metric), row.place, f"{MARKS[row.mark]} {row.mark}", value])
    return pipe_table(["metric", "where", f"{found.arm} is", "difference"], body)


def _summary(summary: Summary | None, metric: str) -> str:
    return DASH if summary is None else summary_text(summary, metric)


def _plain(found: Table) -> str:
    header = ["", *(f"{column.title} ({column.unit})" if column.unit else column.title for column in found.columns)]
    return pipe_table(header, [[name, *(cell.text for cell in cells)] for name, cells in found.rows])


def _collapsed(found: Table) -> str:
    # GitHub renders Markdown inside <details> only between empty lines
    return f"<details>\n<summary>{escape_markdown(found.title)}</summary>\n\n{escape_markdown(found.note)}\n\n{_plain(found)}\n\n</details>"


def _paths(results: Results) -> str:
    lines: list[str] = []
    for arm in results.plan.arms:
        compute = f", compute {arm.compute}" if arm.compute else ""
        compute += f", teacher budget {arm.teacher_budget}" if arm.teacher_budget else ""
        path = code(arm.shown_path) + (f" ({escape_markdown(steps(arm))})" if not arm.is_plain or arm.is_phased else "")
        inexact = "".join(f"; {sentence}" for sentence in arm.inexact)
        lines.append(f"- **{escape_markdown(arm.name)}**: {path}, {escape_markdown(arm.method)}{escape_markdown(compute + inexact)}")
    return "\n".join(lines)


def _provenance(results: Results) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions(stage_rows(results)).items())
    ran_on = f"\n\nVersions: {packages}." if packages else ""
    return f"{code(results.plan.command, 'sh')}\n\n{code(results.plan.recipe_text, 'yaml')}{ran_on}"


def _stages(results: Results) -> str:
    rows = stage_rows(results)
    body = [[f"`{row.stage.key}`", row.stage.label, f"{row.manifest.seconds:.0f} s" if row.manifest else "not finished"] for row in rows]
    found = pipe_table(["stage", "what", "time"], body)
    return f"<details>\n<summary>{counted(len(rows), 'stage')}: keys and times</summary>\n\n{found}\n\n</details>"


def bullets(sentences: Iterable[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {escape_markdown(sentence)}" for sentence in sentences)


def pipe_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. Columns of numbers are aligned right, and the first column and columns of text left."""
    rows = [[*row] for row in body]
    columns = [*zip(*rows, strict=True)][1:] or [()] * len(header[1:])
    lines = [_line(header), _line(["---", *("---:" if any(map(_is_number, c)) else "---" for c in columns)]), *map(_line, rows)]
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return bool(re.match(r"[\W_]*\d", cell)) and not cell.startswith("`")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"


def escape_markdown(value: str) -> str:
    """Escape a name for Markdown, so that it is shown as it is. It cannot end a table cell, become HTML or a link, or hide characters."""
    return visible(value).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(").replace("\n", " ")


def code(text: str, language: str = "") -> str:
    """Format text as Markdown code: within a line or, with `language`, as a block. The text may contain backticks."""
    most = max((len(run) for run in re.findall("`+", text)), default=0)
    if language:
        fence = "`" * max(4, most + 1)
        return f"{fence}{language}\n{visible(text.rstrip())}\n{fence}"
    ticks, pad = "`" * (most + 1), " " if most else ""
    return f"{ticks}{pad}{one_line(text)}{pad}{ticks}"


# --- terminal ---------------------------------------------------------------------------------------------------------


_STYLES = {"gain": "green", "best": "green", "loss": "red", "open": "yellow", "unfinished": "yellow"}


def summary_table(results: Results) -> Group:
    """Return the answer of a study for the terminal, and a table with one row per arm. In a narrow terminal, columns are left out.

    The table shows the main metrics with intervals, and the training FLOPs relative to direct distillation of the same model. If an arm has
    unfinished seeds, its row shows the number of finished seeds.
    """
    found = answer(results)
    said = Text.assemble((f"{found.badge}. ", f"bold {_STYLES.get(found.kind, '')}".strip()), found.answer)
    above = [Text(found.question, style="bold"), said, *([Text(found.against_sft)] if found.against_sft else [])]
    below = [Text(results.plan.drawn)] if results.plan.drawn else []
    below += [Text(caution, style="yellow") for caution in (cautions(results) if results.summaries else [])]
    below += [Text(found.failed, style="red")] if found.failed else []
    below += [Text(found.next)] if found.next else []
    above, below = ([Padding(text, (0, 0, 0, 1)) for text in texts] for texts in (above, below))
    return Group(Text(results.plan.study, style="bold"), *above, _ArmTable(results), *below)


class _ArmTable:
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

    def means(of: Results, arm: str) -> list[str]:
        summaries = [(of.summaries.get((arm, MEAN, metric)), metric) for metric in metrics]
        return [
            "missing" if s is None else summary_text(s, metric) if i < intervals else number(s.mean, metric)
            for i, (s, metric) in enumerate(summaries)
        ]

    for row in cost_rows(results):
        arm = row.arm
        done, planned = len(results.scores[arm.name]), len(arm.evaluate)
        name = arm.name if done == planned else f"{arm.name} ({done}/{counted(planned, 'seed')})"
        table.add_row(*map(escape, (name, *means(results, arm.name), *([ratio_text(row.relative)] if compute else []))))
    if beside := references(results):
        table.add_section()
        for arm in beside.plan.arms:
            table.add_row(*map(escape, (arm.name, *means(beside, arm.name), *([DASH] if compute else []))), style="dim")
    return table


def _said(turn: Mapping[str, str]) -> str:
    return f"[thinking: {turn['thinking']}]\n{turn['text']}" if turn.get("thinking") else turn["text"]


def side_by_side(results: Results, show: int) -> Group:
    """Return the first ``show`` prompts of each test set, with the answers of all arms and their scores."""
    blocks: list[Text | RichTable] = []
    for name, prompts in samples(results).items() if show else ():
        for prompt in prompts[:show]:
            answers = RichTable(box=box.SIMPLE, show_header=False, padding=(0, 1))
            answers.add_column(style="bold", overflow="fold")
            answers.add_column(overflow="fold", ratio=1)
            answers.add_row("reference", escape(prompt["references"][0]))
            for arm, said in prompt["answers"].items():
                answers.add_row(escape(arm), f"{escape(_said(said))}\n[dim]{escape(said['scores'])}[/]")
            asked = "\n".join(f"{turn['role']}: {_said(turn)}" for turn in prompt["turns"]) or prompt["prompt"].strip()
            blocks += [Text(f"{name}, prompt {prompt['index']}", style="bold"), Text(asked), answers]
    return Group(*blocks)
