"""Specs that name other stages and nothing else, for tests of what happens to a graph of stages."""

from tadistill.plan.graph import Spec
from tadistill.plan.inputs import FromStage, Output
from tadistill.plan.kinds import KINDS


def spec(kind: str = "sft", *assistants: str, **parents: str) -> Spec:
    """Return a spec of a kind with these parents by role, and no settings."""
    roles = {role: (Output if role in ("responses", "signal", "answers", "teacher_answers") else FromStage)(stage=key)
             for role, key in parents.items()}  # fmt: skip
    return KINDS[kind].model_construct(**roles, assistants=tuple(FromStage(stage=key) for key in assistants))  # type: ignore[arg-type]
