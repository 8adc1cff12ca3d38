"""Writes docs/results/curves.md and its pictures from the finished studies of recipes/takd/tinyworld-curves.yaml and results/curves.md.j2.

    tadistill run recipes/takd/tinyworld-curves.yaml           and the command of its header for the nearer student
    python docs/tabulate_curves.py [RUNS]

The script also packs both files results.json into docs/results/curves/.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results_page import HERE, RUNS, read_study, steps_of, table, updates_text, write_page

from tadistill.metrics import MEAN
from tadistill.report.figures.compute import curve_sentences
from tadistill.results.budget_curves import BudgetCurve, BudgetPoint, budget_curves
from tadistill.results.collect import Results, Summary
from tadistill.results.compare import difference, reference_at
from tadistill.results.number_text import DASH, flops_text, gap_text, parameters_text, summary_text
from tadistill.results.study import ArmRecord
from tadistill.statistics import Difference
from tadistill.text import listed

METRIC = "fact_accuracy"
STUDIES = {"far": "tinyworld-curves", "near": "tinyworld-curves-near"}
REFERENCE = "direct"
LARGE = ("rows", "curves", "exposure", "calibration", "stages")
"""The parts of results.json that are not kept: values of single seeds and sets, and learning curves."""
TEACHING = ("via-m", "via-l-m", "dense")
"""The arms in which an assistant teaches the student."""
WHAT = {
    "direct": "the teacher teaches; no assistant",
    "via-m": "chain of one assistant",
    "via-l-m": "chain of two assistants",
    "dense": "teacher and assistant teach at once",
    "init-m": "starts from the assistant, pruned; the teacher teaches",
    "init-xl": "starts from the teacher, pruned; the teacher teaches",
    "sft": "SFT on the reference answers; no teacher",
    "no-teacher": "control: a constant advantage in the teacher's place",
}
LOOKS = {
    "direct": ("black", "o", "-"),
    "via-m": ("#0072B2", "s", "-"),
    "via-l-m": ("#56B4E9", "D", "-"),
    "dense": ("#009E73", "^", "-"),
    "init-m": ("#D55E00", "v", "-"),
    "init-xl": ("#E69F00", "P", "-"),
    "sft": ("#CC79A7", "x", "--"),
    "no-teacher": ("0.55", "+", "--"),
}


@dataclass(frozen=True)
class Study:
    """One student: its results, and the curve of each arm."""

    name: str
    results: Results
    steps: dict[str, int | None]
    """Updates of each stage of the plan, by key."""

    @classmethod
    def read(cls, name: str) -> "Study":
        """Read a student's study. Only the arms that the page always names must be finished."""
        results = read_study(STUDIES[name], ("teacher", "start", REFERENCE, *TEACHING))
        return cls(name, results, steps_of(results))

    @property
    def curves(self) -> dict[str, BudgetCurve]:
        return {curve.name: curve for curve in budget_curves(self.results, METRIC)}

    @property
    def times(self) -> list[float]:
        return [point.times for point in self.curves[REFERENCE].points]

    @property
    def seeds(self) -> int:
        return min(len(p.summary.per_seed) for curve in self.curves.values() for p in curve.points)

    def seeds_of(self, arm: str) -> int:
        """Return the number of training seeds of an arm that are measured."""
        found = self.results.summaries.get((arm, MEAN, METRIC))
        return len(found.per_seed) if found else 0

    def mean(self, arm: str, metric: str = METRIC) -> Summary:
        return self.results.summaries[arm, MEAN, metric]

    def points(self, curve: str, metric: str = METRIC) -> Iterator[tuple[BudgetPoint, Summary, Difference | None]]:
        """Yield each point of a curve, its mean in a metric, and the difference from the reference arm at the same budget."""
        for point in self.curves[curve].points:
            other = reference_at(self.results, self.results.arm(point.arm))
            gap = difference(self.results, point.arm, other.name, metric) if other else None
            yield point, self.mean(point.arm, metric), gap

    def student_updates(self, arm: str) -> int:
        """Return the number of updates of the student's own distillation."""
        final = self.results.arm(arm).final
        return self.steps[final[min(final)] or ""] or 0


def times_text(times: list[float]) -> str:
    """Return budgets as text: `1× and 2×`."""
    return listed([f"{t:g}×" for t in times])


# --- the answer ---------------------------------------------------------------------------------------------------------


def clear_budgets(study: Study, curve: str, metric: str = METRIC) -> tuple[list[float], list[float]]:
    """Return the budgets at which an arm is clearly better than the reference arm, and those at which it is clearly worse."""
    gaps = [(p.times, gap) for p, _, gap in study.points(curve, metric) if gap]
    return [t for t, gap in gaps if gap.above_zero], [t for t, gap in gaps if gap.below_zero]


def best_gap(study: Study, curves: tuple[str, ...], times: float | None) -> tuple[str, float, Difference]:
    """Return the arm and the budget with the largest mean difference from the reference arm, at one budget or (None) at any."""
    found = [(name, p.times, gap) for name in curves for p, _, gap in study.points(name) if gap and times in (None, p.times)]
    return max(found, key=lambda each: each[2].mean)


def answer(studies: dict[str, Study]) -> str:
    """Return the first sentence: whether an assistant that teaches pays, and at which budgets."""
    paid = {name: sorted({t for arm in TEACHING for t in clear_budgets(study, arm)[0]}) for name, study in studies.items()}
    said = []
    for name, study in studies.items():
        arm, times, gap = best_gap(study, TEACHING, None if paid[name] else study.times[-1])
        where = f"it pays at {times_text(paid[name])}: there" if paid[name] else f"at {times:g}×"
        best = f"the best of the three ways, `{arm}`, differs from direct distillation by {gap_text(gap, METRIC)} percentage points"
        said.append(f"For the student {'far from' if name == 'far' else 'nearer to'} the teacher, {where} {best}")
    first = next(iter(studies.values()))
    every = "An assistant that teaches pays" if any(paid.values()) else "An assistant that teaches does not pay"
    head = f"{every} at {'some' if any(paid.values()) else 'any'} of the training budgets {times_text(first.times)}, at equal compute"
    seeds = min(study.seeds for study in studies.values())
    return f"**{head}. {'. '.join(said)} (95 % intervals, {seeds} training seeds).**"


# --- tables -------------------------------------------------------------------------------------------------------------


def means_table(study: Study, metric: str = METRIC) -> str:
    """Return one row per arm with its mean at each budget."""
    rows = []
    for name in (n for n in WHAT if n in study.curves):
        cells = {p.times: summary_text(summary, metric) for p, summary, _ in study.points(name, metric)}
        rows.append([f"`{name}`", WHAT[name], *(cells.get(t, DASH) for t in study.times)])
    return table(["arm", "what it is", *(f"{t:g}×" for t in study.times)], rows, left=("arm", "what it is"))


def gaps_table(study: Study, metric: str = METRIC) -> str:
    """Return one row per arm with its difference from the reference arm at each budget. Bold intervals exclude 0."""
    rows, minus = [], f"arm minus `{REFERENCE}`"
    for name in (n for n in WHAT if n in study.curves and n != REFERENCE):
        cells = {}
        for p, _, gap in study.points(name, metric):
            if gap:
                cells[p.times] = gap_text(gap, metric) if gap.covers_zero else f"**{gap_text(gap, metric)}**"
        rows.append([f"`{name}`", *(cells.get(t, DASH) for t in study.times)])
    return table([minus, *(f"{t:g}×" for t in study.times)], rows, left=(minus,))


def largest_table(study: Study) -> str:
    """Return, for each arm at the largest budget, its FLOPs, the updates of its distillations, and what else was measured."""
    metrics = {"fact_accuracy@greedy": "greedy", "loss": "loss", "reverse_kl": "KL(q‖T)", "forward_kl": "KL(T‖q)", "entropy": "entropy"}
    arms = {name: study.results.arm(study.curves[name].points[-1].arm) for name in WHAT if name in study.curves}
    rows = []
    for name, arm in {"teacher": study.results.arm("teacher"), "start": study.results.arm("start"), **arms}.items():
        cells = [summary_text(study.mean(arm.name, metric), metric) for metric in metrics]
        own = flops_text(_own_flops(study.results, arm)) if name in arms else DASH
        rows.append([f"`{name}`", updates_text(study.results, arm) or DASH, own, *cells])
    return table(["arm", "updates", "FLOPs", *metrics.values()], rows, left=("arm", "updates"))


def hops_table(study: Study) -> str:
    """Return the error budget of the chains: KL(q‖T), the part that the last stage minimises, and what the hops above add."""
    rows, added = [], "added by the hops above, from the student up"
    for name in (n for n in ("direct", "via-m", "via-l-m") if n in study.curves):
        for point in study.curves[name].points:
            terms = [study.mean(point.arm, at) for k in range(3) if (point.arm, MEAN, at := f"budget/{k}") in study.results.summaries]
            whole = study.mean(point.arm, "reverse_kl")
            texts = [summary_text(term, "reverse_kl") for term in terms or [whole]]
            rows.append([f"`{name}` at {point.times:g}×", summary_text(whole, "reverse_kl"), texts[0], ", ".join(texts[1:]) or "none"])
    return table(["arm", "KL(q‖T)", "to its last teacher, minimised", added], rows, left=("arm", added))


def beside_direct(studies: dict[str, Study], *arms: str) -> str:
    """Say at which budgets these arms are clearly better or worse than the reference arm."""
    sentences = []
    for name, study in studies.items():
        said = []
        for arm in arms:
            parts = [f"{word} at {times_text(t)}" for word, t in zip(("better", "worse"), clear_budgets(study, arm), strict=True) if t]
            said.append(f"`{arm}` is clearly {' and '.join(parts)}" if parts else f"`{arm}` is never clearly better or worse")
        sentences.append(f"For the {name} student, {', and '.join(said)} than `direct`.")
    return " ".join(sentences)


def greedy(studies: dict[str, Study]) -> str:
    """Say which comparisons with the reference arm are clear under greedy decoding but not with sampling, or the other way round."""
    words, differ = ("better", "worse"), []
    for name, study in studies.items():
        for arm in (n for n in WHAT if n in study.curves and n != REFERENCE):
            sampled, at_best = clear_budgets(study, arm), clear_budgets(study, arm, f"{METRIC}@greedy")
            for word, before, now in zip(words, sampled, at_best, strict=True):
                gone, new = [t for t in before if t not in now], [t for t in now if t not in before]
                differ += [f"`{arm}` of the {name} student is no longer clearly {word} at {times_text(gone)}"] if gone else []
                differ += [f"`{arm}` of the {name} student is clearly {word} at {times_text(new)} too"] if new else []
    return f"The same comparisons with `direct` are clear under greedy decoding{', except that ' if differ else ''}{'; '.join(differ)}."


def free(study: Study) -> str:
    """Compare the chain of one assistant at the largest budget with the reference arm whose student has the nearest number of updates."""
    chain = study.curves["via-m"].points[-1].arm
    updates = study.student_updates(chain)
    other = min((p.arm for p in study.curves[REFERENCE].points), key=lambda arm: abs(log(study.student_updates(arm) / updates)))
    gap = gap_text(_difference(study, chain, other, METRIC), METRIC)
    return (
        f"The {study.name} student of `{chain}` has {updates:,} updates of its own, that of `{other}` has "
        f"{study.student_updates(other):,}; the difference is {gap} points."
    )


def against(study: Study, curve: str, other: str) -> str:
    """Return the paired differences of two arms at each budget."""
    pairs = {p.times: p.arm for p in study.curves[other].points}
    found = [(p.times, _difference(study, p.arm, pairs[p.times], METRIC)) for p in study.curves[curve].points if p.times in pairs]
    return ", ".join(f"{gap_text(gap, METRIC)} at {times:g}×" for times, gap in found)


def control(studies: dict[str, Study]) -> str:
    """Return the largest mean of the control without a teacher, and the mean of the start, for each student."""
    found = []
    for name, study in studies.items():
        best = max((p for p, *_ in study.points("no-teacher")), key=lambda p: p.summary.mean)
        start = summary_text(study.mean("start"), METRIC)
        found.append(f"{summary_text(best.summary, METRIC)} at {best.times:g}× for the {name} student, which starts with {start}")
    return "; ".join(found)


def unfinished(studies: dict[str, Study]) -> str:
    """Return a sentence on the arms that have not all training seeds. Empty if the studies are finished."""
    parts = []
    for name, study in studies.items():
        if left := [f"`{arm.name}`" for arm in study.results.plan.arms if study.seeds_of(arm.name) < len(arm.evaluate)]:
            parts.append(f"{', '.join(left)} ({name})")
    return f"**Not finished**: {'; '.join(parts)}. `tadistill run` continues." if parts else ""


def deviation(studies: dict[str, Study]) -> str:
    """Return by how much the planned FLOPs of an arm differ from its budget, at most, at the smallest budget and at the others."""
    found: dict[bool, float] = {}
    for study in studies.values():
        unit = _own_flops(study.results, study.results.arm(REFERENCE))
        for curve in study.curves.values():
            for p in curve.points:
                off = abs(_own_flops(study.results, study.results.arm(p.arm)) / (p.times * unit) - 1)
                found[p.times > 1] = max(off, found.get(p.times > 1, 0.0))
    return f"{100 * found[False]:.0f} % at 1× and {100 * found[True]:.0f} % at larger budgets"


def _own_flops(results: Results, arm: ArmRecord) -> float:
    stages = results.plan.ancestors(arm.final[min(arm.final)])
    return sum(s.flops or 0.0 for s in stages if s.model != results.plan.teacher)


# --- pictures -----------------------------------------------------------------------------------------------------------


def draw(studies: dict[str, Study], metric: str, title: str, target: Path) -> None:
    """Draw the curves of both students side by side, and below them the differences from the reference arm."""
    figure, axes = plt.subplots(2, len(studies), figsize=(11, 7.6), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
    for column, (name, study) in enumerate(studies.items()):
        above, below = axes[0][column], axes[1][column]
        size = study.results.plan.parameters[study.results.arm(REFERENCE).model]
        above.set_title(f"the {name} student ({parameters_text(size)} parameters)")
        for reference, style in (("teacher", "-."), ("start", ":")):
            level = study.mean(reference, metric).mean
            above.axhline(level, color="0.6", linestyle=style, linewidth=1)
            above.annotate(reference, (study.times[-1], level), fontsize=8, color="0.4", va="bottom", ha="right")
        for i, arm in enumerate(n for n in LOOKS if n in study.curves):
            colour, marker, line = LOOKS[arm]
            drawn = [*study.points(arm, metric)]
            shift = 1.02 ** (i - len(LOOKS) / 2)
            xs = [p.times * shift for p, *_ in drawn]
            above.plot(xs, [s.mean for _, s, _ in drawn], color=colour, marker=marker, linestyle=line, label=arm, markersize=5)
            above.fill_between(xs, [s.low for _, s, _ in drawn], [s.high for _, s, _ in drawn], color=colour, alpha=0.10, linewidth=0)
            gaps = [(x, gap) for x, (_, _, gap) in zip(xs, drawn, strict=True) if gap]
            if gaps:
                errors = [[g.mean - g.low for _, g in gaps], [g.high - g.mean for _, g in gaps]]
                x = [x for x, _ in gaps]
                below.errorbar(x, [g.mean for _, g in gaps], errors, color=colour, marker=marker, linestyle=line, markersize=4, linewidth=1)
        below.axhline(0, color="black", linewidth=1)
        below.set_xscale("log", base=2)
        below.set_xticks(study.times, [f"{t:g}×" for t in study.times])
        below.set_xlabel("training compute, as a multiple of direct's")
        for axis in (above, below):
            axis.grid(alpha=0.25)
    axes[0][0].set_ylabel(title)
    axes[1][0].set_ylabel("difference from direct")
    axes[0][-1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "curves", "svg.fonttype": "none"}):
        figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Write the page, its pictures and the packed results."""
    studies = {name: Study.read(name) for name in STUDIES}
    draw(studies, METRIC, "fact accuracy, %", HERE / "pictures" / "curves.svg")
    draw(studies, f"{METRIC}@greedy", "fact accuracy, greedy decoding, %", HERE / "pictures" / "curves-greedy.svg")
    kept = HERE / "results" / "curves"
    kept.mkdir(exist_ok=True)
    for name, study in STUDIES.items():
        content = json.loads((RUNS / study / "results.json").read_text(encoding="utf-8"))
        text = json.dumps({key: value for key, value in content.items() if key not in LARGE}, ensure_ascii=False)
        (kept / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    write_page(
        "curves",
        studies=studies,
        answer=answer(studies),
        unfinished=unfinished(studies),
        deviation=deviation(studies),
        beside_direct=lambda *arms: beside_direct(studies, *arms),
        greedy=greedy(studies),
        against=lambda name, curve, other: against(studies[name], curve, other),
        control=control(studies),
        last=f"{max(study.times[-1] for study in studies.values()):g}",
        steps=lambda name, curve: f"{studies[name].student_updates(studies[name].curves[curve].points[-1].arm):,}",
        free=" ".join(free(study) for study in studies.values()),
        seeds=min(study.seeds for study in studies.values()),
        means=lambda name: means_table(studies[name]),
        gaps=lambda name, metric=METRIC: gaps_table(studies[name], metric),
        largest=lambda name: largest_table(studies[name]),
        hops=lambda name: hops_table(studies[name]),
        sentences=lambda name: curve_sentences(studies[name].results),
        mean=lambda name, arm, metric=METRIC: summary_text(studies[name].mean(arm, metric), metric),
        gap=lambda name, arm, other, metric=METRIC: gap_text(_difference(studies[name], arm, other, metric), metric),
        parameters=lambda name, model: parameters_text(studies[name].results.plan.parameters[model]),
    )


def _difference(study: Study, arm: str, other: str, metric: str) -> Difference:
    found = difference(study.results, arm, other, metric)
    assert found is not None, f"{arm} and {other} have no common finished seed"
    return found


if __name__ == "__main__":
    main()
