"""Sentences about the numbers of a study that are not exact.

A loss is not exact if a server or a recording has only a part of a teacher's distribution, or if the teacher has another tokenizer than the
student. FLOPs are not complete if a teacher is behind an API.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tadistill.config import Method
from tadistill.config.objective import Gold, MiniLLM, Uld
from tadistill.plan.inputs import Handle, Loaded
from tadistill.plan.kinds import AskSpec, DistillSpec
from tadistill.plan.task import name_of

if TYPE_CHECKING:
    from tadistill.plan.arms import Plan


def approximations(plan: "Plan", arm: str) -> list[str]:
    """Return one sentence for each teacher whose outputs make a loss of the arm inexact, or whose FLOPs are not known. Empty if all numbers
    are exact."""
    found = (_of_stage(plan, stage.model, stage.spec) for stage in plan.stages.values() if arm in stage.arms)
    return list(dict.fromkeys(sentence for sentences in found for sentence in sentences))


def _of_stage(plan: "Plan", student: str, spec: object) -> Iterator[str]:
    if isinstance(spec, AskSpec):
        yield f"teacher FLOPs unknown: {student} is behind an API, so neither the FLOPs of the arm nor `compute` include its FLOPs"
    if isinstance(spec, DistillSpec) and spec.teacher_data:
        yield f"the loss `{spec.objective.label}` of {student} is {_over_spans(spec, name_of(plan, spec.teacher) or 'its teacher')}"
        return
    if not isinstance(spec, DistillSpec) or not _reads_distribution(spec.method):
        return
    for teacher in (spec.teacher, *spec.assistants):
        if inexact := _inexact(spec.method, teacher, name_of(plan, teacher) or "its teacher"):
            yield f"the loss `{spec.objective.label}` of {student} is {inexact}"


def _over_spans(spec: DistillSpec, teacher: str) -> str:
    why = f"computed over spans of text, because {teacher} has another tokenizer"
    if isinstance(spec.objective, MiniLLM):
        return (
            f"{why}: each token gets the reward of its whole span, and the single-step term (the expected reward of the next token) is "
            "left out; the gradient is unbiased, unless later text changes how the teacher's tokenizer splits a span"
        )
    if isinstance(spec.objective, Uld | Gold):
        return f"{why}, as in GOLD of TRL 1.16"
    return (
        f"{why}: at the start of a span, the loss compares the probabilities of groups of next tokens that begin with the same bytes "
        "(cells); inside a span, it compares the probabilities of the next byte; the loss is exact only if each model gives no probability "
        "to tokenisations that its own tokenizer would not make"
    )


def _reads_distribution(method: Method) -> bool:
    objective = method.objective
    pt = isinstance(objective, MiniLLM) and objective.needs_corpus and objective.pt_kd_ratio > 0
    return objective.needs_teacher and (objective.needs_distribution or pt)


def _inexact(method: Method, teacher: Handle, name: str) -> str | None:
    if method.signal is not None:
        return method.signal.inexact(f"the recording of {name} has")
    sends = teacher.sends if isinstance(teacher, Loaded) else None
    return sends and sends.inexact(f"the server of {name} sends")
