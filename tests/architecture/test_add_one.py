"""The ways to add one thing that CONTRIBUTING.md tells, each walked with a throw-away example in a copy of the package.

A walk edits as many files as CONTRIBUTING.md allows, and then uses the new thing. The same walk without its last edit must fail: a
forgotten place is an error, never a silent zero.
"""

import multiprocessing
import shutil
import sys
import traceback
from pathlib import Path

import pytest
from tests.architecture.walks import HARNESS, WALKS, Edit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def package(folder: Path, edits: tuple[Edit, ...]) -> Path:
    """Copy the package into a folder and edit it there; returns the folder to import from. Only edited files are compiled again."""
    shutil.copytree(ROOT / "src" / "tadistill", folder / "tadistill")
    for file, anchor, text in edits:
        path = folder / "tadistill" / file
        content = path.read_text(encoding="utf-8")
        assert content.count(anchor) == 1, f"{file} has no single `{anchor}`; write this walk anew"
        path.write_text(content.replace(anchor, text.replace("@", anchor)), encoding="utf-8")
    return folder


def use(code: str, folder: Path, edits: tuple[Edit, ...]) -> str:
    """Run code with these edits only, in a forked process that has no module of the package; return its traceback, "" if none."""
    from tadistill.runner import preload  # noqa: F401  torch and other libraries, which the forked process then need not import

    source, error = package(folder / "src", edits), folder / "error"

    def run() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "tadistill"]:
            del sys.modules[name]
        sys.path.insert(0, str(source))
        sys.argv[1:] = [str(folder)]
        try:
            exec(HARNESS + code, {"__name__": "__main__"})
            import tadistill

            assert Path(tadistill.__file__).is_relative_to(source)
            error.write_text("", encoding="utf-8")
        except BaseException:
            error.write_text(traceback.format_exc(), encoding="utf-8")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    return error.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", WALKS)
def test_an_addition_touches_few_files_and_works(name, tmp_path):
    walk = WALKS[name]
    assert len({file for file, _, _ in walk.edits}) <= walk.most_files
    error = use(walk.use, tmp_path, walk.edits)
    assert not error, error


@pytest.mark.parametrize("name", WALKS)
def test_a_forgotten_place_fails(name, tmp_path):
    walk = WALKS[name]
    error = use(walk.use, tmp_path, walk.edits[:-1])
    assert error
    assert walk.forgotten in error.splitlines()[-1]
