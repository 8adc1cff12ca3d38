"""The place of the vLLM with which tests run: an environment that the variable TADISTILL_VLLM names, that of `make vllm`, or PATH."""

import shutil
from pathlib import Path

import pytest

from tests.environment import USER

_PLACES = (USER.get("TADISTILL_VLLM", ""), str(Path(__file__).parents[1] / ".vllm"))
VLLM = next(filter(None, (shutil.which("vllm", path=f"{place}/bin") for place in _PLACES)), None) or shutil.which("vllm")
NEEDED = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(VLLM is None, reason="vLLM is not installed; run `make vllm`, or name its environment in TADISTILL_VLLM"),
]
