"""From a recipe to stages, their keys and their costs. `tadistill.plan` is also a function of the API, so this package can be called."""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _PlanPackage(ModuleType):
    def __call__(self, recipe: Any, overrides: Sequence[str] = (), *, runs: Any = None) -> Any:
        """Return the stages of a study. Nothing is run. `tadistill.api.plan` describes the arguments."""
        api = importlib.import_module("tadistill.api")  # here: the API itself imports this package
        return api.plan(recipe, overrides, runs=runs)


sys.modules[__name__].__class__ = _PlanPackage
