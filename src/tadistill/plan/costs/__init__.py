"""What a study's stages cost, before they run, from the recipe alone. Imports no torch; docs/compute.md has the formulas."""

from tadistill.models.counting.cost import Cost, Part
from tadistill.plan.costs.data import check_data
from tadistill.plan.costs.ledger import Ledger
from tadistill.plan.costs.published import minillm_flops

__all__ = ["Cost", "Ledger", "Part", "check_data", "minillm_flops"]
