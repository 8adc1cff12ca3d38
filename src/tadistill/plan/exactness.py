"""Losses of a study that are not exact, because a server or a recording has less than a teacher's whole distribution."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tadistill.config import Method
from tadistill.config.objective import MiniLLM
from tadistill.plan.inputs import Handle, Loaded
from tadistill.plan.specs import DistillSpec
from tadistill.plan.task import name_of

if TYPE_CHECKING:
    from tadistill.plan.arms import Plan


def approximations(plan: "Plan", arm: str) -> list[str]:
    """Return one sentence for each teacher whose outputs make a loss of the arm inexact. Empty if all losses are exact."""
    found = (_of_stage(plan, stage.model, stage.spec) for stage in plan.stages.values() if arm in stage.arms)
    return list(dict.fromkeys(sentence for sentences in found for sentence in sentences))


def _of_stage(plan: "Plan", student: str, spec: object) -> Iterator[str]:
    if not isinstance(spec, DistillSpec) or not _reads_distribution(spec.method):
        return
    for teacher in (spec.teacher, *spec.assistants):
        if inexact := _inexact(spec.method, teacher, name_of(plan, teacher) or "its teacher"):
            yield f"the loss `{spec.objective.label}` of {student} is {inexact}"


def _reads_distribution(method: Method) -> bool:
    objective = method.objective
    pt = isinstance(objective, MiniLLM) and objective.needs_corpus and objective.pt_kd_ratio > 0
    return objective.needs_teacher and (objective.needs_distribution or pt)


def _inexact(method: Method, teacher: Handle, name: str) -> str | None:
    if method.signal is not None:
        return method.signal.inexact(f"the recording of {name} has")
    sends = teacher.sends if isinstance(teacher, Loaded) else None
    return sends and sends.inexact(f"the server of {name} sends")
