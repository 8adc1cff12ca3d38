"""tadistill: white-box distillation of language models through teacher assistants.

    tadistill.objectives.reverse_kl(student_logits, teacher_logits)
    tadistill.run("recipes/quickstart.yaml")
    tadistill.evaluate(model, tokenizer, on=["dolly"])

Submodules are imported on first use, so `import tadistill` does not load torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "objectives":
        return importlib.import_module("tadistill.objectives")
    if name in ("run", "evaluate"):
        return getattr(importlib.import_module("tadistill.api"), name)
    raise AttributeError(f"module 'tadistill' has no attribute '{name}'")
