"""Writes docs/results/takd.md and its pictures from the finished study of recipes/takd/tinyworld-all-paths.yaml and results/takd.md.j2.

    tadistill run recipes/takd/tinyworld-all-paths.yaml
    python docs/tabulate_takd.py [RUNS]

The pictures are the report's own figures, taken in Chromium through playwright. Only the plane is drawn here, for a few arms.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from playwright.sync_api import sync_playwright
from results_page import HERE, RUNS, cell, gap, read_study, table, write_page

from tadistill.metrics import MEAN, metric_unit
from tadistill.results.collect import Results, primary_metric
from tadistill.results.number_text import flops_text, gap_text, number, ratio_text, summary_text
from tadistill.results.verdict import SHOWN, Comparison, comparisons

STUDY = "tinyworld-all-paths"
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


def arms_table(results: Results) -> str:
    """Return one row per arm: its scores, its distance from the teacher, and its cost."""
    metrics = {"fact_accuracy": "fact accuracy", "rouge_l": "ROUGE-L", "fact_accuracy@greedy": "greedy", "loss": "loss"}
    metrics |= {"reverse_kl": "KL(q‖T)", "forward_kl": "KL(T‖q)", "entropy": "entropy"}
    direct = results.arm(DIRECT).flops
    rows = []
    for arm in results.plan.arms:
        cells = [cell(results, arm.name, metric) for metric in metrics]
        ratio = ratio_text(arm.flops / direct if arm.flops and direct else None)
        rows.append([f"`{arm.name}`", arm.path_text, WHAT[arm.name], *cells, flops_text(arm.flops), ratio])
    words = ["arm", "path", "what it is"]
    return table([*words, *metrics.values(), "FLOPs", "× direct"], rows, left=words)


def chains_table(results: Results) -> str:
    """Compare every arm that has an assistant with its equal-compute baseline (or direct), and with direct as if the TA were free."""
    metric = primary_metric(results)
    rows = []
    for c in comparisons(results):
        others = [gap(results, c.arm, c.other, m) for m in ("fact_accuracy@greedy", "rouge_l", "reverse_kl")]
        against = f"`{c.other}`" + ("" if c.against == "equal compute" else " (less compute)")
        numbers = [gap_text(c.difference, metric), f"{c.p_holm:.3f}", SHOWN[c.word]]
        rows.append([f"`{c.arm}`", against, *numbers, *others, gap(results, c.arm, DIRECT, metric)])
    columns = ["arm", "against", "fact accuracy", "Holm p", "verdict", "greedy", "ROUGE-L", "KL(q‖T)"]
    return table([*columns, f"against `{DIRECT}`, as if the TA were free"], rows, left=("arm", "against", "verdict"))


def controls_table(results: Results) -> str:
    """Compare the controls that have the compute of direct with direct."""
    metrics = {"fact_accuracy": "fact accuracy", "fact_accuracy@greedy": "greedy", "rouge_l": "ROUGE-L", "reverse_kl": "KL(q‖T)"}
    metrics |= {"entropy": "entropy"}
    names = ("sft-only-ta", "tempered", "early", "taid")
    return table(
        ["control", *metrics.values()], [[f"`{n}`", *(gap(results, n, DIRECT, m) for m in metrics)] for n in names], left=("control",)
    )


def _teachers_training(results: Results) -> float:
    """Return the FLOPs of the original teacher's own training."""
    arm = results.arm(DIRECT)
    return sum(s.flops or 0.0 for s in results.plan.ancestors(arm.final[min(arm.final)]) if s.model == results.plan.teacher)


def budget_table(results: Results) -> str:
    """Return the terms of each chain's error budget."""
    rows = []
    for arm in ("direct", *CHAINS, "sft-only-ta", "same-size-ta"):
        terms = [results.summaries[arm, MEAN, name] for k in range(9) if (arm, MEAN, name := f"budget/{k}") in results.summaries]
        whole = results.summaries[arm, MEAN, "reverse_kl"]
        texts = [summary_text(t, "reverse_kl") for t in terms or [whole]]
        rows.append([f"`{arm}`", summary_text(whole, "reverse_kl"), texts[0], ", ".join(texts[1:]) or "none"])
    added = "added by the hops above, from the student up"
    return table(["chain", "KL(q‖T)", "to its last teacher, minimised", added], rows, left=("chain", added))


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
    """Draw ROUGE-L and fact accuracy over entropy, for a few arms."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for axis, metric in zip(axes, ("rouge_l", "fact_accuracy"), strict=True):
        for arm, marker in zip(PLANE, "os^vDP", strict=True):
            points = [(f"entropy{at}", f"{metric}{at}") for at in ("@greedy", "@t0.5", "")]
            x, y = ([results.summaries[arm, MEAN, pair[k]].mean for pair in points] for k in (0, 1))
            axis.plot(x, y, marker=marker, label=arm)
        axis.set_xlabel("entropy of the decoding (nats a token)")
        axis.set_title({"rouge_l": "ROUGE-L", "fact_accuracy": "fact accuracy"}[metric])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(HERE / "pictures" / "takd-plane.png", dpi=110)


def main() -> None:
    """Write the page and its pictures."""
    results = read_study(STUDY)
    take_pictures(RUNS / STUDY / "report.html")
    draw_plane(results)
    write_page(
        "takd",
        answer=answer(results),
        arms=arms_table(results),
        chains=chains_table(results),
        controls=controls_table(results),
        budget=budget_table(results),
        flops=flops_text(_teachers_training(results)),
        picture=lambda name: f"![{PICTURES[name]}](../pictures/takd-{name}.png)\n\n*{PICTURES[name]}.*",
        mean=lambda arm, metric: number(results.summaries[arm, MEAN, metric].mean, metric),
        difference=lambda arm, other, metric: gap(results, arm, other, metric),
    )


if __name__ == "__main__":
    main()
