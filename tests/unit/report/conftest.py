"""The studies that the report's tests share; `builder` writes them."""

from pathlib import Path

import pytest

from .builder import SMALL, Study, StudySpec, build_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three arms (a chain and its equal-compute twin among them), two seeds, two sets."""
    return build_study(tmp_path, StudySpec(SMALL))


@pytest.fixture
def unfinished(tmp_path: Path) -> Study:
    """The same with one seed of an arm and one whole arm still to be evaluated."""
    missing = (("direct", 20), ("chain", 10), ("chain", 20))
    return build_study(tmp_path, StudySpec(SMALL, unfinished=missing))
