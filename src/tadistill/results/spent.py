"""The cost of training that really arose. A plan predicts it for all updates, but a stage with `select.patience` may stop earlier."""

import math
from dataclasses import replace

from tadistill.results.study import ArmRecord, StageRecord, StudyPlan, load_manifest
from tadistill.store import Store


def with_spent(plan: StudyPlan, store: Store) -> StudyPlan:
    """Return the plan with what stages that stopped early really spent: their metered FLOPs, and the checkpoints that they evaluated."""
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
