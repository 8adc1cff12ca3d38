"""Writes docs/results/methods.md, from the finished study of recipes/methods/all.yaml.

    tadistill run recipes/methods/all.yaml
    python docs/tabulate_methods.py [RUNS] > docs/results/methods.md

A difference from the arm `kd` is called real if its paired 95 % interval excludes 0 and all training seeds have the same sign.
"""

from results_page import cell, gap, read_study, table

from tadistill.metrics import MEAN
from tadistill.results.collect import Results
from tadistill.results.compare import difference

BASE = "kd"
METRICS = {"fact_accuracy": "fact accuracy", "rouge_l": "ROUGE-L", "reverse_kl": "KL(student ‖ teacher)"}
NO_STUDENT = "teacher"
METHODS = {
    "teacher": "the teacher",
    "sft": "SFT, the start of all others",
    "sft-longer": "SFT, continued",
    "kd": "KD",
    "seqkd": "SeqKD",
    "abkd": "ABKD",
    "taid": "TAID",
    "amid": "AMiD",
    "distillm": "DistiLLM",
    "imitkd": "ImitKD",
    "gkd": "GKD",
    "on-policy-rkl": "on-policy reverse KL",
    "skd": "SKD",
    "distillm-2": "DistiLLM-2",
    "minillm": "MiniLLM, the paper's form",
    "minillm-official": "MiniLLM, the released code's form",
}

SETUP = """
There is one teacher of 316 k parameters and one student of 24 k, with three training seeds. After the same SFT every method gets 240
updates of 32 sequences, so the methods differ in compute. Checkpoints are chosen on dev. Learning rates were chosen with a seed that is not
shown; the recipe's header says what was tried. The numbers are means over five test sets with 95 % intervals
([how they are made](../concepts/intervals.md)).
"""
TAIL = """
## Why

A few hundred updates change little, because the student is far too small for the facts of its world. Selection is noisy as well: dev has
189 facts, and for `minillm` with seed 20 it kept the checkpoint after 40 updates. This explains the wide interval of that arm.

## What this does not say

The table does not rank methods in general. It shows that every method runs, and what these updates did on one toy world. Among so many
comparisons one or two exclude 0 by chance.

## Command

```
tadistill run recipes/methods/all.yaml
python docs/tabulate_methods.py > docs/results/methods.md
```
"""


def seeds_agree(results: Results, arm: str, metric: str) -> bool:
    """Return whether the difference from the base has the same sign for every training seed."""
    mine, base = (results.summaries[name, MEAN, metric].per_seed for name in (arm, BASE))
    return len({mine[seed] > base[seed] for seed in mine}) == 1


def arms_table(results: Results) -> str:
    """Return one row per arm. A difference from the base is bold if it is real."""
    names = [*METRICS.values(), *(f"Δ {METRICS[m]} to {BASE}" for m in ("fact_accuracy", "rouge_l"))]
    words = ["method", "arm", "objective on sampler"]
    rows = []
    for arm in results.plan.arms:
        cells = [cell(results, arm.name, metric) for metric in METRICS]
        for metric in ("fact_accuracy", "rouge_l"):
            text = "" if arm.name in (BASE, NO_STUDENT) else gap(results, arm.name, BASE, metric)
            cells.append(f"**{text}**" if text and is_real(results, arm.name, metric) else text)
        rows.append([METHODS[arm.name], f"`{arm.name}`", arm.method, *cells])
    return table([*words, *names], rows, left=words)


def is_real(results: Results, arm: str, metric: str, *, above: bool = False) -> bool:
    """Return whether the interval excludes 0 and the seeds agree. With `above`, the arm must also be ahead of the base."""
    found = difference(results, arm, BASE, metric)
    if found is None or found.covers_zero or (above and found.mean < 0):
        return False
    return seeds_agree(results, arm, metric)


def verdict(results: Results) -> list[str]:
    """Say in words which differences from the base are real."""
    lines = [
        "",
        f"Against `{BASE}`, a difference is called real (bold) if its paired interval excludes 0 and all three seeds have the same sign:",
        "",
    ]
    for metric, name in METRICS.items():
        sides: dict[bool, list[str]] = {True: [], False: []}
        students = [arm.name for arm in results.plan.arms if arm.name not in (BASE, NO_STUDENT)]
        for arm in students:
            if is_real(results, arm, metric):
                ahead = is_real(results, arm, metric, above=True)
                sides[ahead].append(f"`{arm}`")
        level = [f"`{arm}`" for arm in students if f"`{arm}`" not in sides[True] + sides[False]]
        parts = [f"{word} {', '.join(found) or 'none'}" for word, found in (("higher:", sides[True]), ("lower:", sides[False]))]
        lines.append(f"- {name}: {'; '.join(parts)}; undecided: {', '.join(level) or 'none'}.")
    return lines


def answer(results: Results) -> str:
    """Return the first sentence: which methods differ from the base in the two scores of answers."""

    def higher(metric: str) -> str:
        students = [name for name in METHODS if name not in (BASE, NO_STUDENT)]
        return " and ".join(f"`{name}`" for name in students if is_real(results, name, metric, above=True))

    facts, rouge = higher("fact_accuracy"), higher("rouge_l")
    return (
        f"**Compared with plain KD, which trains on the data set's text, {facts or 'no method'} ends with a higher fact accuracy on "
        f"tinyworld. A higher ROUGE-L is reached by {rouge or 'none'} ({len(results.plan.recipe['seeds'])} training seeds, 240 updates).**"
    )


def main() -> None:
    """Write the page to stdout."""
    results = read_study("methods")
    title = "# Which method is best at equal numbers of updates?\n"
    print("\n".join([title, answer(results), SETUP, arms_table(results), *verdict(results), TAIL]), end="")


if __name__ == "__main__":
    main()
