"""Writes docs/results/bridge.md from its template and the finished study of recipes/bridge/tinyworld-bridge.yaml.

    tadistill run recipes/bridge/tinyworld-bridge.yaml
    python docs/tabulate_bridge.py [RUNS]

Learning rates on another world are not part of this study; the template has their table.
"""

from functools import partial

from results_page import cell, gap, read_study, table, updates_text, write_page

METRIC = "fact_accuracy"
ARMS = {
    "teacher": ("`t`", ""),
    "start": ("`s`", "the student before distillation"),
    "direct": ("`t ~> s`", "scores of the student's text, over spans"),
    "seqkd": ("`t ~> s`", "text"),
    "bridge-spans": ("`t ~> a > s`", "scores of the assistant's text, over spans"),
    "bridge-text": ("`t ~> b > s`", "text; the last step is on-policy reverse KL"),
    "text-chain": ("`t ~> b > s`", "text, in both steps"),
    "sft": ("`s`", "no teacher: the reference answers"),
}
"""Arm -> its path, and what passes the step between the tokenizers."""
COMPARED = [
    *(("bridge-spans", "seqkd"), ("bridge-text", "seqkd"), ("text-chain", "seqkd"), ("bridge-text", "text-chain")),
    *(("bridge-text", "direct"), ("bridge-spans", "direct"), ("direct", "start"), ("seqkd", "direct"), ("seqkd", "sft")),
]
DISTANCES = {
    "teacher_text": "the teacher's answers, for the student",
    "forward_bits": "minus those for the teacher",
    "own_text": "the student's answers, for the teacher",
    "reverse_bits": "minus those for the student",
}


def main() -> None:
    """Write the page."""
    results = read_study("tinyworld-bridge")
    columns = ["arm", "path", "what passes the step between tokenizers", "updates"]
    updates = {arm: updates_text(results, results.arm(arm)) for arm in ARMS}
    scores = {arm: [cell(results, arm, metric) for metric in (METRIC, "bits_per_byte")] for arm in ARMS}
    arms = [[f"`{arm}`", *words, updates[arm], *scores[arm]] for arm, words in ARMS.items()]
    gaps = [[f"`{arm}` − `{other}`", gap(results, arm, other, METRIC, bold=True)] for arm, other in COMPARED]
    distances = [[f"`{arm}`", *(cell(results, arm, metric) for metric in DISTANCES)] for arm in ARMS if arm != "teacher"]
    write_page(
        "bridge",
        arms=table([*columns, "fact accuracy", "bits per byte of the references"], arms, left=columns),
        differences=table(["compared", "difference (points)"], gaps, left=["compared"]),
        distances=table(["arm", *DISTANCES.values()], distances, left=["arm"]),
        facts=partial(cell, results, metric=METRIC),
        gap=partial(gap, results, metric=METRIC),
    )


if __name__ == "__main__":
    main()
