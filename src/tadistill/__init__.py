"""tadistill: white-box distillation of language models through teacher assistants.

    study = tadistill.run("quickstart")                                     # run a study; a notebook shows its table
    tadistill.plan("quickstart")                                            # what it would do, and what that costs
    model, tokenizer = tadistill.load_student(study, "assistant-starts")    # a trained student
    tadistill.evaluate(model, tokenizer, on=["dolly"])                      # a loaded model on test sets
    tadistill.compare(["gpt2", "gpt2-medium"], on="dolly")                  # models side by side
    tadistill.objectives.reverse_kl(student_logits, teacher_logits)

Submodules are imported on first use, so `import tadistill` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tadistill import objectives
    from tadistill.api import compare, evaluate, load_student, plan, run

__version__ = "0.1.0"
__all__ = ["compare", "evaluate", "load_student", "objectives", "plan", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tadistill' has no attribute '{name}'")
    if name == "objectives":
        return importlib.import_module("tadistill.objectives")
    return getattr(importlib.import_module("tadistill.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
