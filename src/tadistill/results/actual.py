"""The rows that trainings and evaluations actually read, and the FLOPs that they actually spent. The plan can only predict them.

Arms are compared on rows that all of them answered. A model whose tokenizer makes longer prompts leaves out more rows. Scores are therefore
paired by the number of the row in its split (from 0), and not by their position in a file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tadistill.data.counts import Counts
from tadistill.errors import StoreError
from tadistill.results.measured import load_predictions
from tadistill.results.study import ArmRecord, StageRecord, StudyPlan, load_manifest
from tadistill.store import Store

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class UsedRows:
    """The number of rows of one split that a study used, and why others were left out. Arms (paths of models) may differ in it."""

    role: str
    """The part of the data: train, dev or test."""
    set: str
    counts: Counts
    arms: tuple[str, ...]
    """The arms that used these rows. Empty if all arms used the same rows."""
    compared: int
    """Number of rows that all arms answered. Arms are compared on these rows."""

    @property
    def text(self) -> str:
        """Return text such as ``dolly (test): 476 of 500 rows; 24 longer than data.max_prompt (256)``.

        It is empty if no row was left out or cut.
        """
        whole = self.counts.text
        if self.compared < self.counts.used:
            whole = f"{whole or f'{self.counts.used} rows'}; arms are compared on the {self.compared} rows that all models answered"
        arms = f", {', '.join(self.arms)}" if self.arms else ""
        return f"{self.set} ({self.role}{arms}): {whole}" if whole else ""

    @property
    def record(self) -> dict[str, Any]:
        """Return the numbers as an entry of ``results.json``."""
        return {"role": self.role, "set": self.set, **asdict(self.counts), "used": self.counts.used, "compared": self.compared,
                "arms": list(self.arms)}  # fmt: skip


def load_rows(store: Store, key: str, corpus: Mapping[str, Mapping[str, Any]]) -> dict[str, Rows]:
    """Return the numbers of the rows that an evaluation answered, for each test set, in the order of its scores.

    `corpus` is the content of the evaluation's corpus.json. If an earlier version of tadistill wrote it without row numbers, they are read
    from the predictions.
    """
    if all("rows" in found for found in corpus.values()):
        return {name: np.asarray(found["rows"], dtype=np.int64) for name, found in corpus.items()}
    rows: dict[tuple[str, int], list[int]] = {}
    for row in load_predictions(store, key):
        rows.setdefault((row["set"], row["seed"]), []).append(row["index"])
    first: dict[str, Rows] = {}
    for (name, _), found in rows.items():
        first.setdefault(name, np.asarray(found, dtype=np.int64))
    return first


def shared_rows(rows: Mapping[str, Mapping[str, Rows]], store: Store) -> dict[str, Rows]:
    """Return the rows of each test set that all evaluations answered, as row numbers.

    `rows` maps a stage and a set to the numbers of its rows.

    Raises:
        StoreError: the evaluations of a set have no row in common.
    """
    shared: dict[str, Rows] = {}
    for of_stage in rows.values():
        for name, of_set in of_stage.items():
            shared[name] = np.intersect1d(shared[name], of_set) if name in shared else of_set
    for name, of_set in shared.items():
        if not len(of_set):
            stages = ", ".join(store.label(key) for key, of_stage in rows.items() if name in of_stage)
            raise StoreError(
                f"the evaluations of {name} have no row in common ({stages}), so arms cannot be compared; raise data.max_prompt, so that "
                "fewer long prompts are left out"
            )
    return shared


def places(answered: Rows, chosen: Rows) -> NDArray[np.intp]:
    """Return the indices of the row numbers `chosen` in the array `answered`. The index of the lowest row number comes first."""
    order = np.argsort(answered, kind="stable")
    return order[np.isin(answered[order], chosen)]


def count_rows(plan: StudyPlan, store: Store, rows: Mapping[str, Mapping[str, Rows]], shared: Mapping[str, Rows]) -> tuple[UsedRows, ...]:
    """Count the rows that finished trainings and evaluations read, for every split."""
    found: dict[tuple[str, str], dict[Counts, dict[str, None]]] = {}
    for stage in plan.stages:
        of_stage = rows.get(stage.key)
        for (role, name), counts in _counts(plan, store, stage.key, of_stage).items():
            if role != "test" or of_stage is not None:
                found.setdefault((role, name), {}).setdefault(counts, {}).update(dict.fromkeys(stage.arms))
    used: list[UsedRows] = []
    for (role, name), by_counts in found.items():
        for counts, arms in by_counts.items():
            compared = len(shared[name]) if role == "test" and name in shared else counts.used
            used.append(UsedRows(role, name, counts, tuple(arms) if len(by_counts) > 1 else (), compared))
    return tuple(used)


def _counts(plan: StudyPlan, store: Store, key: str, rows: Mapping[str, Rows] | None) -> Mapping[tuple[str, str], Counts]:
    manifest = load_manifest(store, key)
    if manifest is None or manifest.counts or rows is None:
        return manifest.counts if manifest else {}
    # an earlier version recorded only how many rows were left out
    left_out, data = store.manifest(key).get("left_out", {}), plan.recipe["data"]
    limits = {"limit": int(data.get("max_prompt", 0)), "max_length": int(data.get("max_length", 0))}
    return {("test", n): Counts(len(of_set) + left_out.get(n, 0), long=left_out.get(n, 0), **limits) for n, of_set in rows.items()}


def rows_text(used: Sequence[UsedRows]) -> str:
    """Describe in one sentence all splits with rows that were left out or cut. The result is empty if there is no such split."""
    found = [text for split in used if (text := split.text)]
    apart = any(split.compared < split.counts.used for split in used)
    whole = " Metrics with one value per set use all rows that a model answered." if apart else ""
    return f"Rows left out, cut or divided: {'. '.join(found)}.{whole}" if found else ""


def with_spent(plan: StudyPlan, store: Store) -> StudyPlan:
    """Return the plan with measured values (FLOPs, number of checkpoints) for trainings that stopped early.

    A training with `select.patience` may stop before its last update.
    """
    early: dict[str, StageRecord] = {}
    for stage in plan.stages:
        found = load_manifest(store, stage.key) if stage.checkpoints else None
        if found is not None and found.checkpoints is not None:
            early[stage.key] = replace(stage, checkpoints=found.checkpoints, flops=None if stage.flops is None else found.flops)
    if not early:
        return plan
    spent = replace(plan, stages=tuple(early.get(stage.key, stage) for stage in plan.stages))
    return replace(spent, arms=tuple(replace(arm, flops=_spent(spent, arm)) for arm in plan.arms))


def _spent(plan: StudyPlan, arm: ArmRecord) -> float | None:
    parts = [stage.flops for stage in plan.ancestors(next(iter(arm.final.values())), paid=True)]
    return None if arm.flops is None else math.fsum(part for part in parts if part is not None)
