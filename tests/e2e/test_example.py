"""The example of an objective in a stock Trainer runs as it stands, offline, and trains."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "objective_in_hf_trainer.py"


def test_objective_in_hf_trainer(tmp_path):
    assert EXAMPLE.read_text().count("\n") <= 40
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "60"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.e-]+)", done.stdout)]
    assert len(losses) == 6  # one for every ten steps
    assert losses[-1] < 0.9 * losses[0]
