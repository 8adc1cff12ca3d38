"""The table of metrics: the title, unit, direction and use of each metric, for evaluation, checkpoint selection and reports.

To add a metric, add a row here and a function in `tadistill.evaluation` that computes the metric.

A stored metric's name may have a suffix. `METRIC@DECODING` is the metric under another decoding. `budget/0`, `budget/1`, … are the terms
of a student's error budget (`evaluation.model_pairs`). `METRIC/8` is pass@8 of METRIC. `task_score` is the first metric of a task of
lm-eval, and `task_score/NAME` is another metric of this task. Training logs have `dev/METRIC`, and `dev/METRIC/SET` for each set if there
are several dev sets.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Literal

from tadistill.errors import StoreError

Group = Literal["quality", "text", "language", "divergence"]
Log = Literal["dev", "train", "rollout"]

POINTS, PERCENT, NATS, BITS = "points", "percentage points", "nats/token", "bits/byte"
MEAN = "mean"  # in place of the name of a test set: the unweighted mean over the test sets that have the metric
LAST = "last"  # the value of `Select.metric` for the final weights: no metric selects a checkpoint


@dataclass(frozen=True)
class Metric:
    """One metric: its names, its direction, the stage that measures it, and where reports show it."""

    name: str
    title: str
    group: Group
    """Metrics of a group share a table in reports. In `quality` (text scored against references), each metric has its own table."""
    unit: str = ""
    decimals: int = 3
    better: Literal["higher", "lower"] | None = None
    stage: Literal["evaluate", "analyse"] = "evaluate"
    """The kind of stage that measures the metric. The kind `analyse` compares a student with its teacher."""
    whole_set: bool = False
    """True if the metric has one value per test set and no value per prompt. It then has no confidence interval."""
    selects: bool = False
    """True if the metric can select checkpoints: training can measure it on the dev set."""
    not_comparable: str = ""
    """The reason why the metric's dev values cannot be compared between two paths (chains of models from the teacher to the student).
    Empty if they can be compared."""
    logs: tuple[Log, ...] = ()
    """The training logs that contain the metric, under the name LOG/METRIC. The report draws a learning curve for each of them."""
    hub: str = ""
    """The metric's name on the Hugging Face Hub."""
    on_card: bool = False
    """True if a model card shows the metric as a secondary value."""
    signed: bool = False
    """True if the metric can be negative."""
    by_token: bool = False
    """True if the value depends on the tokenizer, for example because it counts tokens or is a mean over tokens. Only models with the same
    tokenizer can then be compared."""
    right_or_wrong: bool = False
    """True if each response is right (100) or wrong (0). Reports then have pass@k as METRIC/k."""

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest possible value of the metric. Intervals are cut at these values."""
        return -inf if self.signed else 0.0, 100.0 if self.unit in (POINTS, PERCENT) else inf


_SHARE: tuple[Group, str, int, Literal["higher"]] = ("quality", PERCENT, 1, "higher")
_ROWS = (
    Metric("fact_accuracy", "fact accuracy", "quality", PERCENT, 1, "higher", selects=True, logs=("dev",), hub="accuracy"),
    Metric("numeric", "numeric accuracy", *_SHARE, selects=True, logs=("dev",), hub="accuracy", on_card=True, right_or_wrong=True),
    Metric("choice", "choice accuracy", *_SHARE, selects=True, logs=("dev",), hub="accuracy", on_card=True, right_or_wrong=True),
    Metric("math", "math accuracy", *_SHARE, selects=True, logs=("dev",), hub="accuracy", on_card=True, right_or_wrong=True),
    Metric("checks", "checks passed", *_SHARE, selects=True, logs=("dev",), hub="accuracy", on_card=True, right_or_wrong=True),
    Metric("task_score", "task score", *_SHARE, hub="accuracy", on_card=True),
    Metric("rouge_l", "ROUGE-L", "quality", POINTS, 1, "higher", selects=True, logs=("dev",), hub="rouge"),
    Metric("rouge_l_unicode", "ROUGE-L (all scripts)", "quality", POINTS, 1, "higher", selects=True, logs=("dev",), hub="rouge"),
    Metric("loss", "reference loss", "language", NATS, 3, "lower", selects=True, logs=("dev", "train"), on_card=True, by_token=True),
    Metric("perplexity", "perplexity", "language", "", 2, "lower", whole_set=True, hub="perplexity", on_card=True, by_token=True),
    Metric("bits_per_byte", "bits per byte", "language", BITS, 3, "lower", on_card=True),
    Metric("ece_tokens", "calibration error of tokens", "language", PERCENT, 1, "lower", whole_set=True, on_card=True, by_token=True),
    Metric("ece_labels", "calibration error of labels", "language", PERCENT, 1, "lower", whole_set=True),
    Metric("label_accuracy", "label accuracy", "language", PERCENT, 1, "higher", hub="accuracy"),
    Metric("forward_kl", "KL(teacher ‖ student)", "divergence", NATS, 3, "lower", "analyse", on_card=True),
    Metric(
        *("reverse_kl", "KL(student ‖ teacher)", "divergence", NATS, 3, "lower", "analyse"),
        selects=True,
        not_comparable="is measured against the teacher of the last stage, which differs from path to path",
        logs=("rollout",),
        on_card=True,
    ),
    Metric("teacher_text", "bits per byte of the teacher's answers", "divergence", BITS, 3, "lower", "analyse"),
    Metric("forward_bits", "extra bits per byte of the teacher's answers", "divergence", BITS, 3, "lower", "analyse", signed=True),
    Metric("own_text", "teacher's bits per byte of its answers", "divergence", BITS, 3, "lower", "analyse"),
    Metric("reverse_bits", "extra teacher's bits per byte of its answers", "divergence", BITS, 3, "lower", "analyse", signed=True),
    Metric("budget", "error budget", "divergence", NATS, 3, None, "analyse", signed=True),
    Metric("length", "answer length", "text", "tokens", 1, logs=("rollout",), on_card=True, by_token=True),
    Metric("repetition", "repeated 4-grams", "text", PERCENT, 1, "lower", logs=("rollout",), on_card=True),
    Metric("self_bleu", "self-BLEU", "text", POINTS, 1, "lower"),
    Metric("distinct_1", "distinct 1-grams", "text", PERCENT, 1, whole_set=True),
    Metric("distinct_2", "distinct 2-grams", "text", PERCENT, 1, whole_set=True),
    Metric("distinct_4", "distinct 4-grams", "text", PERCENT, 1, whole_set=True, on_card=True),
    Metric("entropy", "entropy", "text", NATS, 3, logs=("rollout",), on_card=True, by_token=True),
    Metric("exact_match", "exact match", "text", PERCENT, 1, "higher", hub="exact_match", on_card=True),
)
METRICS = {row.name: row for row in _ROWS}
"""All metrics by name, in the order of the tables. `declare` adds the metrics of the user's own code."""
BUILT_IN = frozenset(METRICS)
RECORD = frozenset({"set", "index", "seed", "prompt", "instruction", "input", "turns", "prediction", "references"})
"""The keys of a line of predictions.jsonl that are not metrics. No metric can have such a name."""

SELECTABLE = (LAST, *(row.name for row in _ROWS if row.selects))
"""The allowed values of `Select.metric`, the metric that selects a checkpoint."""
NOT_COMPARABLE = {LAST: "measures nothing on dev"} | {row.name: row.not_comparable for row in _ROWS if row.not_comparable}
"""Maps each value of `Select.metric` that cannot compare two paths on the dev set to the reason."""
LOGS = tuple(f"{log}/{row.name}" for log in ("dev", "train", "rollout") for row in _ROWS if log in row.logs)
"""Names in training logs that have a learning curve in the report, in the order of the figures."""


def declare(*rows: Metric) -> None:
    """Add metrics that the user's own code computes. A metric replaces an earlier one of the same name."""
    METRICS.update({row.name: row for row in rows})


def metric_of(name: str) -> Metric:
    """Return the row of a metric. The name may end with `@` or `/` and a suffix. Raises StoreError if this version has no such metric."""
    base = name.partition("@")[0].partition("/")[0]
    if base not in METRICS:
        raise StoreError(
            f"metric `{name}` is not known to this version of tadistill; use the version that measured it, or run the evaluation again"
        )
    return METRICS[base]


def names_in(group: Group) -> tuple[str, ...]:
    """Return the names of a group's metrics, in the order of the tables."""
    return tuple(row.name for row in METRICS.values() if row.group == group)


def sorted_names(measured: Iterable[str], keep: Callable[[Metric], bool]) -> tuple[str, ...]:
    """Return the measured metrics that `keep` accepts, in the order of the tables.

    Names with an @ are left out: these are metrics of decodings other than the main one.
    """
    order = {name: i for i, name in enumerate(METRICS)}
    names = [name for name in dict.fromkeys(measured) if "@" not in name and keep(metric_of(name))]
    parts = {name: name.partition("/")[::2] for name in names}
    return tuple(sorted(names, key=lambda name: (order[parts[name][0]], int(part) if (part := parts[name][1]).isdecimal() else -1, part)))


def higher_is_better(name: str) -> bool:
    """Return True if a higher value is better. Return False if a lower value is better or the metric has no direction."""
    return name != LAST and metric_of(name).better == "higher"


def improves(name: str, difference: float) -> bool:
    """Return True if the difference is an improvement. For a metric without a direction, a higher value is treated as better."""
    return difference < 0 if metric_of(name).better == "lower" else difference > 0


def metric_title(name: str) -> str:
    """Return a metric's title for readers, for example ``ROUGE-L, greedy`` for ``rouge_l@greedy``."""
    if name == LAST:
        return LAST
    title = metric_of(name).title
    base, _, decoding = name.partition("@")
    if base.startswith("budget/"):
        hop = base.removeprefix("budget/")
        title = "KL to the last assistant" if hop == "0" else f"error of step {hop} above it"
    elif "/" in base:
        part = base.partition("/")[2]
        title = f"{title}, {'pass@' if metric_of(name).right_or_wrong else ''}{part}"
    return f"{title}, {decoding}" if decoding else title


def log_parts(name: str) -> tuple[str, str, str]:
    """Split the name of a value in a training log into the log, the metric and the dev set, such as ``dev``, ``loss`` and ``maths``.

    The third part is empty if the name contains no dev set.
    """
    log, _, rest = name.partition("/")
    metric, _, of = rest.partition("/")
    return log, metric, of


def in_order(logged: Iterable[str]) -> list[str]:
    """Return the names of `logged` that have a learning curve, in the order of `LOGS`. The values of single dev sets follow their mean."""
    names = [*dict.fromkeys(logged)]
    return [name for log in LOGS for name in names if name == log or name.startswith(f"{log}/")]


def metric_unit(name: str) -> str:
    """Return a metric's unit. It is an empty string if the metric has no unit."""
    return metric_of(name).unit


# --- the text of a training stage's progress --------------------------------------------------------------------------------


def training_text(loss: float, tokens_per_second: float) -> str:
    """Return the loss and the speed of a training as text, for its progress display."""
    return f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"


_TRAINING = re.compile(r"loss (-?[\d.]+), ([\d,]+) tokens/s")


def training_numbers(text: str) -> tuple[float, float] | None:
    """Parse a text that `training_text` returned: loss and tokens per second. Return None for any other text."""
    found = _TRAINING.match(text)
    return (float(found[1]), float(found[2].replace(",", ""))) if found else None
