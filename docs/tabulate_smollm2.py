"""Writes docs/results/smollm2.md and its picture from the finished study of recipes/takd/smollm2-cpu.yaml and results/smollm2.md.j2.

tadistill run recipes/takd/smollm2-cpu.yaml
python docs/tabulate_smollm2.py [RUNS]
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from results_page import HERE, cell, gap, read_study, steps_of, table, write_page

from tadistill.metrics import MEAN
from tadistill.results.collect import Results
from tadistill.results.compare import difference
from tadistill.results.curves import learning_curves
from tadistill.results.number_text import DASH, flops_text, gap_text, number, parameters_text, ratio_text, rows_text
from tadistill.results.sample_answers import samples
from tadistill.results.study import ArmRecord

STUDY = "smollm2-cpu"
LOSS, ROUGE = "loss", "rouge_l"
METRICS = {
    ROUGE: "ROUGE-L",
    f"{ROUGE}@greedy": "ROUGE-L, greedy",
    LOSS: "loss",
    "reverse_kl": "KL(q‖T)",
    "forward_kl": "KL(T‖q)",
    "entropy": "entropy",
}
WHAT = {
    "teacher": "SmolLM2-135M-Instruct as published",
    "sft": "the student after SFT, the start of `direct` and `takd`",
    "ta": "the assistant, taught by the teacher",
    "direct": "the teacher teaches the student",
    "takd": "the assistant teaches the student",
    "direct-equal-compute": "`direct` with more updates: the compute of `takd`",
    "cascade": "the student is pruned from the assistant; the teacher teaches it",
}
PAIRS = (
    ("direct", "sft"),
    ("takd", "direct"),
    ("takd", "direct-equal-compute"),
    ("cascade", "direct-equal-compute"),
    ("direct-equal-compute", "direct"),
)
COLOURS = {"ta": "0.55", "direct": "black", "takd": "#0072B2", "direct-equal-compute": "#E69F00", "cascade": "#D55E00"}


def paid(results: Results, arm: ArmRecord) -> str:
    """Return the training FLOPs behind an arm's model and, where they are known, its multiple of those of `direct`."""
    direct = results.arm("direct").flops
    return f"{flops_text(arm.flops)} ({ratio_text(arm.flops / direct)})" if arm.flops and direct else DASH


def answer(results: Results) -> str:
    """Return the first sentence: the difference of both uses of an assistant from direct distillation with the same compute."""
    texts = []
    for arm, use in (("takd", "when the assistant teaches the student"), ("cascade", "when the student is pruned from the assistant")):
        d = difference(results, arm, "direct-equal-compute", LOSS)
        assert d is not None, f"{arm} and its baseline have no seed in common"
        word = "does not clearly differ" if d.covers_zero else "is lower" if d.mean < 0 else "is higher"
        texts.append(f"{word} {use} ({gap_text(d, LOSS)} nats per token)")
    return (
        f"As far as one training seed can tell, far from convergence: compared with direct distillation of equal compute, the loss on the "
        f"references {' and '.join(texts)}."
    )


def arms_table(results: Results) -> str:
    """Return one row per arm with its means over the test sets and its training FLOPs."""
    rows = [
        [f"`{arm.name}`", WHAT[arm.name], *(cell(results, arm.name, metric) for metric in METRICS), paid(results, arm)]
        for arm in results.plan.arms
    ]
    return table(["arm", "what it is", *METRICS.values(), "FLOPs"], rows, left=("arm", "what it is"))


def sets_table(results: Results) -> str:
    """Return one row per arm with ROUGE-L and the loss on each test set."""
    columns = [(metric, name) for metric in (ROUGE, LOSS) for name in results.sets]
    rows = [[f"`{arm.name}`", *(cell(results, arm.name, metric, name) for metric, name in columns)] for arm in results.plan.arms]
    return table(["arm", *(f"{METRICS[metric]}, {name}" for metric, name in columns)], rows, left=("arm",))


def pairs_table(results: Results) -> str:
    """Return one row per pair of arms with their paired differences. Bold intervals exclude 0."""
    rows = [[f"`{one}`", f"`{other}`", *(gap(results, one, other, metric, bold=True) for metric in METRICS)] for one, other in PAIRS]
    return table(["arm", "minus", *METRICS.values()], rows, left=("arm", "minus"))


def stages_table(results: Results) -> str:
    """Return one row per training with its updates, dev loss before its end, FLOPs and seconds."""
    steps, rows = steps_of(results), []
    for stage in results.plan.stages:
        manifest = results.manifests.get(stage.key)
        if manifest is None or stage.kind not in ("sft", "distill"):
            continue
        curve = next((c for c in learning_curves(results) if c.metric == "dev/loss" and stage.key in _keys(results, c.arm, c.name)), None)
        first, last = (number(curve.mean[1][i], LOSS) for i in (0, -1)) if curve else (DASH, DASH)
        rows.append([stage.label, f"{steps[stage.key]:,}", first, last, flops_text(stage.flops), f"{manifest.seconds:,.0f}"])
    return table(["training", "updates", "dev loss, first", "dev loss, last", "FLOPs", "seconds"], rows, left=("training",))


def _keys(results: Results, arm: str | None, name: str) -> set[str | None]:
    """Return the keys of the trainings that a learning curve shows."""
    if arm is not None:
        return set(results.arm(arm).final.values())
    return {stage.key for stage in results.plan.stages if stage.label.startswith(name)}


def side_by_side(results: Results, count: int = 1) -> str:
    """Return the answers of all arms to the first prompts of each test set. Prompts and references are not ours to publish."""
    lines = []
    for name, prompts in samples(results).items():
        for row in prompts[:count]:
            lines += [f"| arm | answer to row {row['index']} of {name} |", "|---|---|"]
            lines += [f"| `{arm}` | {_inline(found['text'])} |" for arm, found in row["answers"].items()] + [""]
    return "\n".join(lines).rstrip()


def _inline(text: str, longest: int = 110) -> str:
    """Return a text as one line of a Markdown table, cut with an ellipsis."""
    flat = " ".join(text.split())
    cut = flat if len(flat) <= longest else flat[: longest - 1] + "…"
    for sign in "\\`*_<>|[]":
        cut = cut.replace(sign, f"\\{sign}")
    return cut or "(empty)"


def draw(results: Results, target: Path) -> None:
    """Draw the dev loss of each distillation over its updates, and the arms' test loss and ROUGE-L with intervals."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.2), width_ratios=(5, 3, 3))
    for curve in learning_curves(results):
        if curve.metric == "dev/loss" and curve.arm in COLOURS:
            left.plot(*curve.mean, color=COLOURS[curve.arm], marker="o", markersize=3, label=curve.arm)
    left.set_xlabel("updates of the last training")
    left.set_ylabel("loss on dev, nats per token")
    left.legend(frameon=False, fontsize=9)
    arms = [arm.name for arm in results.plan.arms if (arm.name, MEAN, LOSS) in results.summaries]
    for axis, metric, title in ((middle, LOSS, "loss on the test sets"), (right, ROUGE, "ROUGE-L, sampled, %")):
        for place, arm in enumerate(reversed(arms)):
            found = results.summaries[arm, MEAN, metric]
            error = [[found.mean - found.low], [found.high - found.mean]]
            axis.errorbar([found.mean], [place], xerr=error, fmt="o", color=COLOURS.get(arm, "0.3"), markersize=5, capsize=3)
        axis.set_yticks(range(len(arms)), list(reversed(arms)) if axis is middle else [""] * len(arms))
        axis.set_xlabel(title)
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "smollm2", "svg.fonttype": "none"}):
        figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Write the page and its picture."""
    results = read_study(STUDY, ("takd", "cascade", "direct", "direct-equal-compute"))
    draw(results, HERE / "pictures" / "smollm2.svg")
    write_page(
        "smollm2",
        answer=answer(results),
        arms=arms_table(results),
        sets=sets_table(results),
        pairs=pairs_table(results),
        stages=stages_table(results),
        samples=side_by_side(results),
        cell=lambda arm, metric=LOSS: cell(results, arm, metric),
        minus=lambda one, other, metric=LOSS: gap(results, one, other, metric),
        parameters=lambda model: parameters_text(results.plan.parameters[model]),
        used=rows_text(results.used),
    )


if __name__ == "__main__":
    main()
