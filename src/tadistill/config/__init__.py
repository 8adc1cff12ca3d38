"""Recipes, the YAML files that describe a study. `load` reads a file, `parse` reads YAML text, and `validate` reads plain data. Each of the
three functions returns an immutable `Recipe`."""

from tadistill.config.arm import Arm
from tadistill.config.data import Data, DataRef
from tadistill.config.evaluate import Evaluate
from tadistill.config.load import load, parse, validate
from tadistill.config.method import Method, Sft
from tadistill.config.method_parts import Optim
from tadistill.config.model import ModelConfig
from tadistill.config.recipe import Recipe

__all__ = ["Arm", "Data", "DataRef", "Evaluate", "Method", "ModelConfig", "Optim", "Recipe", "Sft", "load", "parse", "validate"]
