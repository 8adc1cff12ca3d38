"""Writes docs/results/quickstart.md and the table of README.md, from three runs of recipes/quickstart.yaml.

    tadistill run quickstart
    tadistill run quickstart study=quickstart-2 'seeds=[11,21,31]'
    tadistill run quickstart study=quickstart-3 'seeds=[12,22,32]'
    python docs/tabulate_quickstart.py [RUNS]

The teacher is the same in all runs. `docs/draw_quickstart.py` draws the picture.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
from rich.console import Console

from tadistill.report import read_results, summary_table
from tadistill.results.collect import MEAN, Results, Summary
from tadistill.results.compare import compare
from tadistill.results.number_text import DASH, gap_text, ratio_text, summary_text
from tadistill.store import runs_directory, store_of

HERE = Path(__file__).parent
STUDIES = ("quickstart", "quickstart-2", "quickstart-3")
METRIC, GREEDY = "fact_accuracy", "fact_accuracy@greedy"
TEACHER, START, STUDENT = "teacher", "sft", "s"
DIRECT, LONGER = "abkd", "sft-longer"
WHAT = {
    "teacher": "the teacher",
    "sft": "the student after fine-tuning (SFT); the students below start here",
    "sft-longer": "fine-tuned further, with as many updates as a distilled student",
    "kd": "taught by KD",
    "seqkd": "taught by SeqKD",
    "minillm": "taught by MiniLLM",
    "abkd": "taught by ABKD",
    "assistant": "the assistant, taught by ABKD",
    "assistant-teaches": "the assistant teaches the student",
    "assistant-starts": "the student is cut out of the assistant and fine-tuned; the teacher teaches it",
    "abkd-equal-compute": "no assistant, and the compute of `assistant-starts`",
}
PAIRS = (
    ("sft-longer", "sft"),
    ("minillm", "sft"),
    ("kd", "sft-longer"),
    ("abkd", "sft-longer"),
    ("assistant-teaches", "abkd"),
    ("assistant-teaches", "abkd-equal-compute"),
    ("assistant-starts", "abkd-equal-compute"),
)


def summary(results: Results, arm: str, metric: str = METRIC) -> Summary:
    """Return an arm's mean over the test sets, with its interval."""
    return results.summaries[arm, MEAN, metric]


def cell(results: Results, arm: str, metric: str = METRIC) -> str:
    """Return an arm's mean as text, or a dash if the run does not have it."""
    found = results.summaries.get((arm, MEAN, metric))
    return summary_text(found, metric) if found else DASH


def distilled(runs: Sequence[Results]) -> list[str]:
    """Return the arms that every run has and in which another model teaches the student."""
    taught = [arm.name for arm in runs[0].plan.arms if arm.model == STUDENT and len(arm.path) > 1]
    return [name for name in taught if all((name, MEAN, METRIC) in run.summaries for run in runs)]


def answer(runs: Sequence[Results]) -> str:
    """Return the first paragraph: which distilled arms have an interval above that of the fine-tuned student in all runs."""
    names = distilled(runs)
    always = [name for name in names if all(summary(run, name).low > summary(run, START).high for run in runs)]
    best = max(distilled(runs[:1]), key=lambda name: summary(runs[0], name).mean)
    return (
        f"**{'Yes' if always else 'No'}: in all {len(runs)} runs the 95 % intervals of {len(always)} of {len(names)} distilled students "
        f"lie above that of the fine-tuned student from which they start ({', '.join(f'`{name}`' for name in always) or 'none'}).** In the "
        f"example itself (run 1), the fine-tuned student states {cell(runs[0], START)} % of the facts. The best distilled student "
        f"(`{best}`) states {cell(runs[0], best)} %, and the teacher {cell(runs[0], TEACHER)} %. "
        f"Fine-tuning with as many updates (`{LONGER}`) reaches {cell(runs[0], LONGER)} %: most of the gain of KD is that of more updates."
    )


def arms_table(runs: Sequence[Results]) -> list[str]:
    """Return one row per arm: its fact accuracy in each run, greedy answers and compute in the shipped run."""
    seeds = [", ".join(map(str, sorted(run.plan.arms[1].evaluate))) for run in runs]
    heads = [*(f"run {number}: seeds {text}" for number, text in enumerate(seeds, 1)), "run 1, greedy", "compute"]
    direct = next(arm.flops for arm in runs[0].plan.arms if arm.name == DIRECT)
    lines = [f"| arm | what it is | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for arm in runs[0].plan.arms:
        ratio = ratio_text(arm.flops / direct if arm.flops and direct else None)
        cells = [*(cell(run, arm.name) for run in runs), cell(runs[0], arm.name, GREEDY), ratio]
        lines.append(f"| `{arm.name}` | {WHAT[arm.name]} | {' | '.join(cells)} |")
    return lines


def pairs_table(runs: Sequence[Results]) -> list[str]:
    """Return one row per pair of arms: the paired difference of sampled answers in each run, and of greedy ones in the shipped run."""
    heads = [*(f"run {number}" for number in range(1, len(runs) + 1)), "run 1, greedy"]
    lines = [f"| arm | minus | {' | '.join(heads)} |", "|---|---|" + "---:|" * len(heads)]
    for one, other in PAIRS:
        cells = [difference(run, one, other, METRIC) for run in runs] + [difference(runs[0], one, other, GREEDY)]
        lines.append(f"| `{one}` | `{other}` | {' | '.join(cells)} |")
    return lines


def difference(results: Results, one: str, other: str, metric: str) -> str:
    """Return the paired difference of two arms, in bold if its interval excludes 0."""
    found = compare(results, one, other, metric) if {one, other} <= results.scores.keys() else None
    if found is None:
        return DASH
    gap = found[0]
    text = gap_text(gap, metric)
    return text if gap.covers_zero else f"**{text}**"


def terminal_table(results: Results) -> str:
    """Return what `tadistill run` prints at its end."""
    console = Console(width=140, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(summary_table(results))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def main() -> None:
    """Write both files."""
    root = runs_directory(sys.argv[1] if len(sys.argv) > 1 else None)
    runs = [read_results(root / name, store_of(root)) for name in STUDIES]
    template = jinja2.Template((HERE / "results" / "quickstart.md.j2").read_text(encoding="utf-8"), keep_trailing_newline=True)

    def minus(one: str, other: str, run: int = 1, metric: str = METRIC) -> str:
        return difference(runs[run - 1], one, other, metric).strip("*")

    tables = {"arms": "\n".join(arms_table(runs)), "pairs": "\n".join(pairs_table(runs))}
    page = template.render(answer=answer(runs), minus=minus, **tables)
    (HERE / "results" / "quickstart.md").write_text(page, encoding="utf-8")
    readme = HERE.parent / "README.md"
    text, found = re.subn(
        r"```text\n.*?```", lambda _: f"```text\n{terminal_table(runs[0])}\n```", readme.read_text(encoding="utf-8"), count=1, flags=re.S
    )
    assert found, "README.md has no block of text"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
