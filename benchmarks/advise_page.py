"""The page of `advise.py`."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
RULES = ("direct", "size law", "performance mean", "geometric mean", "random")


def markdown(result: Row, command: str) -> str:
    """The result as a page."""
    return "\n".join([_opening(result, command), _verdicts(result), _regrets(result), _power(result), _tables(result)]) + "\n"


def _opening(result: Row, command: str) -> str:
    where = f"{result['jobs']} processes of one thread, {result['seconds']:.0f} s; Python {result['python']}, numpy {result['numpy']}"
    return (
        f"# Advice: verdicts, regret, intervals, power\n\n```\n{command}\n```\n\n{result['worlds']:,} worlds a cell, "
        f"{result['seeds']} seeds an arm, margin {result['margin']}, level {result['level']}, {where}. Each "
        "world is one held-out family and F families of history. "
        "What is simulated is said in `benchmarks/advise_worlds.py`. The effects are assumptions: the page says how the method behaves "
        "if the world is like that, not that it is.\n"
    )


def _verdicts(result: Row) -> str:
    rows = [
        (
            r["world"],
            r["families"],
            *(f"{r[v]:.1f}" for v in ("direct", "inconclusive", "chain", "wrong", "coverage_80", "coverage_95")),
            f"{r['width']:.2f}",
            _optional(r["spearman"]),
            *(f"{r[f'after_{v}']:.1f}" for v in ("direct", "inconclusive", "chain", "wrong")),
        )
        for r in result["cells"]
    ]
    columns = ("world", "F", "direct", "inconclusive", "chain", "wrong", "in 80 %", "in 95 %", "width", "Spearman")
    after = ("direct after", "inconclusive after", "chain after", "wrong after")
    least = min(100 - r["chain"] for r in result["cells"] if r["world"].startswith("null"))
    least_after = min(100 - r["after_chain"] for r in result["cells"] if r["world"].startswith("null"))
    return (
        "## Verdicts\n\nIn percent. *Inconclusive* tells the user to run direct at equal compute too, and names experiments. *Wrong*: a "
        "chain was recommended that is truly worse than direct. *In 80 / 95 %*: truth inside the interval; *width*: the 95 % interval's. "
        f"*After*: once the first proposed experiment (a chain and its twin, {result['seeds']} seeds each) was run on the held-out "
        "family.\n\n"
        f"On null worlds direct is what to run in {least:.1f} % or more, after an experiment in {least_after:.1f} % or more.\n\n"
        + table((*columns, *after), rows, left=1)
    )


def _regrets(result: Row) -> str:
    names = ("advise", "after one experiment", "best expectation", *RULES)
    rows = [(r["world"], r["families"], *(f"{r['regret'][name]:.2f}" for name in names), _beaten(r)) for r in result["cells"]]
    for families in sorted({r["families"] for r in result["cells"]}):
        of = [r["regret"] for r in result["cells"] if r["families"] == families]
        rows.append(("*mean of the worlds*", families, *(f"{sum(r[name] for r in of) / len(of):.2f}" for name in names), ""))
        rows.append(("*worst world*", families, *(f"{max(r[name] for r in of):.2f}" for name in names), ""))
    return (
        "## Regret\n\nMean points lost to the best path of the held-out family, where exhaustive search without noise has 0. *Best "
        "expectation* runs whatever path is expected to be best, however unsure. *Beaten by*: rules with a regret smaller than that of "
        "`advise` by more than two standard errors. How often each world occurs is not known, so the mean over them weighs nothing "
        "real.\n\n" + table(("world", "F", *names, "`advise` is beaten by"), rows, left=1)
    )


def _beaten(row: Row) -> str:
    regret, se = row["regret"], row["regret_se"]
    better = [n for n in RULES if regret[n] < regret["advise"] - 2 * (se[n] ** 2 + se["advise"] ** 2) ** 0.5]
    return ", ".join(better) or "none"


def _power(result: Row) -> str:
    effects = sorted({r["effect"] for r in result["power"]})
    rows = []
    for families in sorted({r["families"] for r in result["power"]}):
        of = {r["effect"]: r for r in result["power"] if r["families"] == families}
        for when, key in (("from history", "chain"), ("after one experiment", "after_chain")):
            rows.append((families, when, *(f"{of[e][key]:.0f}" for e in effects)))
    return (
        "## Power\n\nWorlds in percent in which a chain is recommended, by the mean effect of every chain in points; families differ by "
        "0.3, edges by 0.3.\n\n" + table(("F", "when", *(f"{e:g}" for e in effects)), rows)
    )


def _tables(result: Row) -> str:
    names = ("advise", "best expectation", "direct", "size law", "geometric mean", "random")
    rows = [
        (
            r["table"],
            r["student"],
            r["verdict"],
            f"{r['inside_95']} of {r['chains']}",
            _optional(r["spearman"]),
            *(f"{r['regret'][name]:.2f}" for name in names),
        )
        for r in result["tables"]
    ]
    return (
        "## Public tables\n\nTAKD's figure 5 and two replications, each predicted from the other two: a table is a family, size ratios are "
        "of layers, margin 0.5. None of them has equal-compute twins, so direct at its own cost stands for them, which flatters "
        "chains; one seed, selected on test, and most differences are below the standard error of an accuracy. Performance mean is "
        "left out: it needs scores without distillation, which are not at hand for all.\n\n"
        + table(("table", "student", "verdict", "in 95 %", "Spearman", *(f"regret: {n}" for n in names)), rows, left=3)
    )


def _optional(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.2f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 0) -> str:
    """A Markdown table, the first columns to the left, the others to the right."""
    ruler = ["---" if i < left else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (columns, ruler, *rows)) + "\n"
