"""Programs that must start without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = {"torch", "transformers", "accelerate", "datasets"}
HEAVY = TORCH | {"scipy", "nltk", "rouge_score", "gguf", "submitit", "peft"}
"""Libraries that take long to import; plan and doctor have a second in all."""
UNUSED = {"numpy", "psutil", "filelock", "multiprocessing"}
"""Libraries that planning this recipe has no use for."""
QUICK = [
    ("from typer.testing import CliRunner; from tadistill.cli import app; run = CliRunner().invoke; run(app, ['--help'])", HEAVY),
    ("found = run(app, ['plan', 'recipes/quickstart.yaml']); assert found.exit_code == 0, found.output", HEAVY | UNUSED),
    ("found = run(app, ['doctor', 'recipes/quickstart.yaml']); assert 'fetched' in found.output, found.output", HEAVY),
    ("import tadistill, tadistill.config, tadistill.plan.arms, tadistill.store, tadistill.report, tadistill.statistics", TORCH),
    # the first work of every run, also of one whose stages are finished
    (
        "from tadistill.config import load; from tadistill.runner.run_study import fetch_models; from tadistill.terminal import Terminal; "
        "fetch_models(load('recipes/quickstart.yaml'), Terminal())",
        TORCH,
    ),
]
"""Code, and the libraries that neither it nor the code before it imports."""


@pytest.mark.slow
def test_no_torch(tmp_path):
    checked = [f"{code}; bad = {heavy} & set(sys.modules); assert not bad, bad" for code, heavy in QUICK]
    environment = os.environ | {"TADISTILL_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", "\n".join(["import sys", *checked])], check=True, cwd=ROOT, timeout=60, env=environment)
