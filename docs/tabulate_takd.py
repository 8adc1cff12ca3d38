"""Writes docs/results/takd.md and its pictures from the finished study of recipes/takd/tinyworld-all-paths.yaml and results/takd.md.j2.

    tadistill run recipes/takd/tinyworld-all-paths.yaml
    python docs/tabulate_takd.py [RUNS]

The pictures are the report's own figures, taken in Chromium through playwright. Only the plane is drawn here, for a few arms.
"""

import sys
from pathlib import Path

import jinja2
import matplotlib.pyplot as plt
from playwright.sync_api import sync_playwright

from tadistill.metrics import metric_unit
from tadistill.results.collect import MEAN, Results, primary_metric, read_results
from tadistill.results.compare import compare
from tadistill.results.number_text import flops_text, gap_text, number, ratio_text, summary_text
from tadistill.results.verdict import Comparison, comparisons
from tadistill.store import store_of

STUDY = "tinyworld-all-paths"
HERE = Path(__file__).parent
DIRECT = "direct"
CHAINS = ("via-l", "via-m", "via-l-m")
PICTURES = {
    "differences": "Paired differences, each arm minus its equal-compute baseline or `direct`; dots are seeds",
    "paths": "The path lattice: which model was distilled from which",
    "plane": "The entropy plane: arms as curves over decoding temperatures, greedy at the left",
    "budget-2": "The error budget of `via-l-m`: KL(student ‖ teacher), hop by hop; the dashed line is its equal-compute baseline",
}
PLANE = ("sft", "direct", "via-m", "via-l-m", "direct-as-via-l-m", "init-m")
WHAT = {
    "teacher": "the teacher",
    "sft": "SFT, the start of all students",
    "ta-l": "the bigger TA",
    "ta-m": "the smaller TA",
    "direct": "no TA",
    "via-l": "chain",
    "via-m": "chain",
    "via-l-m": "chain of two TAs",
    "direct-as-via-l": "no TA, the compute of `via-l`",
    "direct-as-via-m": "no TA, the compute of `via-m`",
    "direct-as-via-l-m": "no TA, the compute of `via-l-m`",
    "sft-only-ta": "TA not distilled",
    "same-size-ta": "TA as big as the teacher",
    "tempered": "teacher as sharp as `ta-m`",
    "early": "teacher at a third of its training",
    "taid": "TAID in place of a TA",
    "dense": "teacher and TA at once",
    "curriculum": "TA, then teacher",
    "init-m": "initialised from the TA, pruned; teacher teaches",
    "init-m-via-m": "initialised from the TA, pruned; TA teaches",
    "direct-as-init-m": "no TA, the compute of `init-m`",
    "init-xl": "initialised from the teacher, pruned; no TA",
    "init-xl-as-init-m": "the same with the compute of `init-m`",
}


def answer(results: Results) -> str:
    """Return the first sentence: the best chain against its equal-compute baseline."""
    found = [_comparison(results, name) for name in CHAINS]
    best = max(found, key=lambda c: c.difference.mean)
    said = {"gain": "a teacher assistant (TA) that teaches helped", "loss": "a teacher assistant (TA) that teaches hurt"}
    word = said.get(best.word, "no teacher assistant (TA) that teaches helped")
    return (
        f"**At equal compute {word} on tinyworld: the best of the three chains, `{best.arm}`, differs from direct distillation with the "
        f"same compute by {gap_text(best.difference, best.metric)} {metric_unit(best.metric)} (95 % interval, "
        f"{len(best.seeds)} training seeds).**"
    )


def _comparison(results: Results, arm: str) -> Comparison:
    return next(c for c in comparisons(results) if c.arm == arm)


def arms_table(results: Results) -> list[str]:
    """Return one row per arm: its scores, its distance from the teacher, and its cost."""
    metrics = {"fact_accuracy": "fact accuracy", "rouge_l": "Rouge-L", "fact_accuracy@greedy": "greedy", "loss": "loss"}
    metrics |= {"reverse_kl": "KL(q‖T)", "forward_kl": "KL(T‖q)", "entropy": "entropy"}
    direct = results.plan.arms[[a.name for a in results.plan.arms].index(DIRECT)].flops
    lines = [
        "| arm | path | what it is | " + " | ".join(metrics.values()) + " | FLOPs | × direct |",
        "|---|---|---|" + "---:|" * (len(metrics) + 2),
    ]
    for arm in results.plan.arms:
        cells = [summary_text(results.summaries[arm.name, MEAN, metric], metric) for metric in metrics]
        ratio = ratio_text(arm.flops / direct) if arm.flops and direct else "–"
        lines.append(f"| `{arm.name}` | {arm.path_text} | {WHAT[arm.name]} | {' | '.join(cells)} | {flops_text(arm.flops)} | {ratio} |")
    return lines


def chains_table(results: Results) -> list[str]:
    """Compare every arm that has an assistant with its equal-compute baseline (or direct), and with direct as if the TA were free."""
    metric = primary_metric(results)
    lines = [
        "| arm | against | fact accuracy | Holm p | verdict | greedy | Rouge-L | KL(q‖T) | against `direct`, as if the TA were free |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for c in comparisons(results):
        others = [_difference(results, c.arm, c.other, m) for m in ("fact_accuracy@greedy", "rouge_l", "reverse_kl")]
        free = _difference(results, c.arm, DIRECT, metric)
        word = {"gain": "gain", "loss": "loss"}.get(c.word, c.word)
        against = f"`{c.other}`" + ("" if c.against == "equal compute" else " (less compute)")
        cells = [f"`{c.arm}`", against, gap_text(c.difference, metric), f"{c.p_holm:.3f}", word, *others, free]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def controls_table(results: Results) -> list[str]:
    """Compare the controls that have the compute of direct with direct."""
    names = ("sft-only-ta", "tempered", "early", "taid")
    metrics = ("fact_accuracy", "fact_accuracy@greedy", "rouge_l", "reverse_kl", "entropy")
    lines = ["| control | fact accuracy | greedy | Rouge-L | KL(q‖T) | entropy |", "|---|" + "---:|" * 5]
    return lines + [f"| `{n}` | " + " | ".join(_difference(results, n, DIRECT, m) for m in metrics) + " |" for n in names]


def _teachers_training(results: Results) -> float:
    """Return the FLOPs of the original teacher's own training."""
    arm = next(a for a in results.plan.arms if a.name == DIRECT)
    return sum(s.flops or 0.0 for s in results.plan.ancestors(arm.final[min(arm.final)]) if s.model == results.plan.teacher)


def _difference(results: Results, arm: str, other: str, metric: str) -> str:
    found = compare(results, arm, other, metric)
    if found is None or arm == other:
        return "–"
    return gap_text(found[0], metric)


def budget_table(results: Results) -> list[str]:
    """Return the terms of each chain's error budget."""
    lines = ["| chain | KL(q‖T) | to its last teacher, minimised | added by the hops above, from the student up |", "|---|---:|---:|---|"]
    for arm in ("direct", *CHAINS, "sft-only-ta", "same-size-ta"):
        terms = [results.summaries[arm, MEAN, name] for k in range(9) if (arm, MEAN, name := f"budget/{k}") in results.summaries]
        whole = results.summaries[arm, MEAN, "reverse_kl"]
        texts = [summary_text(t, "reverse_kl") for t in terms] or [summary_text(whole, "reverse_kl")]
        lines.append(f"| `{arm}` | {summary_text(whole, 'reverse_kl')} | {texts[0]} | {', '.join(texts[1:]) or 'none'} |")
    return lines


def take_pictures(report: Path) -> None:
    """Save the report's figures as PNG files."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900}, device_scale_factor=1.5)
        page.goto(report.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page.wait_for_timeout(2000)
        for name in (n for n in PICTURES if n != "plane"):
            found = page.locator(f"[id^=figure-{name}]").first
            found.scroll_into_view_if_needed()
            page.wait_for_timeout(500)
            found.screenshot(path=HERE / "pictures" / f"takd-{name}.png")
        browser.close()


def draw_plane(results: Results) -> None:
    """Draw Rouge-L and fact accuracy over entropy, for a few arms."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for axis, metric in zip(axes, ("rouge_l", "fact_accuracy"), strict=True):
        for arm, marker in zip(PLANE, "os^vDP", strict=True):
            points = [(f"entropy{at}", f"{metric}{at}") for at in ("@greedy", "@t0.5", "")]
            x, y = ([results.summaries[arm, MEAN, pair[k]].mean for pair in points] for k in (0, 1))
            axis.plot(x, y, marker=marker, label=arm)
        axis.set_xlabel("entropy of the decoding (nats a token)")
        axis.set_title({"rouge_l": "Rouge-L", "fact_accuracy": "fact accuracy"}[metric])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(HERE / "pictures" / "takd-plane.png", dpi=110)


def main() -> None:
    """Write the page and its pictures."""
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs").resolve()
    results = read_results(runs / STUDY, store_of(runs))
    take_pictures(runs / STUDY / "report.html")
    draw_plane(results)
    template = (HERE / "results" / "takd.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    tables = {
        "arms": "\n".join(arms_table(results)),
        "chains": "\n".join(chains_table(results)),
        "controls": "\n".join(controls_table(results)),
        "budget": "\n".join(budget_table(results)),
        "flops": flops_text(_teachers_training(results)),
    }
    page = environment.from_string(template).render(
        answer=answer(results),
        **tables,
        picture=lambda name: f"![{PICTURES[name]}](../pictures/takd-{name}.png)\n\n*{PICTURES[name]}.*",
        mean=lambda arm, metric: number(results.summaries[arm, MEAN, metric].mean, metric),
        difference=lambda arm, other, metric: _difference(results, arm, other, metric),
    )
    (HERE / "results" / "takd.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
