"""Every figure and every table of the page in a browser, against results.json. A figure or table without a check here fails the test."""

import json
import re
from collections.abc import Callable

import pytest

from tadistill.metrics import names_in
from tadistill.report import write_report
from tadistill.report.analysis import published
from tadistill.results.number_text import DASH, detectable_text, flops_text, interval, number, parameters_text, ratio_text, signed
from tadistill.results.verdict import SHOWN

from .builder import ArmSpec, StudySpec, build_study
from .test_browser import Opened, results_of

ARMS = [
    ArmSpec("teacher", ("xl",), gain=6.0, flops=1.0e18),
    ArmSpec("sft", ("s",), gain=-3.0, flops=4.0e16),
    ArmSpec("direct", ("xl", "s"), published={"source": "a paper", "rouge_l": {"dolly": 25.0}}),
    ArmSpec("direct-2x", ("xl", "s"), gain=1.0, compute="2x direct", flops=6.0e17),
    ArmSpec("direct-4x", ("xl", "s"), gain=1.2, compute="4x direct", flops=1.2e18),
    ArmSpec("chain-1x", ("xl", "l", "s"), gain=-4.0, compute="1x direct"),
    ArmSpec("chain-2x", ("xl", "l", "s"), gain=3.0, compute="2x direct", flops=6.0e17),
    ArmSpec("chain-4x", ("xl", "l", "m", "s"), gain=4.0, compute="4x direct", flops=1.2e18),
]
LEDGER = {"parts": {"train/s/forward": {"flops": 0.9e16}}, "seconds": {}, "padding": 0}


class Numbers:
    """The numbers of results.json, and the figures and tables that a page shows of them."""

    def __init__(self, opened: Opened, content: dict):
        self.opened, self.content, self.metric = opened, content, content["differences"][0]["metric"]
        self.means = {(row["arm"], row["set"], row["metric"]): row for row in content["means"]}
        self.arms = {row["arm"]: row for row in content["arms"]}

    # --- figures --------------------------------------------------------------------------------------------------------

    def mean(self, arm: str, metric: str = "", of_set: str = "mean") -> dict:
        return self.means[arm, of_set, metric or self.metric]

    def cost(self, drawn: dict) -> None:
        direct = self.arms["direct"]["flops"]
        for name, x, *ends, _ in drawn["points"]:
            assert x == pytest.approx(self.arms[name]["flops"] / direct, rel=1e-6)
            assert ends == pytest.approx([self.mean(name)[end] for end in ("value", "low", "high")], rel=1e-6)

    def differences(self, drawn: dict) -> None:
        rows = [row for row in self.content["differences"] if row["where"] == "mean" and row["per_seed"]]
        found = [(name, mean, low, high) for name, mean, _, low, high, _ in drawn["points"]]
        assert_same(found, [(row["arm"], row["mean"], row["low"], row["high"]) for row in rows])

    def budgets(self, drawn: dict) -> None:
        for (name, _, xs, ys), curve in zip(drawn["lines"], self.content["budgets"], strict=True):
            assert (name, xs) == (curve["arm"], [p["times"] for p in curve["points"]])
            assert ys == pytest.approx([p["value"] for p in curve["points"]], rel=1e-6)
            assert all(p["value"] == self.mean(p["arm"])["value"] for p in curve["points"])

    def gaps(self, drawn: dict) -> None:
        gaps = [(c["arm"], p["gap"]) for c in self.content["budgets"] for p in c["points"] if p["gap"]]
        assert_same([(name, *ends) for name, _, *ends, _ in drawn["points"]], [(name, *gap.values()) for name, gap in gaps])

    def error_budget(self, drawn: dict) -> None:
        *terms, total = drawn["bars"]
        arm = total[0]
        wanted = [(arm, self.mean(arm, f"budget/{j}")["value"]) for j in range(len(terms))]
        assert_same([(arm, end - base) for *_, base, end, _ in terms], wanted)
        assert total[4] == pytest.approx(self.mean(arm, "reverse_kl")["value"], abs=1e-4)

    def curves(self, drawn: dict, metric: str) -> None:
        rows = [row for row in self.content["curves"] if row["metric"] == metric]
        lines = [(name, seed, [round(v, 5) for v in ys]) for name, seed, _, ys in drawn["lines"]]
        named = {name for name, *_ in lines}  # each method has its own figure of the training loss
        assert sorted(lines, key=str) == sorted(((r["arm"], r["seed"], r["values"]) for r in rows if r["arm"] in named), key=str)
        for name, seed, xs, _ in drawn["lines"]:
            steps = next(row["steps"] for row in rows if (row["arm"], row["seed"]) == (name, seed))
            assert [x / xs[-1] for x in xs] == pytest.approx([step / steps[-1] for step in steps], abs=1e-4)

    def plane(self, drawn: dict) -> None:
        names = ("", *(f"@{name}" for name in ("greedy", "t0.5")))
        wanted = [(arm, *(self.mean(arm, f"{m}{s}")["value"] for m in ("entropy", self.metric))) for arm in self.arms for s in names]
        assert_same([(name, x, y) for name, x, y, *_ in drawn["points"]], wanted)

    def exposure(self, drawn: dict) -> None:
        rows = {(row["arm"], row["seed"]): row for row in self.content["exposure"]}
        dotted = -1  # the end of the mean, which few answers reach
        for name, seed, xs, ys in drawn["lines"]:
            row = rows[name, None if seed == dotted else seed]
            assert ys == pytest.approx([row["values"][int(x) - 1] for x in xs], abs=1e-4)
            assert (xs[-1] > row["solid"]) == (seed == dotted)

    def calibration(self, drawn: dict) -> None:
        rows = [row for row in self.content["calibration"] if row["what"] == "tokens"]
        assert [[name, xs, ys] for name, _, xs, ys in drawn["lines"]] == [[row["arm"], row["confidence"], row["correct"]] for row in rows]

    def lengths(self, drawn: dict) -> None:
        rows = [(row["arm"], *(row[end] for end in ("value", "low", "high"))) for row in self.content["lengths"]]
        assert_same([(name, *ends) for name, _, *ends, _ in drawn["points"]], rows)

    def figures(self) -> dict[str, Callable[[dict], None]]:
        logs = {row["metric"]: row["metric"].replace("/", "-") for row in self.content["curves"]}
        found = {f"figure-{name}": lambda drawn, metric=metric: self.curves(drawn, metric) for metric, name in logs.items()}
        found |= {"figure-cost": self.cost, "figure-differences": self.differences, "figure-plane": self.plane}
        found |= {"figure-budgets": self.budgets, "figure-budget-gaps": self.gaps, "figure-exposure": self.exposure}
        found |= {"figure-calibration-tokens": self.calibration, "figure-lengths": self.lengths, "figure-paths": lambda drawn: None}
        return found

    def check_figure(self, name: str) -> None:
        if re.fullmatch(r"figure-budget-\d+", name):
            self.error_budget(self.opened.values(name))
        else:
            self.figures()[name.removesuffix("-1")](self.opened.values(name))

    # --- tables ---------------------------------------------------------------------------------------------------------

    def cell(self, arm: str, metric: str, of_set: str = "mean") -> str:
        row = self.means.get((arm, of_set, metric))
        if row is None:
            return DASH
        return " ".join([number(row["value"], metric), *([interval(row["low"], row["high"], metric)] if row["low"] is not None else [])])

    def of_metrics(self, *metrics: str) -> list[list[str]]:
        shown = [metric for metric in metrics if any((arm, "mean", metric) in self.means for arm in self.arms)]
        rows = [[arm, *(self.cell(arm, metric) for metric in shown)] for arm in self.arms]
        return [row for row in rows if set(row[1:]) != {DASH}]

    def by_length(self) -> list[list[str]]:
        def cell(row: dict) -> str:
            return f"{number(row['value'], row['metric'])} {interval(row['low'], row['high'], row['metric'])}"

        return [[arm, *(cell(row) for row in self.content["lengths"] if row["arm"] == arm)] for arm in self.arms]

    def comparisons(self) -> list[list[str]]:
        found = []
        for row in self.content["comparisons"]:
            value = f"{signed(row['mean'], self.metric, more=1)} {interval(row['low'], row['high'], self.metric, more=1)}"
            signs = f"{row['sign_flip']['p']:.3f} [{row['sign_flip']['smallest']:.3f}]"
            verdict = f"{SHOWN[row['verdict']]} ({row['credit']})" if row["credit"] else SHOWN[row["verdict"]]
            tests = [f"{row['p']:.4f}", f"{row['p_holm']:.4f}", signs, detectable_text(row["detectable"], self.metric)]
            found.append([f"{row['arm']} {DASH} {row['other']}", value, *tests, verdict])
        return found

    def cost_table(self) -> list[list[str]]:
        def cells(row: dict) -> list[str]:
            relative = DASH if row["relative"] is None else f"{ratio_text(row['relative'])} {row['relative_to']}"
            return [row["arm"], parameters_text(row["parameters"]), flops_text(row["flops"]), relative]

        return [cells(row) for row in self.content["arms"]]

    def ledger(self) -> list[list[str]]:
        def cells(row: dict) -> list[str]:
            ratio = ratio_text(row["metered"] / row["predicted"])
            return [row["stage"], flops_text(row["predicted"]), flops_text(row["metered"]), ratio, f"{row['seconds']:.0f} s"]

        return [cells(row) for row in self.content["ledger"]]

    def tables(self) -> dict[str, Callable[[], list[list[str]]]]:
        groups = {f"table-{name}": lambda name=name: self.of_metrics(*names_in(name)) for name in ("language", "text")}
        hops = sorted({metric for *_, metric in self.means if metric.startswith("budget/")})
        return groups | {
            "table-divergence": lambda: self.of_metrics(*names_in("divergence"), *hops),
            "table-decoding-rouge_l": lambda: self.of_metrics("rouge_l", "rouge_l@greedy", "rouge_l@t0.5"),
            "table-buckets": self.by_length,
            "table-comparisons": self.comparisons,
            "table-cost": self.cost_table,
            "table-ledger": self.ledger,
            "stages": lambda: [[row["label"], row["key"], f"{row['seconds']:.0f} s"] for row in self.content["stages"]],
        }  # fmt: skip


def assert_same(found: list[tuple], wanted: list[tuple]) -> None:
    """Both lists have the same names, each with the same numbers up to the digits that a figure keeps."""
    found, wanted = sorted(found), sorted(wanted)
    assert [name for name, *_ in found] == [name for name, *_ in wanted]
    assert [v for _, *values in found for v in values] == pytest.approx([v for _, *values in wanted for v in values], abs=1e-4)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    sets = {"dolly": 40, "self_inst": 30}
    made = build_study(tmp_path_factory.mktemp("numbers"), StudySpec(ARMS, seeds=(10, 20, 30), sets=sets, fact_sets=(), steps=200))
    for path in made.store_dir.glob("*/*/manifest.json"):
        if "metrics.jsonl" in (content := json.loads(path.read_text()))["files"]:
            path.write_text(json.dumps(content | {"ledger": LEDGER}))
    return made


def test_figures_tables_and_sentences_are_those_of_results_json(browser, study):
    opened = Opened(browser, write_report(study.read()))
    numbers = Numbers(opened, results_of(study))
    opened.unfold()
    page = opened.page
    figures = page.evaluate("[...document.querySelectorAll('.chart')].map((e) => e.id)")
    assert len(figures) > 14
    for name in figures:
        numbers.check_figure(name)
    script = """[...document.querySelectorAll('table[id]:not(#arms)')].map((t) => [t.id, [...t.tBodies[0].rows].map(
        (r) => [...r.cells].map((c) => { c = c.cloneNode(true); c.querySelectorAll('.glyph').forEach((g) => g.remove());
          return c.textContent.replace(/\\s+/g, ' ').trim(); }))])"""
    shown, wanted = dict(page.evaluate(script)), numbers.tables()
    assert set(shown) == set(wanted)
    for name, rows in shown.items():
        assert rows == wanted[name](), name
    content = numbers.content
    headings = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('section')].map((s) => [s.id, s.querySelector('h2').innerText]))"
    )
    assert {name: text.removeprefix("#") for name, text in headings.items()} == content["findings"]
    said = page.locator("main").inner_text().replace("\n", " ")
    sentences = [*content["cautions"], *(s for e in content["explanations"] for s in e["sentences"]), *published(study.read())]
    assert [text for text in sentences if " ".join(text.replace("`", "").split()) not in " ".join(said.split())] == []
    script = "[...document.querySelectorAll('#arms [data-row]')].map((row) => [row.dataset.row, row.querySelector('.words').innerText])"
    assert dict(page.evaluate(script)) == {row["arm"]: row["words"] for row in content["arms"]}
    script = "Object.fromEntries([...document.querySelectorAll('td[data-arm-mean]')].map((c) => [c.dataset.armMean, c.textContent.trim()]))"
    assert page.evaluate(script) == {arm: number(numbers.mean(arm)["value"], numbers.metric) for arm in numbers.arms}
    script = "[...document.querySelectorAll('.analysis [data-difference]')].map((c) => [...c.dataset.difference.split('|'), c.textContent])"
    pairs = {(e["arm"], e["other"]) for e in content["explanations"]}
    rows = [row for row in content["differences"] if (row["arm"], row["other"]) in pairs]
    wanted = [[row["metric"], row["where"], signed(row["mean"], row["metric"])] for row in rows]
    assert sorted(page.evaluate(script)) == sorted(wanted)
    for row in content["paths"]:
        text = f"{row['method']}: {flops_text(row['flops'])} FLOPs of one seed, for {', '.join(row['arms'])}"
        assert page.locator(f'#figure-paths [data-tip="{text}"]').count() >= 1
        assert row["dev"] is None or f"dev {number(row['dev'], numbers.metric)}" in page.locator("#figure-paths").inner_text()
    opened.assert_quiet()
