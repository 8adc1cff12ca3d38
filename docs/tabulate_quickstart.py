"""Writes docs/results/quickstart.md and the table of README.md, from three runs of recipes/quickstart.yaml.

    tadistill run quickstart
    tadistill run quickstart study=quickstart-2 'seeds=[11,21,31]'
    tadistill run quickstart study=quickstart-3 'seeds=[12,22,32]'
    python docs/tabulate_quickstart.py [RUNS]

The teacher is the same in all runs. `docs/draw_quickstart.py` draws the picture.
"""

import re
from collections.abc import Sequence

from results_page import HERE, cell, gap, read_study, table, write_page
from rich.console import Console

from tadistill.metrics import MEAN
from tadistill.report import summary_table
from tadistill.report.against_sft import against_sft
from tadistill.report.tables import cost_rows
from tadistill.results.collect import Results, Summary
from tadistill.results.number_text import ratio_text

STUDIES = ("quickstart", "quickstart-2", "quickstart-3")
METRIC, GREEDY = "fact_accuracy", "fact_accuracy@greedy"
TEACHER, START, STUDENT = "teacher", "sft", "s"
LONGER = "sft-longer"
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


def distilled(runs: Sequence[Results]) -> list[str]:
    """Return the arms that every run has and in which another model teaches the student."""
    taught = [arm.name for arm in runs[0].plan.arms if arm.model == STUDENT and len(arm.path) > 1]
    return [name for name in taught if all((name, MEAN, METRIC) in run.summaries for run in runs)]


def answer(runs: Sequence[Results]) -> str:
    """Return the first paragraph: which distilled arms have an interval above that of the fine-tuned student in all runs, and what is left
    of this gain if the student is fine-tuned with as many updates."""
    names = distilled(runs)
    always = [name for name in names if all(summary(run, name).low > summary(run, START).high for run in runs)]
    best = max(distilled(runs[:1]), key=lambda name: summary(runs[0], name).mean)
    start, longer, teacher, first = (cell(runs[0], name, METRIC) for name in (START, LONGER, TEACHER, best))
    left = "a clear gain is left" if "is clearly better than" in against_sft(runs[0]) else "no clear gain is left"
    return (
        f"**{'Yes' if always else 'No'}, compared with the short fine-tuning from which the distilled students start (`{START}`): in all "
        f"{len(runs)} runs the 95 % intervals of {len(always)} of {len(names)} distilled students lie above that of `{START}` "
        f"({', '.join(f'`{name}`' for name in always) or 'none'}). Compared with fine-tuning with as many updates (`{LONGER}`), {left} in "
        f"the example.** In the example (run 1), the fine-tuned student states {start} % of the facts. The best distilled student "
        f"(`{best}`) states {first} %, and the teacher {teacher} %. "
        f"Fine-tuning with as many updates (`{LONGER}`) reaches {longer} %: most of the gain of KD is that of more updates."
    )


def arms_table(runs: Sequence[Results]) -> str:
    """Return one row per arm: its fact accuracy in each run, greedy answers and compute in the shipped run."""
    seeds = [", ".join(map(str, sorted(run.plan.arms[1].evaluate))) for run in runs]
    heads = [*(f"run {number}: seeds {text}" for number, text in enumerate(seeds, 1)), "run 1, greedy", "compute"]
    rows = []
    for row in cost_rows(runs[0]):
        name, compute = row.arm.name, ratio_text(row.relative)
        rows.append([f"`{name}`", WHAT[name], *(cell(run, name, METRIC) for run in runs), cell(runs[0], name, GREEDY), compute])
    return table(["arm", "what it is", *heads], rows, left=("arm", "what it is"))


def pairs_table(runs: Sequence[Results]) -> str:
    """Return one row per pair of arms: the paired difference of sampled answers in each run, and of greedy ones in the shipped run."""
    heads = [*(f"run {number}" for number in range(1, len(runs) + 1)), "run 1, greedy"]
    measured = [*((run, METRIC) for run in runs), (runs[0], GREEDY)]
    rows = [[f"`{one}`", f"`{other}`", *(gap(run, one, other, metric, bold=True) for run, metric in measured)] for one, other in PAIRS]
    return table(["arm", "minus", *heads], rows, left=("arm", "minus"))


def terminal_table(results: Results) -> str:
    """Return what `tadistill run` prints at its end."""
    console = Console(width=140, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(summary_table(results))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def main() -> None:
    """Write both files."""
    runs = [read_study(name, (TEACHER, START, LONGER)) for name in STUDIES]

    def minus(one: str, other: str, run: int = 1, metric: str = METRIC) -> str:
        return gap(runs[run - 1], one, other, metric)

    write_page("quickstart", answer=answer(runs), minus=minus, arms=arms_table(runs), pairs=pairs_table(runs))
    readme = HERE.parent / "README.md"
    text, found = re.subn(
        r"```text\n.*?```", lambda _: f"```text\n{terminal_table(runs[0])}\n```", readme.read_text(encoding="utf-8"), count=1, flags=re.S
    )
    assert found, "README.md has no block of text"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
