"""Recipes. `load` reads a file, `parse` reads YAML text, and `validate` reads plain data. Each returns a frozen `Recipe`."""

from tadistill.config.load import load, parse, validate
from tadistill.config.method import Method, Optim, Sft
from tadistill.config.recipe import Arm, Data, DataRef, Evaluate, ModelConfig, Recipe

__all__ = ["Arm", "Data", "DataRef", "Evaluate", "Method", "ModelConfig", "Optim", "Recipe", "Sft", "load", "parse", "validate"]
