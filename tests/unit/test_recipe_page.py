"""Every block of the page "Recipes by example" is a part of a recipe that is accepted."""

import re
from pathlib import Path

import pytest
import yaml

from tadistill.config import validate

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
WHOLE = [block for block in BLOCKS if "study" in block]
METHODS = next(block["methods"] for block in BLOCKS if "methods" in block and "study" not in block)
SETS = next(block["data"] for block in BLOCKS if [*block] == ["data"])
LARGE = {"load": "Qwen/Qwen3-1.7B"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.get("study") or "-".join(block.get("arms", block)))
def test_a_block_is_accepted(block):
    if block not in WHOLE:
        whole = next(other for other in WHOLE if other["study"] == "compare")
        sets = whole["data"] | SETS if " on " in str(block) else whole["data"]  # a route
        block = whole | {"models": whole["models"] | {"l": LARGE, "maths-xl": LARGE}, "methods": METHODS, "data": sets} | block
    found = validate(block)
    assert found.arms.keys() == block.get("arms", {"student": ""}).keys()
