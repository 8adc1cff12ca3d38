"""Programs that must start without torch, and recipes that must be read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = [
    "import tadistill, tadistill.config, tadistill.plan.arms, tadistill.store, tadistill.report, tadistill.statistics",
    "from typer.testing import CliRunner; from tadistill.cli import app; CliRunner().invoke(app, ['--help'])",
    "from typer.testing import CliRunner; from tadistill.cli import app; "
    "found = CliRunner().invoke(app, ['plan', 'recipes/quickstart.yaml']); assert found.exit_code == 0, found.output",
    "from typer.testing import CliRunner; from tadistill.cli import app; "
    "found = CliRunner().invoke(app, ['doctor', 'recipes/quickstart.yaml']); assert 'fetched' in found.output, found.output",
    # the first work of every run, also of one whose stages are finished
    "from tadistill.config import load; from tadistill.runner.study import fetch_models; from tadistill.terminal import Terminal; "
    "fetch_models(load('recipes/quickstart.yaml'), Terminal())",
]
UNUSED = {"numpy", "psutil", "filelock", "tokenizers", "multiprocessing"}
"""Libraries that planning this recipe has no use for."""
HEAVY = {"torch", "transformers", "accelerate", "datasets", "scipy", "nltk", "rouge_score", "gguf", "submitit", "peft"}
"""Libraries that take long to import; plan and doctor have a second in all."""


@pytest.mark.parametrize("code", QUICK)
def test_no_torch(code, tmp_path):
    heavy = HEAVY if "invoke" in code else {"torch", "transformers", "accelerate", "datasets"}
    heavy = heavy | UNUSED if "'plan'" in code else heavy
    check = f"; import sys; bad = {heavy} & set(sys.modules); assert not bad, bad"
    environment = os.environ | {"TADISTILL_RUNS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code + check], check=True, cwd=ROOT, timeout=60, env=environment)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_parses(path):
    from tadistill.config import load

    assert load(path).arms
