"""Draws docs/pictures/quickstart.svg, the README's picture: who teaches whom in the example, and the fact accuracy of each student.

Run `make quickstart`, then `python docs/draw_quickstart.py [RUNS]`. A circle is a model.
"""

from collections.abc import Iterator
from html import escape

from results_page import HERE, read_study

from tadistill.metrics import MEAN
from tadistill.results.collect import Results

TARGET = HERE / "pictures" / "quickstart.svg"
TITLE = "Does distillation work? The example, on two CPU cores in five minutes"
METRIC = "fact_accuracy"
ROWS = {
    "teacher": "the teacher",
    "sft": "student, fine-tuned (SFT)",
    "sft-longer": "fine-tuned for longer",
    "kd": "taught by KD",
    "seqkd": "taught by SeqKD",
    "minillm": "taught by MiniLLM",
    "abkd": "taught by ABKD",
    "assistant-teaches": "an assistant teaches, ABKD",
    "abkd-equal-compute": "ABKD, with more updates",
    "assistant-starts": "cut out of an assistant, ABKD",
}
KINDS = {"xl": ("teacher", 14.0), "l": ("assistant", 11.0), "s": ("student", 9.0)}
"""Model -> its colour and the radius of its circle."""
WIDTH, TOP, ROW = 860, 74, 32
HEIGHT = TOP + len(ROWS) * ROW + 40
LEFT, RIGHT = 440, 840
STYLE = """
text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 16px } .small { font-size: 12px; fill: #59636e }
.in { font-size: 12px; fill: #fff; text-anchor: middle }
.grid { stroke: #d1d9e0 } .arrow { stroke: #59636e; stroke-width: 1.5; fill: none } .head { fill: #59636e }
.span { stroke-width: 3; stroke-linecap: round } .teacher { fill: #57606a; stroke: #57606a } .student { fill: #0969da; stroke: #0969da }
.assistant { fill: #8250df; stroke: #8250df } .value { text-anchor: start }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .in { fill: #fff }
  .grid { stroke: #3d444d } .arrow { stroke: #9198a1 } .head { fill: #9198a1 }
  .teacher { fill: #768390; stroke: #768390 } .student { fill: #4493f8; stroke: #4493f8 } .assistant { fill: #ab7df8; stroke: #ab7df8 }
}
"""


def picture(results: Results) -> str:
    """Return the picture as SVG."""
    teacher, start = (results.summaries[name, MEAN, METRIC].mean for name in ("teacher", "sft"))
    taught = [results.summaries[name, MEAN, METRIC].mean for name in list(ROWS)[3:]]
    sentence = (
        f"After fine-tuning the student states {start:.0f} % of the facts right, after distillation {min(taught):.0f} to "
        f"{max(taught):.0f} %; the teacher states {teacher:.0f} %"
    )
    body = [
        f'<text class="title" x="16" y="26">{TITLE}</text>',
        f'<text class="small" x="16" y="48">{escape(sentence, quote=False)}</text>',
        *axis(),
        *(part for number, arm in enumerate(ROWS) for part in row(results, arm, TOP + 20 + number * ROW)),
        f'<text class="small" x="16" y="{HEIGHT - 8}">circles: models · lines: 95 % intervals, three training seeds</text>',
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
    return "\n".join([head, f"<title>{escape(sentence, quote=False)}</title>", f"<style>{STYLE}</style>", *body, "</svg>", ""])


def axis() -> Iterator[str]:
    """Yield the vertical lines and numbers of the scale."""
    for value in (0, 20, 40, 60, 80):
        yield f'<line class="grid" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{TOP}" y2="{TOP + len(ROWS) * ROW + 2}"/>'
        yield f'<text class="small" x="{across(value):.1f}" y="{TOP + len(ROWS) * ROW + 17}" text-anchor="middle">{value} %</text>'
    yield f'<text class="small" x="{RIGHT}" y="{TOP - 8}" text-anchor="end">facts right, sampled answers</text>'


def row(results: Results, name: str, y: float) -> Iterator[str]:
    """Yield an arm's path, its name, and its mean with interval."""
    arm = next(arm for arm in results.plan.arms if arm.name == name)
    summary, x = results.summaries[name, MEAN, METRIC], 30.0
    for place, model in enumerate(arm.path):
        kind, radius = KINDS[model]
        if place:
            yield f'<line class="arrow" x1="{x - 44:.1f}" x2="{x - radius - 8:.1f}" y1="{y}" y2="{y}"/>'
            yield f'<path class="head" d="M{x - radius - 2:.1f} {y}l-8 -4v8z"/>'
        yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="{radius:.1f}"/>'
        yield f'<text class="in" x="{x:.1f}" y="{y + 4}">{model}</text>'
        x += 62
    yield f'<text x="200" y="{y + 5}">{escape(ROWS[name], quote=False)}</text>'
    kind = "assistant" if len(arm.path) > 2 else KINDS[arm.path[-1]][0]
    yield f'<line class="span {kind}" x1="{across(summary.low):.1f}" x2="{across(summary.high):.1f}" y1="{y}" y2="{y}"/>'
    yield f'<circle class="{kind}" cx="{across(summary.mean):.1f}" cy="{y}" r="5"/>'
    yield f'<text class="value" x="{across(summary.high) + 10:.1f}" y="{y + 5}">{summary.mean:.1f}</text>'


def across(value: float) -> float:
    """Return the x coordinate of a share in percent."""
    return LEFT + (RIGHT - LEFT - 40) * value / 90


if __name__ == "__main__":
    TARGET.write_text(picture(read_study("quickstart", list(ROWS))), encoding="utf-8")
    print(TARGET)
