"""Writes docs/results/bridge.md from its template and the finished study of recipes/bridge/tinyworld-bridge.yaml.

    tadistill run recipes/bridge/tinyworld-bridge.yaml
    python docs/tabulate_bridge.py [RUNS]

Learning rates on another world are not part of this study; the template has their table.
"""

from functools import partial

from results_page import cell, gap, read_study, table, write_page

METRIC = "fact_accuracy"
ARMS = {
    "teacher": ("`t`", "", ""),
    "start": ("`s`", "the student before distillation", ""),
    "direct": ("`t ~> s`", "scores of the student's text, over spans", "s 320"),
    "seqkd": ("`t ~> s`", "text", "s 697"),
    "bridge-spans": ("`t ~> a > s`", "scores of the assistant's text, over spans", "a 160, s 128"),
    "bridge-text": ("`t ~> b > s`", "text; the last step is on-policy reverse KL", "b 222, s 224"),
    "text-chain": ("`t ~> b > s`", "text, in both steps", "b 239, s 239"),
    "sft": ("`s`", "no teacher: the reference answers", "s 801"),
}
"""Arm -> its path, what passes the step between the tokenizers, and its updates, which the plan shows."""
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
    arms = [[f"`{arm}`", *words, cell(results, arm, METRIC), cell(results, arm, "bits_per_byte")] for arm, words in ARMS.items()]
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
