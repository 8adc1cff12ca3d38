"""The page of `advise.py`."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
RULES = ("direct", "size law", "performance mean", "geometric mean", "random")


def markdown(result: Row, command: str) -> str:
    """The result as a page."""
    return (
        "\n".join([_opening(result, command), _findings(result), _verdicts(result), _regrets(result), _power(result), _tables(result)])
        + "\n"
    )


def _opening(result: Row, command: str) -> str:
    where = f"{result['jobs']} processes of one thread, {result['seconds']:.0f} s; Python {result['python']}, numpy {result['numpy']}"
    return (
        f"# Advice: verdicts, regret, intervals, power\n\n```\n{command}\n```\n\n{result['worlds']:,} worlds a cell, "
        f"{result['seeds']} seeds an arm, margin {result['margin']}, level {result['level']}, {where}. Each "
        "world is one held-out family and F families of history. "
        "What is simulated is said in `benchmarks/advise_worlds.py`. The effects are assumptions: the page says how the method behaves "
        "if the world is like that, not that it is.\n"
    )


def _findings(result: Row) -> str:
    """What the tables below say, in sentences."""
    cells = [r for r in result["cells"] if r["families"]]
    null, scatter = ([r for r in result["cells"] if r["world"] == name] for name in ("null", "null, scatter"))
    inside_80, inside_95 = ([r[key] for r in cells] for key in ("coverage_80", "coverage_95"))
    beaten, worse, after = ([r for r in cells if _beaten(r, n)] for n in ("advise", "best expectation", "after one experiment"))
    lines = [
        f"No effect at all: direct is what to run in at least {_least(null, 'chain'):.1f} % of the worlds, and in at least "
        f"{_least(null, 'after_chain'):.1f} % after an experiment. No mean effect but families and edges that differ: "
        f"{_least(scatter, 'chain'):.1f} and {_least(scatter, 'after_chain'):.1f} %, where some chains are truly better.",
        f"A chain that is truly worse than direct is recommended in at most {max(r['wrong'] for r in result['cells']):.1f} % of the worlds "
        f"of any kind, after an experiment in at most {max(r['after_wrong'] for r in result['cells']):.1f} %.",
        f"Intervals with history hold the truth in {min(inside_80):.0f} to {max(inside_80):.0f} % (80 %) and {min(inside_95):.0f} to "
        f"{max(inside_95):.0f} % (95 %) of the cases.",
        f"Some rule of thumb loses less than `advise` in {len(beaten)} of {len(cells)} cells with history, less than the best expectation "
        f"in {len(worse)}, and less than `advise` with one experiment in {len(after)}. In doubt `advise` says direct, and that costs most "
        "where chains help everywhere.",
    ]
    none = [r["coverage_95"] for r in result["cells"] if not r["families"]]
    tables, correlations = result["tables"], [r["spearman"] for r in result["tables"] if r["spearman"] is not None]
    lines += [
        f"Without history the interval is the prior's, and the 95 % one holds the truth in {min(none):.0f} to {max(none):.0f} %: it is an "
        "assumption about the size of effects, wrong where they are larger.",
        f"On the public tables the 95 % intervals hold {sum(r['inside_95'] for r in tables)} of {sum(r['chains'] for r in tables)} "
        f"differences and the order of chains is predicted with rank correlations from {min(correlations):.2f} to {max(correlations):.2f}: "
        "two tables of history say nothing useful of a third.",
    ]
    if beaten:
        lines.append(
            "So from history alone the advice does **not** beat the rules of thumb in every world. It prices the paths, refuses chains "
            "without evidence, and names the experiment; the experiment is what decides."
        )
    return "## What the tables say\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _least(rows: Sequence[Row], key: str) -> float:
    return min(100 - r[key] for r in rows)


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
    return (
        "## Verdicts\n\nIn percent. *Inconclusive* tells the user to run direct at equal compute too, and names experiments. *Wrong*: a "
        "chain was recommended that is truly worse than direct. *In 80 / 95 %*: truth inside the interval; *width*: the 95 % interval's. "
        f"*After*: once the first proposed experiment (a chain and its twin, {result['seeds']} seeds each) was run on the held-out "
        "family.\n\n" + table((*columns, *after), rows, left=1)
    )


def _regrets(result: Row) -> str:
    names = ("advise", "after one experiment", "best expectation", *RULES)
    rows = [
        (r["world"], r["families"], *(f"{r['regret'][name]:.2f}" for name in names), ", ".join(_beaten(r, "advise")) or "none")
        for r in result["cells"]
    ]
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


def _beaten(row: Row, by: str) -> list[str]:
    """The rules of thumb whose regret is smaller than a chooser's by more than two standard errors."""
    regret, se = row["regret"], row["regret_se"]
    return [n for n in RULES if regret[n] < regret[by] - 2 * (se[n] ** 2 + se[by] ** 2) ** 0.5]


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
