"""The ways to add one thing that CONTRIBUTING.md tells, each walked with a throw-away example in a copy of the package.

A walk edits as many files as CONTRIBUTING.md allows, and then uses the new thing. The same walk without its last edit must fail: a
forgotten place is an error, never a silent zero.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.architecture.walks import HARNESS, WALKS, Edit

ROOT = Path(__file__).parents[2]


def package(folder: Path, edits: tuple[Edit, ...]) -> Path:
    """Copy the package into a folder and edit it there; returns the folder to import from."""
    shutil.copytree(ROOT / "src" / "tadistill", folder / "tadistill", ignore=shutil.ignore_patterns("__pycache__"))
    for file, anchor, text in edits:
        path = folder / "tadistill" / file
        content = path.read_text(encoding="utf-8")
        assert content.count(anchor) == 1, f"{file} has no single `{anchor}`; write this walk anew"
        path.write_text(content.replace(anchor, text.replace("@", anchor)), encoding="utf-8")
    return folder


def use(code: str, folder: Path, edits: tuple[Edit, ...]) -> subprocess.CompletedProcess[str]:
    """Run code with these edits only."""
    environment = os.environ | {"PYTHONPATH": str(package(folder / "src", edits)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HARNESS + code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.mark.parametrize("name", WALKS)
def test_an_addition_touches_few_files_and_works(name, tmp_path):
    walk = WALKS[name]
    assert len({file for file, _, _ in walk.edits}) <= walk.most_files
    done = use(walk.use, tmp_path, walk.edits)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", WALKS)
def test_a_forgotten_place_fails(name, tmp_path):
    walk = WALKS[name]
    done = use(walk.use, tmp_path, walk.edits[:-1])
    assert done.returncode != 0
    assert walk.forgotten in done.stderr.splitlines()[-1]
