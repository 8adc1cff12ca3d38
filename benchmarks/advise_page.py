"""Writes the page of `advise.py`."""

from collections.abc import Sequence
from typing import Any

import page

Row = dict[str, Any]
RULES = ("direct", "size law", "performance mean", "geometric mean", "random")


def markdown(result: Row) -> str:
    """Return the result as a page."""
    return "\n".join([_opening(result), _findings(result), _verdicts(result), _regrets(result), _power(result), _tables(result)]) + "\n"


def _opening(result: Row) -> str:
    where = f"{result['jobs']} processes of one thread, {result['seconds']:.0f} s; Python {result['python']}, numpy {result['numpy']}"
    return (
        "# Advice: verdicts, regret, intervals, power\n\n"
        "This page shows how good the verdicts and intervals of `tadistill advise` are in simulated worlds.\n\n"
        f"```\n{result['command']}\n```\n\n"
        f"{result['worlds']:,} worlds per cell, {result['seeds']} seeds per arm, margin {result['margin']}, level {result['level']}, "
        f"{where}. Each world has one held-out family and F families of history. `benchmarks/advise_worlds.py` describes the simulation. "
        "The effects are assumptions: the page says how the method behaves if the world is like that, not that it is.\n"
    )


def _findings(result: Row) -> str:
    """Summarise the tables in sentences."""
    cells = [r for r in result["cells"] if r["families"]]
    null, scatter = ([r for r in result["cells"] if r["world"] == name] for name in ("null", "null, scatter"))
    inside_80, inside_95 = ([r[key] for r in cells] for key in ("coverage_80", "coverage_95"))
    beaten, worse, after = ([r for r in cells if _beaten(r, n)] for n in ("advise", "best expectation", "after one experiment"))
    lines = [
        f"Without any effect, `advise` says to run direct in at least {_least(null, 'chain'):.1f} % of the worlds, and in at least "
        f"{_least(null, 'after_chain'):.1f} % after an experiment. With no mean effect but differing families and edges it is "
        f"{_least(scatter, 'chain'):.1f} and {_least(scatter, 'after_chain'):.1f} %; there some chains are truly better.",
        f"A chain that is truly worse than direct is recommended in at most {max(r['wrong'] for r in result['cells']):.1f} % of the worlds "
        f"of any kind, and after an experiment in at most {max(r['after_wrong'] for r in result['cells']):.1f} %.",
        f"Intervals with history contain the truth in {min(inside_80):.0f} to {max(inside_80):.0f} % (80 %) and {min(inside_95):.0f} to "
        f"{max(inside_95):.0f} % (95 %) of the cases.",
        f"Some rule of thumb loses less than `advise` in {len(beaten)} of {len(cells)} cells with history, less than the best expectation "
        f"in {len(worse)}, and less than `advise` with one experiment in {len(after)}. In doubt `advise` says direct; this costs most "
        "if chains help everywhere.",
    ]
    none = [r["coverage_95"] for r in result["cells"] if not r["families"]]
    tables, correlations = result["tables"], [r["spearman"] for r in result["tables"] if r["spearman"] is not None]
    lines += [
        f"Without history the interval is the prior's, and the 95 % interval contains the truth in {min(none):.0f} to "
        f"{max(none):.0f} %. It is an assumption about the size of effects, and wrong if they are larger.",
        f"On the public tables the 95 % intervals contain {sum(r['inside_95'] for r in tables)} of {sum(r['chains'] for r in tables)} "
        f"differences. The predicted order of chains has rank correlations from {min(correlations):.2f} to {max(correlations):.2f}: "
        "two tables of history say nothing useful about a third.",
    ]
    if beaten:
        lines.append(
            "From history alone the advice therefore does **not** beat the rules of thumb in every world. It computes the cost of "
            "the paths, recommends no chain without evidence, and names the experiment that would decide."
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
        "## Verdicts\n\nAll numbers except F, width and Spearman are percentages. *Inconclusive* tells the user to run direct at "
        "equal compute too, and names experiments. *Wrong*: the recommended chain is truly worse than direct. *In 80 / 95 %*: the "
        "interval contains the truth. *Width* is that of the 95 % interval. *After*: the first proposed experiment (a chain and "
        f"its equal-compute baseline, {result['seeds']} seeds each) was run on the held-out family.\n\n"
        + page.table((*columns, *after), rows)
        + "\n"
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
        "## Regret\n\nRegret is the mean number of points lost to the best path of the held-out family; exhaustive search without "
        "noise has 0. *Best expectation* runs the path with the best expectation, however uncertain. *Beaten by* lists the rules "
        "whose regret is smaller than that of `advise` by more than two standard errors. How often each world occurs is not known, "
        "so the mean over worlds has no real weights.\n\n" + page.table(("world", "F", *names, "`advise` is beaten by"), rows) + "\n"
    )


def _beaten(row: Row, by: str) -> list[str]:
    """Return the rules of thumb whose regret is smaller than a chooser's by more than two standard errors."""
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
        "## Power\n\nPercentage of worlds in which a chain is recommended, by the mean effect of every chain in points. Families differ by "
        "0.3, edges by 0.3.\n\n" + page.table(("F", "when", *(f"{e:g}" for e in effects)), rows, left=()) + "\n"
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
        "## Public tables\n\nTAKD's figure 5 and two replications, each predicted from the other two. A table is a family, size ratios are "
        "ratios of layers, and the margin is 0.5. None of the tables has equal-compute baselines, so direct at its own cost takes their "
        "place, which favours chains. The tables have one seed, selected on test, and most differences are below the standard error of an "
        "accuracy. Performance mean is left out, because it needs scores without distillation, which not all tables have.\n\n"
        + page.table(
            ("table", "student", "verdict", "in 95 %", "Spearman", *(f"regret: {n}" for n in names)),
            rows,
            left=("table", "student", "verdict"),
        )
        + "\n"
    )


def _optional(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.2f}"
