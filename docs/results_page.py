"""What the scripts that write pages of docs/results share: they read a study, and write tables and the page."""

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from tadistill.errors import TadistillError
from tadistill.metrics import MEAN
from tadistill.results.collect import Results, read_results
from tadistill.results.compare import difference
from tadistill.results.number_text import DASH, gap_text, summary_text
from tadistill.results.study import ArmRecord
from tadistill.store import runs_directory, store_of

HERE = Path(__file__).parent
RUNS = runs_directory(sys.argv[1] if len(sys.argv) > 1 else None).resolve()


def read_study(name: str, needed: Sequence[str] | None = None) -> Results:
    """Return the results of a study. If it does not exist, or a needed arm (by default any arm) is not evaluated, end the script."""
    try:
        results = read_results(RUNS / name, store_of(RUNS))
    except TadistillError as error:
        sys.exit(f"{error}. The first lines of {sys.argv[0]} have the commands.")
    missing = [arm for arm in needed or [arm.name for arm in results.plan.arms] if not results.scores.get(arm)]
    if missing:
        sys.exit(f"These arms of {name} are not evaluated: {', '.join(missing)}. Run `{results.plan.command}` first.")
    return results


def steps_of(results: Results) -> dict[str, int | None]:
    """Return the number of updates of each stage of a study's plan, by the stage's key. It is None for stages without training."""
    plan = json.loads((results.study_dir / "plan.json").read_text(encoding="utf-8"))
    return {stage["key"]: stage["steps"] for stage in plan["stages"]}


def updates_text(results: Results, arm: ArmRecord) -> str:
    """Return the updates of an arm's distillations and continued fine-tuning as text, such as `m 200, s 100`. It may be empty."""
    steps, stages = steps_of(results), results.plan.ancestors(arm.final[min(arm.final)])
    own = [stage for stage in reversed(stages) if stage.kind == "distill" or "continued" in stage.label]
    return ", ".join(f"{stage.model} {steps[stage.key]:,}" for stage in own)


def cell(results: Results, arm: str, metric: str, of_set: str = MEAN) -> str:
    """Return an arm's mean with its interval as text, or a dash if it was not measured."""
    found = results.summaries.get((arm, of_set, metric))
    return summary_text(found, metric) if found else DASH


def gap(results: Results, arm: str, other: str, metric: str, *, bold: bool = False) -> str:
    """Return the paired difference of two arms as text, or a dash. With `bold`, it is bold if its interval excludes 0."""
    known = arm != other and {arm, other} <= results.scores.keys()
    found = difference(results, arm, other, metric) if known else None
    if found is None:
        return DASH
    return f"**{gap_text(found, metric)}**" if bold and not found.covers_zero else gap_text(found, metric)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str]) -> str:
    """Return a Markdown table. The columns named in `left` are aligned left, and the others right."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], f"|{'|'.join('---' if column in left else '---:' for column in columns)}|", *lines[1:]])


def write_page(name: str, **values: Any) -> None:
    """Write the page `name` of docs/results from its template."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    template = environment.from_string((HERE / "results" / f"{name}.md.j2").read_text(encoding="utf-8"))
    (HERE / "results" / f"{name}.md").write_text(template.render(**values), encoding="utf-8")
