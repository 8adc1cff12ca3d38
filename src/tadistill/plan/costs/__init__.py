"""Predictions of the cost of a study's stages, from the recipe alone. docs/concepts/compute.md has the formulas."""

from tadistill.plan.costs.ledger import Ledger, minillm_flops

__all__ = ["Ledger", "minillm_flops"]
