"""The tables of a report as plain data, so that the page and the Markdown file cannot disagree."""

from collections.abc import Mapping
from dataclasses import dataclass

from tadistill.results.collect import LOWER_IS_BETTER, MEAN, Results, Summary, direct_arm, primary_metric, sets_with
from tadistill.results.files import Arm, Manifest, Stage, load_manifest


@dataclass(frozen=True)
class ScoreTable:
    """Arms by sets for one metric; the first column is the mean over sets, when there is more than one."""

    metric: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Arm, tuple[Summary | None, ...]], ...]
    best: tuple[str | None, ...]  # per column, the arm with the best mean; no statement about evidence


@dataclass(frozen=True)
class CostRow:
    """One arm's other metrics on the mean over sets, its size, and what its training cost."""

    arm: Arm
    others: tuple[Summary | None, ...]
    parameters: int
    flops: float | None
    relative: float | None  # to the direct arm
    direct: str | None


@dataclass(frozen=True)
class StageRow:
    """A stage of the plan and its manifest, None while it is not finished."""

    stage: Stage
    manifest: Manifest | None


def main_metrics(results: Results) -> tuple[str, ...]:
    """The metrics that get a table over all sets."""
    wanted = dict.fromkeys((primary_metric(results), "rouge_l"))
    return tuple(metric for metric in wanted if metric in results.metrics)


def other_metrics(results: Results) -> tuple[str, ...]:
    """The metrics that stand beside the cost; all others have tables of their own (`tadistill.report.details`)."""
    return tuple(metric for metric in ("loss", "forward_kl", "reverse_kl", "entropy", "length") if metric in results.metrics)


def score_table(results: Results, metric: str) -> ScoreTable:
    """The table of one metric; an arm without a finished evaluation keeps its row, with empty cells."""
    sets = sets_with(results, metric)
    columns = (MEAN, *sets) if len(sets) > 1 else sets
    rows = tuple((arm, tuple(results.summaries.get((arm.name, column, metric)) for column in columns)) for arm in results.plan.arms)
    return ScoreTable(metric, columns, rows, tuple(_best(results, column, metric) for column in columns))


def _best(results: Results, column: str, metric: str) -> str | None:
    means = {
        arm.name: results.summaries[arm.name, column, metric].mean
        for arm in results.plan.arms
        if (arm.name, column, metric) in results.summaries and arm.path != (results.plan.teacher,)
    }
    choose = min if metric in LOWER_IS_BETTER else max
    return choose(means, key=means.__getitem__) if len(means) > 1 else None


def cost_rows(results: Results) -> list[CostRow]:
    """Every arm's parameters, training FLOPs, FLOPs relative to the direct arm, and the metrics beside them."""
    rows: list[CostRow] = []
    for arm in results.plan.arms:
        others = tuple(results.summaries.get((arm.name, MEAN, metric)) for metric in other_metrics(results))
        direct = direct_arm(results, arm)
        relative = None
        if direct is not None and direct.flops and arm.flops is not None:
            relative = arm.flops / direct.flops
        parameters = results.plan.parameters[arm.model]
        rows.append(CostRow(arm, others, parameters, arm.flops, relative, direct.name if direct else None))
    return rows


def stage_rows(results: Results) -> list[StageRow]:
    """Every stage of the plan, in its order."""
    return [StageRow(stage, load_manifest(results.store_dir, stage.key)) for stage in results.plan.stages]


def versions(rows: list[StageRow]) -> Mapping[str, str]:
    """What the finished stages ran on; several versions of a package are all named."""
    seen: dict[str, dict[str, None]] = {}
    for row in rows:
        for package, version in (row.manifest.versions if row.manifest else {}).items():
            seen.setdefault(package, {})[version] = None
    return {package: ", ".join(found) for package, found in sorted(seen.items())}
