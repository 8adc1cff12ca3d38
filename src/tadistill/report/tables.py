"""The tables of a report as plain data. The page and the Markdown file show the same tables."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tadistill.metrics import MEAN, higher_is_better, metric_title, metric_unit, sorted_names
from tadistill.plan.graph import without_seed
from tadistill.results.collect import Results, Summary, primary_metric, sets_with
from tadistill.results.compare import BY_LENGTH, bucket_sizes, bucket_summary, bucket_title, difference, direct_of
from tadistill.results.measured import StageManifest
from tadistill.results.number_text import (
    DASH,
    detectable_text,
    flops_text,
    interval,
    interval_of,
    number,
    parameters_text,
    ratio_text,
    signed,
)
from tadistill.results.sample_answers import references
from tadistill.results.study import ArmRecord, StageRecord
from tadistill.results.verdict import SHOWN, Comparison, comparisons, control_pairs
from tadistill.text import MINUS, counted, form


@dataclass(frozen=True)
class ScoreTable:
    """A table of one metric. Its rows are arms, and then models that are no arms (`references`). Its columns are test sets. With several
    sets, the first column is their mean.

    `best` has the names of the best arms of each column. For each model, this is the arm with the best mean. No arm is best if several arms
    share this mean, or if the model has only one arm.
    """

    metric: str
    columns: tuple[str, ...]
    rows: tuple[tuple[ArmRecord, tuple[Summary | None, ...]], ...]
    best: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class CostRow:
    """The training FLOPs of `arm` divided by the FLOPs of `direct`: the arm that distils the same model directly."""

    arm: ArmRecord
    relative: float | None
    direct: str | None


@dataclass(frozen=True)
class StageRow:
    """A stage of the plan and the record of its run (manifest), which is None while the stage is not finished."""

    stage: StageRecord
    manifest: StageManifest | None


def main_metrics(results: Results) -> tuple[str, ...]:
    """Return the quality metrics that the study measured. Each of them has a table of scores in the report."""
    return sorted_names(results.metrics, lambda metric: metric.group == "quality")


def score_table(results: Results, metric: str) -> ScoreTable:
    """Return the table of one metric. If an arm has no finished evaluation, its cells are empty."""
    sets = sets_with(results, metric)
    columns = (MEAN, *sets) if len(sets) > 1 else sets
    every = [(of, arm) for of in (results, references(results)) if of for arm in of.plan.arms]
    rows = tuple((arm, tuple(of.summaries.get((arm.name, column, metric)) for column in columns)) for of, arm in every)
    return ScoreTable(metric, columns, rows, tuple(best_arms(results, column, metric) for column in columns))


def best_arms(results: Results, column: str, metric: str) -> frozenset[str]:
    """Return the arms with the best mean among arms of the same model, as it is shown. Without a single best arm, a model has none."""
    groups: dict[str, dict[str, str]] = {}
    for arm in results.plan.arms:
        if (summary := results.summaries.get((arm.name, column, metric))) is not None:
            groups.setdefault(arm.model, {})[arm.name] = number(summary.mean, metric)
    pick = max if higher_is_better(metric) else min
    found: set[str] = set()
    for means in groups.values():
        best = pick(means.values(), key=lambda text: float(text.replace(MINUS, "-")))
        first = [name for name, text in means.items() if text == best]
        found |= set(first) if len(first) == 1 < len(means) else set()
    return frozenset(found)


def cost_rows(results: Results) -> list[CostRow]:
    """Return the training FLOPs of every arm relative to direct distillation of the same model."""
    rows: list[CostRow] = []
    for arm in results.plan.arms:
        direct = direct_of(results, arm)
        relative = arm.flops / direct.flops if direct and direct.flops and arm.flops is not None else None
        rows.append(CostRow(arm, relative, direct.name if direct else None))
    return rows


def stage_rows(results: Results) -> list[StageRow]:
    """Return all stages of the plan with the records of their runs (manifests)."""
    return [StageRow(stage, results.manifests.get(stage.key)) for stage in results.plan.stages]


def versions(rows: list[StageRow]) -> Mapping[str, str]:
    """Return, for each package, the versions that the finished stages used."""
    seen: dict[str, dict[str, None]] = {}
    for row in rows:
        for package, version in (row.manifest.versions if row.manifest else {}).items():
            seen.setdefault(package, {})[version] = None
    return {package: ", ".join(found) for package, found in sorted(seen.items())}


# --- secondary tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The heading of a table column: a title, and a unit or a remark in small letters below it."""

    title: str
    unit: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell: a value, and its interval or a remark. `value` is a dash if nothing was measured."""

    value: str = DASH
    interval: str = ""

    @property
    def text(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


@dataclass(frozen=True)
class Table:
    """A secondary table. `name` is its id in the HTML. Each row starts with an arm or a pair of arms."""

    name: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def comparison_table(results: Results) -> Table | None:
    """Return the table of paired differences with their tests and verdicts. Return None if the study compares no arms."""
    compared, metric = comparisons(results), primary_metric(results)
    controlled = _control_rows(results, metric, {(c.arm, c.other) for c in compared})
    if not (compared or controlled):
        return None
    columns = (
        Column("difference", metric_unit(metric)),
        Column("p"),
        Column("Holm p", f"over {compared[0].family}" if compared else ""),
        Column("sign-flip p", "smallest possible"),
        Column("detectable", "80 % power"),
        Column("verdict"),
    )
    note = (
        f"Paired differences of {metric_title(metric)} on the mean over sets. {interval_method(results)} "
        f"The equivalence margin is ±{number(results.plan.margin, metric)}."
    )
    if controlled:
        note += " Rows marked `control` compare an arm with its control. They have no verdict: their p-values are not corrected."
    return Table("comparisons", "Comparisons", note, columns, (*((_pair_title(c), _comparison_cells(c)) for c in compared), *controlled))


def _control_rows(results: Results, metric: str, tested: set[tuple[str, str]]) -> list[tuple[str, tuple[Cell, ...]]]:
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for arm, control in control_pairs(results):
        d = difference(results, arm.name, control.name, metric)
        if d and not {(arm.name, control.name), (control.name, arm.name)} & tested:
            value = Cell(signed(d.mean, metric, more=1), interval_of(d, metric, more=1))
            rows.append((f"{arm.name} {DASH} {control.name}", (value, Cell(f"{d.p:.4f}"), Cell(), Cell(), Cell(), Cell("control"))))
    return rows


def interval_method(results: Results) -> str:
    """Return a sentence that explains how the 95 % intervals are computed."""
    seeds = max((len(results.scores[arm.name]) for arm in results.plan.arms if arm.is_trained), default=0)
    over = "training seeds and prompts" if seeds > 1 else f"prompts{', not over training seeds, of which there is one' * seeds}"
    return f"The 95 % intervals are t intervals over {over}. They stay inside the bounds of their metric."


def _pair_title(c: Comparison) -> str:
    return f"{c.arm} {DASH} {c.other}" + (" (not equal compute)" if c.unequal else "")


def _comparison_cells(c: Comparison) -> tuple[Cell, ...]:
    d = c.difference
    value = Cell(signed(d.mean, c.metric, more=1), interval_of(d, c.metric, more=1))
    signs = Cell(f"{c.sign_flip.p:.3f}", f"[{c.sign_flip.smallest:.3f}]") if c.sign_flip else Cell()
    verdict = Cell(SHOWN[c.word], f"({c.credit})" if c.credit else "")
    return value, Cell(f"{d.p:.4f}"), Cell(f"{c.p_holm:.4f}"), signs, Cell(detectable_text(c.detectable, c.metric)), verdict


def detail_tables(results: Results) -> list[Table]:
    """Return the tables that follow the score tables, such as divergence and cost. Tables and rows without values are omitted."""
    main = main_metrics(results)
    tables = [
        _group(results, "divergence", "Divergence from the teacher"),
        _group(results, "language", "Language"),
        _group(results, "text", "Text"),
        *(_decodings(results, metric) for metric in main),
        _buckets(results),
        _cost(results),
        _ledger(results),
    ]
    return [table for table in tables if table is not None]


def _group(results: Results, name: str, title: str) -> Table | None:
    having = sorted_names((metric for _, _, metric in results.summaries), lambda metric: metric.group == name)
    columns = tuple(Column(metric_title(metric), metric_unit(metric)) for metric in having)
    note = "Means over the test sets that have the metric, with 95 % intervals. Metrics with one value per set have no interval."
    return _by_arm(results, name, title, note, columns, lambda arm: [mean_cell(results, arm, metric) for metric in having])


def mean_cell(results: Results, arm: str, metric: str, set_name: str = MEAN) -> Cell:
    """Return a table cell with an arm's value of a metric: on one test set, or the mean over all sets."""
    return _cell(results.summaries.get((arm, set_name, metric)), metric)


def _cell(summary: Summary | None, metric: str) -> Cell:
    return Cell(number(summary.mean, metric), interval(summary.low, summary.high, metric)) if summary else Cell()


def _decodings(results: Results, metric: str) -> Table | None:
    names = [name for name in results.plan.decodings if f"{metric}@{name}" in results.metrics]
    if not names:
        return None
    columns = (Column("main", _changes(results.plan.recipe["evaluate"])), *(Column(n, _changes(results.plan.decodings[n])) for n in names))
    metrics = [metric, *(f"{metric}@{name}" for name in names)]
    title = f"{metric_title(metric)} by decoding"
    note = "Means over the test sets. Tables that do not name a decoding show the main one."
    return _by_arm(results, f"decoding-{metric}", title, note, columns, lambda arm: [mean_cell(results, arm, m) for m in metrics])


def _changes(decoding: Mapping[str, object]) -> str:
    names = {"temperature": "T", "no_repeat_ngram": "no repeated n-gram of"}
    return ", ".join(f"{words} = {decoding[key]}" for key, words in names.items() if decoding.get(key) is not None)


def _buckets(results: Results) -> Table | None:
    shown = bucket_sizes(results)
    columns = tuple(Column(f"{bucket_title(bucket)} tokens", counted(size, "prompt")) for bucket, size in shown.items())
    title = f"{metric_title(BY_LENGTH)} by length of the reference"
    note = "Prompts of all sets, grouped by their first reference's length."

    def cells(arm: str) -> list[Cell]:
        return [_cell(bucket_summary(results, arm, bucket), BY_LENGTH) for bucket in shown]

    return _by_arm(results, "buckets", title, note, columns, cells)


def _cost(results: Results) -> Table:
    teacher, asks = results.plan.teacher, any(arm.teacher_budget or arm.across for arm in results.plan.arms)
    asked = (Column(f"tokens of {teacher}", "per seed"),) if asks else ()
    columns = (Column("parameters"), Column("training FLOPs", "per seed"), Column("relative to direct"), *asked)
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for row in cost_rows(results):
        relative = Cell(ratio_text(row.relative), row.direct or "") if row.relative is not None else Cell()
        tokens = row.arm.teacher_tokens
        of_teacher = (Cell() if tokens is None else Cell(f"{tokens:,.0f}"),) if asks else ()
        size = parameters_text(results.plan.parameters[row.arm.model])
        rows.append((row.arm.name, (Cell(size), Cell(flops_text(row.arm.flops)), relative, *of_teacher)))
    note = f"The cost of all training for an arm's final model, {counted_text(results)}"
    note += " Each relative value is followed by the name of the direct arm, whose FLOPs are 1×."
    if asks:
        note += f" The last column is the number of answer tokens that {teacher} writes or scores, as the plan predicts it."
    return Table("cost", "Cost", note, columns, tuple(rows))


def counted_text(results: Results) -> str:
    """Return the end of the sentence "The cost of all training for an arm's final model, …".

    The end says that the cost includes the training of teachers and assistants. A second sentence follows if a path begins with several
    teachers and an arm has the key `compute`, or if such an arm does not use the original teacher. It says that `compute: as ARM` does not
    count the training of these teachers.
    """
    arms, teacher = results.plan.arms, results.plan.teacher
    text = "including that of its teachers and teacher assistants in this study."
    without = [arm for arm in arms if arm.compute and teacher and teacher not in arm.models]
    if without or (any(arm.is_routed for arm in arms) and any(arm.compute for arm in arms)):
        text += " These FLOPs include the training of the first teachers, but the rule `compute: as ARM` does not count it."
    return text


@dataclass(frozen=True)
class LedgerRow:
    """The compute of one training, as means over its seeds: predicted FLOPs, metered FLOPs and seconds."""

    stage: str
    predicted: float
    metered: float
    seconds: float


def ledger_rows(results: Results) -> list[LedgerRow]:
    """Return the predicted and metered compute of all finished trainings, without dev evaluations."""
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for row in stage_rows(results):
        if row.manifest is not None and row.manifest.flops is not None and row.stage.flops is not None:
            found = row.stage.flops, row.manifest.flops, row.manifest.seconds
            groups.setdefault(without_seed(row.stage.label), []).append(found)
    return [LedgerRow(label, *(sum(column) / len(found) for column in zip(*found, strict=True))) for label, found in groups.items()]


def _ledger(results: Results) -> Table | None:
    rows = tuple((row.stage, _ledger_cells(row)) for row in ledger_rows(results))
    columns = (Column("predicted FLOPs"), Column("metered FLOPs"), Column("metered / predicted"), Column("time", "of the stage"))
    note = "Means over seeds, without dev evaluations. The plan predicts FLOPs from the recipe alone."
    return Table("ledger", "Predicted and metered compute", note, columns, rows) if rows else None


def _ledger_cells(row: LedgerRow) -> tuple[Cell, ...]:
    ratio = ratio_text(row.metered / row.predicted)
    return Cell(flops_text(row.predicted)), Cell(flops_text(row.metered)), Cell(ratio), Cell(f"{row.seconds:.0f} s")


def _by_arm(
    results: Results, name: str, title: str, note: str, columns: tuple[Column, ...], cells: Callable[[str], Iterable[Cell]]
) -> Table | None:
    rows = [(arm.name, tuple(cells(arm.name))) for arm in results.plan.arms] if columns else []
    shown = tuple((arm, of_arm) for arm, of_arm in rows if any(cell != Cell() for cell in of_arm))
    return Table(name, title, note, columns, shown) if shown else None


def sample_text(results: Results, arm: ArmRecord) -> str:
    """Return the numbers of prompts and seeds behind an arm's mean, such as ``580 of 582 prompts, 5 decoding seeds, 3 training seeds``."""
    metric = primary_metric(results)
    seeds = results.scores[arm.name]
    having = {name: of_set[metric] for name, of_set in next(iter(seeds.values())).items() if metric in of_set}
    table = list(having.values())
    decodings = max(values_NK.shape[1] for values_NK in table)
    prompts, rows = sum(map(len, table)), sum({s.set: s.counts.rows for s in results.used if s.role == "test" and s.set in having}.values())
    of = f" of {rows}" if rows > prompts else ""
    counts = f"{prompts}{of} {form(max(prompts, rows), 'prompt', 'prompts')}, {counted(decodings, 'decoding seed')}"
    return f"{counts}, {counted(len(seeds), 'training seed')}" if arm.is_trained else counts
